"""What a run will need, before anything is started: memory a rank, from the sizes alone.

Parameters, gradients and optimizer state are exact up to norms; activations follow Korthikanti et al. (2022,
arXiv 2205.05198) without the attention matrix, which the attention kernels never store, and with experts
evenly loaded. Under an FP8 recipe activations are counted as in bfloat16, which is more than what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, RunConfig
from megatron_tokedit.config.validate import num_microbatches
from megatron_tokedit.engine.sizes import layer_size, padded_vocab_size

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
        data_parallel_size: copies of the model. With the context-parallel ranks they share the optimizer
            state where it is distributed; that of experts, only those that hold the same ones.
    """
    model, parallel = config.model, config.parallel
    rows = padded_vocab_size(
        model.vocab_size or 0, model.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size
    )
    dense, experts = _rank_parameters(model, parallel, rows)
    mixed = config.precision.compute_dtype == "bf16"
    value_bytes = 2 if mixed else 4
    fused_loss = config.precision.cross_entropy_loss_fusion
    loss_bytes = 0 if (config.precision.is_fp8 if fused_loss is None else fused_loss) else 4
    replicas = data_parallel_size * parallel.context_parallel_size
    shards, expert_shards = (
        (replicas, max(1, replicas // parallel.expert_model_parallel_size))
        if parallel.use_distributed_optimizer
        else (1, 1)
    )
    tokens = model.seq_length * config.training.micro_batch_size / parallel.context_parallel_size
    in_flight = _microbatches_in_flight(parallel, num_microbatches(config.training, data_parallel_size))
    return MemoryEstimate(
        parameters=(dense + experts) * value_bytes + _fp8_bytes(config),
        gradients=(dense + experts) * 4,
        optimizer=(dense / shards + experts / expert_shards) * (12 if mixed else 8),
        activations=tokens * _stage_activations(model, parallel, in_flight) * value_bytes,
        logits=tokens * rows / parallel.tensor_model_parallel_size * (value_bytes + loss_bytes),
    )


def _fp8_bytes(config: RunConfig) -> float:
    """What FP8 adds to the weights of the linear layers in bfloat16, in bytes of a rank.

    A product needs a weight as it is and transposed, a byte each, kept from one microbatch to the next:
    beside the weight in bfloat16, or instead of it, which saves as much as it costs.
    """
    model, parallel, precision = config.model, config.parallel, config.precision
    if not precision.is_fp8 or precision.keeps_fp8_parameters(parallel):
        return 0.0
    layer, tensor_parallel = layer_size(model), parallel.tensor_model_parallel_size
    in_bf16 = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
    num_layers = (model.num_layers - in_bf16) / parallel.pipeline_model_parallel_size
    mlps = layer.num_experts / parallel.expert_model_parallel_size * layer.mlp
    return num_layers * (layer.attention + mlps) / tensor_parallel * 2


def _rank_parameters(model: ModelConfig, parallel: ParallelConfig, rows: int) -> tuple[float, float]:
    """Parameters of the fullest rank: those every data-parallel rank holds, and those of its experts."""
    tensor_parallel, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layer, num_layers = layer_size(model), model.num_layers / stages
    mlps = layer.num_experts * layer.mlp / tensor_parallel
    matrices = 1 if model.ties_embeddings or stages > 1 else 2
    positions = 0 if model.family_traits.uses_rope else model.max_positions * model.hidden_size
    dense = num_layers * (layer.attention / tensor_parallel + layer.router + layer.norms)
    dense += matrices * rows * model.hidden_size / tensor_parallel + positions
    if not model.family_traits.has_experts:
        return dense + num_layers * mlps, 0.0
    return dense, num_layers * mlps / parallel.expert_model_parallel_size


def _microbatches_in_flight(parallel: ParallelConfig, num_microbatches: int) -> float:
    """Microbatches whose activations the first stage keeps (Narayanan et al., 2021, section 2.2)."""
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    waiting = stages + (stages - 1) / chunks if chunks > 1 else stages
    return min(waiting, num_microbatches)


def _stage_activations(model: ModelConfig, parallel: ParallelConfig, in_flight: float) -> float:
    """Values the first stage keeps for the backward pass, a token of one microbatch."""
    layers = model.num_layers / parallel.pipeline_model_parallel_size
    whole = _layer_activations(model, parallel)
    if parallel.recompute_granularity != "full":
        return layers * whole * in_flight
    entrance = model.hidden_size / (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    count = parallel.recompute_num_layers or 1
    if parallel.recompute_method == "block":
        count *= parallel.virtual_pipeline_model_parallel_size  # counted in every chunk of layers
        return (count * entrance + (layers - count) * whole) * in_flight + whole
    return layers / count * entrance * in_flight + count * whole


def _layer_activations(model: ModelConfig, parallel: ParallelConfig) -> float:
    """Values of one layer kept for the backward pass, a token."""
    family, h = model.family_traits, model.hidden_size
    tensor_parallel = parallel.tensor_model_parallel_size
    selective = parallel.recompute_granularity == "selective"
    recomputed = set(parallel.recompute_modules or []) if selective else set()
    copies = model.moe_router_topk if family.has_experts else 1
    residual = h * (2 if "layernorm" in recomputed else 4)  # inputs of both norms, and what they put out
    attention = (2 * model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_size
    mlp = 0.0
    if not recomputed & {"mlp", "moe"}:
        mlp = copies * model.ffn_size * (4 if family.gated_linear_unit else 2)
        mlp += 2 * copies * h if family.has_experts else 0  # tokens sorted by expert, and back
    split = attention + mlp
    if parallel.sequence_parallel:
        return (residual + split) / tensor_parallel
    return residual + split / tensor_parallel
