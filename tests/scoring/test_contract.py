"""Every scorer keeps the one contract; what a check means is told in contract.py."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent))

import contract

from megatron_tokedit.scoring import candidates, head
from megatron_tokedit.scoring.base import CandidateRequest, Nucleus
from megatron_tokedit.scoring.load import identify_prior, load_scorer
from megatron_tokedit.scoring.scorer import CausalScorer
from megatron_tokedit.testing.fake_prior import BigramBackbone, BigramScorer, random_bigrams
from megatron_tokedit.testing.models import write_hf_gpt2, write_hf_llama

VOCAB = 31


def bigram_subject(table, make, **changes):
    def logprobs(ids):
        return np.log(table[ids]).astype(np.float32)

    return contract.Subject(make, logprobs, len(table), **{"tolerance": 1e-4, **changes})


def exact_fake(table):
    return bigram_subject(table, lambda options: BigramScorer(table, options.start_id), has_windows=False)


def bigram_scorer(table, **settings):
    return bigram_subject(table, lambda options: CausalScorer(BigramBackbone(table), options, **settings))


def hugging_face(folder, **settings):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    identity = identify_prior(str(folder))

    def make(options):
        scorer = load_scorer(identity, options, device="cpu")
        return CausalScorer(scorer.backbone, options, **settings)

    @contract.remembered
    @torch.inference_mode()
    def logprobs(ids):
        return model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()

    return contract.Subject(make, logprobs, identity.vocab_size)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("priors")
    sharp = {"initializer_range": 0.5}
    write_hf_llama(root / "llama", vocab_size=61, **sharp)
    write_hf_gpt2(root / "gpt2", vocab_size=59, **sharp)
    return root


@pytest.fixture(params=["fake", "direct", "deferred", "blocks", "hf llama", "hf gpt2", "hf deferred"])
def subject(request, folders, monkeypatch):
    table = random_bigrams(VOCAB, seed=1)
    if request.param in ("blocks", "hf gpt2"):  # so that the tiny vocabulary has several column blocks
        monkeypatch.setattr(head, "_CPU_COLUMNS", 4)
    match request.param:
        case "fake":
            return exact_fake(table)
        case "direct" | "blocks":
            return bigram_scorer(table)
        case "deferred":
            return bigram_scorer(table, deferred=True)
        case "hf llama":
            return hugging_face(folders / "llama")
        case "hf gpt2":
            return hugging_face(folders / "gpt2")
    return hugging_face(folders / "llama", deferred=True)


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_the_contract(subject, check):
    check(subject)


@pytest.mark.parametrize("columns", [3, 4, 1024])
@pytest.mark.parametrize("deferred", [False, True])
def test_ties_go_to_the_lowest_id(monkeypatch, columns, deferred):
    """Integer weights: many ids of a row are equally probable, at the last place too."""
    monkeypatch.setattr(head, "_CPU_COLUMNS", columns)
    weights = np.random.default_rng(3).integers(1, 4, (VOCAB, VOCAB)).astype(float)
    table = weights / weights.sum(axis=1, keepdims=True)
    backbone = BigramBackbone(table)
    real = CausalScorer(backbone, contract.options(start_id=1), deferred=deferred)
    documents = bigram_scorer(table).documents()
    for k in (1, 2, 3, 5, 9, 28):
        request = CandidateRequest(k, contract.EVERYTHING, contract.EXCLUDED)
        for ours, exact in zip(
            real.score(documents, request), BigramScorer(table, 1).score(documents, request), strict=True
        ):
            np.testing.assert_array_equal(ours.candidate_ids_EK, exact.candidate_ids_EK)


def test_deferred_results_are_the_direct_ones(folders):
    subject = hugging_face(folders / "llama")
    backbone = subject.scorer().backbone
    for request in (
        CandidateRequest(4, contract.SOME, contract.EXCLUDED),
        CandidateRequest(None, contract.SOME, contract.EXCLUDED, Nucleus(0.95, 1.5)),
    ):
        direct, deferred = (
            CausalScorer(backbone, contract.options(start_id=1), deferred=deferred).score(
                subject.documents(), request
            )
            for deferred in (False, True)
        )
        for a, b in zip(direct, deferred, strict=True):
            np.testing.assert_allclose(a.logprobs_T, b.logprobs_T, atol=1e-6)
            np.testing.assert_array_equal(a.candidate_ids_EK, b.candidate_ids_EK)
            np.testing.assert_allclose(a.candidate_logprobs_EK, b.candidate_logprobs_EK, atol=1e-6)


def test_deferred_batches_are_launched_ahead():
    """The forward of a batch is asked for before the batch before it is taken in."""
    order = []

    class Watched(BigramBackbone):
        def hidden_states(self, ids_BL):
            order.append("forward")
            return super().hidden_states(ids_BL)

    scorer = CausalScorer(Watched(random_bigrams(VOCAB, seed=1)), contract.options(), deferred=True)
    scorer.score([np.arange(8, dtype=np.int32)] * 16, on_batch=lambda tokens: order.append("taken in"))
    assert order == ["forward", *["forward", "taken in"] * 3, "taken in"]


@pytest.mark.parametrize("widths", [(64, 8), (2, 2), (1, 3)])
def test_a_wide_nucleus_is_widened_until_it_is_covered(monkeypatch, widths):
    """Flat rows need hundreds of ids, sharp ones few; the width is looked for per row."""
    first, factor = widths
    monkeypatch.setattr(candidates, "FIRST_WIDTH", first)
    monkeypatch.setattr("megatron_tokedit.scoring.scorer.WIDENING", factor)
    table = random_bigrams(150, seed=5, sharpness=3.0)
    table[::2] = random_bigrams(150, seed=6, sharpness=0.1)[::2]
    subject = bigram_scorer(table)
    request = CandidateRequest(None, contract.EVERYTHING, contract.EXCLUDED, Nucleus(0.9, 1.0))
    contract.compare_all(subject, request, start_id=1)
    contract.compare_all(bigram_scorer(table, deferred=True), request, start_id=1)


def test_impossible_ids_are_no_candidates():
    table = random_bigrams(VOCAB, seed=1)
    backbone = BigramBackbone(table)
    bias = torch.zeros(VOCAB)
    bias[5:] = -torch.inf
    backbone.head = head.OutputHead(backbone.head.weight_VH, bias_V=bias)
    (scores,) = CausalScorer(backbone, contract.options()).score(
        [np.array([2, 3, 4], np.int32)], CandidateRequest(7, contract.EVERYTHING, (0, 9))
    )
    assert (np.sort(scores.candidate_ids_EK) == [-1, -1, -1, 1, 2, 3, 4]).all()
    assert (scores.candidate_logprobs_EK[:, 4:] == -np.inf).all()
    np.testing.assert_allclose(np.exp(scores.logprobs_T[1:]) <= 1.0, True)
