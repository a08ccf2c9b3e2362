from __future__ import annotations

import engine_cases
import pytest

from megatron_tokedit.errors import CheckpointError
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
