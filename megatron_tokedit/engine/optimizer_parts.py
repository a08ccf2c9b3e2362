"""Moves optimizer state between runs with and without expert parallelism.

megatron-core gives experts that are spread over ranks an optimizer of their own, chained to the other one,
and a checkpoint lists its parts as they were. The tensors (moments, main parameters) are stored by parameter
and fit any parts; only the short description of the parts has to be made anew.
"""

from __future__ import annotations

from typing import Any

from megatron_tokedit.errors import CheckpointError


def fit_parts(core_optimizer: Any, loaded: dict[Any, Any]) -> dict[Any, Any]:
    """A loaded optimizer state with as many parts as ``core_optimizer`` has.

    Args:
        core_optimizer: from ``build_optimizer``.
        loaded: what ``dist_checkpointing.load`` made of its sharded state dict: this run's tensors, and the
            description that was saved.

    Raises:
        CheckpointError: the parts differ, and the optimizer is not the distributed one.
    """
    parts = core_optimizer.chained_optimizers
    described = [loaded[key] for key in sorted(k for k in loaded if isinstance(k, int))]
    described = [part for part in described if "optimizer" in part] or [loaded]
    if len(described) == len(parts):
        return loaded
    if not hasattr(parts[0], "sharded_param_state_fully_reshardable"):
        raise CheckpointError(
            "a checkpoint with another expert_model_parallel_size keeps its optimizer only under "
            "parallel.use_distributed_optimizer: true"
        )
    step = described[0]["optimizer"]["param_groups"][0].get("step")
    fitted = []
    for index, part in enumerate(parts):
        tensors = loaded[index] if len(parts) > 1 else loaded
        groups = part.state_dict()["optimizer"]["param_groups"]
        for group in groups if step is not None else ():
            group["step"] = step
        rest = {key: value for key, value in described[0].items() if not isinstance(key, int)}
        fitted.append({**rest, "optimizer": {"param_groups": groups}, "param_state": tensors["param_state"]})
    return fitted[0] if len(parts) == 1 else dict(enumerate(fitted))
