"""Applies the rules and the sampler to one document: token ids and scores in, edited ids and a record out.

Invariant: the first token of a document (and the first text token after a leading BOS), special tokens and
unscored tokens are never touched; the first token of a sequence is never dropped, so no sequence of a
document vanishes; every touched token is in the record, from which the original is rebuilt exactly.

Legend: ``T`` tokens of a document (its sequences one after the other), ``E`` rows with candidates, ``R``
tokens that are resampled, ``N`` tokens that differ in the end, ``K`` candidates.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_tokedit.edit.random import uniforms
from megatron_tokedit.edit.rules import Action, Rules
from megatron_tokedit.edit.samplers import Sampler, draw

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EditMethod:
    """Everything that decides an edit besides the prior and the text.

    Attributes:
        rules: which tokens.
        sampler: what they become.
        seed: key of the random numbers.
        generation: which edit of the corpus this is, from 1.
        exclude_original: never draw the original token again (the paper has no such option).
    """

    rules: Rules
    sampler: Sampler
    seed: int = 1234
    generation: int = 1
    exclude_original: bool = False


@dataclass(frozen=True, slots=True)
class Candidates:
    """Candidates of one document's rows, as a scorer returns them.

    Attributes:
        positions_E: int64 ``[E]``, ascending; a superset of the positions that are to be resampled.
        ids_EK: int32 ``[E, K]``.
        logprobs_EK: float32 ``[E, K]``.
    """

    positions_E: Int64
    ids_EK: Int32
    logprobs_EK: Float32


@dataclass(frozen=True, slots=True)
class EditedDocument:
    """One edited document and what was done to it.

    Attributes:
        sequences: edited ids of each sequence, int32.
        positions_N: int64 ``[N]``, ascending: positions in the original document that changed or were
            dropped.
        original_ids_N: int32 ``[N]``: what stood there.
        dropped_N: bool ``[N]``: True where the token was dropped, False where it was replaced.
        num_eligible: tokens that met a rule's condition and may be edited.
        num_resampled: tokens that were drawn again, whatever came out.
    """

    sequences: list[Int32]
    positions_N: Int64
    original_ids_N: Int32
    dropped_N: npt.NDArray[np.bool_]
    num_eligible: int
    num_resampled: int

    @property
    def num_dropped(self) -> int:
        """Tokens removed."""
        return int(self.dropped_N.sum())

    @property
    def num_changed(self) -> int:
        """Tokens replaced by a different one."""
        return len(self.positions_N) - self.num_dropped


class Editor:
    """Edits documents by one method.

    Args:
        method: rules, sampler, seed.
        vocab_size: the tokenizer's.
        special_ids: ids that are never edited.
        bos: the id after which the document's text begins, if it begins with it.
    """

    def __init__(
        self, method: EditMethod, *, vocab_size: int, special_ids: frozenset[int], bos: int | None
    ) -> None:
        self.method = method
        self._bos = bos
        self._is_special_V = np.zeros(vocab_size, bool)
        self._is_special_V[[i for i in special_ids if 0 <= i < vocab_size]] = True

    def edit(
        self,
        sequences: Sequence[Int32],
        logprobs_T: Float32,
        candidates: Candidates,
        key: bytes,
    ) -> EditedDocument:
        """Edit one document.

        Args:
            sequences: original ids of each sequence.
            logprobs_T: float32 ``[T]``: log-probability of each token on the original context; NaN: not
                scored.
            candidates: for every position that a resample rule covers.
            key: the document's key for random numbers.
        """
        ids_T = np.concatenate(sequences) if sequences else np.empty(0, np.int32)
        starts = np.cumsum([0, *(len(sequence) for sequence in sequences)])
        actions_T = self.method.rules.actions(logprobs_T)
        self._protect(actions_T, ids_T, starts)
        num_eligible = int(np.count_nonzero(actions_T))

        resampled_R = np.flatnonzero(actions_T == Action.RESAMPLE)
        new_ids_T = ids_T.copy()
        if len(resampled_R):
            new_ids_T[resampled_R] = self._resample(ids_T, logprobs_T, candidates, key, resampled_R)
        dropped_T = actions_T == Action.DROP
        positions_N = np.flatnonzero((new_ids_T != ids_T) | dropped_T)
        return EditedDocument(
            sequences=_split(new_ids_T, dropped_T, starts),
            positions_N=positions_N,
            original_ids_N=ids_T[positions_N],
            dropped_N=dropped_T[positions_N],
            num_eligible=num_eligible,
            num_resampled=len(resampled_R),
        )

    def _protect(self, actions_T: npt.NDArray[np.int8], ids_T: Int32, starts: Int64) -> None:
        """Set to KEEP, in place, what may not be touched."""
        actions_T[self._is_special_V[ids_T]] = Action.KEEP
        actions_T[:1] = Action.KEEP
        if len(ids_T) > 1 and ids_T[0] == self._bos:
            actions_T[1] = Action.KEEP
        first = starts[:-1][starts[:-1] < starts[1:]]
        actions_T[first[actions_T[first] == Action.DROP]] = Action.KEEP

    def _resample(
        self, ids_T: Int32, logprobs_T: Float32, candidates: Candidates, key: bytes, resampled_R: Int64
    ) -> Int32:
        """New ids of the resampled positions, int32 ``[R]``."""
        rows_R = np.searchsorted(candidates.positions_E, resampled_R)
        assert np.array_equal(candidates.positions_E[rows_R], resampled_R), (
            "a resampled row has no candidates"
        )
        uniforms_T = uniforms(key, len(ids_T), seed=self.method.seed, generation=self.method.generation)
        return draw(
            self.method.sampler,
            candidates.ids_EK[rows_R],
            candidates.logprobs_EK[rows_R],
            ids_T[resampled_R],
            logprobs_T[resampled_R],
            uniforms_T[resampled_R],
            exclude_original=self.method.exclude_original,
        )


def _split(ids_T: Int32, dropped_T: npt.NDArray[np.bool_], starts: Int64) -> list[Int32]:
    """Cut the document back into its sequences, without the dropped tokens."""
    kept_T = ~dropped_T
    bounds = np.concatenate([[0], np.cumsum(kept_T)])[starts]
    kept_ids = ids_T[kept_T]
    return [kept_ids[begin:end] for begin, end in itertools.pairwise(bounds)]
