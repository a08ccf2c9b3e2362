"""Entropy, Gini, divergences, diversity, perplexity and DSIR, against values by hand and other code."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.analysis import concentration, diversity, dsir, findings, hashing, perplexity
from megatron_tokedit.analysis.blocks import TokenBlock
from megatron_tokedit.analysis.ngrams import NgramCounts
from megatron_tokedit.testing.fake_prior import BigramScorer, random_bigrams

COUNTS = st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any).map(np.array)


def block_of(*documents: list[int]) -> TokenBlock:
    return TokenBlock.of([np.array(document, np.int32) for document in documents])


def test_entropy_gini_and_top_mass_by_hand() -> None:
    assert concentration.entropy_bits(np.array([1, 1, 1, 1])) == pytest.approx(2.0)
    assert concentration.entropy_bits(np.array([2, 1, 1, 0])) == pytest.approx(1.5)
    assert concentration.entropy_bits(np.array([0, 7])) == 0.0
    assert concentration.gini(np.array([5, 5, 5])) == pytest.approx(0.0)
    assert concentration.gini(np.array([0, 0, 0, 8])) == pytest.approx(0.75)
    assert concentration.gini(np.array([1, 2, 3])) == pytest.approx(
        2 / 9
    )  # (-2 * 1 + 0 * 2 + 2 * 3) / (3 * 6)
    assert concentration.top_mass(np.array([1, 4, 3, 2]), 2) == pytest.approx(0.7)
    assert concentration.rank_mass(np.array([1, 3])).tolist() == [0.75, 1.0]
    described = concentration.describe(np.array([2, 1, 1, 0]))
    assert described["effective_features"] == pytest.approx(2**1.5)
    assert described["num_features_seen"] == 3


def test_divergences_by_hand() -> None:
    p, q = np.array([3, 1]), np.array([1, 1])
    assert concentration.kl_bits(p, q, 0.0) == pytest.approx(0.75 * math.log2(1.5) + 0.25 * math.log2(0.5))
    smoothed = 3.5 / 5 * math.log2((3.5 / 5) / 0.5) + 1.5 / 5 * math.log2((1.5 / 5) / 0.5)
    assert concentration.kl_bits(p, q) == pytest.approx(smoothed)
    assert concentration.js_bits(np.array([4, 0]), np.array([0, 9])) == pytest.approx(1.0)
    middle = [(0.75 + 0.5) / 2, (0.25 + 0.5) / 2]
    by_kl = sum(
        0.5 * x * math.log2(x / m)
        for pair in ((0.75, 0.25), (0.5, 0.5))
        for x, m in zip(pair, middle, strict=True)
    )
    assert concentration.js_bits(p, q) == pytest.approx(by_kl)
    assert math.isfinite(concentration.kl_bits(np.array([1, 0]), np.array([0, 1])))


@settings(deadline=None, max_examples=50)
@given(COUNTS, COUNTS)
def test_divergences_behave(p: np.ndarray, q: np.ndarray) -> None:
    assert concentration.js_bits(p, q) == pytest.approx(concentration.js_bits(q, p), abs=1e-12)
    assert 0.0 <= concentration.js_bits(p, q) <= 1.0 + 1e-12
    assert concentration.js_bits(p, 3 * p) == pytest.approx(0.0, abs=1e-12)
    assert concentration.kl_bits(p, q) >= 0.0
    assert 0.0 <= concentration.gini(p) < 1.0


def test_diversity_by_hand() -> None:
    phrase = list(range(10, 20))
    block = block_of([*phrase, 1, *phrase], [2, 3], [2, 3])
    distinct = diversity.distinct_shares(block)
    assert distinct["1"] == pytest.approx(13 / 25)
    assert distinct["2"] == pytest.approx(12 / 22)  # 9 of the phrase, 2 around the 1, and (2, 3)
    repeated = diversity.repeated_shares(block)
    assert repeated["8"] == pytest.approx(6 / 14)  # three a phrase, of 21 - 8 + 1
    assert repeated["13"] == 0.0


class Letters:
    """A tokenizer as far as compression needs one."""

    def decode(self, ids: np.ndarray) -> str:
        return "".join(chr(97 + i) for i in ids)


def test_compression_ratio_is_that_of_the_text() -> None:
    block = block_of([0, 1] * 500, [2] * 10)
    text = "ab" * 500 + "\n" + "c" * 10 + "\n"
    packed = zstandard.ZstdCompressor(level=10).compress(text.encode())
    ratio = diversity.compression_ratio(block, Letters())  # type: ignore[arg-type]
    assert ratio == pytest.approx(len(text) / len(packed), rel=0.2)
    noise = block_of(np.random.default_rng(0).integers(0, 26, 5000).tolist())
    assert diversity.compression_ratio(noise, Letters()) < 2.0  # type: ignore[arg-type]


def reference_log_weights(
    documents: list[list[int]], target: list[list[int]], raw: list[list[int]]
) -> list[float]:
    """DSIR as the paper writes it, one n-gram at a time."""

    def features(tokens: list[int]) -> Counter[int]:
        found = Counter[int]()
        for n in (1, 2):
            for i in range(len(tokens) - n + 1):
                key = 0
                for token in tokens[i : i + n]:
                    key = key << 32 | (token + 1)
                mixed = int(hashing.mix64(np.array([key], np.uint64))[0])
                found[(mixed >> 32) * 10_000 >> 32] += 1
        return found

    p = sum((features(tokens) for tokens in target), Counter[int]())
    q = sum((features(tokens) for tokens in raw), Counter[int]())
    return [
        sum(
            count * (math.log(p[j] / p.total() + 1e-8) - math.log(q[j] / q.total() + 1e-8))
            for j, count in features(tokens).items()
        )
        for tokens in documents
    ]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=8))
def test_log_weights_are_dsirs(documents: list[list[int]]) -> None:
    target = [[1, 2, 3, 1, 2], [2, 2]]
    raw = [*documents, [4, 5]]
    counted = []
    for corpus in (target, raw):
        counts = NgramCounts.empty(10)
        counts.add(block_of(*corpus))
        counted.append(counts.features_F)
    found = dsir.log_weights(block_of(*documents), dsir.log_ratios(*counted))
    assert found == pytest.approx(reference_log_weights(documents, target, raw), rel=1e-9, abs=1e-9)


def test_resampling_follows_the_weights() -> None:
    """The first document drawn has probability weight / sum of weights: Gumbel-max."""
    weights = np.log(np.array([1.0, 2.0, 7.0]))
    ordinals = np.arange(3)
    drawn = Counter(int(dsir.resample(ordinals, weights, 1, seed)[0]) for seed in range(4000))
    for ordinal, share in enumerate((0.1, 0.2, 0.7)):
        assert drawn[ordinal] / 4000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))
    noise = dsir.gumbel(np.arange(20_000), 5)
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.04)
    assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.05)


def test_resampling_does_not_depend_on_the_order() -> None:
    weights = np.random.default_rng(0).normal(size=50)
    ordinals = np.arange(50)
    turned = np.random.default_rng(1).permutation(50)
    once = dsir.resample(ordinals, weights, 10, 3)
    assert np.array_equal(once, dsir.resample(ordinals[turned], weights[turned], 10, 3))
    assert len(set(once.tolist())) == 10
    assert not np.array_equal(once, dsir.resample(ordinals, weights, 10, 4))


def test_perplexities_are_those_of_the_table() -> None:
    table = random_bigrams(6, seed=0, sharpness=2.0)
    scorer = BigramScorer(table, bos=None)
    documents = [[1, 2, 3, 4, 5] * 5, [2], [0, 0, 1]]
    scores = perplexity.score_blocks(scorer, [block_of(*documents)])
    expected = [sum(-math.log(table[a, b]) for a, b in itertools.pairwise(d)) for d in documents]
    assert scores.nll_D == pytest.approx(expected, rel=1e-5)
    assert scores.tokens_D.tolist() == [24, 0, 2]
    assert scores.perplexities == pytest.approx([math.exp(expected[0] / 24)], rel=1e-5)  # the only long one
    bins = Counter(min(9, int(table[a, b] * 10)) for d in documents for a, b in itertools.pairwise(d))
    assert scores.histogram.tolist() == [bins[i] for i in range(10)]


def scores_of(perplexities: list[float]) -> perplexity.PriorScores:
    count = len(perplexities)
    return perplexity.PriorScores(
        np.arange(count), np.full(count, 20), 20 * np.log(perplexities), np.ones(10, np.int64)
    )


def test_lowest_quarter_and_tail() -> None:
    reference = scores_of(list(range(100, 201)))  # 5th to 95th percentile: 105 to 195; a quarter: to 127.5
    found = perplexity.describe(scores_of([5.0, 120.0, 125.0, 130.0, 191.0]), reference)
    assert found["share_in_lowest_quarter"] == pytest.approx(0.6)
    assert found["tail_share"] == pytest.approx(0.2)  # above 190
    assert found["quantiles"]["0.5"] == pytest.approx(125.0)
    assert perplexity.describe(reference, reference)["tail_share"] == pytest.approx(0.1, abs=0.01)
    nothing = perplexity.describe(perplexity.PriorScores.empty(), reference)
    assert nothing["corpus_perplexity"] is None
    assert nothing["quantiles"] is None


def corpus_entry(
    name: str, *, effective: float, distinct: float, median: float, tail: float
) -> dict[str, object]:
    return {
        "name": name,
        "num_tokens_counted": 10**6,
        "at_budget": {
            "concentration": {"bigram_features": {"effective_features": effective}},
            "diversity": {"distinct": {"3": distinct}, "compression_ratio": 3.0, "repeated": {"8": 0.01}},
        },
        "perplexity": {
            "quantiles": {"0.1": median / 2, "0.5": median},
            "tail_share": tail,
            "num_documents_scored": 500,
            "num_documents_too_short": 0,
        },
    }


def test_verdicts() -> None:
    human = corpus_entry("human", effective=7000, distinct=0.8, median=40, tail=0.1)
    other = corpus_entry("x", effective=5000, distinct=0.6, median=25, tail=0.0)
    boilerplate = corpus_entry("x", effective=5000, distinct=0.5, median=19, tail=0.03)
    synthetic = corpus_entry("x", effective=3900, distinct=0.8, median=19, tail=0.02)
    cases = [(other, []), (boilerplate, ["repetitive"]), (synthetic, ["predictable", "concentrated"])]
    for corpus, signs in cases:
        found = findings.judge({"corpora": [human, corpus], "budget_tokens": 10**6, "reference": "human"})
        (verdict,) = found["verdicts"]
        assert [sign["sign"] for sign in verdict["signs"]] == signs
        assert verdict["verdict"] == findings.VERDICTS[len(signs)]
        assert found["cautions"] == []
    found = findings.judge({"corpora": [human], "budget_tokens": 500, "reference": "human"})
    assert any("500 tokens" in text for text in found["cautions"])
