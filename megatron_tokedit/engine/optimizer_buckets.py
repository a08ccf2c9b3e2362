"""Optimizer state gathered for a checkpoint, where megatron-core looks for it.

Parameters lie in buckets, whose ends the distributed optimizer pads so that the ranks share them evenly. For
a ``fully_reshardable`` checkpoint megatron-core 0.16.1 gathers a buffer's state without the padding, and then
takes each parameter's from where it lies with it: from the second bucket on, main parameters and moments
would be saved shifted by the padding before them, with nothing but a warning about the last ones.

Invariant: a saved parameter's state is its own, however the buckets are cut and padded.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


def place_gathered_state(part: Any) -> None:
    """Let a distributed optimizer gather its state with the padding of its buckets.

    Args:
        part: one of an optimizer's ``chained_optimizers``.
    """
    gather = part.get_parameter_state_dp_zero

    @functools.wraps(gather)
    def gather_in_place(*args: Any, **kwargs: Any) -> Any:
        state = gather(*args, **kwargs)
        if state is None:  # of a rank that does not save
            return None
        for index, ranges in enumerate(part.gbuf_ranges):
            for dtype in ranges:
                state[index][dtype] = with_padding(part.buffers[index], state[index][dtype])
        return state

    part.get_parameter_state_dp_zero = gather_in_place


def with_padding(buffer: Any, gathered: dict[str, Any]) -> dict[str, Any]:
    """Gathered state as long as its buffer.

    Args:
        buffer: megatron-core's parameter and gradient buffer.
        gathered: flat tensors of its buckets end to end without their padding, and numbers.
    """
    if buffer.numel_unpadded == buffer.numel:
        return gathered
    placed = dict(gathered)
    for key, values in gathered.items():
        if not isinstance(values, torch.Tensor):
            continue
        placed[key] = values.new_zeros(buffer.numel)
        sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
        for (start, _), part in zip(buffer.bucket_indices, values.split(sizes), strict=True):
            placed[key][start : start + len(part)] = part
    return placed
