"""Precision recipes by name: the one place that says which megatron-core fields a recipe sets.

==================  ======================================================================================
``fp32``            parameters, activations and gradients in float32
``bf16``            ``bf16``: parameters and activations in bfloat16; float32 main parameters, gradient
                    accumulation and optimizer state; loss in float32
``fp8_tensorwise``  as bf16, and ``fp8="hybrid"``, ``fp8_recipe="tensorwise"``; under the distributed
                    optimizer ``fp8_param`` and ``fp8_param_gather`` (weights kept and gathered in FP8)
``fp8_delayed``     as bf16, and ``fp8="hybrid"``, ``fp8_recipe="delayed"``, ``fp8_amax_history_len=1024``,
                    ``fp8_amax_compute_algo="max"``
``fp8_blockwise``   as bf16, and ``fp8="e4m3"``, ``fp8_recipe="blockwise"``
``mxfp8``           as bf16, and ``fp8="e4m3"``, ``fp8_recipe="mxfp8"``
==================  ======================================================================================

All but fp32 have ``grad_reduce_in_fp32``. ``num_layers_at_start_in_bf16`` and ``num_layers_at_end_in_bf16``
set ``first_last_layers_bf16``. What a recipe needs is in ``config/recipes.py``; whether the machine has it,
``engine/preflight.py`` says.

Invariant: a recipe that the machine cannot honour is refused, never replaced by another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_tokedit.config.recipes import RECIPES, Recipe
from megatron_tokedit.config.sections import ParallelConfig, PrecisionConfig
from megatron_tokedit.engine import preflight
from megatron_tokedit.errors import ConfigError

__all__ = ["RECIPES", "PrecisionFields", "Recipe", "check_model", "resolve"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class PrecisionFields:
    """Fields of a recipe, by the megatron-core dataclass they belong to."""

    transformer: dict[str, Any] = field(default_factory=dict)
    """``TransformerConfig``."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """``OptimizerConfig``."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """``DistributedDataParallelConfig``."""


def resolve(precision: PrecisionConfig, device: torch.device, parallel: ParallelConfig) -> PrecisionFields:
    """Map a recipe to megatron-core's fields for ``device`` and a layout.

    Whether the machine has what they need is not asked here, but by ``preflight.refuse_faults``.
    """
    dtype = _DTYPES[precision.compute_dtype]
    transformer: dict[str, Any] = {"params_dtype": dtype, "pipeline_dtype": dtype}
    optimizer: dict[str, Any] = {"params_dtype": dtype}
    ddp: dict[str, Any] = {"grad_reduce_in_fp32": True}
    if precision.compute_dtype == "bf16":
        transformer["bf16"] = optimizer["bf16"] = True
    if precision.is_fp8:
        keeps = precision.keeps_fp8_parameters(parallel)
        transformer |= {**_fp8_fields(precision.resolved(parallel)), "fp8_param": keeps}
        optimizer["fp8_recipe"] = precision.traits.fp8_recipe
        ddp["fp8_param_gather"] = keeps
    return PrecisionFields({**transformer, **_kernel_fields(precision, device)}, optimizer, ddp)


def _fp8_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of ``TransformerConfig`` that say what is in FP8, and how it is scaled."""
    traits = precision.traits
    fields: dict[str, Any] = {"fp8": traits.fp8, "fp8_recipe": traits.fp8_recipe}
    first, last = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    if first or last:
        fields |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": first,
            "num_layers_at_end_in_bf16": last,
        }
    if traits.has_amax_history:
        fields |= {
            "fp8_amax_history_len": precision.fp8_amax_history_len,
            "fp8_amax_compute_algo": precision.fp8_amax_compute_algo,
        }
    return fields


def _kernel_fields(precision: PrecisionConfig, device: torch.device) -> dict[str, Any]:
    """Fused loss and CUDA graphs; none of it exists on a CPU, whose loss has kernels of its own."""
    if device.type != "cuda":
        return {}
    fields: dict[str, Any] = {}
    has_engine = preflight.probe().transformer_engine is not None
    fused = has_engine if precision.cross_entropy_loss_fusion is None else precision.cross_entropy_loss_fusion
    if fused:
        default = "te" if has_engine else "native"
        fields["cross_entropy_loss_fusion"] = True
        fields["cross_entropy_fusion_impl"] = precision.cross_entropy_fusion_impl or default
    if precision.cuda_graph_impl != "none":
        fields["cuda_graph_impl"] = precision.cuda_graph_impl
        fields["cuda_graph_scope"] = list(precision.cuda_graph_scope or [])
    return fields


def check_model(precision: PrecisionConfig, config: Any, modules: list[Any]) -> None:
    """Refuse a model that would not compute in FP8 although its recipe says so.

    megatron-core turns FP8 off without a word where a layer is not Transformer Engine's. Counts the linear
    layers that would quantize, and asks megatron-core for the context it would run them in.

    Args:
        precision: the recipe.
        config: megatron-core's ``TransformerConfig`` of the model.
        modules: this rank's chunks of layers.

    Raises:
        ConfigError: no FP8 context, or linear layers of a transformer layer that do not know FP8.
    """
    if not precision.is_fp8:
        return
    from megatron.core import fp8_utils

    faults = []
    plain = [
        f"{name} ({type(layer).__name__})"
        for module in modules
        for name, layer in module.named_modules()
        if name.rpartition(".")[2].startswith("linear_") and not hasattr(layer, "fp8_meta")
    ]
    if plain:
        faults.append(f"{len(plain)} linear layers do not know FP8, such as {plain[0]}")
    if not _fp8_context_is_active(config, layer=precision.num_layers_at_start_in_bf16):
        faults.append("megatron-core runs its layers outside of an FP8 context")
    parameters = [parameter for module in modules for parameter in module.parameters()]
    keeps = config.fp8_param and _has_fp8_layers(config, modules)
    if keeps and not any(map(fp8_utils.is_float8tensor, parameters)):
        faults.append("none of its parameters is kept in FP8")
    if faults:
        raise ConfigError(
            f"precision.recipe: {precision.recipe} was asked for, but the model that was built would not "
            f"compute so: {'; '.join(faults)}; tools/doctor.py says what this machine has"
        )


def _has_fp8_layers(config: Any, modules: list[Any]) -> bool:
    """Whether not all layers of this rank stay in bfloat16, as they may at either end of a pipeline."""
    from megatron.core import fp8_utils

    layers = [layer for module in modules for layer in module.modules() if hasattr(layer, "self_attention")]
    return not all(fp8_utils.is_first_last_bf16_layer(config, layer.layer_number - 1) for layer in layers)


def _fp8_context_is_active(config: Any, layer: int) -> bool:
    """Whether Transformer Engine quantizes inside the context that megatron-core gives layer ``layer``."""
    from megatron.core import fp8_utils

    if fp8_utils.get_fp8_recipe(config) is None:
        return False
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    with fp8_utils.get_fp8_context(config, layer):
        return bool(FP8GlobalStateManager.is_fp8_enabled())
