"""CUDA graphs of layers, as options: what megatron-core leaves to the training loop.

``local`` graphs are megatron-core's own: recorded in the first step, made at its end, replayed from then on;
all they need is a random-number tracker that graphs can hold. ``transformer_engine`` graphs have to be
captured between two steps (:class:`LayerGraphs`), after some steps without.

Invariant: a graph changes when kernels are launched, not what they compute.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_tokedit.config.sections import PrecisionConfig
from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.engine.model import gather_parameters
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)


class LayerGraphs:
    """Transformer Engine's graphs of a model's layers; does nothing where they were not asked for."""

    def __init__(
        self,
        precision: PrecisionConfig,
        model: list[Any],
        optimizer: Any,
        ctx: ParallelContext,
        *,
        micro_batch_size: int,
        seq_length: int,
        global_batch_size: int,
    ) -> None:
        self._helper: Any = None
        if precision.cuda_graph_impl != "transformer_engine":
            return
        from megatron.core import num_microbatches_calculator as calculator
        from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
        from megatron.core.utils import get_model_config

        calculator.unset_num_microbatches_calculator()
        calculator.init_num_microbatches_calculator(
            ctx.rank, None, global_batch_size, micro_batch_size, ctx.dp_size
        )
        self._model = model
        self._config = get_model_config(model[0])
        self._helper = TECudaGraphHelper(
            model=model,
            config=self._config,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            optimizers=[optimizer],
        )
        if not precision.is_fp8:
            add_every_gradient(model)
        self._steps_before = self._config.cuda_graph_warmup_steps

    def before_step(self) -> None:
        """Capture, if this is the step that graphs begin with. Collective over the world."""
        if self._helper is None or self._helper.graphs_created():
            return
        if self._steps_before > 0:
            self._steps_before -= 1
            return
        gather_parameters(self._model)
        hooked = [chunk for chunk in self._model if chunk.use_forward_hook]
        for chunk in hooked:  # they gather parameters, which a graph must not hold
            chunk.disable_forward_pre_hook(param_sync=False)
        self._helper.create_cudagraphs()
        for chunk in hooked:
            chunk.enable_forward_pre_hook()
        if hooked:
            self._helper.cuda_graph_set_manual_hooks()
        logger.info("CUDA graphs of the layers are captured")


def add_every_gradient(model: list[Any]) -> None:
    """Let Transformer Engine's linear layers add the weight gradient of every microbatch to the buffer.

    In what they take for a step's first microbatch they write it over what is there. megatron-core tells them
    which that is under FP8 only, and a capture lets all of them begin with the first: replayed for every
    microbatch, its graph would leave nothing but the last one's gradient. A layer that caches nothing for the
    microbatches behind the first (there is something to cache in FP8 only) is never told.
    """
    for chunk in model:
        for module in chunk.modules():
            if hasattr(module, "disable_parameter_transpose_cache"):
                module.disable_parameter_transpose_cache = True


def plain_states(states: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A random-number tracker's states as tensors, whatever it keeps them as."""
    from megatron.core.tensor_parallel.random import convert_cuda_rng_state

    return {name: convert_cuda_rng_state(state) for name, state in states.items()}


def tracked_states(states: dict[str, torch.Tensor], present: dict[str, Any]) -> dict[str, Any]:
    """Saved states in the form that the tracker keeps now.

    Generators are set to them, not replaced: those that were there are the ones that graphs are told of.

    Args:
        states: from :func:`plain_states`.
        present: the tracker's own states.
    """
    tracked: dict[str, Any] = {}
    for name, state in states.items():
        kept = present.get(name)
        tracked[name] = kept.set_state(state) if isinstance(kept, torch.Generator) else state
    return tracked
