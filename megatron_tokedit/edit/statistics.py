"""Counts of an edit that can be added up: over documents, work units, workers and machines.

Invariant: merging is exact for every count; the one float (the sum of log-probabilities) is added in the
order of the documents inside a unit and of the units in a merge, so it does not depend on who did which unit.

Legend: ``T`` tokens of a document.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_tokedit.edit.editor import EditedDocument

NUM_BINS = 100
MARGIN = 1e-4
"""Tokens whose p is this near to a threshold may go the other way on other hardware."""


@dataclass(slots=True)
class EditStatistics:
    """What was scored and edited.

    Attributes:
        tokens: tokens of the documents as they came in.
        scored: tokens with a probability (all but the first of a document where no BOS precedes it).
        eligible: scored tokens that met a rule's condition and may be edited.
        resampled: tokens drawn again.
        changed: tokens that came out different.
        dropped: tokens removed.
        margin: scored tokens within ``MARGIN`` of a threshold.
        logprob_sum: sum of natural log-probabilities of the scored tokens.
        histogram: scored tokens by p in 100 equal bins, int64; the last bin holds p = 1 too.
    """

    tokens: int = 0
    scored: int = 0
    eligible: int = 0
    resampled: int = 0
    changed: int = 0
    dropped: int = 0
    margin: int = 0
    logprob_sum: float = 0.0
    histogram: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))

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
        p = np.exp(scored_logprobs)
        self.tokens += len(logprobs_T)
        self.scored += len(p)
        self.eligible += edited.num_eligible
        self.resampled += edited.num_resampled
        self.changed += edited.num_changed
        self.dropped += edited.num_dropped
        for threshold in thresholds:
            self.margin += int(np.count_nonzero(np.abs(p - threshold) <= MARGIN))
        self.logprob_sum += float(scored_logprobs.sum(dtype=np.float64))
        bins = np.minimum((p * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        self.histogram += np.bincount(bins, minlength=NUM_BINS)

    def merge(self, other: EditStatistics) -> None:
        """Add the counts of another set of documents."""
        for name in (
            "tokens",
            "scored",
            "eligible",
            "resampled",
            "changed",
            "dropped",
            "margin",
            "logprob_sum",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.histogram = self.histogram + other.histogram

    @property
    def perplexity(self) -> float | None:
        """Exp of the mean negative log-probability of the scored tokens; None where there is none."""
        return math.exp(-self.logprob_sum / self.scored) if self.scored else None

    def to_json(self) -> dict[str, Any]:
        """Every count, as JSON types; :meth:`from_json` reads it back."""
        return asdict(self) | {"histogram": self.histogram.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> EditStatistics:
        """The statistics that :meth:`to_json` wrote."""
        return cls(**(value | {"histogram": np.asarray(value["histogram"], np.int64)}))
