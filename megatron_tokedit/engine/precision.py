"""Precision recipes by name: the one place that says which megatron-core fields a recipe sets.

==========  ==============================================================================================
``fp32``    parameters, activations and gradients in float32
``bf16``    parameters and activations in bfloat16; float32 main parameters, gradient accumulation and
            optimizer state (megatron-core's mixed-precision optimizers); loss in float32
==========  ==============================================================================================

Invariant: a recipe that the machine cannot honour is refused, never replaced by another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_tokedit.config.sections import PrecisionConfig


@dataclass(frozen=True, slots=True)
class PrecisionFields:
    """Fields of a recipe, by the megatron-core dataclass they belong to."""

    transformer: dict[str, Any] = field(default_factory=dict)
    """``TransformerConfig``."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """``OptimizerConfig``."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """``DistributedDataParallelConfig``."""


_RECIPES = {
    "fp32": PrecisionFields(
        transformer={"params_dtype": torch.float32, "pipeline_dtype": torch.float32},
        optimizer={"params_dtype": torch.float32},
        ddp={"grad_reduce_in_fp32": True},
    ),
    "bf16": PrecisionFields(
        transformer={"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16},
        optimizer={"bf16": True, "params_dtype": torch.bfloat16},
        ddp={"grad_reduce_in_fp32": True},
    ),
}


def resolve(precision: PrecisionConfig, device: torch.device) -> PrecisionFields:
    """Map a recipe to megatron-core's fields for ``device``."""
    return _RECIPES[precision.recipe]
