"""Transformer Engine's user buffers, which overlap tensor-parallel communication with matrix products.

megatron-core's ``tp_comm_overlap`` tells the layers to use them, but leaves making them to the program.
"""

from __future__ import annotations

from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tokedit.errors import ConfigError


def make(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, *, micro_batch_size: int
) -> None:
    """Make the buffers that ``parallel.tp_comm_overlap`` needs, or nothing. Collective over the world.

    Raises:
        ConfigError: the GPUs or the driver cannot share memory.
    """
    if not parallel.tp_comm_overlap:
        return
    from transformer_engine.pytorch.module import base

    tokens = model.seq_length * micro_batch_size // parallel.context_parallel_size
    modes = [
        base.UserBufferQuantizationMode.FP8 if precision.is_fp8 else base.UserBufferQuantizationMode.NONE
    ]
    if precision.num_layers_at_start_in_bf16 or precision.num_layers_at_end_in_bf16:
        modes.append(base.UserBufferQuantizationMode.NONE)
    try:
        base.initialize_ub(
            shape=[tokens, model.hidden_size],
            tp_size=parallel.tensor_model_parallel_size,
            quantization_modes=modes,
            bootstrap_backend="nccl",
        )
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"parallel.tp_comm_overlap: Transformer Engine cannot make its buffers here ({error}); set it to "
            f"false"
        ) from error
