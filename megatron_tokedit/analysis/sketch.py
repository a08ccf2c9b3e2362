"""Which n-grams occur how often, in bounded memory: a sample of n-grams, chosen by their hash.

An n-gram is in the sample if the lower ``level`` bits of its hash are zero, so either all of its occurrences
are counted or none (Gibbons 2001, "Distinct sampling"). The level rises by one whenever more than
``capacity`` n-grams are kept.

Invariant: the level is the smallest at which the n-grams of all input fit, whatever the order and the parts
it came in; so parts merge into the whole exactly, and samples of two corpora can be compared n-gram by
n-gram.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_tokedit.analysis.blocks import Hashes, Ints
from megatron_tokedit.analysis.ngrams import join_counts

CAPACITY = 1 << 17


@dataclass(slots=True)
class NgramSample:
    """The n-grams of one size that the hash chose, with the number of their occurrences.

    Attributes:
        capacity: most n-grams that are kept.
        level: a share of ``2^-level`` of all n-grams is in the sample.
        num_ngrams: occurrences of all n-grams, in the sample or not.
        hashes: uint64, ascending; valid after :meth:`settle`.
        counts: int64, occurrences of each.
    """

    capacity: int = CAPACITY
    level: int = 0
    num_ngrams: int = 0
    hashes: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))
    counts: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    _waiting: list[Hashes] = field(default_factory=list)
    _num_waiting: int = 0

    def add(self, hashes: Hashes) -> None:
        """Count n-grams, one hash an occurrence."""
        self.num_ngrams += len(hashes)
        chosen = hashes[_is_chosen(hashes, self.level)] if self.level else hashes
        if len(chosen):
            self._waiting.append(chosen)
            self._num_waiting += len(chosen)
        if self._num_waiting >= self.capacity:
            self.settle()

    def merge(self, other: NgramSample) -> None:
        """Add what another counted.

        Raises:
            ValueError: of another capacity (a fault of the caller).
        """
        if other.capacity != self.capacity:
            raise ValueError(f"samples of capacity {self.capacity} and {other.capacity} do not merge")
        self.settle()
        other.settle()
        self.num_ngrams += other.num_ngrams
        self.level = max(self.level, other.level)
        self._keep(*join_counts(self.hashes, self.counts, other.hashes, other.counts))

    def settle(self) -> None:
        """Take in what waits."""
        if self._waiting:
            new = np.unique(np.concatenate(self._waiting), return_counts=True)
            self._waiting.clear()
            self._num_waiting = 0
            self._keep(*join_counts(self.hashes, self.counts, *new))

    def _keep(self, hashes: Hashes, counts: Ints) -> None:
        is_chosen = _is_chosen(hashes, self.level)
        while is_chosen.sum() > self.capacity:
            self.level += 1
            is_chosen = _is_chosen(hashes, self.level)
        self.hashes, self.counts = hashes[is_chosen], counts[is_chosen]

    @property
    def repeated_share(self) -> float:
        """Share of occurrences whose n-gram occurs again somewhere; estimated where ``level`` > 0."""
        self.settle()
        total = int(self.counts.sum())
        return float(self.counts[self.counts > 1].sum() / total) if total else 0.0


def survival(original: NgramSample, edited: NgramSample, max_count: int = 1) -> tuple[float, int]:
    """Share of the original's rare n-grams that the edited corpus still holds, and how many were looked at.

    Args:
        original: sample of the corpus before the edit.
        edited: after it.
        max_count: occurrences up to which an n-gram of the original is rare.
    """
    original.settle()
    edited.settle()
    level = max(original.level, edited.level)
    rare = original.hashes[(original.counts <= max_count) & _is_chosen(original.hashes, level)]
    if not len(rare):
        return float("nan"), 0
    return float(np.isin(rare, edited.hashes, assume_unique=True).mean()), len(rare)


def _is_chosen(hashes: Hashes, level: int) -> npt.NDArray[np.bool_]:
    is_chosen: npt.NDArray[np.bool_] = (hashes & np.uint64((1 << level) - 1)) == 0
    return is_chosen
