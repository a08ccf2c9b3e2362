"""Which conversations share a row: best fit, longest first, over a histogram of their lengths.

Best-fit-decreasing looks at lengths only, so the rows of a source are planned once, as places of given
lengths, and every epoch puts other conversations of the same lengths into them (one whose length no other has
keeps its companions). Invariant: all epochs have equally many rows, every conversation is in exactly one row
of each, and the rows depend on the lengths, the row's size and the epoch's seed only. (Packing by histogram:
Krell et al., 2021, arXiv 2107.02027.)

Legend: N conversations, R rows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int64]
Pattern = tuple[int, ...]
"""The lengths of the places of one row, falling."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The rows of every epoch of a source, as patterns and how many rows have each."""

    patterns: tuple[tuple[Pattern, int], ...]

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return sum(count for _, count in self.patterns)


def plan_rows(lengths_N: Lengths, row_length: int, *, packing: bool = True) -> RowPlan:
    """Plan the rows for conversations of these lengths, each from 1 to ``row_length``.

    Best-fit-decreasing: from the longest on, each goes into the fullest row that has room for it, else into a
    new one. Never more than 11/9 of the fewest possible rows, plus one. Takes time by the number of different
    lengths, not of conversations.

    Args:
        lengths_N: of the conversations, in any order.
        row_length: positions of a row.
        packing: False gives each conversation a row of its own.
    """
    values, counts = np.unique(lengths_N, return_counts=True)
    histogram = list(zip(values.tolist(), counts.tolist(), strict=True))[::-1]
    if histogram and not 0 < histogram[-1][0] <= histogram[0][0] <= row_length:
        raise ValueError(f"lengths from {histogram[-1][0]} to {histogram[0][0]} in rows of {row_length}")
    if not packing:
        return RowPlan(tuple(((length,), count) for length, count in histogram))
    open_rows: dict[int, Counter[Pattern]] = {row_length: Counter()}  # by room that is left
    open_rooms = 0  # bit r: there are rows with room r
    for length, count in histogram:
        left = count
        while left:
            fitting = open_rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else row_length
            left, touched = _fill(open_rows, room, row_length, length, left)
            for changed in touched:
                has_rows = bool(open_rows.get(changed))
                open_rooms = open_rooms | 1 << changed if has_rows else open_rooms & ~(1 << changed)
    merged: Counter[Pattern] = Counter()
    for rows in open_rows.values():
        merged.update(rows)
    return RowPlan(tuple(sorted(merged.items(), reverse=True)))


def _fill(
    open_rows: dict[int, Counter[Pattern]], room: int, row_length: int, length: int, count: int
) -> tuple[int, set[int]]:
    """Put up to ``count`` conversations of one length into rows that have ``room`` left, or into new rows.

    A row that still has room for another of the same length is then the fullest with room: it takes as many
    as fit.

    Returns:
        How many are left over, and the rooms whose rows have changed.
    """
    most = room // length
    if open_rows[room]:
        pattern, num_rows = next(iter(open_rows[room].items()))
    else:
        pattern, num_rows = (), -(-count // most)
    full = min(num_rows, count // most)
    rest = count - full * most if full < num_rows else 0
    touched = {room}
    for num, copies in ((full, most), (1 if rest else 0, rest)):
        if num:
            left = room - copies * length
            open_rows.setdefault(left, Counter())[pattern + (length,) * copies] += num
            touched.add(left)
    used = full + bool(rest)
    if pattern:
        open_rows[room][pattern] -= used
        if not open_rows[room][pattern]:
            del open_rows[room][pattern]
    return count - full * most - rest, touched


def assign_rows(
    plan: RowPlan, lengths_N: Lengths, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rows of one epoch: conversations in the plan's places, by chance, and the rows in random order.

    Args:
        plan: from :func:`plan_rows` for the same lengths.
        lengths_N: of the conversations.
        seed: of the epoch. numpy's legacy generator: its numbers are the same in every version.

    Returns:
        Starts ``[R + 1]`` of the rows in the second array, and numbers ``[N]`` of conversations.
    """
    random = np.random.RandomState(seed)
    shuffled_N = random.permutation(len(lengths_N))
    by_length_N = shuffled_N[np.argsort(lengths_N[shuffled_N], kind="stable")]
    counts = np.array([count for _, count in plan.patterns], dtype=np.int64)
    sizes_R = np.repeat(np.array([len(pattern) for pattern, _ in plan.patterns], dtype=np.int64), counts)
    places_N = np.concatenate(
        [np.zeros(0, np.int64), *(np.tile(np.array(pattern), count) for pattern, count in plan.patterns)]
    )
    filled_N = np.empty(len(lengths_N), np.int64)
    filled_N[np.argsort(places_N, kind="stable")] = by_length_N
    rows_R = random.permutation(len(sizes_R))
    old_starts_R = np.cumsum(sizes_R) - sizes_R
    new_sizes_R = sizes_R[rows_R]
    starts = np.concatenate(([0], np.cumsum(new_sizes_R))).astype(np.int64)
    offsets_N = np.arange(len(lengths_N)) - np.repeat(starts[:-1], new_sizes_R)
    return starts, filled_N[np.repeat(old_starts_R[rows_R], new_sizes_R) + offsets_N]
