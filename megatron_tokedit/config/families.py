"""Model families as data: what distinguishes them, in megatron-core's words.

Everything that the sizes of a model do not say is here, once; the engine maps a row to a
``TransformerConfig`` and a layer spec, and counts parameters from it. Invariant: no other file compares
family names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FamilyName = Literal["llama", "gpt2", "qwen2", "qwen3", "olmo", "mixtral"]


@dataclass(frozen=True, slots=True)
class Family:
    """What every model of a family has in common; the defaults are Llama's.

    Attributes:
        normalization: as in ``TransformerConfig``.
        norm_has_weights: False: the norms have neither gain nor bias.
        position_embedding_type: as in ``GPTModel``.
        gated_linear_unit: SwiGLU; else GELU in its tanh approximation.
        add_bias_linear: every linear layer has a bias.
        add_qkv_bias: the query, key and value projections have one, whatever the others have.
        qk_layernorm: a norm over the channels of every query and key head.
        share_embeddings_and_output_weights: default of the model's setting.
        has_experts: mixture of experts in every layer.
    """

    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_has_weights: bool = True
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    share_embeddings_and_output_weights: bool = False
    has_experts: bool = False

    @property
    def uses_rope(self) -> bool:
        """Rotary positions: relative, without parameters."""
        return self.position_embedding_type == "rope"

    def default_ffn_hidden_size(self, hidden_size: int) -> int:
        """8/3 x hidden_size up to a multiple of 64 where the unit is gated, else 4 x hidden_size."""
        return -(-8 * hidden_size // (3 * 64)) * 64 if self.gated_linear_unit else 4 * hidden_size


FAMILIES: dict[FamilyName, Family] = {
    "llama": Family(),  # Touvron et al., 2023
    "gpt2": Family(  # Radford et al., 2019
        normalization="LayerNorm",
        position_embedding_type="learned_absolute",
        gated_linear_unit=False,
        add_bias_linear=True,
        share_embeddings_and_output_weights=True,
    ),
    "qwen2": Family(add_qkv_bias=True),  # Yang et al., 2024; tied up to 1.5B
    "qwen3": Family(qk_layernorm=True),  # Yang et al., 2025; tied up to 4B
    "olmo": Family(normalization="LayerNorm", norm_has_weights=False),  # Groeneveld et al., 2024; 1B is tied
    "mixtral": Family(has_experts=True),  # Jiang et al., 2024
}
