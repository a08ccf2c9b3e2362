"""From a document's tokens back to its original's, over several edits of it.

Every generation edits what the one before made, and its record (:class:`EditedDocument`) speaks of positions
in that. The journal of a generation, however, must rebuild the original of the first. Dropped tokens shift
positions, and a token may come back to what it was; the lineage keeps account of both.

Invariant: the current tokens and :meth:`Lineage.changes` together give the original exactly.

Legend: ``T`` tokens of the original (its sequences one after the other), ``M`` tokens of the current
document, ``N`` tokens of the original that are dropped or differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from megatron_tokedit.edit.editor import EditedDocument

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Lineage:
    """A document after some edits, and where each of its tokens stood in the original.

    Attributes:
        sequences: current ids of each sequence, int32.
        originals: original ids of each sequence, int32.
        positions_M: int64 ``[M]``, ascending: each current token's position in the original; None: nothing
            was dropped, and positions are the same.
    """

    sequences: list[Int32]
    originals: list[Int32]
    positions_M: Int64 | None = None

    @classmethod
    def start(cls, sequences: Sequence[Int32]) -> Self:
        """A document that was not edited yet."""
        return cls(list(sequences), list(sequences))

    @property
    def sequence_lengths(self) -> list[int]:
        """Tokens of each sequence of the original."""
        return [len(ids) for ids in self.originals]

    def advance(self, edited: EditedDocument) -> Lineage:
        """The document after one more edit.

        Args:
            edited: what an editor made of :attr:`sequences`.
        """
        positions_M = self.positions_M
        if edited.num_dropped:
            if positions_M is None:
                positions_M = np.arange(sum(self.sequence_lengths))
            positions_M = np.delete(positions_M, edited.positions_N[edited.dropped_N])
        return Lineage(edited.sequences, self.originals, positions_M)

    def changes(self) -> tuple[Int64, Int32, Bool]:
        """What turns the current document back into the original.

        Returns:
            int64 ``[N]``, ascending: positions in the original of tokens that were dropped or are another
            now; int32 ``[N]``: what stood there; bool ``[N]``: True where the token was dropped.
        """
        original_T, current_M = _joined(self.originals), _joined(self.sequences)
        if self.positions_M is None:
            positions_N = (original_T != current_M).nonzero()[0]
            return positions_N, original_T[positions_N], np.zeros(len(positions_N), bool)
        dropped_T = np.ones(len(original_T), bool)
        dropped_T[self.positions_M] = False
        differs_T = dropped_T.copy()
        differs_T[self.positions_M] = original_T[self.positions_M] != current_M
        positions_N = differs_T.nonzero()[0]
        return positions_N, original_T[positions_N], dropped_T[positions_N]


def _joined(sequences: list[Int32]) -> Int32:
    """The sequences one after the other."""
    return np.concatenate(sequences) if sequences else np.empty(0, np.int32)
