"""Applies the rules and the sampler to one document: token ids and scores in, edited ids and a record out.

Invariant: the first token of a document (and the first text token after a leading BOS), special tokens and
unscored tokens are never touched; the first token of a sequence is never dropped, so no sequence of a
document vanishes; no edit makes invalid UTF-8; every touched token is in the record, from which the original
is rebuilt exactly.

A document that is not edited costs a few array operations, and one that is some thirty on short arrays: the
tokens that a rule covers are looked at, not all.

Legend: ``T`` tokens of a document (its sequences one after the other), ``E`` rows with candidates, ``P``
tokens that meet a rule and may be edited, ``R`` those of them that are resampled, ``N`` tokens that differ in
the end, ``K`` candidates, ``V`` vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_tokedit.edit.random import uniforms
from megatron_tokedit.edit.rules import Action, Rules
from megatron_tokedit.edit.samplers import Sampler, draw
from megatron_tokedit.edit.utf8_guard import Utf8Guard

Bool = npt.NDArray[np.bool_]
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
        ids_EK: int32 ``[E, K]``, padded with -1.
        logprobs_EK: float32 ``[E, K]``, padded with -inf.
    """

    positions_E: Int64
    ids_EK: Int32
    logprobs_EK: Float32


@dataclass(frozen=True, slots=True)
class EditedDocument:
    """One edited document and what was done to it.

    Attributes:
        sequences: edited ids of each sequence, int32; the original arrays themselves where nothing differs.
        positions_N: int64 ``[N]``, ascending: positions in the original document that changed or were
            dropped.
        original_ids_N: int32 ``[N]``: what stood there.
        dropped_N: bool ``[N]``: True where the token was dropped, False where it was replaced.
        num_eligible: tokens that met a rule's condition and may be edited.
        num_resampled: tokens that were drawn again, whatever came out.
        num_undone: tokens whose change or removal was undone because it would have made invalid UTF-8; they
            are as they were and not in ``positions_N``.
    """

    sequences: list[Int32]
    positions_N: Int64
    original_ids_N: Int32
    dropped_N: Bool
    num_eligible: int
    num_resampled: int
    num_undone: int = 0

    @property
    def num_dropped(self) -> int:
        """Tokens removed."""
        return int(np.count_nonzero(self.dropped_N))

    @property
    def num_changed(self) -> int:
        """Tokens replaced by a different one."""
        return len(self.positions_N) - self.num_dropped


class Editor:
    """Edits documents by one method.

    Args:
        method: rules, sampler, seed.
        vocab_size: V, the tokenizer's.
        special_ids: ids that are never edited.
        bos: the id after which the document's text begins, if it begins with it.
        incomplete_utf8: ids whose bytes are not whole UTF-8 characters by themselves -> those bytes.
    """

    def __init__(
        self,
        method: EditMethod,
        *,
        vocab_size: int,
        special_ids: frozenset[int],
        bos: int | None,
        incomplete_utf8: Mapping[int, bytes],
    ) -> None:
        self.method = method
        self._bos = bos
        self._is_special_V = np.zeros(vocab_size, bool)
        self._is_special_V[[i for i in special_ids if 0 <= i < vocab_size]] = True
        self._guard = Utf8Guard(incomplete_utf8, vocab_size=vocab_size)
        self._drops = any(rule.action is Action.DROP for rule in method.rules.rules)

    def edit(
        self,
        sequences: Sequence[Int32],
        logprobs_T: Float32,
        candidates: Candidates,
        key: bytes,
        editable_T: Bool | None = None,
    ) -> EditedDocument:
        """Edit one document.

        Args:
            sequences: original ids of each sequence.
            logprobs_T: float32 ``[T]``: log-probability of each token on the original context; NaN: not
                scored.
            candidates: for every position that a resample rule covers.
            key: the document's key for random numbers.
            editable_T: bool ``[T]``: tokens that may be touched at all; None: every one.
        """
        ids_T = sequences[0] if len(sequences) == 1 else np.concatenate([*sequences, _NO_IDS])
        starts = [0, *itertools.accumulate(map(len, sequences))]
        positions_P, dropped_P = self._eligible(ids_T, logprobs_T, starts, editable_T)
        original_ids_P = ids_T[positions_P]
        new_ids_P = original_ids_P.copy()
        resampled = np.s_[:] if dropped_P is None else ~dropped_P
        resampled_R = positions_P[resampled]
        if len(resampled_R):
            new_ids_P[resampled] = self._resample(ids_T, logprobs_T, candidates, key, resampled_R)

        touched_P = new_ids_P != original_ids_P
        if dropped_P is not None:
            touched_P |= dropped_P
        touched = touched_P.nonzero()[0]
        positions_N, new_ids_N = positions_P[touched], new_ids_P[touched]
        dropped_N = np.zeros(len(touched), bool) if dropped_P is None else dropped_P[touched]
        num_undone = 0
        broken_N = self._guard.broken(ids_T, starts, positions_N, new_ids_N, dropped_N)
        if broken_N is not None:
            num_undone = int(np.count_nonzero(broken_N))
            positions_N, new_ids_N, dropped_N = (
                array_N[~broken_N] for array_N in (positions_N, new_ids_N, dropped_N)
            )
        return EditedDocument(
            sequences=_apply(sequences, ids_T, starts, positions_N, new_ids_N, dropped_N),
            positions_N=positions_N,
            original_ids_N=ids_T[positions_N],
            dropped_N=dropped_N,
            num_eligible=len(positions_P),
            num_resampled=len(resampled_R),
            num_undone=num_undone,
        )

    def _eligible(
        self, ids_T: Int32, logprobs_T: Float32, starts: list[int], editable_T: Bool | None
    ) -> tuple[Int64, Bool | None]:
        """Positions that a rule covers and that may be touched, ascending.

        Returns:
            int64 ``[P]`` and bool ``[P]``, which of them are to be dropped; None where no rule drops.
        """
        actions_T = self.method.rules.actions(logprobs_T)
        actions_T[:1] = Action.KEEP
        if len(ids_T) > 1 and ids_T[0] == self._bos:
            actions_T[1] = Action.KEEP
        if editable_T is not None:
            actions_T[~editable_T] = Action.KEEP
        if self._drops:
            for start, end in itertools.pairwise(starts):
                if start < end and actions_T[start] == Action.DROP:
                    actions_T[start] = Action.KEEP
        positions_P = actions_T.nonzero()[0]
        is_special_P = self._is_special_V[ids_T[positions_P]]
        if is_special_P.any():
            positions_P = positions_P[~is_special_P]
        return positions_P, actions_T[positions_P] == Action.DROP if self._drops else None

    def _resample(
        self, ids_T: Int32, logprobs_T: Float32, candidates: Candidates, key: bytes, resampled_R: Int64
    ) -> Int32:
        """New ids of the resampled positions, int32 ``[R]``."""
        candidate_ids_RK, candidate_logprobs_RK = candidates.ids_EK, candidates.logprobs_EK
        if not np.array_equal(candidates.positions_E, resampled_R):
            rows_R = np.searchsorted(candidates.positions_E, resampled_R)
            assert np.array_equal(candidates.positions_E.take(rows_R, mode="clip"), resampled_R), (
                "a resampled row has no candidates"
            )
            candidate_ids_RK, candidate_logprobs_RK = candidate_ids_RK[rows_R], candidate_logprobs_RK[rows_R]
        uniforms_T = uniforms(key, len(ids_T), seed=self.method.seed, generation=self.method.generation)
        return draw(
            self.method.sampler,
            candidate_ids_RK,
            candidate_logprobs_RK,
            ids_T[resampled_R],
            logprobs_T[resampled_R],
            uniforms_T[resampled_R],
            exclude_original=self.method.exclude_original,
        )


_NO_IDS: Int32 = np.empty(0, np.int32)


def _apply(
    sequences: Sequence[Int32],
    ids_T: Int32,
    starts: list[int],
    positions_N: Int64,
    new_ids_N: Int32,
    dropped_N: Bool,
) -> list[Int32]:
    """The document's sequences with the edits made."""
    if not len(positions_N):
        return list(sequences)
    ids_T = ids_T.copy()
    ids_T[positions_N] = new_ids_N
    if dropped_N.any():
        dropped_positions = positions_N[dropped_N]
        ids_T = np.delete(ids_T, dropped_positions)
        starts = (starts - np.searchsorted(dropped_positions, starts)).tolist()
    return [ids_T[begin:end] for begin, end in itertools.pairwise(starts)]
