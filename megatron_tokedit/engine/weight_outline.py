"""Which parameters a model has, and where a checkpoint keeps each, without the memory for any.

The model is built on torch's ``meta`` device, which has shapes and no contents, and asked for its sharded
state dict. Invariant: keys, places and extra states are those of a training run, because it is the same model
that says them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tokedit.engine.initialize import ParallelContext, current_context, initialize
from megatron_tokedit.engine.model import _gpt_model, transformer_config


@dataclass(frozen=True, slots=True)
class StoredPart:
    """Consecutive rows of a parameter as a checkpoint has them.

    Attributes:
        key: of the tensor in the checkpoint, which may hold a parameter of every layer and expert.
        offset: of the part in that tensor.
        shape: of the part, without the axes for layers and experts.
        first_row: of the part in the parameter.
        global_shape: of the whole tensor.
        may_be_padded: the number of rows is rounded up to the layout's taste: the vocabulary.
    """

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    first_row: int
    global_shape: tuple[int, ...]
    may_be_padded: bool


@dataclass(frozen=True, slots=True)
class WeightOutline:
    """A model without its weights.

    Attributes:
        shapes: name of every parameter in the whole model -> shape; the vocabulary is padded.
        parts: name of every parameter -> its parts in a checkpoint, by row.
        sharded_state: what megatron-core saves, on the meta device.
    """

    shapes: dict[str, tuple[int, ...]]
    parts: dict[str, tuple[StoredPart, ...]]
    sharded_state: dict[str, Any]


def outline_weights(model: ModelConfig, vocab_size: int) -> WeightOutline:
    """Describe the weights of a model.

    Starts megatron-core in a world of one, unless it runs in one already.

    Args:
        model: the model.
        vocab_size: real vocabulary.
    """
    from megatron.core import parallel_state

    ctx = _context()
    with torch.device("meta"):
        config = transformer_config(
            model, PrecisionConfig(recipe="fp32"), ParallelConfig(), ctx.device, perform_initialization=False
        )
        gpt = _gpt_model(model, config, ctx, vocab_size, False, 0)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state: dict[str, Any] = gpt.sharded_state_dict(metadata={"dp_cp_group": group})
    shapes = {name: tuple(parameter.shape) for name, parameter in gpt.named_parameters()}
    return WeightOutline(shapes, {name: _parts(state[name]) for name in shapes}, state)


def _context() -> ParallelContext:
    """A one-process context whose model is of megatron-core's own layers, wherever this runs."""
    from megatron.core import parallel_state

    if parallel_state.is_initialized():
        ctx = current_context()
    else:
        threads = torch.get_num_threads()
        ctx = initialize(ParallelConfig(), seed=0, cpu_threads=threads, standalone=not dist.is_initialized())
    assert ctx.world_size == 1, "a conversion is the work of one process"
    return dataclasses.replace(ctx, device=torch.device("cpu"))


def _parts(entry: Any) -> tuple[StoredPart, ...]:
    """The parts of one parameter: a factory splits what tensor-parallel ranks share unevenly."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    tensors = list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]
    parts = [
        StoredPart(
            key=tensor.key,
            offset=tuple(tensor.global_offset),
            shape=tuple(tensor.local_shape),
            first_row=tensor.global_offset[tensor.prepend_axis_num],
            global_shape=tuple(tensor.global_shape),
            may_be_padded=tensor.allow_shape_mismatch,
        )
        for tensor in tensors
    ]
    return tuple(sorted(parts, key=lambda part: part.first_row))
