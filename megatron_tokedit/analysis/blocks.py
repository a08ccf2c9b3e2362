"""A run of documents as one array of token ids, the unit that everything in this room counts over.

Invariant: no n-gram of a block crosses the border between two documents.
Legend: ``T`` tokens of a block, ``D`` its documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """Documents laid end to end.

    Attributes:
        ids_T: int32 ``[T]``.
        ends_D: int64 ``[D]``, one past each document's last token; the first starts at 0.
        ordinals_D: int64 ``[D]``, each document's place in its corpus.
    """

    ids_T: Ids
    ends_D: Ints
    ordinals_D: Ints

    @classmethod
    def of(cls, documents: Sequence[Ids], ordinals: Sequence[int] | None = None) -> Self:
        """A block of these documents; numbered from 0 where no ordinals are given."""
        ids_T = np.concatenate([np.empty(0, np.int32), *documents]).astype(np.int32)
        ends_D = np.cumsum([len(ids) for ids in documents], dtype=np.int64)
        numbers = np.arange(len(documents)) if ordinals is None else np.asarray(ordinals)
        return cls(ids_T, ends_D, numbers.astype(np.int64))

    @property
    def starts_D(self) -> Ints:
        """Where each document starts."""
        return np.concatenate((np.zeros(min(1, len(self.ends_D)), np.int64), self.ends_D[:-1]))

    @property
    def lengths_D(self) -> Ints:
        """Tokens of each document."""
        return self.ends_D - self.starts_D

    @property
    def remaining_T(self) -> Ints:
        """Tokens from each one to its document's end, itself included: an n-gram starts where it is >= n."""
        return np.repeat(self.ends_D, self.lengths_D) - np.arange(len(self.ids_T))

    def document(self, index: int) -> Ids:
        """The ids of one document."""
        return self.ids_T[int(self.ends_D[index - 1]) if index else 0 : int(self.ends_D[index])]

    def documents(self) -> list[Ids]:
        """The ids of every document."""
        return [self.document(index) for index in range(len(self.ends_D))]
