"""What may be drawn is what transformers leaves; how often is the exact probability."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from generation_cases import bigram_model
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_tokedit.errors import CheckpointError, ConfigError
from megatron_tokedit.generation import GenerationSettings, Prompt, generate
from megatron_tokedit.generation.sampling import choose, restrict, uniforms_of

RULES = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.6},
    {"temperature": 0.3, "top_p": 0.95},
]


def transformers_scores(logits: torch.Tensor, settings: GenerationSettings) -> torch.Tensor:
    """What transformers' generate makes of logits under the same settings."""
    scores = TemperatureLogitsWarper(settings.temperature)(None, logits)
    if settings.top_k is not None:
        scores = TopKLogitsWarper(settings.top_k)(None, scores)
    return scores if settings.top_p is None else TopPLogitsWarper(settings.top_p)(None, scores)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("vocab_size", [2, 40, 3000])
def test_leaves_what_transformers_leaves(rules, vocab_size):
    settings = GenerationSettings(**rules)
    logits = 3.0 * torch.randn(50, vocab_size, generator=torch.Generator().manual_seed(0))
    ours = restrict(logits / settings.temperature, settings.top_k, settings.top_p)
    assert torch.equal(ours, transformers_scores(logits.clone(), settings))


def test_a_nucleus_wider_than_the_first_look():
    logits = torch.zeros(2, 40000)
    logits[:, 7] = 3.0
    kept = restrict(logits, None, 0.9).isfinite().sum(dim=1)
    mass = np.exp(3.0) + 39999
    assert kept.tolist() == [1 + int(np.ceil(0.9 * mass - np.exp(3.0)))] * 2


def test_ties_at_the_end_of_the_top_k_stay():
    assert restrict(torch.tensor([[1.0, 5.0, 1.0, 0.0]]), 2, None).isfinite().tolist() == [
        [True, True, True, False]
    ]


@pytest.mark.parametrize("rules", RULES)
def test_frequencies_are_the_probabilities(rules):
    """Pearson's chi-square over 40,000 draws with a fixed seed, against transformers' probabilities."""
    settings = GenerationSettings(**rules)
    logits = 1.5 * torch.randn(1, 30, generator=torch.Generator().manual_seed(1))
    exact = transformers_scores(logits, settings).double().softmax(-1)[0].numpy()
    uniforms = np.random.default_rng(5).random(40000)
    drawn = choose(logits.expand(len(uniforms), -1), uniforms, settings)
    counts = np.bincount(drawn, minlength=30)
    assert not counts[exact == 0.0].any()
    usual = exact * len(uniforms) >= 5
    expected = exact[usual] * len(uniforms)
    chi_square = ((counts[usual] - expected) ** 2 / expected).sum()
    freedom = usual.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_texts_have_the_bigrams_of_the_model():
    """The whole way: pairs in sampled texts against the model's conditional probabilities."""
    model = bigram_model(eod_bonus=0.0)
    settings = GenerationSettings(max_new_tokens=90, top_k=4, stop_at_eod=False, batch_rows=64)
    decoder = model.make_decoder()
    total, counts = 0.0, {}
    for completion in generate(model, [Prompt([model.start_id], range(300))], settings):
        for pair in zip([model.start_id, *completion.ids], completion.ids, strict=False):
            counts[pair] = counts.get(pair, 0) + 1
    befores = {}
    for (before, _), count in counts.items():
        befores[before] = befores.get(before, 0) + count
    freedom = 0
    for before, count in befores.items():
        exact = restrict(decoder.add([[before]]), 4, None).double().softmax(-1)[0].numpy()
        for id_ in np.flatnonzero(exact * count >= 5):
            expected = exact[id_] * count
            total += (counts.get((before, int(id_)), 0) - expected) ** 2 / expected
            freedom += 1
    assert freedom > 300
    assert total < freedom + 4 * np.sqrt(2 * freedom)  # rows of the table give up one degree each: generous


def test_a_uniform_chooses_by_the_inverse_cdf():
    logits = torch.tensor([0.5, 0.0, 0.3, 0.2]).log()[None].expand(6, -1)
    uniforms = [0.0, 0.4999, 0.5001, 0.7999, 0.8001, 1.0 - 2**-53]
    assert choose(logits, uniforms, GenerationSettings()) == [0, 0, 2, 2, 3, 3]
    assert choose(logits, [], GenerationSettings(temperature=0.0)) == [0] * 6


def test_numbers_are_keyed_by_seed_prompt_and_sample():
    keys = [([1, 2], 0, 7), ([1, 2], 1, 7), ([1, 2], 0, 8), ([1, 3], 0, 7), ([1, 2, 0], 0, 7)]
    numbers = {uniforms_of(*key).random() for key in keys}
    assert len(numbers) == len(keys)
    assert uniforms_of((1, 2), 0, 7).random() == uniforms_of([1, 2], 0, 7).random()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(bad):
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(CheckpointError, match="not finite numbers"):
        choose(logits, [0.5, 0.5], GenerationSettings())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("batch_rows", 0),
        ("top_k", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", -1),
        ("seed", 2**64),
        ("stop_texts", ("a", "")),
    ],
)
def test_settings_that_cannot_be_honoured(field, value):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        dataclasses.replace(GenerationSettings(), **{field: value})


def test_all_faults_at_once():
    with pytest.raises(ConfigError, match=r"(?s)top_k: 0.*top_p: 2"):
        GenerationSettings(top_k=0, top_p=2.0)
