"""Builds a GPT model from a ``ModelConfig``: megatron-core's ``GPTModel`` with the layer spec that fits the
device.

On a CUDA device with Transformer Engine the layers are Transformer Engine's; else they are megatron-core's
local ones with our scaled-dot-product attention and norms. Invariant: both have the same parameters under
the same checkpoint keys, and :func:`num_parameters` counts them exactly.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tokedit.engine import precision as precision_recipes
from megatron_tokedit.engine import preflight
from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.errors import ConfigError


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation, as GPT-2 has it."""
    return F.gelu(x, approximate="tanh")


def head_size(model: ModelConfig) -> int:
    """Size of one attention head.

    Raises:
        ConfigError: ``hidden_size`` does not divide into heads and ``kv_channels`` is not given.
    """
    if model.kv_channels is not None:
        return model.kv_channels
    if model.hidden_size % model.num_attention_heads:
        raise ConfigError(
            f"model: hidden_size={model.hidden_size} is not a multiple of num_attention_heads="
            f"{model.num_attention_heads}; change one of them or set kv_channels"
        )
    return model.hidden_size // model.num_attention_heads


def ffn_size(model: ModelConfig) -> int:
    """Inner size of the MLP; default 4 h for ``gpt2``, 8/3 h rounded up to a multiple of 64 for ``llama``."""
    if model.ffn_hidden_size is not None:
        return model.ffn_hidden_size
    if model.family == "gpt2":
        return 4 * model.hidden_size
    return math.ceil(8 * model.hidden_size / 3 / 64) * 64


def ties_embeddings(model: ModelConfig) -> bool:
    """Whether the output layer uses the embedding's weight."""
    if model.share_embeddings_and_output_weights is not None:
        return model.share_embeddings_and_output_weights
    return model.family == "gpt2"


def padded_vocab_size(vocab_size: int, multiple: int, tp_size: int) -> int:
    """Rows of the embedding: ``vocab_size`` rounded up to a common multiple of ``multiple`` and ``tp_size``.

    For the usual powers of two this does not depend on ``tp_size``, so a checkpoint keeps its shapes.
    """
    unit = math.lcm(multiple, tp_size)
    return math.ceil(vocab_size / unit) * unit


def num_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Exact number of parameters, without the padding of the vocabulary.

    Args:
        model: the model.
        vocab_size: real vocabulary.
    """
    h, f = model.hidden_size, ffn_size(model)
    d, n = head_size(model), model.num_attention_heads
    g = model.num_query_groups or n
    biased = model.family == "gpt2"
    attention = h * d * (n + 2 * g) + n * d * h
    mlp = h * f * (2 if biased else 3)
    biases = d * (n + 2 * g) + h + f + h if biased else 0
    norms_per_norm = 2 * h if biased else h
    layer = attention + mlp + biases + 2 * norms_per_norm
    embeddings = vocab_size * h * (1 if ties_embeddings(model) else 2)
    positions = max_positions(model) * h if biased else 0
    return model.num_layers * layer + norms_per_norm + embeddings + positions


def max_positions(model: ModelConfig) -> int:
    """Longest sequence the model takes."""
    return model.max_position_embeddings or model.seq_length


def flops_per_token(model: ModelConfig, vocab_size: int, seq_length: int | None = None) -> float:
    """Floating-point operations of one training step (forward and backward) a token.

    Three times the forward's matrix products, each 2 m n k; attention is counted for the causal half of the
    score matrix (Narayanan et al., 2021, with causality taken into account); norms, softmax and the embedding
    look-up are left out.
    """
    s = seq_length or model.seq_length
    h, f = model.hidden_size, ffn_size(model)
    d, n = head_size(model), model.num_attention_heads
    g = model.num_query_groups or n
    projections = 2 * h * d * (n + 2 * g) + 2 * n * d * h
    scores = 2 * 2 * n * d * (s + 1) / 2
    mlp = 2 * h * f * (2 if model.family == "gpt2" else 3)
    return 3.0 * (model.num_layers * (projections + scores + mlp) + 2 * h * vocab_size)


def _family_fields(model: ModelConfig) -> dict[str, Any]:
    if model.family == "gpt2":
        return {"normalization": "LayerNorm", "activation_func": gelu_tanh, "add_bias_linear": True}
    return {
        "normalization": "RMSNorm",
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
    }


def _check_shards(model: ModelConfig, parallel: ParallelConfig) -> None:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    groups = model.num_query_groups or model.num_attention_heads
    faults = [
        f"model.{name}={size} is not a multiple of {by}={divisor}"
        for name, size, by, divisor in (
            ("num_attention_heads", model.num_attention_heads, "parallel.tensor_model_parallel_size", tp),
            ("num_query_groups", groups, "parallel.tensor_model_parallel_size", tp),
            ("ffn_hidden_size", ffn_size(model), "parallel.tensor_model_parallel_size", tp),
            ("num_layers", model.num_layers, "parallel.pipeline_model_parallel_size", pp),
            ("num_attention_heads", model.num_attention_heads, "model.num_query_groups", groups),
        )
        if size % divisor
    ]
    if faults:
        raise ConfigError("\n".join(faults))


def transformer_config(
    model: ModelConfig,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    device: torch.device,
    *,
    perform_initialization: bool = True,
) -> Any:
    """megatron-core's ``TransformerConfig`` for a model, precision and layout.

    Raises:
        ConfigError: sizes that do not divide among the ranks.
    """
    _check_shards(model, parallel)

    from megatron.core.transformer.transformer_config import TransformerConfig

    on_cuda = device.type == "cuda"
    fields = precision_recipes.resolve(precision, device).transformer
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=head_size(model),
        ffn_hidden_size=ffn_size(model),
        layernorm_epsilon=model.norm_epsilon,
        init_method_std=model.init_method_std,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        use_cpu_initialization=not on_cuda,
        perform_initialization=perform_initialization,
        gradient_accumulation_fusion=on_cuda and preflight.probe().fused_wgrad,
        masked_softmax_fusion=False,
        bias_activation_fusion=on_cuda and model.family == "llama",
        bias_dropout_fusion=on_cuda,
        persist_layer_norm=False,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
        **_family_fields(model),
        **fields,
    )


def layer_spec(config: Any, device: torch.device) -> Any:
    """Transformer Engine's layer spec on a CUDA device that has it, else the local one with our attention."""
    from megatron.core.models.gpt import gpt_layer_specs

    if device.type == "cuda" and preflight.probe().transformer_engine is not None:
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()

    from megatron_tokedit.engine.attention import LocalNorm, SdpaCoreAttention

    spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.input_layernorm = LocalNorm
    spec.submodules.pre_mlp_layernorm = LocalNorm
    spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    return spec


def _block_spec(config: Any, device: torch.device) -> Any:
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    from megatron_tokedit.engine.attention import LocalNorm

    spec = layer_spec(config, device)
    if device.type == "cuda" and preflight.probe().transformer_engine is not None:
        return spec
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=LocalNorm
    )


def _gpt_model(model: ModelConfig, config: Any, ctx: ParallelContext, vocab_size: int) -> Any:
    from megatron_tokedit.engine.gpt import VocabMaskedGPTModel

    return VocabMaskedGPTModel(
        config=config,
        transformer_layer_spec=_block_spec(config, ctx.device),
        vocab_size=padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by, ctx.tp_size),
        real_vocab_size=vocab_size,
        max_sequence_length=max_positions(model),
        pre_process=ctx.is_first_stage,
        post_process=ctx.is_last_stage,
        share_embeddings_and_output_weights=ties_embeddings(model),
        position_embedding_type="learned_absolute" if model.family == "gpt2" else "rope",
        rotary_base=model.rotary_base,
    )


def build_model(
    model: ModelConfig,
    precision: PrecisionConfig,
    ctx: ParallelContext,
    vocab_size: int,
    *,
    parallel: ParallelConfig,
    wrap_with_ddp: bool,
    perform_initialization: bool = True,
) -> list[Any]:
    """Build this rank's part of the model.

    Collective over the world (data-parallel replicas are made equal).

    Args:
        model: the model.
        precision: the recipe.
        ctx: from :func:`megatron_tokedit.engine.initialize.initialize`.
        vocab_size: real vocabulary; padding is added here.
        parallel: the layout ``ctx`` was made from.
        wrap_with_ddp: wrap in megatron-core's ``DistributedDataParallel`` (needed to train).
        perform_initialization: False where a checkpoint overwrites all weights anyway.

    Returns:
        A list of one module (interleaved pipeline stages will make it longer).

    Raises:
        ConfigError: sizes that do not divide among the ranks.
    """
    config = transformer_config(
        model, precision, parallel, ctx.device, perform_initialization=perform_initialization
    )
    module = _gpt_model(model, config, ctx, vocab_size).to(ctx.device)
    if config.bf16:
        from megatron.core.transformer.module import Float16Module

        module = Float16Module(config, module)
    if not wrap_with_ddp:
        return [module]
    return [_wrap_with_ddp(module, config, precision, parallel, ctx)]


def _wrap_with_ddp(
    module: Any, config: Any, precision: PrecisionConfig, parallel: ParallelConfig, ctx: ParallelContext
) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=ctx.device.type == "cuda" and ctx.dp_size > 1,
        **precision_recipes.resolve(precision, ctx.device).ddp,
    )
    wrapped = DistributedDataParallel(config, ddp_config, module)
    wrapped.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    if ctx.dp_size > 1:
        config.no_sync_func = wrapped.no_sync
    return wrapped


def unwrap(module: Any) -> Any:
    """The bare ``GPTModel`` inside data-parallel and precision wrappers."""
    while hasattr(module, "module"):
        module = module.module
    return module
