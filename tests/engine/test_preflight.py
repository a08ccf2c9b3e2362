from __future__ import annotations

import sys

import pytest
import torch

from megatron_tokedit.engine import preflight
from megatron_tokedit.errors import ConfigError


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder on the path to put broken packages into; the probe forgets what it saw before and after."""
    monkeypatch.syspath_prepend(str(tmp_path))
    preflight.probe.cache_clear()
    yield tmp_path
    preflight.probe.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in ("transformer_engine", "apex")]:
        del sys.modules[name]


def write_package(folder, name, source):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)


@pytest.mark.parametrize(
    "error", ["RuntimeError('no libcudart')", "FileNotFoundError('libtransformer_engine.so')"]
)
def test_half_installed_transformer_engine(packages, error):
    write_package(packages, "transformer_engine", f"raise {error}")
    with pytest.raises(
        ConfigError, match=r"transformer_engine is installed but cannot be imported .*reinstall"
    ):
        preflight.check()


def test_unrelated_apex(packages):
    write_package(packages, "apex", "")
    with pytest.raises(ConfigError, match="pip uninstall apex"):
        preflight.check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device_is_chosen_with_a_reason():
    assert preflight.resolve_device("auto") == ("cpu", "no CUDA device was found")
    assert preflight.resolve_device("cpu")[0] == "cpu"
    with pytest.raises(ConfigError, match=r"runtime\.device: 'cuda' was asked for"):
        preflight.resolve_device("cuda")
