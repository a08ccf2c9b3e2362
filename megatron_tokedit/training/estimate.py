"""What a run will need, before anything is started: memory a rank, from the sizes alone.

Parameters, gradients and optimizer state are exact up to norms; activations follow Korthikanti et al. (2022,
arXiv 2205.05198) without the attention matrix, which the attention kernels never store.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.config.validate import num_microbatches
from megatron_tokedit.engine.model import num_parameters, padded_vocab_size

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of the rank that needs most, at its peak."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All together, in bytes."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits


def estimate_memory(config: RunConfig, *, data_parallel_size: int) -> MemoryEstimate:
    """Estimate the memory of the fullest rank.

    Args:
        config: resolved (every model default filled in).
        data_parallel_size: ranks that share the optimizer state where it is distributed.
    """
    model, parallel = config.model, config.parallel
    tensor_parallel, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vocab_size = model.vocab_size or 0
    rows = padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by, tensor_parallel)
    matrices = 1 if model.ties_embeddings else 2
    layers = num_parameters(model, vocab_size) - matrices * vocab_size * model.hidden_size
    own_matrices = matrices if stages == 1 else 1
    own = layers / (tensor_parallel * stages) + own_matrices * rows * model.hidden_size / tensor_parallel

    mixed = config.precision.recipe == "bf16"
    value_bytes = 2 if mixed else 4
    shards = data_parallel_size if parallel.use_distributed_optimizer else 1
    tokens = model.seq_length * config.training.micro_batch_size
    in_flight = min(stages, num_microbatches(config.training, data_parallel_size))
    return MemoryEstimate(
        parameters=own * value_bytes,
        gradients=own * 4,
        optimizer=own * (12 if mixed else 8) / shards,
        activations=tokens * _activation_values(config) * value_bytes * model.num_layers / stages * in_flight,
        logits=tokens * rows / tensor_parallel * (value_bytes + 4),
    )


def _activation_values(config: RunConfig) -> float:
    """Values kept for the backward pass, a token and layer, on one tensor-parallel rank."""
    model = config.model
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    split = (2 * heads + 2 * groups) * model.head_size
    split += model.ffn_size * (4 if model.family == "llama" else 2)
    return 4 * model.hidden_size + split / config.parallel.tensor_model_parallel_size
