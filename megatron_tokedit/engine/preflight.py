"""Says before ``megatron.core`` is imported what the machine cannot do of what is asked.

megatron-core guards its optional imports against ``ImportError`` only, so a half-installed Transformer Engine
makes ``import megatron.core`` die with an unrelated traceback, and any importable ``apex`` makes it believe
in kernels that are not there; and without Transformer Engine it trains an FP8 recipe without FP8 and without
a word. Invariant: nothing here imports megatron, and a setting that the machine cannot honour is a fault,
never replaced by another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megatron_tokedit.config.faults import Fault, raise_faults
from megatron_tokedit.config.recipes import RECIPES
from megatron_tokedit.config.sections import ParallelConfig, PrecisionConfig
from megatron_tokedit.engine.machine import (
    INSTALL_TRANSFORMER_ENGINE,
    Probe,
    assumed,
    describe,
    dotted,
    numbers,
    probe,
)
from megatron_tokedit.errors import ConfigError

__all__ = [
    "Probe",
    "assumed",
    "check",
    "describe",
    "engine_fault",
    "machine_faults",
    "probe",
    "refuse_faults",
    "resolve_device",
    "section_faults",
    "setting_faults",
]

OLDEST_TRANSFORMER_ENGINE, FIRST_UNKNOWN_TRANSFORMER_ENGINE = (2, 9), (2, 12)
"""megatron-core 0.16 takes the versions in between."""
OLDEST_BF16_CAPABILITY = (8, 0)
FIRST_CUDNN_PACKED_CAPABILITY = (9, 0)
_NO_CUDA = "'cuda' was asked for, but torch finds no CUDA device; use 'auto' or 'cpu'"


def check() -> Probe:
    """Probe, and refuse to go on with a broken optional package.

    Raises:
        ConfigError: lists every package that would make ``import megatron.core`` fail.
    """
    found = probe()
    if found.faults:
        raise ConfigError("\n".join(found.faults))
    return found


def _gpu(found: Probe) -> str:
    """The GPU in words."""
    return f"the {found.gpu_name} has {dotted(found.compute_capability or (0, 0))}"


def engine_fault(found: Probe) -> str | None:
    """What keeps Transformer Engine from being used on this machine's GPU."""
    version = found.transformer_engine
    if version is None:
        broken = any("transformer_engine" in fault for fault in found.faults)
        return (
            "its installation is broken (see above)"
            if broken
            else f"it is not installed ({INSTALL_TRANSFORMER_ENGINE})"
        )
    if not OLDEST_TRANSFORMER_ENGINE <= numbers(version) < FIRST_UNKNOWN_TRANSFORMER_ENGINE:
        return (
            f"version {version} is installed, and megatron-core 0.16 takes "
            f"{dotted(OLDEST_TRANSFORMER_ENGINE)} up to, not including, "
            f"{dotted(FIRST_UNKNOWN_TRANSFORMER_ENGINE)} ({INSTALL_TRANSFORMER_ENGINE})"
        )
    return None


def _recipe_faults(precision: PrecisionConfig, found: Probe) -> Iterator[Fault]:
    path, traits = ("precision", "recipe"), precision.traits
    capability = found.compute_capability
    if not found.has_cuda:
        if precision.is_fp8:
            yield Fault(
                path,
                f"{precision.recipe} needs a GPU of compute capability "
                f"{dotted(traits.min_capability or (0, 0))}, and this machine has no CUDA device; use "
                f"bf16, or run it where there is one",
            )
        return
    if precision.compute_dtype == "bf16" and capability and capability < OLDEST_BF16_CAPABILITY:
        yield Fault(
            path,
            f"{precision.recipe} needs compute capability {dotted(OLDEST_BF16_CAPABILITY)} for bfloat16, "
            f"and {_gpu(found)}; use fp32",
        )
    elif traits.min_capability and capability and capability < traits.min_capability:
        yield Fault(
            path,
            f"{precision.recipe} needs compute capability {dotted(traits.min_capability)}, and "
            f"{_gpu(found)}; use {_fitting_recipes(found)}",
        )
    if traits.max_capability and capability and capability >= traits.max_capability:
        yield Fault(
            path,
            f"{precision.recipe} has no kernels for compute capability {dotted(traits.max_capability)} or "
            f"later, and {_gpu(found)}; use {_fitting_recipes(found)}",
        )
    if traits.min_cuda and numbers(found.cuda_version or "") < traits.min_cuda:
        yield Fault(
            path,
            f"{precision.recipe} needs CUDA {dotted(traits.min_cuda)}, and torch {torch.__version__} is "
            f"built for {found.cuda_version}; install a torch for a later CUDA, or use another recipe",
        )
    if precision.is_fp8 and (fault := engine_fault(found)):
        yield Fault(path, f"{precision.recipe} needs Transformer Engine's layers: {fault}")


def _fitting_recipes(found: Probe) -> str:
    """Names of the recipes that the GPU and CUDA take."""
    capability, cuda = found.compute_capability or (0, 0), numbers(found.cuda_version or "")
    fitting = [
        recipe.name
        for recipe in RECIPES.values()
        if capability >= (recipe.min_capability or OLDEST_BF16_CAPABILITY)
        and (recipe.max_capability is None or capability < recipe.max_capability)
        and cuda >= (recipe.min_cuda or (0, 0))
        and recipe.compute_dtype == "bf16"
    ]
    return " or ".join(fitting) or "fp32"


def _kernel_faults(precision: PrecisionConfig, parallel: ParallelConfig, found: Probe) -> Iterator[Fault]:
    """Settings beside the recipe that need a GPU or Transformer Engine."""
    graphs = precision.cuda_graph_impl
    wishes = (
        (("precision", "cross_entropy_loss_fusion"), precision.cross_entropy_loss_fusion, False),
        (("precision", "cross_entropy_fusion_impl"), precision.cross_entropy_fusion_impl == "te", True),
        (("precision", "cuda_graph_impl"), graphs != "none", graphs == "transformer_engine"),
        (("parallel", "tp_comm_overlap"), parallel.tp_comm_overlap, True),
        (("parallel", "context_parallel_size"), parallel.context_parallel_size > 1, True),
    )
    for (section, field), wanted, needs_engine in wishes:
        if not wanted:
            continue
        value = getattr(precision if section == "precision" else parallel, field)
        shown = str(value).lower() if isinstance(value, bool) else value
        if not found.has_cuda:
            yield Fault(
                (section, field), f"{shown} needs a GPU, and this machine has no CUDA device; remove it"
            )
        elif needs_engine and (fault := engine_fault(found)):
            yield Fault((section, field), f"{shown} needs Transformer Engine: {fault}")


def setting_faults(precision: PrecisionConfig, found: Probe, parallel: ParallelConfig) -> list[Fault]:
    """Every setting that the machine cannot honour; what is broken there comes first.

    Args:
        precision: the recipe and what goes with it.
        found: from :func:`probe` or :func:`assumed`.
        parallel: the layout.
    """
    faults = [Fault((), fault) for fault in found.faults]
    faults += _recipe_faults(precision, found)
    faults += _kernel_faults(precision, parallel, found)
    present = found.has_cuda and found.transformer_engine is not None
    if present and not precision.is_fp8 and (fault := engine_fault(found)):
        faults.append(Fault((), f"Transformer Engine would be used on the GPU, but {fault}"))
    return faults


def machine_faults(precision: PrecisionConfig, found: Probe, parallel: ParallelConfig) -> list[str]:
    """:func:`setting_faults` as sentences that name section and field."""
    return [str(fault) for fault in setting_faults(precision, found, parallel)]


def section_faults(sections: Mapping[str, Any], found: Probe) -> list[Fault]:
    """:func:`setting_faults` of a run's sections, as far as they are sound."""
    precision, parallel = sections.get("precision"), sections.get("parallel")
    device = getattr(sections.get("runtime"), "device", "auto")
    if precision is None or parallel is None or device == "cpu":  # checked against cpu without a machine
        return [Fault((), fault) for fault in found.faults]
    faults = setting_faults(precision, found, parallel)
    faults += _packing_faults(sections, precision, found)
    if device == "cuda" and not found.has_cuda:
        faults.append(Fault(("runtime", "device"), _NO_CUDA))
    return faults


def _packing_faults(sections: Mapping[str, Any], precision: PrecisionConfig, found: Probe) -> Iterator[Fault]:
    """What Transformer Engine's attention over packed rows needs: its slow path, which takes float32 and any
    GPU, does not take them, and cuDNN's takes them from Hopper on.
    """
    packs = sections.get("stage") == "sft" and getattr(sections.get("sft"), "packing", False)
    if not packs or not found.has_cuda or found.transformer_engine is None:
        return
    capability = found.compute_capability
    is_old = capability is not None and capability < FIRST_CUDNN_PACKED_CAPABILITY
    if is_old and found.flash_attn is None and not found.is_assumed:
        yield Fault(
            ("sft", "packing"),
            f"true needs the package flash-attn on a GPU before compute capability "
            f"{dotted(FIRST_CUDNN_PACKED_CAPABILITY)}, and {_gpu(found)}; install it, or set it to false",
        )
    if precision.compute_dtype != "bf16":
        yield Fault(
            ("precision", "recipe"),
            f"{precision.recipe}: on a GPU, packed rows of conversations need an attention in bfloat16; use "
            f"bf16, or set sft.packing: false",
        )


def refuse_faults(precision: PrecisionConfig, parallel: ParallelConfig) -> None:
    """Stop before a model is built that this machine cannot run as it is meant.

    Raises:
        ConfigError: one message with every fault.
    """
    raise_faults(setting_faults(precision, probe(), parallel), "this machine")


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
        raise ConfigError(f"runtime.device: {_NO_CUDA}")
    if device == "cpu" and has_cuda:
        raise ConfigError(
            "runtime.device: 'cpu' was asked for on a machine with a CUDA device; hide it by setting "
            "CUDA_VISIBLE_DEVICES='' in the environment"
        )
    return device, "asked for"
