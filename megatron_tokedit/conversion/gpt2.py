"""GPT-2 (Radford et al., 2019): learned positions, biases everywhere, linear layers stored transposed."""

from __future__ import annotations

from megatron_tokedit.config.model import ModelConfig
from megatron_tokedit.conversion.architecture import EMBEDDING, OUTPUT_LAYER, Architecture, Rule
from megatron_tokedit.conversion.layouts import FUSED_QKV, TRANSPOSED, VOCABULARY

_OURS, _THEIRS = "decoder.layers.{layer}.", "transformer.h.{layer}."


def _both(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """Weight and bias of a norm."""
    return Rule(f"{ours}.weight", (f"{theirs}.weight",)), Rule(f"{ours}.bias", (f"{theirs}.bias",))


def _linear(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """Weight and bias of a linear layer."""
    return Rule(f"{ours}.weight", (f"{theirs}.weight",), TRANSPOSED), Rule(
        f"{ours}.bias", (f"{theirs}.bias",)
    )


def _check(model: ModelConfig) -> list[str]:
    faults = []
    if model.num_key_value_heads != model.num_attention_heads:
        faults.append(
            f"model.num_query_groups: {model.num_key_value_heads}; GPT-2 has as many key/value heads as "
            f"attention heads, {model.num_attention_heads}"
        )
    width = model.num_attention_heads * model.head_size
    if width != model.hidden_size:
        faults.append(
            f"model.kv_channels: {model.num_attention_heads} heads of {model.head_size} make {width}; "
            f"GPT-2's make hidden_size = {model.hidden_size}"
        )
    return faults


GPT2 = Architecture(
    family="gpt2",
    model_types=("gpt2",),
    class_name="GPT2LMHeadModel",
    prefix="transformer.",
    fields={
        "n_layer": "num_layers",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_inner": "ffn_hidden_size",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "norm_epsilon",
        "initializer_range": "init_method_std",
        "attn_pdrop": "attention_dropout",
        "resid_pdrop": "hidden_dropout",
        "embd_pdrop": "hidden_dropout",
        "tie_word_embeddings": "share_embeddings_and_output_weights",
    },
    computed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    head_size_name=None,
    ignored=r".*\.attn\.(bias|masked_bias)",
    check=_check,
    rules=(
        Rule(EMBEDDING, ("transformer.wte.weight",), VOCABULARY),
        Rule("embedding.position_embeddings.weight", ("transformer.wpe.weight",)),
        Rule(OUTPUT_LAYER, ("lm_head.weight",), VOCABULARY),
        *_both("decoder.final_layernorm", "transformer.ln_f"),
        *_both(f"{_OURS}input_layernorm", f"{_THEIRS}ln_1"),
        *_both(f"{_OURS}pre_mlp_layernorm", f"{_THEIRS}ln_2"),
        Rule(f"{_OURS}self_attention.linear_qkv.weight", (f"{_THEIRS}attn.c_attn.weight",), FUSED_QKV),
        Rule(f"{_OURS}self_attention.linear_qkv.bias", (f"{_THEIRS}attn.c_attn.bias",), FUSED_QKV),
        *_linear(f"{_OURS}self_attention.linear_proj", f"{_THEIRS}attn.c_proj"),
        *_linear(f"{_OURS}mlp.linear_fc1", f"{_THEIRS}mlp.c_fc"),
        *_linear(f"{_OURS}mlp.linear_fc2", f"{_THEIRS}mlp.c_proj"),
    ),
)
