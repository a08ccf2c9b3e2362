"""Sizes of a model from its configuration alone: parameters and floating-point operations, exactly.

Invariant: :func:`num_parameters` is the count of the module that ``engine.model`` builds, for every family,
but for the padding of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_tokedit.config.sections import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerSize:
    """Parameters of one layer.

    Attributes:
        attention: projections with their biases, and norms of queries and keys.
        mlp: a dense MLP with its biases, or one expert.
        router: of the experts; 0 for a dense layer.
        norms: the two norms of the layer.
        num_experts: MLPs in it.
    """

    attention: int
    mlp: int
    router: int
    norms: int
    num_experts: int

    @property
    def total(self) -> int:
        """All parameters of the layer."""
        return self.attention + self.num_experts * self.mlp + self.router + self.norms


def padded_vocab_size(vocab_size: int, multiple: int, tp_size: int) -> int:
    """Rows of the embedding: ``vocab_size`` rounded up to a common multiple of ``multiple`` and ``tp_size``.

    For the usual powers of two this does not depend on ``tp_size``, so a checkpoint keeps its shapes.
    """
    unit = math.lcm(multiple, tp_size)
    return math.ceil(vocab_size / unit) * unit


def norm_parameters(model: ModelConfig) -> int:
    """Parameters of one norm over the hidden size."""
    family = model.family_traits
    if not family.norm_has_weights:
        return 0
    return model.hidden_size * (2 if family.normalization == "LayerNorm" else 1)


def layer_size(model: ModelConfig) -> LayerSize:
    """Parameters of one layer, by part."""
    family = model.family_traits
    h, f = model.hidden_size, model.ffn_size
    d, n, g = model.head_size, model.num_attention_heads, model.num_key_value_heads
    attention = h * d * (n + 2 * g) + n * d * h
    if family.add_bias_linear or family.add_qkv_bias:
        attention += d * (n + 2 * g)
    if family.qk_layernorm:
        attention += 2 * d
    mlp = h * f * (3 if family.gated_linear_unit else 2)
    if family.add_bias_linear:
        attention += h
        mlp += f + h
    num_experts = model.num_moe_experts or 1
    router = h * num_experts if family.has_experts else 0
    return LayerSize(attention, mlp, router, 2 * norm_parameters(model), num_experts)


def num_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Exact number of parameters, without the padding of the vocabulary.

    Args:
        model: the model.
        vocab_size: real vocabulary.
    """
    embeddings = vocab_size * model.hidden_size * (1 if model.ties_embeddings else 2)
    positions = 0 if model.family_traits.uses_rope else model.max_positions * model.hidden_size
    return model.num_layers * layer_size(model).total + norm_parameters(model) + embeddings + positions


def flops_per_token(model: ModelConfig, vocab_size: int, seq_length: int | None = None) -> float:
    """Floating-point operations of one training step (forward and backward) a token.

    Three times the forward's matrix products, each 2 m n k; attention is counted for the causal half of the
    score matrix (Narayanan et al., 2021, with causality taken into account), experts for those a token is
    sent to; norms, softmax and the embedding look-up are left out, and so is what is recomputed.
    """
    s = seq_length or model.seq_length
    h, f = model.hidden_size, model.ffn_size
    d, n, g = model.head_size, model.num_attention_heads, model.num_key_value_heads
    projections = 2 * h * d * (n + 2 * g) + 2 * n * d * h
    scores = 2 * 2 * n * d * (s + 1) / 2
    mlp = 2 * h * f * (3 if model.family_traits.gated_linear_unit else 2)
    if model.family_traits.has_experts:
        mlp = model.moe_router_topk * mlp + 2 * layer_size(model).router
    return 3.0 * (model.num_layers * (projections + scores + mlp) + 2 * h * vocab_size)
