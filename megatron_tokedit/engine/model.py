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

from megatron_tokedit.config.faults import raise_faults
from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tokedit.config.validate import cross_section_faults
from megatron_tokedit.engine import precision as precision_recipes
from megatron_tokedit.engine import preflight
from megatron_tokedit.engine.initialize import ParallelContext


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation, as GPT-2 has it."""
    return F.gelu(x, approximate="tanh")


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
    h, f = model.hidden_size, model.ffn_size
    d, n, g = model.head_size, model.num_attention_heads, model.num_key_value_heads
    biased = model.family == "gpt2"
    attention = h * d * (n + 2 * g) + n * d * h
    mlp = h * f * (2 if biased else 3)
    biases = d * (n + 2 * g) + h + f + h if biased else 0
    norms_per_norm = 2 * h if biased else h
    layer = attention + mlp + biases + 2 * norms_per_norm
    embeddings = vocab_size * h * (1 if model.ties_embeddings else 2)
    positions = model.max_positions * h if biased else 0
    return model.num_layers * layer + norms_per_norm + embeddings + positions


def flops_per_token(model: ModelConfig, vocab_size: int, seq_length: int | None = None) -> float:
    """Floating-point operations of one training step (forward and backward) a token.

    Three times the forward's matrix products, each 2 m n k; attention is counted for the causal half of the
    score matrix (Narayanan et al., 2021, with causality taken into account); norms, softmax and the embedding
    look-up are left out.
    """
    s = seq_length or model.seq_length
    h, f = model.hidden_size, model.ffn_size
    d, n, g = model.head_size, model.num_attention_heads, model.num_key_value_heads
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
    raise_faults(cross_section_faults({"model": model, "parallel": parallel}), "model and layout")

    from megatron.core.transformer.transformer_config import TransformerConfig

    on_cuda = device.type == "cuda"
    fields = precision_recipes.resolve(precision, device).transformer
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_size,
        ffn_hidden_size=model.ffn_size,
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


def layer_spec(config: Any, device: torch.device, *, documents_masked: bool = False) -> Any:
    """Transformer Engine's layer spec on a CUDA device that has it, else the local one with our attention.

    Args:
        config: megatron-core's ``TransformerConfig``.
        device: of this rank.
        documents_masked: batches bring an ``attention_mask``. Transformer Engine ignores it under the spec's
            own mask type, ``causal``; our attention takes one whenever it is there.
    """
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.enums import AttnMaskType

    if device.type == "cuda" and preflight.probe().transformer_engine is not None:
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
        if documents_masked:
            spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.arbitrary
        return spec

    from megatron_tokedit.engine.attention import LocalNorm, SdpaCoreAttention

    spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.input_layernorm = LocalNorm
    spec.submodules.pre_mlp_layernorm = LocalNorm
    spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    return spec


def _block_spec(config: Any, device: torch.device, documents_masked: bool) -> Any:
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    from megatron_tokedit.engine.attention import LocalNorm

    spec = layer_spec(config, device, documents_masked=documents_masked)
    if device.type == "cuda" and preflight.probe().transformer_engine is not None:
        return spec
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=LocalNorm
    )


def _gpt_model(
    model: ModelConfig, config: Any, ctx: ParallelContext, vocab_size: int, documents_masked: bool
) -> Any:
    from megatron_tokedit.engine.gpt import VocabMaskedGPTModel

    return VocabMaskedGPTModel(
        config=config,
        transformer_layer_spec=_block_spec(config, ctx.device, documents_masked),
        vocab_size=padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by, ctx.tp_size),
        real_vocab_size=vocab_size,
        max_sequence_length=model.max_positions,
        pre_process=ctx.is_first_stage,
        post_process=ctx.is_last_stage,
        share_embeddings_and_output_weights=model.ties_embeddings,
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
    documents_masked: bool = False,
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
        documents_masked: batches bring an ``attention_mask`` (``data.reset_attention_mask``).

    Returns:
        A list of one module (interleaved pipeline stages will make it longer).

    Raises:
        ConfigError: sizes that do not divide among the ranks.
    """
    config = transformer_config(
        model, precision, parallel, ctx.device, perform_initialization=perform_initialization
    )
    module = _gpt_model(model, config, ctx, vocab_size, documents_masked).to(ctx.device)
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
