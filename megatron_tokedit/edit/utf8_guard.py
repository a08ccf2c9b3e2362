"""Keeps an edit from making invalid UTF-8: where a byte-level edit would, it is undone.

Byte-level vocabularies (the byte-level BPE of GPT-2, Llama 3 and Qwen, the byte fallback of sentencepiece)
have ids whose bytes are not whole characters. A character that takes several of them is lost when one of them
is replaced or dropped. Such ids stand in runs between ids that decode to whole characters; a run is judged on
its own bytes, as all that surrounds it is whole before and after the edit.

Invariant: where a document's sequences decode to valid UTF-8 before an edit, they do so after it; an edit is
undone only together with its run, and only where the run would come out invalid or was so before.

Legend: ``T`` tokens of a document, ``N`` edited tokens of it, ``V`` vocabulary, ``Q`` runs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

_WHOLE = b"a"
"""Stands for the bytes of an id that decodes to whole characters."""


class Utf8Guard:
    """Finds the edits of a document that would make invalid UTF-8.

    Args:
        incomplete_utf8: ids whose bytes are not whole characters by themselves -> those bytes.
        vocab_size: V.
    """

    def __init__(self, incomplete_utf8: Mapping[int, bytes], *, vocab_size: int) -> None:
        self._bytes_of_id = {i: data for i, data in incomplete_utf8.items() if 0 <= i < vocab_size}
        self._is_incomplete_V = np.zeros(vocab_size, bool)
        self._is_incomplete_V[list(self._bytes_of_id)] = True

    def broken(
        self, ids_T: Int32, starts: list[int], positions_N: Int64, new_ids_N: Int32, dropped_N: Bool
    ) -> Bool | None:
        """Which edits must be undone.

        Args:
            ids_T: original ids.
            starts: position where each sequence begins, and the end of the last one.
            positions_N: int64 ``[N]``, ascending: what is replaced or dropped.
            new_ids_N: int32 ``[N]``; the original id where the token is dropped.
            dropped_N: bool ``[N]``.

        Returns:
            bool ``[N]``, or None where no edit must.
        """
        becomes_N = self._is_incomplete_V[new_ids_N]
        in_run_N = becomes_N | self._is_incomplete_V[ids_T[positions_N]]
        if not in_run_N.any():
            return None
        in_run_T = self._is_incomplete_V[ids_T]
        in_run_T[positions_N] = in_run_N
        begins_Q, ends_Q = _runs(in_run_T, starts)
        run_N = np.searchsorted(begins_Q, positions_N, side="right") - 1
        broken_N = np.zeros(len(positions_N), bool)
        for run in np.unique(run_N[in_run_N]).tolist():
            begin, end = int(begins_Q[run]), int(ends_Q[run])
            first, last = np.searchsorted(positions_N, (begin, end)).tolist()
            old = [self._bytes_of_id.get(i, _WHOLE) for i in ids_T[begin:end].tolist()]
            new = old.copy()
            edits = zip(
                positions_N[first:last].tolist(),
                new_ids_N[first:last].tolist(),
                dropped_N[first:last].tolist(),
                strict=True,
            )
            for position, new_id, dropped in edits:
                new[position - begin] = b"" if dropped else self._bytes_of_id.get(new_id, _WHOLE)
            if not (_is_utf8(new) and _is_utf8(old)):
                broken_N[first:last] = True
        return broken_N if broken_N.any() else None


def _runs(in_run_T: Bool, starts: list[int]) -> tuple[Int64, Int64]:
    """First position of each maximal run, and the one behind its last; a run ends with its sequence."""
    begins_T = in_run_T.copy()
    begins_T[1:] &= ~in_run_T[:-1]
    inner = [start for start in starts[1:-1] if start < len(in_run_T)]
    begins_T[inner] = in_run_T[inner]
    ends_T = in_run_T.copy()
    ends_T[:-1] &= begins_T[1:] | ~in_run_T[1:]
    return begins_T.nonzero()[0], ends_T.nonzero()[0] + 1


def _is_utf8(pieces: list[bytes]) -> bool:
    """Whether the pieces, one after the other, are valid UTF-8."""
    try:
        b"".join(pieces).decode()
    except UnicodeDecodeError:
        return False
    return True
