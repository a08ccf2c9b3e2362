"""Whole documents of a fixed number of tokens, drawn at random: what corpora of all sizes are compared on.

Entropy, distinct n-grams, compression and repetition all depend on how much text is looked at, so they are
measured on the same number of tokens of every corpus.

Invariant: the documents kept are those of the lowest priorities (a hash of seed and ordinal) whose tokens
reach the budget; parts merge into the whole exactly.
"""

from __future__ import annotations

import numpy as np

from megatron_tokedit.analysis.blocks import Ids, TokenBlock
from megatron_tokedit.analysis.hashing import priorities

_PURPOSE = 1


class TokenReservoir:
    """A random sample of documents with at least ``budget_tokens`` tokens, or all of them.

    Args:
        budget_tokens: memory is at most twice as many, and one document.
        seed: of the draw.
    """

    def __init__(self, budget_tokens: int, seed: int) -> None:
        self.budget_tokens, self.seed = budget_tokens, seed
        self.num_tokens = 0
        self._kept: list[tuple[int, int, Ids]] = []
        self._cutoff: int | None = None

    def add(self, block: TokenBlock) -> None:
        """Offer a block's documents."""
        priorities_D = priorities(block.ordinals_D, self.seed, _PURPOSE)
        is_wanted_D = block.lengths_D > 0
        if self._cutoff is not None:
            is_wanted_D &= priorities_D <= np.uint64(self._cutoff)
        for index in np.flatnonzero(is_wanted_D).tolist():
            ids = block.document(index).copy()
            self._kept.append((int(priorities_D[index]), int(block.ordinals_D[index]), ids))
            self.num_tokens += len(ids)
        if self.num_tokens > 2 * self.budget_tokens:
            self.settle()

    def merge(self, other: TokenReservoir) -> None:
        """Add what another kept.

        Raises:
            ValueError: of another budget or seed (a fault of the caller).
        """
        if (other.budget_tokens, other.seed) != (self.budget_tokens, self.seed):
            raise ValueError("reservoirs of different budgets or seeds do not merge")
        self._kept += other._kept
        self.settle()

    def settle(self) -> None:
        """Keep no more than the budget asks for."""
        self._kept.sort(key=lambda entry: entry[:2])
        total = 0
        for index, (priority, _, ids) in enumerate(self._kept):
            total += len(ids)
            if total >= self.budget_tokens:
                del self._kept[index + 1 :]
                self._cutoff = priority
                break
        self.num_tokens = total

    def block(self, num_tokens: int) -> TokenBlock:
        """The first documents in the order of the draw, cut at exactly so many tokens (or all there are)."""
        self.settle()
        documents, ordinals, missing = [], [], num_tokens
        for _, ordinal, ids in self._kept:
            if missing <= 0:
                break
            documents.append(ids[:missing])
            ordinals.append(ordinal)
            missing -= len(documents[-1])
        return TokenBlock.of(documents, ordinals)

    def whole_block(self) -> TokenBlock:
        """Everything kept, for storing it."""
        self.settle()
        return self.block(self.num_tokens)
