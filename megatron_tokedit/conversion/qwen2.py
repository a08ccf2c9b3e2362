"""Qwen2 and Qwen2.5 (Yang et al., 2024): Llama with biases on queries, keys and values."""

from __future__ import annotations

from megatron_tokedit.conversion import llama
from megatron_tokedit.conversion.architecture import Architecture, Rule
from megatron_tokedit.conversion.layouts import QKV

_QKV_BIAS = Rule(
    f"{llama.OURS}self_attention.linear_qkv.bias",
    tuple(f"{llama.THEIRS}self_attn.{part}_proj.bias" for part in "qkv"),
    QKV,
)

QWEN2 = Architecture(
    family="qwen2",
    model_types=("qwen2",),
    class_name="Qwen2ForCausalLM",
    fields=llama.FIELDS,
    computed={"hidden_act": ("silu",)},
    states_head_size=False,
    rules=(*llama.ENDS, *llama.NORMS, llama.QKV_WEIGHT, _QKV_BIAS, llama.PROJECTION, *llama.MLP),
)
