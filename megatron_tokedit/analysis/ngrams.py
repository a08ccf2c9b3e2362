"""Counts of uni- and bi-grams of token ids in bounded memory, and the exact counts of the commonest bi-grams.

Bi-grams are far too many to keep a counter each. Two tables of fixed size count all of them: DSIR's 10,000
features, and 2^20 finer buckets whose counts are upper bounds of what falls into them (a count-min sketch of
one row). The commonest bi-grams are then counted exactly in a second pass, which looks only at the
:data:`CANDIDATE_BUCKETS` fullest fine buckets. That the list is complete is proved, not hoped for: a bi-gram
elsewhere occurs at most as often as the fullest bucket that was left out.

Invariant: counts of parts add up to the counts of the whole, whatever the parts.
Legend: ``V`` vocabulary, ``F`` features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from megatron_tokedit.analysis.blocks import Hashes, Ints, TokenBlock
from megatron_tokedit.analysis.hashing import (
    NUM_BUCKETS,
    block_bigrams,
    buckets_of,
    mix64,
    split_keys,
    token_hashes,
)
from megatron_tokedit.errors import DataFormatError

FINE_BUCKETS = 1 << 20
CANDIDATE_BUCKETS = 512


@dataclass(slots=True)
class NgramCounts:
    """Uni- and bi-gram counts of documents.

    Attributes:
        unigrams_V: int64 ``[V]``, exact.
        bigrams_F: int64 ``[10,000]``, bi-grams by feature.
        fine: int64 ``[2^20]``, bi-grams by fine bucket.
    """

    unigrams_V: Ints
    bigrams_F: Ints
    fine: Ints

    @classmethod
    def empty(cls, vocab_size: int) -> Self:
        """Nothing counted yet."""
        return cls(
            np.zeros(vocab_size, np.int64), np.zeros(NUM_BUCKETS, np.int64), np.zeros(FINE_BUCKETS, np.int64)
        )

    def add(self, block: TokenBlock, keys: Hashes | None = None) -> None:
        """Count a block.

        Args:
            block: the documents.
            keys: its :func:`block_bigrams`, where they are known already.

        Raises:
            DataFormatError: an id is outside the vocabulary.
        """
        if not len(block.ids_T):
            return
        vocab_size = len(self.unigrams_V)
        if block.ids_T.min() < 0 or block.ids_T.max() >= vocab_size:
            raise DataFormatError(
                f"token id {max(int(block.ids_T.max()), -int(block.ids_T.min()))} is outside the tokenizer's "
                f"vocabulary of {vocab_size}: the dataset was made with another tokenizer; name it with "
                "--tokenizer-type and --tokenizer-model"
            )
        self.unigrams_V += np.bincount(block.ids_T, minlength=vocab_size)
        hashes = mix64(block_bigrams(block) if keys is None else keys)
        self.bigrams_F += np.bincount(buckets_of(hashes), minlength=NUM_BUCKETS)
        np.add.at(self.fine, fine_buckets(hashes), 1)  # bincount would go through 2^20 counters a block

    def merge(self, other: NgramCounts) -> None:
        """Add what another counted."""
        self.unigrams_V += other.unigrams_V
        self.bigrams_F += other.bigrams_F
        self.fine += other.fine

    @property
    def num_tokens(self) -> int:
        """Tokens counted."""
        return int(self.unigrams_V.sum())

    @property
    def features_F(self) -> Ints:
        """DSIR's features: uni- and bi-grams in the same 10,000 buckets."""
        buckets_V = buckets_of(token_hashes(np.arange(len(self.unigrams_V), dtype=np.int32)))
        unigrams_F = np.bincount(buckets_V, weights=self.unigrams_V, minlength=NUM_BUCKETS)
        return unigrams_F.astype(np.int64) + self.bigrams_F


def fine_buckets(hashes: Hashes) -> Ints:
    """The fine bucket of every mixed bi-gram, from its lower bits, which the features do not use."""
    return (hashes & np.uint64(FINE_BUCKETS - 1)).view(np.int64)


@dataclass(slots=True)
class BigramTally:
    """Exact counts of the bi-grams in some fine buckets.

    Attributes:
        buckets: int64, the fine buckets, ascending.
        keys: uint64 ``[K]``, ascending, see :func:`bigram_keys`.
        counts: int64 ``[K]``.
    """

    buckets: Ints
    keys: Hashes
    counts: Ints

    @classmethod
    def empty(cls, buckets: Ints) -> Self:
        """Nothing counted yet."""
        return cls(np.sort(buckets), np.empty(0, np.uint64), np.empty(0, np.int64))

    def add(self, block: TokenBlock, is_candidate: npt.NDArray[np.bool_]) -> None:
        """Count a block; ``is_candidate`` says of every fine bucket whether it is among :attr:`buckets`."""
        keys = block_bigrams(block)
        kept, counts = np.unique(keys[is_candidate[fine_buckets(mix64(keys))]], return_counts=True)
        self._join(kept, counts)

    def merge(self, other: BigramTally) -> None:
        """Add what another counted in the same buckets."""
        self._join(other.keys, other.counts)

    def _join(self, keys: Hashes, counts: Ints) -> None:
        self.keys, self.counts = join_counts(self.keys, self.counts, keys, counts)

    def top(self, count: int) -> list[tuple[int, int, int]]:
        """The commonest bi-grams ``(first id, second id, occurrences)``; ties by rising ids."""
        order = np.lexsort((self.keys, -self.counts))[:count]
        first, second = split_keys(self.keys[order])
        return list(zip(first.tolist(), second.tolist(), self.counts[order].tolist(), strict=True))


def join_counts(keys: Hashes, counts: Ints, other_keys: Hashes, other_counts: Ints) -> tuple[Hashes, Ints]:
    """Counts by key, added up; all keys are ascending and each occurs once, and so they come out."""
    if not len(keys):
        return other_keys, other_counts
    places = np.searchsorted(keys, other_keys)
    is_known = keys[np.minimum(places, len(keys) - 1)] == other_keys
    joined = counts.copy()
    joined[places[is_known]] += other_counts[is_known]
    is_new = ~is_known
    return (
        np.insert(keys, places[is_new], other_keys[is_new]),
        np.insert(joined, places[is_new], other_counts[is_new]),
    )


def candidates(fine: Ints, count: int = CANDIDATE_BUCKETS) -> tuple[Ints, int]:
    """The fullest fine buckets, and the count of the fullest that is not among them.

    A tally of these buckets holds the corpus's k commonest bi-grams, if the k-th occurs at least as often as
    the second number says.
    """
    order = np.lexsort((np.arange(len(fine)), -fine))
    return np.sort(order[:count]), int(fine[order[count]]) if count < len(fine) else 0
