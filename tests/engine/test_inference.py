from __future__ import annotations

import math

import engine_cases
import pytest
import torch

from megatron_tokedit.config.recipes import RECIPES
from megatron_tokedit.config.sections import PrecisionConfig
from megatron_tokedit.engine.inference import fill_up, scoring_precision
from megatron_tokedit.errors import CheckpointError, ConfigError
from megatron_tokedit.testing.models import tiny_gpt2, tiny_llama, tiny_model

MODELS = {
    "llama": tiny_llama(),
    "gpt2": tiny_gpt2(),
    "tied": tiny_llama(share_embeddings_and_output_weights=True),
    "qwen3": tiny_model("qwen3"),
    "olmo": tiny_model("olmo"),
    "mixtral": tiny_model("mixtral"),
}


def logits_of_saved(folder, model):
    """Train two steps under TP2, save, and return the full logits of fixed ids."""
    import torch
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_tokedit.engine.model import unwrap

    run = engine_cases.start(model, tp=2, layout={"sequence_parallel": True})
    run.steps(2)
    run.save(folder, 2)
    ids = torch.arange(40).reshape(2, 20)
    gpt = unwrap(run.model[0]).eval()
    with torch.no_grad():
        logits = gpt(ids, torch.arange(20).expand(2, -1), None)
    return gather_from_tensor_model_parallel_region(logits).numpy()


def logits_of_language_model(folder):
    import torch

    from megatron_tokedit.engine.inference import load_language_model

    lm = load_language_model(folder, device="cpu")
    ids = torch.arange(40).reshape(2, 20)
    hidden = lm.hidden_states(ids)
    padded = torch.nn.functional.pad(ids, (0, 7))
    causal = torch.equal(hidden, lm.hidden_states(padded)[:, :20]) or torch.allclose(
        hidden, lm.hidden_states(padded)[:, :20], atol=1e-6
    )
    return (hidden @ lm.output_weight.T).numpy(), lm.vocab_size, lm.max_context_tokens, lm.fingerprint, causal


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_give_the_models_logits(ranks, tmp_path, name):
    want = ranks.run(logits_of_saved, tmp_path, MODELS[name], world_size=2)[0]
    ((got, vocab_size, context, fingerprint, causal),) = ranks.run(
        logits_of_language_model, tmp_path, world_size=1
    )
    assert got == pytest.approx(want, abs=2e-5)
    assert (vocab_size, context) == (engine_cases.VOCAB_SIZE, 32)
    assert len(fingerprint) == 64
    assert causal


def fingerprints(folder):
    from megatron_tokedit.config.sections import PrecisionConfig
    from megatron_tokedit.engine.inference import load_language_model

    return [
        load_language_model(folder, precision=PrecisionConfig(recipe=recipe)).fingerprint
        for recipe in ("fp32", "fp32", "bf16")
    ]


def resave_under_other_layout(folder, other):
    run = engine_cases.start(tiny_llama(), tp=2)
    run.load(folder)
    run.save(other, 9)


def test_fingerprint_follows_weights_and_dtype_not_layout(ranks, tmp_path):
    ranks.run(engine_cases.train_and_save, tmp_path / "a", tiny_llama(), 1, world_size=1)
    ranks.run(resave_under_other_layout, tmp_path / "a", tmp_path / "b", world_size=2)
    ((first, again, bf16),) = ranks.run(fingerprints, tmp_path / "a", world_size=1)
    ((moved, _, _),) = ranks.run(fingerprints, tmp_path / "b", world_size=1)
    assert first == again == moved != bf16


def refused(folder):
    from megatron_tokedit.engine.inference import load_language_model

    try:
        load_language_model(folder)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_folder_without_checkpoint(ranks, tmp_path):
    (message,) = ranks.run(refused, tmp_path, world_size=1)
    assert "has no complete checkpoint" in message


FP8 = [recipe for recipe in RECIPES.values() if recipe.is_fp8]


@pytest.mark.parametrize("multiple", sorted({recipe.token_multiple for recipe in FP8} | {1, 16}))
@pytest.mark.parametrize("max_positions", [7, 32, 1000])
def test_filled_up_inputs_have_the_tokens_that_a_product_takes(multiple, max_positions):
    for rows in (1, 2, 3, 5, 16):
        for length in (1, 2, 7, 15, 31, 32, 100):
            if length > max_positions:
                continue
            ids = torch.arange(rows * length).reshape(rows, length)
            filled = fill_up(ids, multiple, max_positions)
            assert filled.numel() % multiple == 0
            assert filled.size(1) <= max_positions
            assert torch.equal(filled[:rows, :length], ids)
            assert (filled[:, length:] == filled[:, length - 1 : length]).all()
            assert (filled[rows:] == filled[:1]).all()
            by_rows = length * math.ceil(rows / (step := multiple // math.gcd(length, multiple))) * step
            assert filled.numel() <= by_rows
            assert (filled.numel() == rows * length) == (rows * length % multiple == 0)


def hidden_states_filled_up(folder):
    """Largest difference between hidden states of filled-up inputs, of many sizes, and of plain ones."""
    from megatron_tokedit.engine.inference import load_language_model

    lm = load_language_model(folder, device="cpu")
    own, forward = lm.precision, lm.gpt.forward
    sizes, worst = [], 0.0

    def watched(ids, *args):
        sizes.append(tuple(ids.shape))
        return forward(ids, *args)

    lm.gpt.forward = watched
    for shape in ((1, 1), (3, 7), (2, 31), (5, 32), (1, 32)):
        ids = torch.randint(0, lm.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        lm.precision = own
        want = lm.hidden_states(ids)
        assert sizes.pop() == shape
        for recipe in FP8:
            lm.precision = PrecisionConfig(recipe=recipe.name)
            got = lm.hidden_states(ids)
            assert got.shape == want.shape
            worst = max(worst, (got - want).abs().max().item())
            assert math.prod(sizes.pop()) % recipe.token_multiple == 0
    return worst


def test_what_is_filled_up_leaves_no_trace(ranks, tmp_path):
    ranks.run(engine_cases.train_and_save, tmp_path, tiny_gpt2(), 1, world_size=1)
    (worst,) = ranks.run(hidden_states_filled_up, tmp_path, world_size=1)
    assert worst < 1e-5


def test_what_a_checkpoint_is_scored_in():
    recorded = PrecisionConfig(
        recipe="fp8_tensorwise",
        num_layers_at_start_in_bf16=1,
        cross_entropy_loss_fusion=True,
        cuda_graph_impl="local",
    )
    for asked in (None, "fp8_tensorwise"):
        found = scoring_precision(recorded, asked)
        assert (found.recipe, found.num_layers_at_start_in_bf16) == ("fp8_tensorwise", 1)
        assert (found.cuda_graph_impl, found.cross_entropy_loss_fusion) == ("none", None)
    assert scoring_precision(recorded, "fp8_blockwise") == PrecisionConfig(recipe="fp8_blockwise")
    assert scoring_precision(recorded, PrecisionConfig(recipe="fp32")).recipe == "fp32"
    with pytest.raises(ConfigError, match="fp8_delayed scales by what was computed before"):
        scoring_precision(PrecisionConfig(recipe="fp8_delayed"), None)
    assert scoring_precision(PrecisionConfig(recipe="fp8_delayed"), "bf16").recipe == "bf16"


def matrix_parameters(folder):
    from megatron_tokedit.engine.inference import load_language_model

    return load_language_model(folder, device="cpu").count_parameters()[1]


@pytest.mark.parametrize("family", ["olmo", "mixtral"])
def test_matrix_parameters_are_those_a_token_meets(ranks, tmp_path, family):
    from megatron_tokedit.engine.sizes import flops_per_token

    model = tiny_model(family)
    ranks.run(engine_cases.train_and_save, tmp_path, model, 1, world_size=1)
    (counted,) = ranks.run(matrix_parameters, tmp_path, world_size=1)
    attention = model.num_layers * 4 * model.hidden_size * (model.seq_length + 1) / 2
    assert 2 * counted == flops_per_token(model, engine_cases.VOCAB_SIZE) / 3 - attention
