"""Every family computes what its published implementation computes: same weights, same logits."""

from __future__ import annotations

import engine_cases
import pytest

from megatron_tokedit.testing.models import tiny_model

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
CASES = {
    "llama": ({"norm_epsilon": 1e-6}, "Llama", {}),
    "llama-scaled": (
        {"norm_epsilon": 1e-6, "rotary_base": 500000, "rope_scaling": True},
        "Llama",
        {"rope_parameters": LLAMA3},
    ),
    "qwen2": ({"norm_epsilon": 1e-6}, "Qwen2", {}),
    "qwen3": ({"norm_epsilon": 1e-6, "kv_channels": 16}, "Qwen3", {"head_dim": 16}),
    "olmo": ({}, "Olmo", {"pad_token_id": 1, "eos_token_id": 1}),
    "mixtral": ({"rotary_base": 1000000}, "Mixtral", {"num_local_experts": 4}),
}


def published(name, fields):
    """A Hugging Face model of the tiny size with random weights."""
    import torch
    import transformers

    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=engine_cases.VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        initializer_range=0.2,
        **fields,
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        if "norm" in key or "bias" in key:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model


def our_names(theirs, num_layers, num_groups):
    """Their state dict under our names: queries, keys and values by group, gate above up."""
    import torch

    ours = {"embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
            "output_layer.weight": theirs["lm_head.weight"]}  # fmt: skip
    if "model.norm.weight" in theirs:
        ours["decoder.final_layernorm.weight"] = theirs["model.norm.weight"]
    simple = {
        "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
        "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
        "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
        "input_layernorm.weight": "input_layernorm.weight",
        "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
        "mlp.down_proj.weight": "mlp.linear_fc2.weight",
        "mlp.gate.weight": "mlp.router.weight",
    }
    for layer in range(num_layers):
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        ours |= {target + new: theirs[source + old] for old, new in simple.items() if source + old in theirs}
        for kind in ("weight", "bias"):
            if f"{source}self_attn.q_proj.{kind}" in theirs:
                parts = [theirs[f"{source}self_attn.{part}_proj.{kind}"] for part in "qkv"]
                by_group = [part.view(num_groups, -1, *part.shape[1:]) for part in parts]
                merged = torch.cat(by_group, dim=1).flatten(0, 1)
                ours[f"{target}self_attention.linear_qkv.{kind}"] = merged
        if f"{source}mlp.gate_proj.weight" in theirs:
            pair = [theirs[f"{source}mlp.{part}_proj.weight"] for part in ("gate", "up")]
            ours[f"{target}mlp.linear_fc1.weight"] = torch.cat(pair)
        else:
            experts = f"{target}mlp.experts.local_experts"
            for index, pair in enumerate(theirs[f"{source}mlp.experts.gate_up_proj"]):
                ours[f"{experts}.{index}.linear_fc1.weight"] = pair
                ours[f"{experts}.{index}.linear_fc2.weight"] = theirs[f"{source}mlp.experts.down_proj"][index]
    return ours


def both_logits(model, name, fields):
    import torch

    from megatron_tokedit.engine.model import unwrap

    reference = published(name, fields)
    gpt = unwrap(engine_cases.start(model).model[0]).eval()
    state = our_names(reference.state_dict(), model.num_layers, model.num_key_value_heads)
    padding = engine_cases.VOCAB_SIZE
    with torch.no_grad():
        parameters = dict(gpt.named_parameters())
        assert parameters.keys() == state.keys()
        for key, parameter in parameters.items():
            parameter[: len(state[key])] = state[key]
        ids = torch.randint(0, padding, (3, 32), generator=torch.Generator().manual_seed(1))
        positions = torch.arange(32).expand(3, -1)
        return gpt(ids, positions, None)[..., :padding].numpy(), reference(ids).logits.numpy()


@pytest.mark.parametrize("name", CASES)
def test_same_weights_same_logits(ranks, name):
    changes, reference, fields = CASES[name]
    model = tiny_model(name.split("-")[0], **changes)
    ((got, want),) = ranks.run(both_logits, model, reference, fields, world_size=1)
    assert abs(want).max() > 1.0
    assert got == pytest.approx(want, abs=2e-4)
