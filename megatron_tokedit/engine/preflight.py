"""Looks at the machine before ``megatron.core`` is imported.

megatron-core guards its optional imports against ``ImportError`` only, so a half-installed Transformer Engine
makes ``import megatron.core`` die with an unrelated traceback, and any importable ``apex`` makes it believe
in kernels that are not there. Invariant: nothing here imports megatron, and whatever an optional package
raises becomes one plain sentence.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache

import torch

from megatron_tokedit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Probe:
    """What the machine offers.

    Attributes:
        has_cuda: a CUDA device is usable.
        transformer_engine: version of a working Transformer Engine, else None.
        fused_wgrad: NVIDIA apex's ``fused_weight_gradient_mlp_cuda`` extension is installed (the one thing
            of apex that is still used).
        faults: what is installed but broken, one sentence each.
    """

    has_cuda: bool
    transformer_engine: str | None
    fused_wgrad: bool
    faults: tuple[str, ...]


def _probe_transformer_engine() -> tuple[str | None, str | None]:
    """Version and fault of Transformer Engine; both None where it is not installed."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None, None
    try:
        module = importlib.import_module("transformer_engine")
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # noqa: BLE001 - a half-installed package raises anything
        reason = str(error).strip().splitlines()
        return None, (
            f"transformer_engine is installed but cannot be imported "
            f"({type(error).__name__}: {reason[0] if reason else 'no message'}); reinstall it to match torch "
            f"{torch.__version__} or remove it (pip uninstall transformer-engine transformer-engine-torch)"
        )
    return str(getattr(module, "__version__", "unknown")), None


def _probe_apex() -> str | None:
    """Fault of an importable package named apex that lacks NVIDIA's fused layer norm, else None."""
    if importlib.util.find_spec("apex") is None:
        return None
    try:
        found = importlib.util.find_spec("apex.normalization") is not None
    except Exception:  # noqa: BLE001 - importing the parent package may raise anything
        found = False
    if found and importlib.util.find_spec("fused_layer_norm_cuda") is not None:
        return None
    return (
        "a package named 'apex' is installed that is not NVIDIA's apex with its CUDA extensions (the one on "
        "PyPI is an unrelated project); megatron-core would use it and fail: pip uninstall apex"
    )


@lru_cache(maxsize=1)
def probe() -> Probe:
    """Probe once per process; never raises."""
    version, te_fault = _probe_transformer_engine()
    faults = tuple(fault for fault in (te_fault, _probe_apex()) if fault)
    fused_wgrad = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return Probe(torch.cuda.is_available(), version, fused_wgrad, faults)


def check() -> Probe:
    """Probe, and refuse to go on with a broken optional package.

    Raises:
        ConfigError: lists every package that would make ``import megatron.core`` fail.
    """
    found = probe()
    if found.faults:
        raise ConfigError("\n".join(found.faults))
    return found


def resolve_device(device: str) -> tuple[str, str]:
    """Choose the device type.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        (``cpu`` or ``cuda``, the reason in words).

    Raises:
        ConfigError: ``cuda`` without a CUDA device, or ``cpu`` on a machine that shows one (megatron-core
            takes whatever CUDA device it sees, so the device has to be hidden).
    """
    has_cuda = torch.cuda.is_available()
    if device == "auto":
        return ("cuda", "a CUDA device is available") if has_cuda else ("cpu", "no CUDA device was found")
    if device == "cuda" and not has_cuda:
        raise ConfigError(
            "runtime.device: 'cuda' was asked for, but torch finds no CUDA device; use 'auto' or 'cpu'"
        )
    if device == "cpu" and has_cuda:
        raise ConfigError(
            "runtime.device: 'cpu' was asked for on a machine with a CUDA device; hide it by setting "
            "CUDA_VISIBLE_DEVICES='' in the environment"
        )
    return device, "asked for"
