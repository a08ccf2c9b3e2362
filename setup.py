"""Packaging metadata; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "megatron_tokedit/__init__.py").read_text()).group(1)

setup(
    name="megatron_tokedit",
    version=VERSION,
    description="Megatron-style training of large language models on token-edited corpora",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["megatron_tokedit", "megatron_tokedit.*"]),
    package_data={"megatron_tokedit": ["py.typed", "tokenizers/chat_templates/*.jinja"]},
    install_requires=[
        "torch>=2.6,<2.14",
        "megatron-core>=0.16.1,<0.17",
        "psutil>=5.9,<8",  # megatron-core's checkpoint writer needs it and does not say so
        "numpy>=1.26,<3",
        "sentencepiece>=0.2,<0.3",
        "protobuf>=5,<8",  # reads the piece types of sentencepiece models
        "transformers>=5.0,<6",
        "tokenizers>=0.21,<1",
        "safetensors>=0.5,<1",
        "pydantic>=2.11,<3",
        "PyYAML>=6,<7",
        "orjson>=3.10,<4",
        "zstandard>=0.23,<1",
        "pyarrow>=17,<27",
        "tqdm>=4.66,<5",
        "tensorboard>=2.17,<3",
        "matplotlib>=3.9,<4",
    ],
    extras_require={
        "dev": [
            "pytest>=8,<10",
            "pytest-timeout>=2.3,<3",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "ruff>=0.9,<1",
            "mypy>=1.13,<3",
            "types-PyYAML>=6,<7",
            "pre-commit>=4,<5",
            "gigatoken>=0.10,<1",  # the extra `fast`, so that its tests run
            "lm-eval>=0.4.13,<0.5",  # the extra `eval`, likewise
            "accelerate>=1,<2",
            "sentence-transformers>=6,<7",  # the extra `embedding`, likewise
        ],
        # needs an NVIDIA GPU and CUDA 13: pip install --no-build-isolation -e ".[fp8]"; never without a GPU
        "fp8": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12"],
        # accelerate: lm-eval's own model `hf`, which --backend lm-eval compares with, imports it
        "eval": ["lm-eval>=0.4.13,<0.5", "accelerate>=1,<2"],
        "embedding": ["sentence-transformers>=6,<7"],  # analyze_corpus.py --embedding-model
        "fast": ["gigatoken>=0.10,<1"],
        "wandb": ["wandb>=0.17,<1"],
        "mlflow": ["mlflow>=2.14,<4"],
    },
)
