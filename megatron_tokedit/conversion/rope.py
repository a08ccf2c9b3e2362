"""Scaling of rotary positions: which of the published variants this package computes.

Invariant: a variant that it would compute otherwise is a fault, never a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_tokedit.config.model import ModelConfig

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What megatron-core computes with ``rope_scaling``."""
_DEFAULT_BASE = 10000.0
_LLAMA3_FACTOR = 8.0


def read_rope(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fields of the model section for ``rope_parameters`` of a ``config.json``, and faults."""
    kind = str(parameters.get("rope_type", "default"))
    base = float(parameters.get("rope_theta") or _DEFAULT_BASE)
    faults = []
    if not base.is_integer():
        faults.append(f"rope_theta: {base}, expected a whole number")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        faults.append(
            f"partial_rotary_factor: {parameters['partial_rotary_factor']}; positions rotate whole heads here"
        )
    fields: dict[str, Any] = {"rotary_base": int(base)}
    factor = float(parameters.get("factor") or 1.0)
    if kind == "linear":
        if factor > 1.0:
            fields["seq_len_interpolation_factor"] = factor
        elif factor < 1.0:
            faults.append(f"rope_parameters.factor: {factor} of a linear scaling, expected 1 or more")
    elif kind == "llama3":
        fields |= {"rope_scaling": True, "rope_scaling_factor": factor}
        faults += [
            f"rope_parameters.{name}: {parameters.get(name)}, expected {value} (megatron-core computes Llama "
            "3's scaling with that alone)"
            for name, value in _LLAMA3.items()
            if parameters.get(name) != value
        ]
    elif kind != "default":
        faults.append(f"rope_type: {kind} is not computed here, but default, linear and llama3 are")
    return fields, faults


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """``rope_parameters`` of a model with rotary positions."""
    parameters: dict[str, Any] = {"rope_theta": float(model.rotary_base), "rope_type": "default"}
    if model.rope_scaling:
        factor = model.rope_scaling_factor or _LLAMA3_FACTOR
        parameters |= {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    elif model.seq_len_interpolation_factor is not None:
        parameters |= {"rope_type": "linear", "factor": model.seq_len_interpolation_factor}
    return parameters


def rope_faults(model: ModelConfig) -> list[str]:
    """What of a model's positions no published variant says."""
    if model.rope_scaling and model.seq_len_interpolation_factor is not None:
        return ["model.seq_len_interpolation_factor: no published model has it beside rope_scaling"]
    return []
