"""The document bootstrap, intervals, paired differences, tables and pictures, on sums of documents."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.evaluation import (
    Bootstrap,
    CheckpointPerplexity,
    DocumentSums,
    DomainPerplexity,
    PerplexityReport,
    TextCounts,
    analyse,
    as_json,
    as_tables,
)
from megatron_tokedit.evaluation import bootstrap as bootstrap_module
from megatron_tokedit.evaluation.bootstrap import percentile_interval, resampled_sums
from megatron_tokedit.evaluation.perplexity_plot import plot
from megatron_tokedit.evaluation.perplexity_report import document_lines


def domain(
    name: str, nll: list[float], tokens: list[int], text: TextCounts | None = None
) -> DomainPerplexity:
    scored = np.array(tokens, np.int64)
    return DomainPerplexity(name, DocumentSums(np.array(nll, np.float64), scored, scored), text)


def checkpoint(name: str, *domains: DomainPerplexity) -> CheckpointPerplexity:
    return CheckpointPerplexity(name, "0" * 64, domains)


def corpus(seed: int, num_documents: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Lengths, and mean nats a token, of documents that differ as documents do; true ratio of sums: 3."""
    generator = np.random.default_rng(seed)
    tokens = np.ceil(generator.lognormal(5.5, 1.0, num_documents)).astype(np.int64)
    return tokens, generator.normal(3.0, 0.4, num_documents)


def two_checkpoints(num_documents: int = 200, *, gain: float = 0.02, **options: object) -> PerplexityReport:
    tokens, mean = corpus(1, num_documents)
    noise = np.random.default_rng(2).normal(gain, 0.05, num_documents)
    results = [
        checkpoint(name, domain("web", list(tokens * m), list(tokens)))
        for name, m in (("old", mean), ("new", mean - noise))
    ]
    return analyse(results, ["old", "new"], **options)


# --- the bootstrap


def exact_variance_of_mean(values: list[float]) -> float:
    """Of the mean of as many draws with replacement."""
    return float(np.var(values)) / len(values)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-100.0, 100.0), min_size=1, max_size=40), st.integers(0, 2**32))
def test_resampled_sums_have_the_mean_and_variance_of_draws_with_replacement(
    values: list[float], seed: int
) -> None:
    sums = resampled_sums([np.array(values), np.ones(len(values))], 4000, seed=seed, name="d")
    assert (sums[:, 1] == len(values)).all(), "as many documents as there are"
    variance = exact_variance_of_mean(values)
    means = sums[:, 0] / len(values)
    assert abs(means.mean() - np.mean(values)) <= 6.0 * math.sqrt(variance / 4000) + 1e-9
    # the kurtosis of a mean of few values is at most that of one value
    kurtosis = 10.0 + len(values)
    assert abs(means.var() - variance) <= 6.0 * variance * math.sqrt(kurtosis / 4000) + 1e-9


def test_resampled_sums_are_those_of_an_obvious_bootstrap() -> None:
    """The same quantiles as a loop that draws documents one by one."""
    tokens, mean = corpus(5, 25)
    nll = tokens * mean
    generator = np.random.default_rng(0)
    slow = []
    for _ in range(6000):
        drawn = [int(generator.integers(0, 25)) for _ in range(25)]
        slow.append(sum(nll[d] for d in drawn) / sum(tokens[d] for d in drawn))
    sums = resampled_sums([nll, tokens.astype(float)], 6000, seed=3, name="d")
    fast = sums[:, 0] / sums[:, 1]
    quantiles = [0.025, 0.25, 0.5, 0.75, 0.975]
    spread = np.std(slow)
    np.testing.assert_allclose(np.quantile(fast, quantiles), np.quantile(slow, quantiles), atol=0.08 * spread)


def test_many_documents_are_drawn_in_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(1).normal(size=1000)
    monkeypatch.setattr(bootstrap_module, "_BLOCK_DOCUMENTS", 64)
    sums = resampled_sums([values, np.ones(1000)], 3000, seed=1, name="d")
    assert (sums[:, 1] == 1000).all()
    expected = math.sqrt(1000 * np.var(values))
    assert sums[:, 0].std() == pytest.approx(expected, rel=0.06)
    assert sums[:, 0].mean() == pytest.approx(values.sum(), abs=5 * expected / math.sqrt(3000))


def test_columns_get_the_same_documents_and_do_not_depend_on_one_another() -> None:
    values, others = np.random.default_rng(1).normal(size=(2, 90))
    together = resampled_sums([values, others, 2 * values], 50, seed=7, name="d")
    np.testing.assert_array_equal(together[:, 0] * 2, together[:, 2])
    np.testing.assert_array_equal(together[:, [1]], resampled_sums([others], 50, seed=7, name="d"))
    for changed in ({"seed": 8, "name": "d"}, {"seed": 7, "name": "e"}):
        assert not np.array_equal(together[:, [1]], resampled_sums([others], 50, **changed))


def test_memory_of_a_million_documents() -> None:
    columns = [np.random.default_rng(m).random(1_000_000) for m in range(6)]
    tracemalloc.start()
    resampled_sums(columns, 5, seed=1, name="d")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20, f"{peak >> 20} MiB beside the columns"


def test_percentiles_leave_out_what_is_not_defined() -> None:
    values = np.append(np.arange(101.0), [np.nan] * 5)
    assert percentile_interval(values, 0.9) == pytest.approx((5.0, 95.0))
    assert percentile_interval(np.full(3, np.nan), 0.9) is None
    assert percentile_interval(np.zeros(0), 0.9) is None


@pytest.mark.parametrize(("num_documents", "least"), [(100, 0.90), (30, 0.87)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(num_documents: int, least: float) -> None:
    """95 % by name; with few documents a percentile interval is known to be too narrow."""
    hits = paired_hits = 0
    trials = 400
    for trial in range(trials):
        tokens, mean = corpus(1000 + trial, num_documents)
        gain = np.random.default_rng(trial).normal(0.02, 0.05, num_documents)
        results = [
            checkpoint(name, domain("d", list(tokens * m), list(tokens)))
            for name, m in (("a", mean), ("b", mean - gain))
        ]
        report = analyse(results, ["a", "b"], bootstrap=Bootstrap(300, trial))
        low, high = report.estimates["token"][0][0].interval
        hits += low <= math.exp(3.0) <= high
        low, high = report.differences["token"][0][1].difference.interval
        paired_hits += low <= -0.02 <= high
    for share in (hits / trials, paired_hits / trials):
        assert least <= share <= 0.985, (hits, paired_hits)


# --- perplexities, units, differences


def test_values_are_those_of_the_formulas() -> None:
    text = TextCounts(np.array([4, 6]), np.array([20, 30]))
    report = analyse(
        [checkpoint("c", domain("a", [10.0, 30.0], [5, 15], text), domain("b", [6.0], [6]))], ["c"]
    )
    assert report.rows == ("a", "b", "average")
    (token_a,), (token_b,), (average,) = report.estimates["token"]
    assert token_a.value == pytest.approx(math.exp(2.0))
    assert token_b.value == pytest.approx(math.e)
    assert average.value == pytest.approx((math.exp(2.0) + math.e) / 2)
    assert report.estimates["word"][0][0].value == pytest.approx(math.exp(4.0))
    assert report.estimates["byte"][0][0].value == pytest.approx(40.0 / 50 / math.log(2))
    assert report.estimates["byte"][1:] == [[None], [None]], "the bytes of b are not known"
    assert token_a.interval is not None
    assert token_b.interval is None, "of one document nothing is known of others"
    assert average.interval is None


def test_a_paired_interval_is_much_narrower_than_the_checkpoints_own() -> None:
    report = two_checkpoints()
    (difference,) = [d for d in report.differences["token"][0] if d is not None]
    low, high = difference.difference.interval
    own = [np.log(e.interval) for e in report.estimates["token"][0]]
    assert own[0][0] < own[1][1], "the intervals of the two overlap"
    assert own[1][0] < own[0][1]
    assert high - low < 0.3 * min(o[1] - o[0] for o in own)
    assert difference.excludes_zero
    assert high < 0.0
    values = [e.value for e in report.estimates["token"][0]]
    assert difference.difference.value == pytest.approx(math.log(values[1] / values[0]))
    assert difference.change.value == pytest.approx(values[1] / values[0] - 1.0)
    assert difference.change.interval == pytest.approx(tuple(np.expm1([low, high])), rel=1e-3)


def test_a_difference_that_is_noise_does_not_exclude_zero() -> None:
    report = two_checkpoints(gain=0.0)
    assert report.differences["token"][0][1].excludes_zero is False
    same = analyse([report.results[0]] * 2, ["a", "b"])
    assert same.differences["token"][0][1].difference.interval == (0.0, 0.0)
    assert same.differences["token"][0][1].excludes_zero is False


def test_the_baseline_turns_the_sign_and_changes_no_estimate() -> None:
    one, other = two_checkpoints(), two_checkpoints(baseline=1)
    assert one.estimates == other.estimates
    there, back = one.differences["token"][1][1], other.differences["token"][1][0]
    assert back.difference.value == pytest.approx(-there.difference.value)
    assert back.difference.interval == pytest.approx([-end for end in reversed(there.difference.interval)])


def test_intervals_depend_neither_on_other_checkpoints_nor_on_other_domains() -> None:
    both = two_checkpoints()
    more = domain("more", [3.0, 4.0], [2, 2])
    for c in range(2):
        alone = analyse([checkpoint("x", *both.results[c].domains, more)], ["x"])
        assert alone.estimates["token"][0][0] == both.estimates["token"][0][c]
    assert two_checkpoints(bootstrap=Bootstrap(seed=5)).estimates != both.estimates


def test_bits_a_byte_compare_what_tokens_do_not() -> None:
    """The same model with tokens of half the length: equal a byte, not a token."""
    tokens, mean = corpus(3, 50)
    text = TextCounts(tokens, 4 * tokens)
    short, long = 2 * tokens, tokens
    results = [
        checkpoint("short", domain("d", list(tokens * mean), list(short), text)),
        checkpoint("long", domain("d", list(tokens * mean), list(long), text)),
    ]
    report = analyse(results, ["short", "long"])
    assert not report.same_tokens
    assert report.differences["byte"][0][1].difference.value == 0.0
    assert report.differences["token"][0][1].excludes_zero
    assert "bytes" in as_tables(report, "byte").splitlines()[0].split()


def test_documents_that_were_not_scored_change_nothing_but_their_number() -> None:
    tokens, mean = corpus(4, 40)
    nll = list(tokens * mean)
    report = analyse([checkpoint("c", domain("d", nll, list(tokens)))], ["c"])
    padded = analyse([checkpoint("c", domain("d", [0.0, *nll, 0.0], [0, *tokens, 0]))], ["c"])
    assert padded.estimates["token"] == report.estimates["token"]
    assert padded.results[0].domains[0].num_documents == 40


def test_checkpoints_of_different_documents_are_refused() -> None:
    results = [checkpoint("a", domain("d", [1.0], [1])), checkpoint("b", domain("d", [1.0, 2.0], [1, 1]))]
    with pytest.raises(ValueError, match="different documents"):
        analyse(results, ["a", "b"])


def test_a_perplexity_beyond_float64_is_infinite() -> None:
    report = analyse([checkpoint("c", domain("d", [2000.0, 1900.0], [1, 1]))], ["c"])
    assert report.estimates["token"][0][0].value == math.inf
    assert json.loads(orjson.dumps(as_json(report)))["table"][0]["perplexity"] == [None]
    assert "inf" in as_tables(report)


# --- JSON, tables, pictures


def test_json_holds_what_it_always_held_and_the_rest() -> None:
    report = two_checkpoints()
    content = json.loads(orjson.dumps(as_json(report)))
    assert [row["domain"] for row in content["table"]] == ["web", "average"]
    for c, entry in enumerate(content["checkpoints"]):
        (web,) = entry["domains"]
        assert entry["checkpoint"] == ["old", "new"][c]
        assert web["perplexity"] == content["table"][0]["perplexity"][c]
        assert web["perplexity"] == pytest.approx(math.exp(web["nll_nats"] / web["num_scored_tokens"]))
        assert entry["average_perplexity"] == content["table"][1]["perplexity"][c]
        low, high = web["intervals"]["perplexity"]
        assert low < web["perplexity"] < high
        assert web["bits_per_byte"] is None
        assert web["num_bytes"] is None
    (comparison,) = content["comparisons"]
    assert (comparison["baseline"], comparison["checkpoint"]) == ("old", "new")
    row = comparison["rows"][0]["token"]
    assert row["excludes_zero"] is True
    assert row["change_percent"] == pytest.approx(100 * math.expm1(row["difference"]))
    assert comparison["rows"][0]["byte"] is None
    assert content["bootstrap"]["num_resamples"] == 1000
    assert content["bootstrap"]["seed"] == 1234


def test_table_of_several_checkpoints() -> None:
    table, comparison = as_tables(two_checkpoints()).split("\n\n")
    lines = table.splitlines()
    assert lines[0].split() == ["domain", "documents", "tokens", "old", "new"]
    assert [line.count("*") for line in lines[1:3]] == [1, 1]
    assert lines[1].split("+-")[-1].rstrip().endswith("*"), "the new one is lower"
    assert len({len(line) for line in lines[:3]}) <= 2, "aligned, but for a blank instead of the last *"
    lines = comparison.splitlines()
    assert lines[0].startswith("against old (ln of the ratio of perplexities, nats a token)")
    assert lines[2].split()[:2] == ["new", "web"]
    assert lines[2].endswith("lower")


def test_table_without_intervals() -> None:
    report = two_checkpoints(bootstrap=Bootstrap(0))
    text = as_tables(report)
    assert "+-" not in text
    assert "n/a" in text.split("\n\n")[1]
    assert report.differences["token"][0][1].excludes_zero is None


def test_few_documents_are_pointed_out() -> None:
    assert "Too few documents" in as_tables(two_checkpoints(10))
    assert "Too few documents" not in as_tables(two_checkpoints(50))


def test_a_line_for_every_document() -> None:
    report = two_checkpoints(7)
    lines = list(document_lines(report))
    assert [line["document"] for line in lines] == list(range(7))
    for c, name in enumerate(report.names):
        total = sum(line["nll_nats"][name] for line in lines)
        assert total == pytest.approx(report.results[c].domains[0].nll_nats)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_picture(tmp_path: Path, suffix: str) -> None:
    report = two_checkpoints()
    path = tmp_path / f"p{suffix}"
    plot(report, "token", path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    infinite = analyse([checkpoint("c", domain("d", [2000.0, 1900.0], [1, 1]))], ["c"])
    plot(infinite, "token", path)
    plot(analyse([checkpoint("c", domain("d", [1.0], [1]), domain("e", [90.0], [10]))], ["c"]), "token", path)
