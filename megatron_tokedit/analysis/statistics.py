"""Everything that one pass over a corpus counts, as one thing that adds up and can be stored.

Invariant: the statistics of parts, merged in any order, are those of the whole; and what is stored comes back
the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron_tokedit.analysis.blocks import TokenBlock
from megatron_tokedit.analysis.diversity import LONG_SIZES
from megatron_tokedit.analysis.hashing import ngram_hashes
from megatron_tokedit.analysis.ngrams import NgramCounts
from megatron_tokedit.analysis.reservoir import TokenReservoir
from megatron_tokedit.analysis.sketch import NgramSample

RARE_SIZES = (2, 3)
"""Sizes of the n-grams whose survival is looked at; that of single tokens follows from exact counts."""
SAMPLED_SIZES = (*RARE_SIZES, *LONG_SIZES)

Arrays = dict[str, npt.NDArray[Any]]


class CorpusStatistics:
    """What was counted of one corpus.

    Args:
        vocab_size: of the tokenizer.
        budget_tokens: of the reservoir.
        seed: of the reservoir.

    Attributes:
        ngrams: uni- and bi-grams.
        samples: size -> sampled n-grams.
        reservoir: documents to compare on.
        num_documents: documents read, empty ones included.
        num_bad: lines that were none.
    """

    def __init__(self, vocab_size: int, budget_tokens: int, seed: int) -> None:
        self.ngrams = NgramCounts.empty(vocab_size)
        self.samples = {size: NgramSample() for size in SAMPLED_SIZES}
        self.reservoir = TokenReservoir(budget_tokens, seed)
        self.num_documents = 0
        self.num_bad = 0

    @property
    def num_tokens(self) -> int:
        """Tokens counted."""
        return self.ngrams.num_tokens

    def add(self, block: TokenBlock) -> None:
        """Count a block of documents."""
        self.num_documents += len(block.ends_D)
        self.ngrams.add(block)
        for size, hashes in ngram_hashes(block, SAMPLED_SIZES).items():
            self.samples[size].add(hashes)
        self.reservoir.add(block)

    def settle(self) -> None:
        """Shrink to what has to be kept, before it is sent or stored."""
        for sample in self.samples.values():
            sample.settle()
        self.reservoir.settle()

    def merge(self, other: CorpusStatistics) -> None:
        """Add what another counted."""
        self.ngrams.merge(other.ngrams)
        for size, sample in self.samples.items():
            sample.merge(other.samples[size])
        self.reservoir.merge(other.reservoir)
        self.num_documents += other.num_documents
        self.num_bad += other.num_bad

    def to_arrays(self) -> Arrays:
        """Everything, as arrays for ``numpy.savez``."""
        self.settle()
        kept = self.reservoir.whole_block()
        arrays: Arrays = {
            "unigrams": self.ngrams.unigrams_V,
            "bigrams": self.ngrams.bigrams_F,
            "fine": self.ngrams.fine,
            "counts": np.array([self.num_documents, self.num_bad]),
            "budget": np.array([self.reservoir.budget_tokens, self.reservoir.seed]),
            "kept_ids": kept.ids_T,
            "kept_ends": kept.ends_D,
            "kept_ordinals": kept.ordinals_D,
        }
        for size, sample in self.samples.items():
            arrays[f"sample{size}"] = np.array([sample.capacity, sample.level, sample.num_ngrams])
            arrays[f"sample{size}_hashes"], arrays[f"sample{size}_counts"] = sample.hashes, sample.counts
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """What :meth:`to_arrays` gave."""
        found = cls(len(arrays["unigrams"]), *(int(value) for value in arrays["budget"]))
        found.ngrams = NgramCounts(arrays["unigrams"], arrays["bigrams"], arrays["fine"])
        found.num_documents, found.num_bad = (int(value) for value in arrays["counts"])
        found.reservoir.add(TokenBlock(arrays["kept_ids"], arrays["kept_ends"], arrays["kept_ordinals"]))
        for size in SAMPLED_SIZES:
            capacity, level, num_ngrams = (int(value) for value in arrays[f"sample{size}"])
            hashes, counts = arrays[f"sample{size}_hashes"], arrays[f"sample{size}_counts"]
            found.samples[size] = NgramSample(capacity, level, num_ngrams, hashes, counts)
        return found
