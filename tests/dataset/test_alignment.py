"""Aligning two arrays: the script always gives the original back, and is short where the edits are local."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.dataset import CHANGED, DROPPED, INSERTED, JournalEntries, align, undo_document
from megatron_tokedit.dataset.journal_format import entry_fault

few_ids = st.lists(st.integers(0, 3), max_size=60)
many_ids = st.lists(st.integers(0, 2**31 - 1), max_size=60)


def undone(original: list[int], edited: list[int]) -> tuple[list[int], JournalEntries]:
    """The original, rebuilt from the edited array and the entries that alignment found."""
    positions, original_ids, kinds = align(np.array(original, np.int32), np.array(edited, np.int32))
    entries = JournalEntries(positions.astype(np.int32), original_ids, kinds, np.empty(0, np.int32))
    assert not len(positions) or entry_fault(len(original), positions, kinds) is None
    assert not original_ids[kinds == INSERTED].any()
    rebuilt = undo_document([np.array(edited, np.int64)], entries)
    return np.concatenate(rebuilt).tolist(), entries


@settings(max_examples=300, deadline=None)
@given(ids=st.tuples(few_ids, few_ids) | st.tuples(many_ids, many_ids))
def test_any_two_arrays(ids: tuple[list[int], list[int]]) -> None:
    assert undone(*ids)[0] == ids[0]


def test_all_short_arrays() -> None:
    arrays = [list(ids) for length in range(5) for ids in itertools.product((0, 1), repeat=length)]
    for original, edited in itertools.product(arrays, arrays):
        rebuilt, entries = undone(original, edited)
        assert rebuilt == original
        assert (len(entries.kinds) == 0) == (original == edited)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_long_arrays_with_edits_far_apart(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    original = rng.integers(0, 500, 2000).tolist()
    edited, num_edits, position = [], 0, 0
    while position < len(original):
        step = int(rng.integers(40, 200))
        edited += original[position : position + step]
        position += step
        removed, added = (int(number) for number in rng.integers(0, 12, 2))
        edited += rng.integers(500, 900, added).tolist()
        num_edits += max(removed, added)
        position += removed
    rebuilt, entries = undone(original, edited)
    assert rebuilt == original
    assert len(entries.kinds) <= 1.05 * num_edits + 2  # the nearest agreement may be one by chance


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda ids: [*ids[:50], 900, *ids[51:]], [(50, CHANGED)]),
        (lambda ids: [*ids[:50], *ids[51:]], [(50, DROPPED)]),
        (lambda ids: [*ids[:50], 900, 901, *ids[50:]], [(50, INSERTED), (50, INSERTED)]),
        (lambda ids: [*ids, 900], [(100, INSERTED)]),
        (lambda ids: ids[:-1], [(99, DROPPED)]),
        (lambda ids: [900, *ids], [(0, INSERTED)]),
        (lambda ids: [*ids[:20], 900, *ids[22:]], [(20, CHANGED), (21, DROPPED)]),
        (lambda ids: ids, []),
        (lambda ids: [], [(position, DROPPED) for position in range(100)]),
    ],
)
def test_simple_changes_have_simple_entries(
    change: Callable[[list[int]], list[int]], expected: list[tuple[int, int]]
) -> None:
    original = list(range(100))
    rebuilt, entries = undone(original, change(original))
    assert rebuilt == original
    assert list(zip(entries.positions.tolist(), entries.kinds.tolist(), strict=True)) == expected


def test_a_block_of_another_text_is_one_replacement_and_the_rest_is_found_again() -> None:
    rng = np.random.default_rng(0)
    head, tail = rng.integers(0, 9000, 300).tolist(), rng.integers(0, 9000, 300).tolist()
    for size in (10, 150, 3000):
        old, new = rng.integers(9000, 9999, size), rng.integers(10_000, 10_999, size // 2)
        original = [*head, *old, *tail, 1, *tail]
        rebuilt, entries = undone(original, [*head, *new, *tail, 2, *tail])
        assert rebuilt == original
        assert len(entries.kinds) == size + 1


def test_equal_hashes_of_different_tokens_are_told_apart() -> None:
    factor = 1_000_003  # (a, b, c) and (a + 1, b - factor, c) hash alike
    original, edited = [5, factor + 7, 9, 1, 2, 3], [6, 7, 9, 1, 2, 4]
    assert undone(original, edited)[0] == original
