"""Builds a GPT model from a ``ModelConfig``: megatron-core's ``GPTModel``, in the chunks that a rank holds.

What a family is stands in ``config.families``, the layers in ``engine.layers``, the counts in
``engine.sizes``. Invariant: nothing here depends on the name of a family.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_tokedit.config.faults import raise_faults
from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tokedit.config.validate import cross_section_faults
from megatron_tokedit.engine import precision as precision_recipes
from megatron_tokedit.engine import preflight
from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.engine.layers import (
    block_spec,
    fuse_weight_gradients,
    layer_spec,
    uses_transformer_engine,
)
from megatron_tokedit.engine.sizes import flops_per_token, num_parameters, padded_vocab_size

__all__ = [
    "build_model",
    "flops_per_token",
    "gather_parameters",
    "layer_spec",
    "num_parameters",
    "padded_vocab_size",
    "transformer_config",
    "unwrap",
]


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation, as GPT-2 has it."""
    return F.gelu(x, approximate="tanh")


def _family_fields(model: ModelConfig) -> dict[str, Any]:
    family = model.family_traits
    fields: dict[str, Any] = {
        "normalization": family.normalization,
        "activation_func": F.silu if family.gated_linear_unit else gelu_tanh,
        "gated_linear_unit": family.gated_linear_unit,
        "add_bias_linear": family.add_bias_linear,
        "add_qkv_bias": family.add_qkv_bias,
        "qk_layernorm": family.qk_layernorm,
    }
    if family.has_experts:
        fields |= {
            "num_moe_experts": model.num_moe_experts,
            "moe_ffn_hidden_size": model.ffn_size,
            "moe_router_topk": model.moe_router_topk,
        }
    return fields


def _parallel_fields(parallel: ParallelConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        name: getattr(parallel, name)
        for name in (
            "tensor_model_parallel_size",
            "sequence_parallel",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "recompute_granularity",
            "recompute_method",
            "recompute_num_layers",
            "recompute_modules",
            "tp_comm_overlap",
        )
    }
    if parallel.virtual_pipeline_model_parallel_size > 1:
        fields["virtual_pipeline_model_parallel_size"] = parallel.virtual_pipeline_model_parallel_size
        # batched, two messages to the same stage (both neighbours of two) would be taken for each other
        fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return fields


def _router_loss_fields(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Weights of the router's losses.

    megatron-core 0.16.1 scales their gradients by the tokens of one rank where the loss is counted a token
    (``TopKRouter.attach_and_log_load_balancing_loss``), and sums over the ranks that share a sequence: each
    counts one part in as many. The weights make up for it, so that every layout has the same gradient.
    """
    if not model.family_traits.has_experts:
        return {}
    sharing = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    z_loss = model.moe_z_loss_coeff
    return {
        "moe_router_load_balancing_type": "aux_loss" if model.moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff * sharing,
        "moe_z_loss_coeff": None if z_loss is None else z_loss * sharing,
    }


def _device_fields(model: ModelConfig, parallel: ParallelConfig, device: torch.device) -> dict[str, Any]:
    """What is faster on a GPU, or exists only there; none of it changes a result beyond rounding."""
    on_cuda = device.type == "cuda"
    has_experts = model.family_traits.has_experts
    return {
        "use_cpu_initialization": not on_cuda,
        "gradient_accumulation_fusion": on_cuda and preflight.probe().fused_wgrad,
        "bias_activation_fusion": on_cuda and model.family_traits.gated_linear_unit,
        "bias_dropout_fusion": on_cuda,
        # gloo reads a tensor that the interleaved schedule has sent after it is freed; NCCL's streams do not
        "deallocate_pipeline_outputs": on_cuda or parallel.virtual_pipeline_model_parallel_size == 1,
        "moe_token_dispatcher_type": "alltoall" if on_cuda else "allgather",
        "moe_grouped_gemm": has_experts and uses_transformer_engine(device),
        "apply_rope_fusion": model.family_traits.uses_rope and uses_transformer_engine(device),
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
        ConfigError: sizes that do not divide among the ranks, or what this machine cannot do.
    """
    sections = {"model": model, "parallel": parallel, "precision": precision}
    raise_faults(cross_section_faults(sections), "model, layout and precision")
    preflight.refuse_faults(precision, parallel)

    from megatron.core.transformer.transformer_config import TransformerConfig

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
        perform_initialization=perform_initialization,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        calculate_per_token_loss=True,
        **_family_fields(model),
        **_router_loss_fields(model, parallel),
        **_parallel_fields(parallel),
        **_device_fields(model, parallel, device),
        **precision_recipes.resolve(precision, device, parallel).transformer,
    )


def _gpt_model(
    model: ModelConfig, config: Any, ctx: ParallelContext, vocab_size: int, documents_masked: bool, chunk: int
) -> Any:
    """Chunk ``chunk`` of this rank's, bare."""
    from megatron_tokedit.engine.gpt import VocabMaskedGPTModel

    family = model.family_traits
    vp_stage = chunk if ctx.vp_size > 1 else None
    return VocabMaskedGPTModel(
        config=config,
        transformer_layer_spec=block_spec(
            config,
            ctx.device,
            norm_has_weights=family.norm_has_weights,
            documents_masked=documents_masked,
            vp_stage=vp_stage,
        ),
        vocab_size=padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by, ctx.tp_size),
        real_vocab_size=vocab_size,
        max_sequence_length=model.max_positions,
        pre_process=ctx.is_first_stage and chunk == 0,
        post_process=ctx.is_last_stage and chunk == ctx.vp_size - 1,
        share_embeddings_and_output_weights=model.ties_embeddings,
        position_embedding_type=family.position_embedding_type,
        rotary_base=model.rotary_base,
        rope_scaling=model.rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor or 8.0,
        seq_len_interpolation_factor=model.seq_len_interpolation_factor,
        vp_stage=vp_stage,
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
        The chunks of layers this rank holds: one, or ``virtual_pipeline_model_parallel_size`` of them.

    Raises:
        ConfigError: sizes that do not divide among the ranks, what this machine cannot do, or a model that
            does not compute in the precision that was asked for.
    """
    config = transformer_config(
        model, precision, parallel, ctx.device, perform_initialization=perform_initialization
    )
    modules = []
    for chunk in range(ctx.vp_size):
        module = _gpt_model(model, config, ctx, vocab_size, documents_masked, chunk).to(ctx.device)
        if config.bf16:
            from megatron.core.transformer.module import Float16Module

            module = Float16Module(config, module)
        modules.append(module)
    precision_recipes.check_model(precision, config, modules)
    return _wrap_with_ddp(modules, config, precision, parallel, ctx) if wrap_with_ddp else modules


def _wrap_with_ddp(
    modules: list[Any],
    config: Any,
    precision: PrecisionConfig,
    parallel: ParallelConfig,
    ctx: ParallelContext,
) -> list[Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        **_overlap_fields(parallel, ctx),
        **precision_recipes.resolve(precision, ctx.device, parallel).ddp,
    )
    wrapped = [
        DistributedDataParallel(config, ddp_config, module, disable_bucketing=chunk > 0)
        for chunk, module in enumerate(modules)
    ]
    for chunk in wrapped:
        if fuse_weight_gradients(chunk) and precision.cuda_graph_impl == "local":
            # the layers have read it already; megatron-core's graphs ask it whether what a layer returns for
            # a gradient is one, or, unset memory, stands for one that is in the buffer already
            config.gradient_accumulation_fusion = True
        if not config.fp8_param:  # not to be broadcast; data-parallel ranks draw them from the same seed
            chunk.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    if ctx.dp_size * ctx.cp_size > 1:
        config.no_sync_func = [chunk.no_sync for chunk in wrapped] if ctx.vp_size > 1 else wrapped[0].no_sync
    return wrapped


def _overlap_fields(parallel: ParallelConfig, ctx: ParallelContext) -> dict[str, bool]:
    """Fields of ``DistributedDataParallelConfig`` that hide communication behind computation."""
    default = ctx.device.type == "cuda" and ctx.dp_size * ctx.cp_size > 1
    reduce = parallel.overlap_grad_reduce
    reduce = default if reduce is None else reduce
    gather = parallel.overlap_param_gather
    gather = reduce and default and parallel.use_distributed_optimizer if gather is None else gather
    return {"overlap_grad_reduce": reduce, "overlap_param_gather": gather}


def gather_parameters(model: list[Any]) -> None:
    """Make the last update visible in all parameters, where it is gathered during the next forward pass.

    Collective over the data-parallel ranks; needed before parameters are read outside of a training step.
    """
    from megatron.core import fp8_utils

    for chunk in model:
        if getattr(chunk, "use_forward_hook", False):
            chunk.start_param_sync(force_sync=True)
            # the next forward pass would do it, but takes what is gathered already for finished; without it
            # the next backward pass would multiply by the transposed weights of an update before
            in_fp8 = [parameter for parameter in chunk.parameters() if fp8_utils.is_float8tensor(parameter)]
            fp8_utils.post_all_gather_processing(in_fp8)


def unwrap(module: Any) -> Any:
    """The bare ``GPTModel`` inside data-parallel and precision wrappers."""
    while hasattr(module, "module"):
        module = module.module
    return module
