"""Qwen3 (Yang et al., 2025): Llama with a norm on every query and key head."""

from __future__ import annotations

from megatron_tokedit.conversion import llama
from megatron_tokedit.conversion.architecture import Architecture, Rule

_HEAD_NORMS = tuple(
    Rule(
        f"{llama.OURS}self_attention.{part}_layernorm.weight",
        (f"{llama.THEIRS}self_attn.{part}_norm.weight",),
    )
    for part in "qk"
)

QWEN3 = Architecture(
    family="qwen3",
    model_types=("qwen3",),
    class_name="Qwen3ForCausalLM",
    fields=llama.FIELDS,
    computed={"hidden_act": ("silu",), "attention_bias": (False,)},
    rules=(*llama.ENDS, *llama.NORMS, llama.QKV_WEIGHT, *_HEAD_NORMS, llama.PROJECTION, *llama.MLP),
)
