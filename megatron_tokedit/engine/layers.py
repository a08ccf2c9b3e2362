"""The layer specs: Transformer Engine's on a CUDA device that has it, else megatron-core's local ones with
our attention and norms.

Invariant: both have the same parameters under the same checkpoint keys, so that what was trained on one is
loaded on the other.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_tokedit.engine import preflight
from megatron_tokedit.errors import ConfigError


def uses_transformer_engine(device: torch.device) -> bool:
    """Whether the layers on ``device`` are Transformer Engine's."""
    return device.type == "cuda" and preflight.probe().transformer_engine is not None


def layer_spec(
    config: Any, device: torch.device, *, norm_has_weights: bool = True, documents_masked: bool = False
) -> Any:
    """The spec of one layer.

    Args:
        config: megatron-core's ``TransformerConfig``.
        device: of this rank.
        norm_has_weights: False for norms without gain and bias.
        documents_masked: batches bring an ``attention_mask``. Transformer Engine ignores it under the spec's
            own mask type, ``causal``; our attention takes one whenever it is there.
    """
    if uses_transformer_engine(device):
        return _transformer_engine_spec(config, norm_has_weights, documents_masked)

    from megatron.core.models.gpt import gpt_layer_specs

    from megatron_tokedit.engine.attention import LocalNorm, SdpaCoreAttention, WeightlessNorm

    spec = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    norm = LocalNorm if norm_has_weights else WeightlessNorm
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    attention.core_attention = SdpaCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = LocalNorm
    if config.num_moe_experts is not None:  # Transformer Engine keeps this norm apart from the experts
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    return spec


def _transformer_engine_spec(config: Any, norm_has_weights: bool, documents_masked: bool) -> Any:
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.enums import AttnMaskType

    spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    layer, attention = spec.submodules, spec.submodules.self_attention
    if documents_masked:
        attention.params["attn_mask_type"] = AttnMaskType.arbitrary
    if not norm_has_weights:  # its fused norms always have weights: norm and linear layer stand apart
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

        from megatron_tokedit.engine.attention import WeightlessNorm

        layer.input_layernorm = layer.pre_mlp_layernorm = WeightlessNorm
        attention.submodules.linear_qkv = TEColumnParallelLinear
        layer.mlp.submodules.linear_fc1 = TEColumnParallelLinear
    elif config.num_moe_experts is None and "layernorm" in (config.recompute_modules or ()):
        raise ConfigError(
            "parallel.recompute_modules: layernorm has no effect with Transformer Engine's layers of this "
            "model family, whose norms are part of the linear layers behind them; remove it"
        )
    return spec


def block_spec(
    config: Any,
    device: torch.device,
    *,
    norm_has_weights: bool,
    documents_masked: bool,
    vp_stage: int | None,
) -> Any:
    """The spec of this rank's layers and, on the last stage, the norm that follows them.

    Args:
        config: megatron-core's ``TransformerConfig``.
        device: of this rank.
        norm_has_weights: as in :func:`layer_spec`.
        documents_masked: as in :func:`layer_spec`.
        vp_stage: index of the chunk among this rank's, None without interleaving.
    """
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    from megatron_tokedit.engine.attention import LocalNorm, WeightlessNorm

    spec = layer_spec(config, device, norm_has_weights=norm_has_weights, documents_masked=documents_masked)
    if uses_transformer_engine(device) and norm_has_weights:
        return spec
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, vp_stage=vp_stage),
        layer_norm=LocalNorm if norm_has_weights else WeightlessNorm,
    )


def fuse_weight_gradients(module: torch.nn.Module) -> int:
    """Let Transformer Engine's linear layers add weight gradients to the float32 buffer in the product.

    megatron-core's own setting, ``gradient_accumulation_fusion``, also covers its output layer, which needs
    an extension of apex; Transformer Engine's layers need nothing. For a model that will be wrapped in DDP,
    whose buffers they add to.

    Returns:
        How many layers that are.
    """
    layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "fuse_wgrad_accumulation")]
    for layer in layers:
        layer.fuse_wgrad_accumulation = True
    return len(layers)
