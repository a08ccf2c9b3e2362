"""Every family and every shipped example is built, and has as many parameters as was published."""

from __future__ import annotations

from pathlib import Path

import engine_cases
import pytest

from megatron_tokedit.config.families import FAMILIES
from megatron_tokedit.config.load import load_config
from megatron_tokedit.config.record import resolve
from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tokedit.engine import model as engine_model
from megatron_tokedit.testing.models import tiny_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

PUBLISHED = {
    "gpt2_124m": 124_439_808,  # openai-community/gpt2's model.safetensors
    "llama3_8b": 8_030_261_248,  # meta-llama/Meta-Llama-3-8B's model card
    "qwen2_0.5b": 494_032_768,  # Qwen/Qwen2-0.5B's model card
    "olmo_1b": 1_176_764_416,  # allenai/OLMo-1B-hf's model card
    # "237M" in the paper of token editing; exactly 2 x 50304 x 1024 + 8 x (4 x 1024^2 + 3 x 1024 x 4096)
    "olmo_237m": 237_240_320,
    # by hand; the tokenizer has 1024 pieces
    "tiny_cpu": 328_256,  # 2 x 1024 x 64 + 4 x (12288 + 3 x 64 x 192 + 128) + 64
    "tiny_sft_cpu": 328_256,  # fine-tunes tiny_cpu
    "tiny_moe_cpu": 575_040,  # 2 x 1024 x 64 + 4 x (12288 + 4 x 3 x 64 x 128 + 4 x 64 + 128) + 64
}

MIXTRAL_8X7B = {
    "family": "mixtral", "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
    "num_query_groups": 8, "ffn_hidden_size": 14336, "num_moe_experts": 8, "seq_length": 4096,
}  # fmt: skip
QWEN3_0_6B = {
    "family": "qwen3", "num_layers": 28, "hidden_size": 1024, "num_attention_heads": 16,
    "num_query_groups": 8, "kv_channels": 128, "ffn_hidden_size": 3072, "seq_length": 4096,
    "share_embeddings_and_output_weights": True,
}  # fmt: skip
OTHER_PUBLISHED = {
    "mixtral-8x7b": (MIXTRAL_8X7B, 32_000, 46_702_792_704),  # mistralai/Mixtral-8x7B-v0.1's model card
    "qwen3-0.6b": (QWEN3_0_6B, 151_936, 596_049_920),  # Qwen/Qwen3-0.6B's model card
}


def module_parameters(model, vocab_size):
    """Parameters of the real module, built without memory."""
    import torch
    from megatron.core import parallel_state

    from megatron_tokedit.engine.initialize import current_context, initialize

    ctx = (
        current_context()
        if parallel_state.is_initialized()
        else initialize(ParallelConfig(), seed=1, device="cpu")
    )
    config = engine_model.transformer_config(
        model, PrecisionConfig(recipe="bf16"), ParallelConfig(), ctx.device, perform_initialization=False
    )
    with torch.device("meta"):
        module = engine_model._gpt_model(model, config, ctx, vocab_size, False, 0)
    parameters = list(module.parameters())
    assert all(parameter.is_meta for parameter in parameters)
    return sum(parameter.numel() for parameter in parameters)


def example_parameters(path):
    model = resolve(load_config(path), vocab_size=1024).model
    return engine_model.num_parameters(model, model.vocab_size), module_parameters(model, model.vocab_size)


def test_every_preset_is_in_the_table():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_example_has_the_published_size(ranks, name):
    ((counted, built),) = ranks.run(example_parameters, EXAMPLES / f"{name}.yaml", world_size=1)
    assert counted == PUBLISHED[name]
    padded = engine_model.padded_vocab_size(50257, 128, 1) - 50257  # the only example that is padded
    assert built == counted + (padded * 768 if name == "gpt2_124m" else 0)


OTHERS = sorted(
    str(path.relative_to(EXAMPLES)) for path in EXAMPLES.glob("*/*.yaml") if path.parent.name != "collapse"
)


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_the_recipes_are_counted_exactly(ranks, name):
    ((counted, built),) = ranks.run(example_parameters, EXAMPLES / name, world_size=1)
    assert counted == built


@pytest.mark.parametrize("name", OTHER_PUBLISHED)
def test_published_sizes(ranks, name):
    fields, vocab_size, published = OTHER_PUBLISHED[name]
    model = ModelConfig(**fields)
    assert engine_model.num_parameters(model, vocab_size) == published
    assert ranks.run(module_parameters, model, vocab_size, world_size=1) == [published]


VARIANTS = {
    **{family: {} for family in FAMILIES},
    "llama-tied": {"share_embeddings_and_output_weights": True},
    "llama-wide-heads": {"kv_channels": 16},
    "gpt2-untied": {"share_embeddings_and_output_weights": False, "max_position_embeddings": 48},
    "qwen3-wide-heads": {"kv_channels": 16},
    "mixtral-three": {"num_moe_experts": 3, "moe_z_loss_coeff": 0.001},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count_is_exact(ranks, name):
    model = tiny_model(name.split("-")[0], **VARIANTS[name])
    assert ranks.run(module_parameters, model, 96, world_size=1) == [engine_model.num_parameters(model, 96)]


def multiplications(model):
    """Floating-point operations of a forward pass a token, counted by torch over real matrix products."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    run = engine_cases.start(model, vocab_size=96)
    tokens = torch.zeros(1, model.seq_length, dtype=torch.long)
    positions = torch.arange(model.seq_length)[None]
    gpt = engine_model.unwrap(run.model[0]).eval()
    mask = (
        torch.ones(model.seq_length, model.seq_length).triu(1)[None, None] > 0
    )  # through the unblocked kernel
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        gpt(tokens, positions, mask)
    return counter.get_total_flops() / model.seq_length


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_of_the_module(ranks, family):
    """Attention apart, which the formula counts for the causal half only."""
    model = tiny_model(family)
    (forward,) = ranks.run(multiplications, model, world_size=1)
    heads = model.num_attention_heads * model.head_size
    whole = model.num_layers * 4 * heads * model.seq_length
    half = model.num_layers * 4 * heads * (model.seq_length + 1) / 2
    assert engine_model.flops_per_token(model, 96) / 3 - half in (
        pytest.approx(forward - whole),
        pytest.approx(forward),
    )


def rotary_frequencies(changes):
    run = engine_cases.start(tiny_model("llama", **changes))
    embedding = engine_model.unwrap(run.model[0]).rotary_pos_emb
    return embedding.inv_freq.tolist(), embedding(8).flatten().tolist()


def test_rotary_scaling_reaches_the_model(ranks):
    slow = {"rotary_base": 500000}
    scaling = {**slow, "rope_scaling": True, "rope_scaling_factor": 4.0}
    ((plain, angles),) = ranks.run(rotary_frequencies, slow, world_size=1)
    ((scaled, _),) = ranks.run(rotary_frequencies, scaling, world_size=1)
    ((same, halved),) = ranks.run(
        rotary_frequencies, {**slow, "seq_len_interpolation_factor": 2.0}, world_size=1
    )
    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 4)  # only slow rotations are scaled
    assert same == plain
    assert halved == pytest.approx([angle / 2 for angle in angles])
