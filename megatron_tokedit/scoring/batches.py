"""A call's documents as model inputs, and the scores of its batches as scores of documents.

Invariant: inputs are padded on the right only, behind everything that is scored, so no mask is needed; what
comes back is put where it belongs whatever the order of batches.

Legend: ``B`` rows of a batch, ``L`` positions of a batch, ``N`` scored tokens of a batch, ``G`` tokens of all
documents of a call, ``E`` rows with candidates, ``K`` candidates a row, ``F`` candidates of all rows end to
end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from megatron_tokedit.scoring.base import TokenScores
from megatron_tokedit.scoring.windows import Window

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Batch:
    """Model input of one batch and where its scores belong.

    Attributes:
        ids_BL: int64 ``[B, L]``.
        rows_N: int64 ``[N]``: flat index into B x L of the hidden state that predicts each scored token.
        targets_N: int64 ``[N]``: the scored tokens.
        places_N: int64 ``[N]``: flat index of each scored token among all tokens of the call.
    """

    ids_BL: Int64
    rows_N: Int64
    targets_N: Int64
    places_N: Int64


@dataclass(frozen=True, slots=True)
class RaggedCandidates:
    """Candidates of rows that need not have equally many.

    Attributes:
        places_E: int64 ``[E]``: flat index among all tokens of the call.
        counts_E: int64 ``[E]``: candidates of each row.
        ids_F: int32 ``[F]``, row by row.
        logprobs_F: float32 ``[F]``.
    """

    places_E: Int64
    counts_E: Int64
    ids_F: Int32
    logprobs_F: Float32

    @classmethod
    def from_rows(cls, places_E: Int64, ids_EK: Int32, logprobs_EK: Float32, *, is_ragged: bool) -> Self:
        """From rows as wide as the widest; ``is_ragged``: -1 is no candidate."""
        if not is_ragged:
            counts_E = np.full(len(ids_EK), ids_EK.shape[1], np.int64)
            return cls(places_E, counts_E, ids_EK.ravel(), logprobs_EK.ravel())
        is_real_EK = ids_EK >= 0
        return cls(places_E, is_real_EK.sum(axis=1), ids_EK[is_real_EK], logprobs_EK[is_real_EK])


def join_documents(documents: Sequence[Int32]) -> tuple[Int32, Int64]:
    """The ids of all documents end to end, and where each begins, with the end."""
    offsets = np.cumsum([0, *(len(ids) for ids in documents)])
    return np.concatenate([*documents, np.empty(0, np.int32)]), offsets


def make_batch(windows: Sequence[Window], ids_G: Int32, offsets: Int64, start_id: int | None) -> Batch:
    """Model input of some windows, right-padded with a row's last token (zeros where it has none).

    Padding changes no score, but under a precision that scales a whole batch by its largest activation it
    should have activations like those of the text.

    Args:
        windows: at least one.
        ids_G: all tokens of the call.
        offsets: where each document begins in them.
        start_id: id put before each window; None: none.
    """
    shift = int(start_id is not None)
    length = max(1, max(window.num_tokens for window in windows) - 1 + shift)
    ids_BL = np.zeros((len(windows), length), np.int64)
    rows, places = [], []
    for row, window in enumerate(windows):
        if start_id is not None:
            ids_BL[row, 0] = start_id
        begin = offsets[window.document]
        num_inputs = shift + window.num_tokens - 1
        ids_BL[row, shift:num_inputs] = ids_G[begin + window.start : begin + window.stop - 1]
        if num_inputs:
            ids_BL[row, num_inputs:] = ids_BL[row, num_inputs - 1]
        # the token at window position i is predicted by input position i - 1 + shift
        first = max(window.first_scored, window.start + 1 - shift)
        rows.append(np.arange(first, window.stop) - window.start - 1 + shift + row * length)
        places.append(np.arange(first, window.stop) + begin)
    places_N = np.concatenate(places)
    return Batch(ids_BL, np.concatenate(rows), ids_G[places_N].astype(np.int64), places_N)


def split_scores(
    logprobs_G: Float32, found: Sequence[RaggedCandidates], offsets: Int64, width: int | None
) -> list[TokenScores]:
    """Scores of each document, from the scores of the whole call.

    Args:
        logprobs_G: of all tokens of the call.
        found: candidates of its batches.
        offsets: where each document begins, and the end.
        width: columns of every document's candidates; None: those of its widest row.
    """
    places_E = np.concatenate([np.empty(0, np.int64), *(part.places_E for part in found)])
    counts_E = np.concatenate([np.empty(0, np.int64), *(part.counts_E for part in found)])
    # one more than all, for the padding to point at
    ids_F = np.concatenate([*(part.ids_F for part in found), np.array([-1], np.int32)])
    logprobs_F = np.concatenate([*(part.logprobs_F for part in found), np.array([-np.inf], np.float32)])
    starts_E = np.cumsum(counts_E) - counts_E
    order_E = np.argsort(places_E, kind="stable")
    places_E, starts_E, counts_E = places_E[order_E], starts_E[order_E], counts_E[order_E]
    bounds = np.searchsorted(places_E, offsets)
    scores = []
    for i in range(len(offsets) - 1):
        rows = slice(bounds[i], bounds[i + 1])
        columns_K = np.arange(counts_E[rows].max(initial=0) if width is None else width)
        index_EK = np.where(
            columns_K < counts_E[rows, None], starts_E[rows, None] + columns_K, len(ids_F) - 1
        )
        scores.append(
            TokenScores(
                logprobs_T=logprobs_G[offsets[i] : offsets[i + 1]],
                candidate_positions_E=places_E[rows] - offsets[i],
                candidate_ids_EK=ids_F[index_EK],
                candidate_logprobs_EK=logprobs_F[index_EK],
            )
        )
    return scores
