"""From the sums of documents to perplexities, their intervals and the differences of checkpoints.

    perplexity a token = exp(nll / tokens)
    perplexity a word = exp(nll / words)
    bits a byte = nll / bytes / ln 2

``nll`` in nats, each sum over a whole domain (lm-eval's ``word_perplexity`` and ``bits_per_byte``; its
``byte_perplexity`` is 2 to the power of the last). The average is the plain mean over domains, as in arXiv
2412.14689. Intervals are percentiles over resampled documents (``bootstrap``).

Invariant: an interval is made by computing the number shown, once for each resample, from that resample's
documents; checkpoints are compared on the same documents in every resample, so what makes a document hard for
both of them cancels out. Domains are resampled apart, so an average's interval is of these domains.

Legend: ``R`` resamples behind the measured sums, which are row 0; ``C`` checkpoints; ``D`` documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_tokedit.evaluation.bootstrap import FloatArray, percentile_interval, resampled_sums
from megatron_tokedit.evaluation.perplexity import CheckpointPerplexity, DomainPerplexity

Unit = Literal["token", "word", "byte"]
UNITS: tuple[Unit, ...] = ("token", "word", "byte")
AVERAGE = "average"
CONFIDENCE = 0.95
FEW_DOCUMENTS = 30
"""With fewer the percentile interval is noticeably too narrow (docs/evaluation.md has how much)."""


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How intervals are made.

    Attributes:
        num_resamples: 0: no intervals.
        seed: of the draws.
    """

    num_resamples: int = 1000
    seed: int = 1234


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and where it would lie for other documents of the same kind.

    Attributes:
        value: as measured.
        interval: 95 %; None without resamples, or of fewer than two documents.
    """

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Difference:
    """A checkpoint against the baseline on the same documents; below 0: the checkpoint is better.

    Attributes:
        difference: ln of the ratio of perplexities (nats a token or word), or of bits a byte the difference.
        change: the checkpoint's number divided by the baseline's, minus 1.
    """

    difference: Estimate
    change: Estimate

    @property
    def excludes_zero(self) -> bool | None:
        """Whether the interval of the difference does; None without one."""
        interval = self.difference.interval
        return None if interval is None else interval[0] > 0.0 or interval[1] < 0.0


@dataclass(frozen=True, slots=True, eq=False)
class PerplexityReport:
    """All checkpoints on all domains, and what can be said of them.

    Attributes:
        results: one a checkpoint, of the same domains and documents.
        names: of the checkpoints, for people; all different.
        baseline: index of the checkpoint that the others are compared with.
        bootstrap: how the intervals were made.
        rows: the domains, and the average.
        estimates: unit -> ``[row][checkpoint]``; None where words or bytes are not known.
        differences: unit -> ``[row][checkpoint]``; None for the baseline and where a number is not known.
    """

    results: tuple[CheckpointPerplexity, ...]
    names: tuple[str, ...]
    baseline: int
    bootstrap: Bootstrap
    rows: tuple[str, ...]
    estimates: dict[Unit, list[list[Estimate | None]]]
    differences: dict[Unit, list[list[Difference | None]]]

    @property
    def same_tokens(self) -> bool:
        """Whether all checkpoints scored the same number of tokens of every document.

        Where not, their tokenizers differ, and numbers a token cannot be compared.
        """
        return all(
            np.array_equal(
                result.domains[i].documents.num_scored_tokens_D, first.documents.num_scored_tokens_D
            )
            for i, first in enumerate(self.results[0].domains)
            for result in self.results[1:]
        )

    def knows(self, unit: Unit) -> bool:
        """Whether any row has a number a unit."""
        return any(estimate is not None for row in self.estimates[unit] for estimate in row)


def analyse(
    results: Sequence[CheckpointPerplexity],
    names: Sequence[str],
    *,
    baseline: int = 0,
    bootstrap: Bootstrap | None = None,
) -> PerplexityReport:
    """Estimates, intervals and differences of everything measured.

    Args:
        results: one a checkpoint, of the same domains and documents.
        names: of the checkpoints.
        baseline: index of the checkpoint to compare the others with.
        bootstrap: how to make intervals; default: 1,000 resamples.

    Raises:
        ValueError: the checkpoints were not measured on the same documents.
    """
    bootstrap = bootstrap or Bootstrap()
    by_domain = [
        _domain_values([result.domains[i] for result in results], bootstrap)
        for i in range(len(results[0].domains))
    ]
    estimates: dict[Unit, list[list[Estimate | None]]] = {}
    differences: dict[Unit, list[list[Difference | None]]] = {}
    for unit in UNITS:
        rows_RC = [values[unit] for values in by_domain]
        rows_RC.append(np.mean(rows_RC, axis=0))
        estimates[unit] = [[_estimate(values_R) for values_R in row_RC.T] for row_RC in rows_RC]
        differences[unit] = [
            [
                None if c == baseline else _difference(values_R, row_RC[:, baseline], unit)
                for c, values_R in enumerate(row_RC.T)
            ]
            for row_RC in rows_RC
        ]
    rows = (*(domain.domain for domain in results[0].domains), AVERAGE)
    return PerplexityReport(tuple(results), tuple(names), baseline, bootstrap, rows, estimates, differences)


def _domain_values(domains: Sequence[DomainPerplexity], bootstrap: Bootstrap) -> dict[Unit, FloatArray]:
    """Unit -> ``[1 + R, C]``: as measured, and for each resample; NaN where a number does not exist."""
    num_checkpoints = len(domains)
    scored_CD = [domain.documents.num_scored_tokens_D for domain in domains]
    if len({len(scored_D) for scored_D in scored_CD}) > 1:
        raise ValueError(f"domain {domains[0].domain}: the checkpoints scored different documents")
    counts = domains[0].text
    columns = [domain.documents.nll_nats_D for domain in domains]
    columns += [scored_D.astype(np.float64) for scored_D in scored_CD]
    if counts is not None:
        columns += [counts.num_words_D.astype(np.float64), counts.num_bytes_D.astype(np.float64)]
    is_drawn_D = np.any([scored_D > 0 for scored_D in scored_CD], axis=0)
    columns = [column_D[is_drawn_D] for column_D in columns]
    measured_1M = np.array([[column_D.sum() for column_D in columns]])
    resampled_RM = resampled_sums(
        columns, bootstrap.num_resamples, seed=bootstrap.seed, name=domains[0].domain
    )
    for c, scored_D in enumerate(scored_CD):
        if np.count_nonzero(scored_D) < 2:  # of one document nothing is known of others
            resampled_RM[:, c] = np.nan
    sums_RM = np.concatenate([measured_1M, resampled_RM])
    nll_RC, tokens_RC = sums_RM[:, :num_checkpoints], sums_RM[:, num_checkpoints : 2 * num_checkpoints]
    unknown_R1 = np.full((len(sums_RM), 1), np.nan)
    words_R1 = unknown_R1 if counts is None else sums_RM[:, -2:-1]
    bytes_R1 = unknown_R1 if counts is None else sums_RM[:, -1:]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return {
            "token": np.exp(nll_RC / np.where(tokens_RC > 0, tokens_RC, np.nan)),
            "word": np.exp(nll_RC / np.where(words_R1 > 0, words_R1, np.nan)),
            "byte": nll_RC / np.where(bytes_R1 > 0, bytes_R1, np.nan) / math.log(2.0),
        }


def _estimate(values_R: FloatArray) -> Estimate | None:
    """The first value, with the percentiles of the others; None where there is no such number."""
    if np.isnan(values_R[0]):
        return None
    return Estimate(float(values_R[0]), percentile_interval(values_R[1:], CONFIDENCE))


def _difference(values_R: FloatArray, baseline_R: FloatArray, unit: Unit) -> Difference | None:
    """Of paired resamples; None where a number does not exist."""
    with np.errstate(invalid="ignore", divide="ignore"):
        change_R = values_R / baseline_R - 1.0
        difference_R = values_R - baseline_R if unit == "byte" else np.log(values_R) - np.log(baseline_R)
    difference, change = _estimate(difference_R), _estimate(change_R)
    return None if difference is None or change is None else Difference(difference, change)
