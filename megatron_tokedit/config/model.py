"""The model, how it is spread over ranks, and its precision; names as in megatron-core."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_tokedit.config.base import Section


class ModelConfig(Section):
    """A GPT model; names as in megatron-core's ``TransformerConfig`` and ``GPTModel``."""

    family: Literal["llama", "gpt2"] = "llama"
    """``llama``: RMSNorm, RoPE, SwiGLU, no biases. ``gpt2``: LayerNorm, learned positions, GELU, biases."""
    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt | None = None
    """Key/value heads (GQA); default: as many as attention heads."""
    kv_channels: PositiveInt | None = None
    """Size of a head; default ``hidden_size / num_attention_heads``."""
    ffn_hidden_size: PositiveInt | None = None
    """Default: 4 x hidden_size for ``gpt2``; for ``llama`` 8/3 x hidden_size, up to a multiple of 64."""
    seq_length: PositiveInt
    """Training sequence length in tokens."""
    max_position_embeddings: PositiveInt | None = None
    """Number of learned positions (``gpt2``); default ``seq_length``."""
    rotary_base: PositiveInt = 10000
    norm_epsilon: PositiveFloat = 1e-5
    init_method_std: PositiveFloat = 0.02
    hidden_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    attention_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    share_embeddings_and_output_weights: bool | None = None
    """Tied embeddings; default: yes for ``gpt2``, no for ``llama``."""
    vocab_size: PositiveInt | None = None
    """Real vocabulary; default: the tokenizer's. The engine pads it; padding is never scored."""
    make_vocab_size_divisible_by: PositiveInt = 128

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Inner size of the MLP."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.family == "gpt2":
            return 4 * self.hidden_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64

    @property
    def max_positions(self) -> int:
        """Longest sequence the model takes."""
        return self.max_position_embeddings or self.seq_length

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output layer uses the embedding's weight."""
        tied = self.share_embeddings_and_output_weights
        return self.family == "gpt2" if tied is None else tied

    def resolved(self, vocab_size: int | None = None) -> ModelConfig:
        """This model with every default that depends on another field filled in.

        Args:
            vocab_size: the tokenizer's vocabulary size, for a model that names none.
        """
        return self.model_copy(
            update={
                "num_query_groups": self.num_key_value_heads,
                "kv_channels": self.head_size,
                "ffn_hidden_size": self.ffn_size,
                "max_position_embeddings": self.max_positions,
                "share_embeddings_and_output_weights": self.ties_embeddings,
                "vocab_size": self.vocab_size or vocab_size,
            }
        )


class ParallelConfig(Section):
    """How the model is spread over ranks; the data-parallel size is what remains of the world size."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    distributed_timeout_minutes: PositiveInt = 30


class PrecisionConfig(Section):
    """A named precision recipe (``engine/precision.py`` documents each one's megatron-core fields)."""

    recipe: Literal["fp32", "bf16"] = "bf16"
