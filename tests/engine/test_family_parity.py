"""Every family computes what its published implementation computes: same weights, same logits."""

from __future__ import annotations

import tempfile
from pathlib import Path

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


def our_names(reference, model):
    """Its weights as it publishes them, under our names."""
    from megatron_tokedit.conversion.architecture import to_ours
    from megatron_tokedit.conversion.layouts import Sizes
    from megatron_tokedit.conversion.registry import ARCHITECTURES
    from megatron_tokedit.conversion.safetensors_files import list_tensors, read_tensor

    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        tensors, faults = list_tensors(Path(folder))
        assert not faults
        theirs = {name: read_tensor(tensor) for name, tensor in tensors.items()}
    return to_ours(ARCHITECTURES[model.family], Sizes(model, engine_cases.VOCAB_SIZE), theirs)


def both_logits(model, name, fields):
    import torch

    from megatron_tokedit.engine.model import unwrap

    reference = published(name, fields)
    gpt = unwrap(engine_cases.start(model).model[0]).eval()
    state = our_names(reference, model)
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
