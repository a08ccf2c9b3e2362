"""Cutting a row of ids at control tokens, so that what stands between them can be decoded on its own.

Invariant: the segments and the ids that ended them, put together again, are the input.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt


def split_at_ids(
    ids: npt.NDArray[np.int32], cut_ids: npt.NDArray[np.int32]
) -> Iterator[tuple[npt.NDArray[np.int32], int | None]]:
    """Yield each run of ids outside ``cut_ids`` with the cut id that ends it, ``None`` after the last run.

    Args:
        ids: ``[T]``.
        cut_ids: ids to cut at, in any order.
    """
    start = 0
    for position in np.flatnonzero(np.isin(ids, cut_ids)).tolist():
        yield ids[start:position], int(ids[position])
        start = position + 1
    yield ids[start:], None


def widened(starts_T: npt.NDArray[np.int64], ends_T: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Ends of tokens, where one of no width (a byte of a character that the next one ends) has the next's."""
    ends_T = ends_T.copy()
    for index in (np.flatnonzero(starts_T == ends_T)[::-1]).tolist():
        if index + 1 < len(ends_T) and starts_T[index + 1] == starts_T[index]:
            ends_T[index] = ends_T[index + 1]
    return ends_T
