"""Counts of an edit that can be added up: over documents, work units, workers and machines.

Invariant: merging is exact and its grouping does not matter: every field is a sum over documents, counts are
integers, and the one float (the sum of log-probabilities) is rounded to a multiple of 2**-20 for each
document, so that float64 adds it without a rounding error up to 2**33 nats; beyond, its last bits depend on
the order of the units, which is fixed.

Legend: ``T`` tokens of a document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_tokedit.edit.editor import EditedDocument

NUM_BINS = 100
MARGIN = 1e-4
"""Tokens whose p is this near to a threshold may go the other way on other hardware."""
PERPLEXITY_BINS_PER_NAT = 32
NUM_PERPLEXITY_BINS = 16 * PERPLEXITY_BINS_PER_NAT
"""Bin i holds perplexities from exp(i / 32) up to exp((i + 1) / 32); the last one, all above e**16 too."""
_QUANTILES_PERCENT = (1, 5, 25, 50, 75, 95, 99)
_LOGPROB_UNITS_PER_NAT = 2.0**20


@dataclass(slots=True)
class EditStatistics:
    """What was scored and edited. Every field is a sum over documents.

    Attributes:
        documents: documents with a scored token.
        tokens: tokens of the documents as they came in.
        scored: tokens with a probability (all but the first of a document where no BOS precedes it).
        eligible: scored tokens that met a rule's condition and may be edited.
        resampled: tokens drawn again.
        changed: tokens that came out different.
        dropped: tokens removed.
        undone: tokens whose change or removal was undone because it would have made invalid UTF-8; in
            ``resampled``, but neither in ``changed`` nor in ``dropped``.
        margin: scored tokens within ``MARGIN`` of a threshold.
        logprob_sum: sum of natural log-probabilities of the scored tokens.
        histogram: scored tokens by p in 100 equal bins, int64; the last bin holds p = 1 too.
        perplexity_histogram: documents with a scored token by their perplexity, int64, in
            ``NUM_PERPLEXITY_BINS`` bins of equal width in log(perplexity).
    """

    documents: int = 0
    tokens: int = 0
    scored: int = 0
    eligible: int = 0
    resampled: int = 0
    changed: int = 0
    dropped: int = 0
    undone: int = 0
    margin: int = 0
    logprob_sum: float = 0.0
    histogram: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))
    perplexity_histogram: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(NUM_PERPLEXITY_BINS, np.int64)
    )

    def add(
        self, logprobs_T: npt.NDArray[np.float32], edited: EditedDocument, thresholds: tuple[float, ...]
    ) -> None:
        """Count one document.

        Args:
            logprobs_T: float32 ``[T]``; NaN where a token was not scored.
            edited: what became of it.
            thresholds: of the rules, for the margin.
        """
        scored_logprobs = logprobs_T[~np.isnan(logprobs_T)]
        num_scored = len(scored_logprobs)
        num_dropped = edited.num_dropped
        self.tokens += len(logprobs_T)
        self.scored += num_scored
        self.eligible += edited.num_eligible
        self.resampled += edited.num_resampled
        self.changed += len(edited.positions_N) - num_dropped
        self.dropped += num_dropped
        self.undone += edited.num_undone
        if not num_scored:
            return
        p = np.exp(scored_logprobs)
        for threshold in thresholds:
            self.margin += int(np.count_nonzero(np.abs(p - threshold) <= MARGIN))
        bins = np.minimum((p * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        self.histogram += np.bincount(bins, minlength=NUM_BINS)
        logprob_sum = float(scored_logprobs.sum(dtype=np.float64))
        self.logprob_sum += round(logprob_sum * _LOGPROB_UNITS_PER_NAT) / _LOGPROB_UNITS_PER_NAT
        self.documents += 1
        perplexity_bin = int(-logprob_sum / num_scored * PERPLEXITY_BINS_PER_NAT)
        self.perplexity_histogram[min(max(perplexity_bin, 0), NUM_PERPLEXITY_BINS - 1)] += 1

    def merge(self, other: EditStatistics) -> None:
        """Add the counts of another set of documents."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    @property
    def perplexity(self) -> float | None:
        """Exp of the mean negative log-probability of the scored tokens; None where there is none."""
        return math.exp(-self.logprob_sum / self.scored) if self.scored else None

    def perplexity_quantiles(self) -> dict[str, float]:
        """How perplexity is distributed over documents: ``p01 p05 p25 p50 p75 p95 p99``; empty without any.

        The q-quantile is the smallest perplexity that at least a share q of the documents does not exceed
        (``inverted_cdf`` in numpy). It is read from the histogram, interpolated in log(perplexity) between
        the edges of its bin, so it is off by at most a factor of exp(1 / 32) = 1.032 either way, as long as
        it is below e**16, where the last bin begins to be open.
        """
        if not self.documents:
            return {}
        ends = np.cumsum(self.perplexity_histogram)
        quantiles = {}
        for percent in _QUANTILES_PERCENT:
            rank = -(-percent * self.documents // 100)  # of the document, from 1: rounded up
            index = int(np.searchsorted(ends, rank))
            count = int(self.perplexity_histogram[index])
            within = (rank - (int(ends[index]) - count) - 0.5) / count
            quantiles[f"p{percent:02}"] = math.exp((index + within) / PERPLEXITY_BINS_PER_NAT)
        return quantiles

    def to_json(self) -> dict[str, Any]:
        """Every count, as JSON types; :meth:`from_json` reads it back."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> EditStatistics:
        """The statistics that :meth:`to_json` wrote.

        Raises:
            KeyError: a field is missing.
            TypeError: there is one too many.
        """
        missing = [each.name for each in fields(cls) if each.name not in value]
        if missing:
            raise KeyError(f"statistics without {', '.join(missing)}")
        arrays = {name: np.asarray(item, np.int64) for name, item in value.items() if isinstance(item, list)}
        return cls(**(value | arrays))
