"""Mixtral (Jiang et al., 2024): Mistral with experts in the place of every MLP."""

from __future__ import annotations

from megatron_tokedit.conversion import llama
from megatron_tokedit.conversion.architecture import Architecture, Rule
from megatron_tokedit.conversion.layouts import GATE_UP

_OURS = f"{llama.OURS}mlp.experts.local_experts.{{expert}}."
_THEIRS = f"{llama.THEIRS}block_sparse_moe.experts.{{expert}}."
_EXPERTS = (
    Rule(f"{llama.OURS}mlp.router.weight", (f"{llama.THEIRS}block_sparse_moe.gate.weight",)),
    Rule(f"{_OURS}linear_fc1.weight", (f"{_THEIRS}w1.weight", f"{_THEIRS}w3.weight"), GATE_UP),
    Rule(f"{_OURS}linear_fc2.weight", (f"{_THEIRS}w2.weight",)),
)

MIXTRAL = Architecture(
    family="mixtral",
    model_types=("mixtral",),
    class_name="MixtralForCausalLM",
    fields={
        **llama.FIELDS,
        "num_local_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
        "router_aux_loss_coef": "moe_aux_loss_coeff",
    },
    computed={"hidden_act": ("silu",)},
    rules=(*llama.ENDS, *llama.NORMS, llama.QKV_WEIGHT, llama.PROJECTION, *_EXPERTS),
)
