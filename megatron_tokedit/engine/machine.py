"""What the machine offers: GPU, CUDA, Transformer Engine, flash-attn and what is left of apex.

Invariant: nothing but :func:`megatron_fault` imports megatron, nothing raises, and whatever a package raises
becomes one plain sentence.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any

import torch

from megatron_tokedit.config.gpus import gpu_named

INSTALL_TRANSFORMER_ENGINE = "pip install --no-build-isolation -e '.[fp8]'"


@dataclass(frozen=True, slots=True)
class Probe:
    """What the machine offers.

    Attributes:
        has_cuda: a CUDA device is usable.
        transformer_engine: version of a working Transformer Engine, else None.
        fused_wgrad: NVIDIA apex's ``fused_weight_gradient_mlp_cuda`` extension is installed (the one thing
            of apex that is still used).
        faults: what is installed but broken, one sentence each.
        gpu_name: of the first CUDA device.
        compute_capability: the smallest among the CUDA devices.
        num_gpus: CUDA devices that this process sees.
        cuda_version: that torch was built for; None for a build without CUDA.
        flash_attn: version of a working flash-attn, else None; Transformer Engine can use it.
        is_assumed: not this machine, but one that was described (:func:`assumed`).
    """

    has_cuda: bool
    transformer_engine: str | None
    fused_wgrad: bool
    faults: tuple[str, ...]
    gpu_name: str | None = None
    compute_capability: tuple[int, int] | None = None
    num_gpus: int = 0
    cuda_version: str | None = None
    flash_attn: str | None = None
    is_assumed: bool = False


def _installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _is_findable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # noqa: BLE001 - importing the parent package may raise anything
        return False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _probe_transformer_engine() -> tuple[str | None, str | None]:
    """Version and fault of Transformer Engine; both None where it is not installed."""
    if not _is_findable("transformer_engine"):
        return None, None
    try:
        module = importlib.import_module("transformer_engine")
        for name in (
            "pytorch",
            "pytorch.distributed",
            "pytorch.tensor",
        ):  # what megatron-core takes
            importlib.import_module(f"transformer_engine.{name}")
    except Exception as error:  # noqa: BLE001 - a half-installed package raises anything
        return None, (
            f"transformer_engine is installed but cannot be imported ({_first_line(error)}); reinstall it to "
            f"match torch {torch.__version__} ({INSTALL_TRANSFORMER_ENGINE}) or remove it (pip uninstall "
            f"transformer-engine transformer-engine-torch)"
        )
    return str(getattr(module, "__version__", "unknown")), None


def _probe_flash_attn() -> tuple[str | None, str | None]:
    """Version and fault of flash-attn. One that raises ``ImportError`` is as good as none to its users."""
    if not _is_findable("flash_attn"):
        return None, None
    try:
        module = importlib.import_module("flash_attn")
    except ImportError:
        return None, None
    except Exception as error:  # noqa: BLE001 - a half-installed package raises anything
        return None, (
            f"flash_attn is installed but cannot be imported ({_first_line(error)}), which megatron-core "
            f"does not survive; reinstall it or remove it (pip uninstall flash-attn)"
        )
    return str(getattr(module, "__version__", _installed_version("flash-attn"))), None


def _probe_apex() -> str | None:
    """Fault of an importable package named apex that lacks NVIDIA's fused layer norm, else None."""
    if not _is_findable("apex"):
        return None
    if _is_findable("apex.normalization") and _is_findable("fused_layer_norm_cuda"):
        return None
    return (
        "a package named 'apex' is installed that is not NVIDIA's apex with its CUDA extensions (the one on "
        "PyPI is an unrelated project); megatron-core would use it and fail: pip uninstall apex"
    )


def _probe_cuda() -> dict[str, Any]:
    """The fields of a probe that describe the CUDA devices."""
    fields: dict[str, Any] = {"has_cuda": False, "cuda_version": torch.version.cuda}
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count:
            fields |= {
                "has_cuda": True,
                "num_gpus": count,
                "gpu_name": torch.cuda.get_device_name(0),
                "compute_capability": min(torch.cuda.get_device_capability(i) for i in range(count)),
            }
    except Exception as error:  # noqa: BLE001 - a driver that does not fit raises anything
        fields["fault"] = (
            f"torch {torch.__version__} sees a CUDA device but cannot use it ({_first_line(error)}); update "
            f"the driver, or hide the device by setting CUDA_VISIBLE_DEVICES='' in the environment"
        )
    return fields


@lru_cache(maxsize=1)
def probe() -> Probe:
    """Probe once per process; never raises."""
    cuda = _probe_cuda()
    engine_version, engine_fault = _probe_transformer_engine()
    flash_version, flash_fault = _probe_flash_attn()
    faults = (cuda.pop("fault", None), engine_fault, flash_fault, _probe_apex())
    return Probe(
        transformer_engine=engine_version,
        fused_wgrad=_is_findable("fused_weight_gradient_mlp_cuda"),
        faults=tuple(fault for fault in faults if fault),
        flash_attn=flash_version,
        **cuda,
    )


def assumed(gpu: str) -> Probe:
    """A machine with a GPU of ``config.gpus`` and what the extra ``fp8`` installs, to check a run for it."""
    known = gpu_named(gpu)
    assert known is not None, gpu
    return Probe(
        has_cuda=True,
        transformer_engine="2.11.0",
        fused_wgrad=False,
        faults=(),
        gpu_name=f"NVIDIA {known.name}",
        compute_capability=known.compute_capability,
        num_gpus=1,
        cuda_version="13.0",
        is_assumed=True,
    )


def megatron_fault() -> str | None:
    """Why megatron-core cannot be imported, None where it can; imports it."""
    try:
        importlib.import_module("megatron.core.models.gpt")
    except Exception as error:  # noqa: BLE001 - optional packages that it finds may raise anything
        return (
            f"megatron-core {_installed_version('megatron-core')} cannot be imported ({_first_line(error)}); "
            f"pip install 'megatron-core>=0.16.1,<0.17', and remove what the message names"
        )
    return None


def numbers(version: str) -> tuple[int, int]:
    """(2, 11) of ``2.11.0+abc``; (0, 0) of what is no version."""
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def dotted(version: tuple[int, int]) -> str:
    """2.11 of (2, 11)."""
    return f"{version[0]}.{version[1]}"


def describe(found: Probe) -> str:
    """A machine in one line."""
    if not found.has_cuda:
        return f"no CUDA device; torch {torch.__version__}"
    engine = (
        f"Transformer Engine {found.transformer_engine}"
        if found.transformer_engine
        else "no Transformer Engine"
    )
    line = (
        f"{found.gpu_name} (compute capability {dotted(found.compute_capability or (0, 0))}), CUDA "
        f"{found.cuda_version}, {engine}"
    )
    return f"assumed, not this machine: {line}" if found.is_assumed else f"{found.num_gpus} x {line}"
