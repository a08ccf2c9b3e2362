"""Batches and rows between the steps of the scorer.

Legend: as in ``scorer``; ``C`` column blocks of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from megatron_tokedit.scoring.batches import Batch
from megatron_tokedit.scoring.head import RowScores
from megatron_tokedit.scoring.transfer import Download, upload


@dataclass(frozen=True, slots=True)
class Launched:
    """A batch whose log-probabilities are on their way."""

    batch: Batch
    hidden_NH: torch.Tensor
    scores: RowScores
    logprobs: Download


@dataclass(frozen=True, slots=True)
class Wanted:
    """Rows that need candidates, with what the head's first pass found out about them.

    Attributes:
        places_E: int64 ``[E]``: flat index among all tokens of the call.
        hidden_EH: ``[E, H]``.
        normalisers_E: float32 ``[E]``.
        maxima_CE: float32 ``[C, E]``, by column block.
    """

    places_E: npt.NDArray[np.int64]
    hidden_EH: torch.Tensor
    normalisers_E: torch.Tensor
    maxima_CE: torch.Tensor

    @classmethod
    def of_batch(cls, launched: Launched, rows_E: npt.NDArray[np.int64]) -> Self:
        """Some rows of a batch."""
        rows = upload(rows_E, launched.hidden_NH.device)
        scores = launched.scores
        return cls(
            launched.batch.places_N[rows_E],
            launched.hidden_NH[rows],
            scores.normalisers_N[rows],
            scores.maxima_CN[:, rows],
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of several, in order."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.places_E for part in parts]),
            torch.cat([part.hidden_EH for part in parts]),
            torch.cat([part.normalisers_E for part in parts]),
            torch.cat([part.maxima_CE for part in parts], dim=1),
        )

    def where(self, is_kept_E: npt.NDArray[np.bool_]) -> Wanted:
        """The rows for which it holds."""
        rows = upload(np.flatnonzero(is_kept_E), self.hidden_EH.device)
        return Wanted(
            self.places_E[is_kept_E],
            self.hidden_EH[rows],
            self.normalisers_E[rows],
            self.maxima_CE[:, rows],
        )


@dataclass(frozen=True, slots=True)
class Selected:
    """Rows whose candidates are on their way."""

    wanted: Wanted
    found: Download
