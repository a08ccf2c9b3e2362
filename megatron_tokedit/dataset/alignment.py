"""Aligning a document with its edited form where only the two are known, as after a change of tokenizer.

Method: equal tokens are skipped; where the two part, the nearest place where the next tokens agree again is
searched, first within a few tokens, then within ever more, and all before it counts as replaced. Edits are
local, so this takes linear time and gives a script not much longer than the shortest.

Invariant: any two arrays give entries from which :func:`megatron_tokedit.dataset.undo.undo_document` rebuilds
the original; how short they are is a matter of quality, not of truth.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_tokedit.dataset.journal_format import CHANGED, DROPPED, INSERTED

_AGREEING_TOKENS = 3
"""So many equal tokens in a row are taken for the same place."""
_LOOK_AHEADS = (24, 192, 4096)
"""Tokens searched for that place, one after another until it is found; then the rest is one replacement."""
_COMPARED_TOKENS = 256
_HASH_FACTOR = 1_000_003

Ids = npt.NDArray[np.integer]


def align(
    original: Ids, edited: Ids
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Find journal entries that turn ``edited`` back into ``original``.

    Args:
        original: token ids ``[T]``.
        edited: token ids ``[U]``.

    Returns:
        Positions int64 ``[E]``, original ids int64 ``[E]`` (0 for inserted tokens) and kinds uint8 ``[E]``,
        as :meth:`JournalWriter.add_document` takes them.
    """
    original, edited = np.asarray(original, np.int64), np.asarray(edited, np.int64)
    prefix = _common_length(original, edited)
    suffix = _common_length(original[prefix:][::-1], edited[prefix:][::-1])
    positions, kinds = [np.empty(0, np.int64)], [np.empty(0, np.uint8)]
    for begin, end, begin_edited, end_edited in _replacements(
        original[: len(original) - suffix], edited[: len(edited) - suffix], prefix
    ):
        shared = min(end - begin, end_edited - begin_edited)
        changed = begin + np.flatnonzero(
            original[begin : begin + shared] != edited[begin_edited : begin_edited + shared]
        )
        dropped = np.arange(begin + shared, end)
        inserted = np.full(end_edited - begin_edited - shared, end)
        positions += [changed, dropped, inserted]
        kinds += [
            np.full(len(part), kind, np.uint8)
            for part, kind in ((changed, CHANGED), (dropped, DROPPED), (inserted, INSERTED))
        ]
    positions_E, kinds_E = np.concatenate(positions), np.concatenate(kinds)
    original_ids_E = np.zeros(len(positions_E), np.int64)
    stood = kinds_E != INSERTED
    original_ids_E[stood] = original[positions_E[stood]]
    return positions_E, original_ids_E, kinds_E


def _replacements(original: Ids, edited: Ids, start: int) -> list[tuple[int, int, int, int]]:
    """Spans ``[begin, end)`` of the original that became ``[begin, end)`` of the edited; equal from
    ``start`` on elsewhere.
    """
    spans = []
    i = j = start
    while i < len(original) or j < len(edited):
        skip, skip_edited = _next_agreement(original[i:], edited[j:])
        spans.append((i, i + skip, j, j + skip_edited))
        i, j = i + skip, j + skip_edited
        equal = _common_length(original[i:], edited[j:])
        i, j = i + equal, j + equal
    return spans


def _common_length(first: Ids, second: Ids) -> int:
    """Number of equal leading tokens."""
    length = min(len(first), len(second))
    start, size = 0, _COMPARED_TOKENS
    while start < length:
        end = min(start + size, length)
        different = first[start:end] != second[start:end]
        if different.any():
            return start + int(different.argmax())
        start, size = end, 2 * size
    return length


def _next_agreement(original: Ids, edited: Ids) -> tuple[int, int]:
    """Tokens to skip in both so that the next ones agree; all of both where no such place is found.

    Of several places the one with the shortest replacement is taken.
    """
    for look_ahead in _LOOK_AHEADS:
        found = _nearest_common(original[:look_ahead], edited[:look_ahead])
        if found is not None:
            return found
        if look_ahead >= max(len(original), len(edited)):
            break
    return len(original), len(edited)


def _keys(ids: Ids) -> npt.NDArray[np.int64]:
    """A number for every :data:`_AGREEING_TOKENS` tokens in a row; equal tokens have equal numbers."""
    num_keys = max(len(ids) - _AGREEING_TOKENS + 1, 0)
    keys = np.zeros(num_keys, np.int64)
    for offset in range(_AGREEING_TOKENS):
        keys = keys * _HASH_FACTOR + ids[offset : offset + num_keys]  # wraps; unequal ones may collide
    return keys


def _nearest_common(original: Ids, edited: Ids) -> tuple[int, int] | None:
    """The places ``(i, j)`` from which on :data:`_AGREEING_TOKENS` tokens agree that are nearest: the larger
    of the two is smallest, then their difference.
    """
    keys, first_places = np.unique(_keys(original), return_index=True)
    keys_edited = _keys(edited)
    if not len(keys) or not len(keys_edited):
        return None
    found = np.minimum(np.searchsorted(keys, keys_edited), len(keys) - 1)
    places_edited = np.flatnonzero(keys[found] == keys_edited)
    places = first_places[found[places_edited]]
    agree = np.ones(len(places), bool)  # equal numbers need not be equal tokens
    for offset in range(_AGREEING_TOKENS):
        agree &= original[places + offset] == edited[places_edited + offset]
    places, places_edited = places[agree], places_edited[agree]
    if not len(places):
        return None
    best = np.lexsort((np.abs(places - places_edited), np.maximum(places, places_edited)))[0]
    return int(places[best]), int(places_edited[best])
