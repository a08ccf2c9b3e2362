"""Counts, their sums and the quantiles read from them."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.edit.editor import EditedDocument
from megatron_tokedit.edit.statistics import NUM_PERPLEXITY_BINS, PERPLEXITY_BINS_PER_NAT, EditStatistics


def edited(num_eligible: int, changed: int, dropped: int, undone: int = 0) -> EditedDocument:
    number = changed + dropped
    return EditedDocument(
        [],
        np.arange(number),
        np.zeros(number, np.int32),
        np.arange(number) >= changed,
        num_eligible,
        num_eligible,
        undone,
    )


def of_documents(documents: list[np.ndarray]) -> EditStatistics:
    statistics = EditStatistics()
    for logprobs in documents:
        number = len(logprobs)
        statistics.add(logprobs, edited(number // 2, number // 3, number // 5, number // 7), (0.5, 0.99))
    return statistics


def random_document(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(rng.choice([1e-9, 0.01, 1.0, 30.0]), rng.choice([0, 1, 2, 40])).astype(
        np.float32
    )
    if rng.random() < 0.5:
        logprobs[:1] = np.nan
    logprobs[-1:] = math.log(0.5)  # at a threshold
    return logprobs


def test_counts_of_one_document():
    logprobs = np.log(np.array([np.nan, 1.0, 0.99, 0.98995, 0.5, 0.005], np.float32))
    statistics = EditStatistics()
    statistics.add(logprobs, edited(3, 1, 1, 2), (0.99,))
    assert (statistics.documents, statistics.tokens, statistics.scored, statistics.eligible) == (1, 6, 5, 3)
    assert (statistics.resampled, statistics.changed, statistics.dropped) == (3, 1, 1)
    assert (statistics.undone, statistics.margin) == (2, 2)
    assert statistics.histogram[[0, 50, 98, 99]].sum() == 5
    assert statistics.histogram[99] >= 1
    mean = np.log([1.0, 0.99, 0.98995, 0.5, 0.005]).mean()
    assert np.isclose(statistics.perplexity, np.exp(-mean), rtol=1e-6)
    assert statistics.perplexity_histogram.nonzero()[0].tolist() == [int(-mean * PERPLEXITY_BINS_PER_NAT)]


def test_a_document_without_a_scored_token_is_none():
    statistics = of_documents([np.empty(0, np.float32), np.array([np.nan], np.float32)])
    assert (statistics.documents, statistics.tokens, statistics.scored) == (0, 1, 0)
    assert statistics.perplexity is None
    assert statistics.perplexity_quantiles() == {}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 10_000), max_size=4), max_size=3), max_size=4), st.randoms())
def test_any_grouping_is_a_single_pass(groups, random):
    """Documents in units, units in machines, merged in any order: every field is the same, floats too."""
    whole = of_documents([random_document(seed) for group in groups for unit in group for seed in unit])
    machines = []
    for group in groups:
        machine = EditStatistics()
        for unit in group:
            part = of_documents([random_document(seed) for seed in unit])
            machine.merge(EditStatistics.from_json(json.loads(json.dumps(part.to_json()))))
        machines.append(machine)
    random.shuffle(machines)
    merged = EditStatistics()
    for machine in machines:
        merged.merge(machine)
    assert merged.to_json() == whole.to_json()
    assert merged.histogram.sum() == merged.scored
    assert merged.perplexity_histogram.sum() == merged.documents
    assert merged.perplexity_quantiles() == whole.perplexity_quantiles()


@pytest.mark.parametrize("size", [2, 7, 30])
def test_the_sum_of_floats_does_not_depend_on_the_grouping(size):
    documents = [random_document(seed) for seed in range(300)]
    whole, merged = of_documents(documents), EditStatistics()
    for begin in reversed(range(0, 300, size)):
        merged.merge(of_documents(documents[begin : begin + size]))
    assert merged.logprob_sum == whole.logprob_sum
    exact = math.fsum(np.concatenate(documents)[~np.isnan(np.concatenate(documents))].tolist())
    assert abs(whole.logprob_sum - exact) <= 300 * 2.0**-21


def test_every_field_is_merged_and_written():
    once = of_documents([random_document(seed) for seed in range(40)])
    twice = of_documents([random_document(seed) for seed in range(40)])
    twice.merge(once)
    assert {field.name for field in fields(EditStatistics)} == once.to_json().keys()
    for name, value in once.to_json().items():
        assert np.any(value), name
        assert np.array_equal(np.asarray(value) * 2, twice.to_json()[name]), name
    content = once.to_json()
    with pytest.raises(KeyError, match="undone"):
        EditStatistics.from_json({name: value for name, value in content.items() if name != "undone"})
    with pytest.raises(TypeError, match="surplus"):
        EditStatistics.from_json(content | {"surplus": 1})


def test_merging_leaves_the_other_alone():
    first, second = of_documents([random_document(7)]), of_documents([random_document(8)])
    before = second.to_json()
    first.merge(second)
    first.merge(second)
    assert second.to_json() == before


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.0, 15.9), min_size=1, max_size=300))
def test_quantiles_are_those_of_the_documents_within_a_bin(nats):
    statistics = of_documents([np.full(5, -value, np.float32) for value in nats])
    exact = np.exp(np.sort(np.array(nats, np.float32).astype(float)))
    quantiles = statistics.perplexity_quantiles()
    assert list(quantiles) == ["p01", "p05", "p25", "p50", "p75", "p95", "p99"]
    for name, value in quantiles.items():
        rank = -(-int(name[1:]) * len(nats) // 100)
        assert abs(math.log(value / exact[rank - 1])) <= 1 / PERPLEXITY_BINS_PER_NAT + 1e-6


def test_quantiles_are_numpys_where_documents_are_many():
    nats = np.random.default_rng(0).normal(3.0, 0.7, 1999).clip(0, 15).astype(np.float32)
    quantiles = of_documents([np.full(3, -value) for value in nats]).perplexity_quantiles()
    shares = [int(name[1:]) / 100 for name in quantiles]
    expected = np.exp(np.quantile(nats.astype(float), shares, method="inverted_cdf"))
    np.testing.assert_allclose([*quantiles.values()], expected, rtol=math.expm1(1 / PERPLEXITY_BINS_PER_NAT))
    np.testing.assert_allclose(quantiles["p50"], expected[3], rtol=0.01)  # interpolated: much nearer


def test_perplexities_beyond_the_histogram_are_in_its_ends():
    statistics = of_documents([np.full(2, 1e-7, np.float32), np.full(2, -40.0, np.float32)])
    assert statistics.perplexity_histogram[[0, NUM_PERPLEXITY_BINS - 1]].tolist() == [1, 1]
