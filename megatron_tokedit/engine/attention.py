"""Core attention through ``torch.nn.functional.scaled_dot_product_attention``, and the norms of the local
layer spec.

megatron-core's ``DotProductAttention`` writes the whole [s, s] score matrix of every head; this one does
not. On CPU, plain causal attention over short sequences goes through ``cpu_kernels`` instead, which is
faster there.
Invariant: the same numbers as ``DotProductAttention`` (up to float rounding), the same constructor, and the
same [s, b, h] layout, so that it takes its place in a layer spec.

Packed rows are attended to one sequence at a time: no work is done, and nothing is kept, for pairs of
positions that must not see each other.

Legend: s positions, t those of all sequences of a packed row, b rows, n heads of this tensor-parallel rank,
g key/value heads of this rank, d size of a head.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tokedit.engine.cpu_kernels import MAX_BLOCKED_POSITIONS, BlockedCausalAttention
from megatron_tokedit.engine.packing import PackedRow


class SdpaCoreAttention(MegatronModule):
    """Causal scaled dot-product attention of one layer, with grouped key/value heads and dropout."""

    keeps_probabilities = True
    """On a CPU, for a backward pass; where there will be none, torch's flash attention is faster."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "context parallelism needs Transformer Engine's attention"
        assert attn_mask_type == AttnMaskType.causal, "the layer spec asks for causal attention only"
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[s, b, n, d]``; of a packed row ``[t, n, d]``.
            key: ``[s, b, g, d]`` or ``[t, g, d]``.
            value: as ``key``.
            attention_mask: bool ``[b or 1, 1, s, s]``, True where attention is forbidden (megatron-core's
                convention; causality included), or None for the plain causal mask.
            attn_mask_type: unused; always causal.
            attention_bias: must be None.
            packed_seq_params: a :class:`PackedRow`, or None.

        Returns:
            ``[s, b, n * d]``, contiguous; of a packed row ``[t, n * d]``.
        """
        assert attention_bias is None, "no attention bias in the layer spec"
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, PackedRow), "a row from engine.packing"
            assert attention_mask is None, "a packed row has its borders, and no mask"
            return self._packed(query, key, value, packed_seq_params.lengths)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n or g, s, d]
        context = self._attend(query, key, value, attention_mask)
        return context.permute(2, 0, 1, 3).reshape(context.size(2), context.size(0), -1)  # [s, b, n * d]

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """``[t, n or g, d]`` -> ``[t, n * d]``, sequence by sequence."""
        sequences = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True)
        contexts = [self._attend(q[None], k[None], v[None], None) for q, k, v in sequences]  # [1, n, s, d]
        return torch.cat(contexts, dim=2)[0].transpose(0, 1).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
        """``[b, n or g, s, d]`` -> ``[b, n, s, d]``."""
        dropout = self.dropout if self.training else 0.0
        is_plain = attention_mask is None and dropout == 0.0 and query.device.type == "cpu"
        if self.keeps_probabilities and is_plain and query.size(2) <= MAX_BLOCKED_POSITIONS:
            context: Tensor = BlockedCausalAttention.apply(query, key, value, self.softmax_scale)
            return context
        return self._sdpa(query, key, value, attention_mask, dropout)

    def _sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float
    ) -> Tensor:
        with get_cuda_rng_tracker().fork() if dropout > 0.0 else contextlib.nullcontext():
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=dropout,
                is_causal=attention_mask is None,
                scale=self.softmax_scale,
                enable_gqa=query.size(1) != key.size(1),
            )


class LocalNorm:
    """Makes the norm module of the local layer spec: RMSNorm or LayerNorm, as the config says.

    megatron-core's ``WrappedTorchNorm`` refuses sequence parallelism; here the parameters carry the mark by
    which megatron-core sums their gradients over the tensor-parallel group.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        """Build the module; the signature is that of a norm in a layer spec."""
        kind = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
        norm = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class WeightlessNorm:
    """Makes a norm without gain and bias (OLMo's), which has nothing to share between ranks."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        """Build the module; the signature is that of a norm in a layer spec."""
        kind = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
        return kind(hidden_size, eps=eps, elementwise_affine=False)
