"""OLMo 1 (Groeneveld et al., 2024): Llama with layer norms that have no weights."""

from __future__ import annotations

from megatron_tokedit.conversion import llama
from megatron_tokedit.conversion.architecture import Architecture

OLMO = Architecture(
    family="olmo",
    model_types=("olmo",),
    class_name="OlmoForCausalLM",
    fields={theirs: ours for theirs, ours in llama.FIELDS.items() if theirs != "rms_norm_eps"},
    computed={"hidden_act": ("silu",), "attention_bias": (False,), "clip_qkv": (None,)},
    ours_computed={"norm_epsilon": 1e-5},
    states_head_size=False,
    rules=(*llama.ENDS, llama.QKV_WEIGHT, llama.PROJECTION, *llama.MLP),
)
