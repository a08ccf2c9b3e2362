"""Llama (Touvron et al., 2023) and Mistral (Jiang et al., 2023), and what its descendants share with it."""

from __future__ import annotations

from megatron_tokedit.conversion.architecture import EMBEDDING, OUTPUT_LAYER, Architecture, Rule
from megatron_tokedit.conversion.layouts import GATE_UP, QKV, VOCABULARY

FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "intermediate_size": "ffn_hidden_size",
    "rms_norm_eps": "norm_epsilon",
    "initializer_range": "init_method_std",
    "attention_dropout": "attention_dropout",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "max_position_embeddings": "max_position_embeddings",
}
OURS, THEIRS = "decoder.layers.{layer}.", "model.layers.{layer}."
ENDS = (
    Rule(EMBEDDING, ("model.embed_tokens.weight",), VOCABULARY),
    Rule(OUTPUT_LAYER, ("lm_head.weight",), VOCABULARY),
)
QKV_WEIGHT = Rule(
    f"{OURS}self_attention.linear_qkv.weight",
    tuple(f"{THEIRS}self_attn.{part}_proj.weight" for part in "qkv"),
    QKV,
)
PROJECTION = Rule(f"{OURS}self_attention.linear_proj.weight", (f"{THEIRS}self_attn.o_proj.weight",))
NORMS = (
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Rule(f"{OURS}input_layernorm.weight", (f"{THEIRS}input_layernorm.weight",)),
    Rule(f"{OURS}pre_mlp_layernorm.weight", (f"{THEIRS}post_attention_layernorm.weight",)),
)
MLP = (
    Rule(
        f"{OURS}mlp.linear_fc1.weight",
        (f"{THEIRS}mlp.gate_proj.weight", f"{THEIRS}mlp.up_proj.weight"),
        GATE_UP,
    ),
    Rule(f"{OURS}mlp.linear_fc2.weight", (f"{THEIRS}mlp.down_proj.weight",)),
)

LLAMA = Architecture(
    family="llama",
    model_types=("llama", "mistral"),
    class_name="LlamaForCausalLM",
    fields=FIELDS,
    computed={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    rules=(*ENDS, *NORMS, QKV_WEIGHT, PROJECTION, *MLP),
)
