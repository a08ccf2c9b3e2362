"""The model, how it is spread over ranks, and its precision; names as in megatron-core."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_tokedit.config.base import Section
from megatron_tokedit.config.families import FAMILIES, Family, FamilyName
from megatron_tokedit.config.recipes import RECIPES, Recipe, RecipeName


class ModelConfig(Section):
    """A GPT model; names as in megatron-core's ``TransformerConfig`` and ``GPTModel``."""

    family: FamilyName = "llama"
    """What the sizes do not say: norms, positions, activation, biases, experts (``config/families.py``)."""
    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt | None = None
    """Key/value heads (GQA); default: as many as attention heads."""
    kv_channels: PositiveInt | None = None
    """Size of a head; default ``hidden_size / num_attention_heads``."""
    ffn_hidden_size: PositiveInt | None = None
    """Default: 4 x hidden_size for ``gpt2``; else 8/3 x hidden_size, up to a multiple of 64."""
    seq_length: PositiveInt
    """Training sequence length in tokens."""
    max_position_embeddings: PositiveInt | None = None
    """Number of learned positions (``gpt2``); default ``seq_length``."""
    rotary_base: PositiveInt = 10000
    rope_scaling: bool = False
    """Llama 3.1's scaling of the rotary frequencies, for more positions than a model was trained with."""
    rope_scaling_factor: PositiveFloat | None = None
    """Of ``rope_scaling``; default 8."""
    seq_len_interpolation_factor: float | None = Field(default=None, gt=1.0)
    """Divide rotary positions by this factor (linear interpolation)."""
    norm_epsilon: PositiveFloat = 1e-5
    init_method_std: PositiveFloat = 0.02
    hidden_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    attention_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    share_embeddings_and_output_weights: bool | None = None
    """Tied embeddings; default: the family's (yes for ``gpt2`` only)."""
    num_moe_experts: PositiveInt | None = None
    """Experts a layer; needed by ``mixtral``, for it alone."""
    moe_router_topk: PositiveInt = 2
    """Experts a token is sent to."""
    moe_aux_loss_coeff: NonNegativeFloat = 0.02
    """Weight of the load-balancing loss (Fedus et al., 2022), which no reported loss holds; 0: none."""
    moe_z_loss_coeff: PositiveFloat | None = None
    """Weight of the router's z-loss (Zoph et al., 2022); default: none."""
    vocab_size: PositiveInt | None = None
    """Real vocabulary; default: the tokenizer's. The engine pads it; padding is never scored."""
    make_vocab_size_divisible_by: PositiveInt = 128

    @property
    def family_traits(self) -> Family:
        """The family's row of the table."""
        return FAMILIES[self.family]

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
        return self.family_traits.default_ffn_hidden_size(self.hidden_size)

    @property
    def max_positions(self) -> int:
        """Longest sequence the model takes."""
        return self.max_position_embeddings or self.seq_length

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output layer uses the embedding's weight."""
        tied = self.share_embeddings_and_output_weights
        return self.family_traits.share_embeddings_and_output_weights if tied is None else tied

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
    """How the model is spread over ranks, and what is computed twice to save memory.

    The data-parallel size is what remains of the world size. Names as in megatron-core.
    """

    tensor_model_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks along the sequence (arXiv 2205.05198)."""
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: PositiveInt = 1
    """Chunks of layers a rank holds (the interleaved schedule; arXiv 2104.04473)."""
    context_parallel_size: PositiveInt = 1
    """Split every sequence over this many ranks; needs Transformer Engine's attention, so a GPU."""
    expert_model_parallel_size: PositiveInt = 1
    """Spread the experts over this many of the data-parallel ranks."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradients while the backward pass goes on; default: on a GPU with data parallelism."""
    overlap_param_gather: bool | None = None
    """Gather updated parameters while the forward pass goes on; default: as ``overlap_grad_reduce`` where
    the optimizer is distributed."""
    tp_comm_overlap: bool = False
    """Overlap tensor-parallel communication with the products around it (Transformer Engine's user buffers);
    needs ``sequence_parallel`` and GPUs of one node with a direct link."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Compute activations again in the backward pass: of whole layers, or of ``recompute_modules``."""
    recompute_method: Literal["uniform", "block"] | None = None
    """``full`` only: every so many layers in one unit, or so many single layers a stage."""
    recompute_num_layers: PositiveInt | None = None
    """``full`` only: how many (see ``recompute_method``)."""
    recompute_modules: list[Literal["core_attn", "layernorm", "mlp", "moe"]] | None = None
    """``selective`` only; default ``[core_attn]``."""
    distributed_timeout_minutes: PositiveInt = 30


class PrecisionConfig(Section):
    """A named precision recipe (``engine/precision.py`` documents each one's megatron-core fields) and what
    goes with it; names as in megatron-core.
    """

    recipe: RecipeName = "bf16"
    """``fp8_*`` and ``mxfp8`` need a GPU that has the kernels, and Transformer Engine (docs/precision.md)."""
    fp8_param_gather: bool | None = None
    """Keep the weights of the linear layers in FP8 and gather them so; default: the recipe's where the
    optimizer is distributed. The optimizer's float32 main parameters are the exact ones."""
    num_layers_at_start_in_bf16: NonNegativeInt = 0
    """First layers that stay in bfloat16."""
    num_layers_at_end_in_bf16: NonNegativeInt = 0
    """Last layers that stay in bfloat16."""
    fp8_amax_history_len: PositiveInt | None = None
    """``fp8_delayed`` only: steps whose largest values the scales are taken from; default 1024."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] | None = None
    """``fp8_delayed`` only: which of them; default ``max``."""
    cross_entropy_loss_fusion: bool | None = None
    """Compute the loss in fused kernels; default: on a GPU with Transformer Engine."""
    cross_entropy_fusion_impl: Literal["native", "te"] | None = None
    """Whose: megatron-core's compiled ones, or Transformer Engine's; default ``te`` where it is there."""
    cuda_graph_impl: Literal["none", "local", "transformer_engine"] = "none"
    """Record the kernels of a layer once and replay them: megatron-core's way, or Transformer Engine's."""
    cuda_graph_scope: list[Literal["attn", "mlp", "moe_router"]] | None = None
    """Parts of a layer that a graph holds; default: all."""

    @property
    def traits(self) -> Recipe:
        """The recipe's row of the table."""
        return RECIPES[self.recipe]

    @property
    def is_fp8(self) -> bool:
        """Whether matrix products are in FP8."""
        return self.traits.is_fp8

    @property
    def compute_dtype(self) -> Literal["fp32", "bf16"]:
        """Of everything that is not quantized."""
        return self.traits.compute_dtype

    def resolved(self, parallel: ParallelConfig) -> PrecisionConfig:
        """This precision with the recipe's defaults filled in."""
        update: dict[str, object] = {}
        if self.is_fp8:
            update["fp8_param_gather"] = self.keeps_fp8_parameters(parallel)
        if self.traits.has_amax_history:
            update["fp8_amax_history_len"] = self.fp8_amax_history_len or self.traits.amax_history_len
            update["fp8_amax_compute_algo"] = self.fp8_amax_compute_algo or "max"
        return self.model_copy(update=update)

    def keeps_fp8_parameters(self, parallel: ParallelConfig) -> bool:
        """Whether the weights of the linear layers are kept in FP8 under a layout."""
        if self.fp8_param_gather is not None:
            return self.fp8_param_gather
        return bool(self.traits.param_gather) and parallel.use_distributed_optimizer
