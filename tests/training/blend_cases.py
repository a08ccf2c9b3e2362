"""What ranks do with blends; importable by the rank pool."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from training_cases import SPEC

from megatron_tokedit.config.sections import DataConfig, SourceConfig
from megatron_tokedit.dataset.blend import Datasets, build_datasets
from megatron_tokedit.dataset.rank_zero import from_rank_zero
from megatron_tokedit.dataset.sources import inspect_sources

SEQ_LENGTH = 16
SEED = 11


def data_config(folder: Path, names: dict[str, float], **fields: Any) -> DataConfig:
    sources = [
        SourceConfig(name=name, prefix=f"{folder}/{name}", weight=weight) for name, weight in names.items()
    ]
    return DataConfig(train=sources, validation=[sources[0]], **fields)


def build(data: DataConfig, folder: Path, num_samples: int, **more: Any) -> Datasets:
    """Datasets with the test's settings; ``more`` goes to ``build_datasets``."""
    infos = inspect_sources(data, tokenizer_spec=SPEC, seq_length=more.get("seq_length", SEQ_LENGTH))
    settings = {"seed": SEED, "seq_length": SEQ_LENGTH, "cache_dir": folder / "cache", **more}
    return build_datasets(data, infos, num_train_samples=num_samples, tokenizer_spec=SPEC, **settings)


def samples(
    folder: Path, names: dict[str, float], num_samples: int, fields: dict[str, Any]
) -> dict[str, Any]:
    """The first ``num_samples`` training samples, the validation rows, and the cache's files and times."""
    datasets = build(data_config(folder, names, **fields), folder, num_samples)
    files = {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.npy")
    }
    validation = datasets.validation[next(iter(names))]
    return {
        "tokens": [datasets.train[index]["tokens"].tolist() for index in range(num_samples)],
        "first": {
            key: value.tolist() for key, value in datasets.train[0].items() if hasattr(value, "tolist")
        },
        "validation_tokens": sum(
            int(validation[index]["loss_mask"].sum()) for index in range(len(validation))
        ),
        "files": files,
        "leftovers": [path.name for path in (folder / "cache").iterdir() if path.name.startswith(".")],
    }


def alone(folder: Path, names: dict[str, float], num_samples: int) -> list[list[int]]:
    """The training samples' tokens, built without ranks."""
    train = build(data_config(folder, names), folder, num_samples).train
    return [train[index]["tokens"].tolist() for index in range(num_samples)]


def megatron_samples(folder: Path, names: dict[str, float], num_samples: int) -> list[list[int]]:
    """The same, by megatron-core's own builder."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from megatron_tokedit.dataset.blend import _DatasetTokenizer

    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ_LENGTH,
        blend_per_split=[([f"{folder}/{name}" for name in names], list(names.values())), None, None],
        tokenizer=_DatasetTokenizer(SPEC["vocab_size"], SPEC["eod"], SPEC["fingerprint"]),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(folder / "megatron_cache"),
    )
    train = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config).build()[0]
    return [train[index]["tokens"].tolist() for index in range(num_samples)]


def bug_on_rank_zero() -> str:
    """What this rank raised."""
    try:
        from_rank_zero(lambda: 1 // 0)
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return f"{type(error).__name__}: {error}"
    return "nothing"


def build_without_permission(folder: Path, names: dict[str, float]) -> str:
    """Rank 0 cannot write the cache; returns what this rank raised."""
    (folder / "cache").write_text("a file where the folder should be") if dist.get_rank() == 0 else None
    dist.barrier()
    try:
        build(data_config(folder, names), folder, 8)
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return f"{os.getpid()} {type(error).__name__}: {error}"
    return "nothing"


def build_in_folders_of_their_own(folder: Path, names: dict[str, float]) -> str:
    """Every rank has a cache that the others do not see; returns what this rank raised."""
    try:
        build(data_config(folder, names), folder, 8, cache_dir=folder / f"cache{dist.get_rank()}")
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return f"{type(error).__name__}: {error}"
    return "nothing"
