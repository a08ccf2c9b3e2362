"""Rows of conversations: best fit by lengths, every conversation in one row of every epoch, exact borders."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.config.sft import SftConfig
from megatron_tokedit.dataset import IndexedDatasetWriter
from megatron_tokedit.dataset.conversations import ConversationCounts, count_conversations
from megatron_tokedit.dataset.loss_mask import loss_mask_prefix
from megatron_tokedit.dataset.packing import assign_rows, plan_rows
from megatron_tokedit.dataset.reader import IndexedDataset
from megatron_tokedit.dataset.sft import RowIndex
from megatron_tokedit.dataset.sources import SourceInfo

ROWS = st.integers(4, 40).flatmap(
    lambda size: st.tuples(st.just(size), st.lists(st.integers(1, size), max_size=60))
)


def best_fit_decreasing(lengths: list[int], size: int) -> list[list[int]]:
    """The textbook's algorithm, row by row."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if size - sum(row) >= length]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@given(ROWS)
def test_the_plan_is_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    size, lengths = case
    plan = plan_rows(np.array(lengths, dtype=np.int64), size)
    expected = best_fit_decreasing(lengths, size)
    assert plan.num_rows == len(expected)
    planned = [sum(pattern) for pattern, count in plan.patterns for _ in range(count)]
    assert sorted(planned) == sorted(map(sum, expected))


@given(ROWS, st.integers(0, 2**32 - 1), st.booleans())
def test_an_epoch_has_every_conversation_once_in_rows_that_hold_them(
    case: tuple[int, list[int]], seed: int, packing: bool
) -> None:
    size, listed = case
    lengths_N = np.array(listed, dtype=np.int64)
    plan = plan_rows(lengths_N, size, packing=packing)
    starts, numbers = assign_rows(plan, lengths_N, seed)
    assert sorted(numbers.tolist()) == list(range(len(listed)))
    assert len(starts) == plan.num_rows + 1
    rows = [numbers[start:end] for start, end in itertools.pairwise(starts)]
    assert all(0 < lengths_N[row].sum() <= size for row in rows)
    assert packing or all(len(row) == 1 for row in rows)
    again = assign_rows(plan, lengths_N, seed)
    assert all(np.array_equal(one, other) for one, other in zip((starts, numbers), again, strict=True))


def test_epochs_are_shuffled_differently_and_pack_well() -> None:
    lengths_N = np.random.default_rng(0).integers(20, 900, 5000)
    plan = plan_rows(lengths_N, 1024)
    assert lengths_N.sum() / (plan.num_rows * 1024) > 0.985
    (starts, first), (_, second) = (assign_rows(plan, lengths_N, seed) for seed in (1, 2))
    assert (first == second).mean() < 0.05
    in_order = [sorted(first[a:b].tolist()) for a, b in itertools.pairwise(starts)]
    companions = {tuple(row) for row in in_order if len(row) > 1}
    others = {tuple(sorted(second[a:b].tolist())) for a, b in itertools.pairwise(starts)}
    assert len(companions & others) < len(companions) / 10, "most companions change from epoch to epoch"


def test_a_length_that_fits_no_row_is_our_own_bug() -> None:
    with pytest.raises(ValueError, match="lengths from 3 to 9 in rows of 8"):
        plan_rows(np.array([3, 9]), 8)


# --------------------------------------------------------------------------------------------- datasets


def write(prefix: Path, conversations: list[tuple[list[int], list[int]]]) -> IndexedDataset:
    for where, dtype, part in ((str(prefix), np.uint16, 0), (loss_mask_prefix(str(prefix)), np.uint8, 1)):
        with IndexedDatasetWriter(where, dtype) as writer:
            for pair in conversations:
                writer.add_document([np.array(pair[part], dtype=np.int64)])
            writer.finalize()
    return IndexedDataset(str(prefix))


CONVERSATION = st.lists(st.tuples(st.integers(1, 500), st.integers(0, 1)), min_size=0, max_size=24).map(
    lambda tokens: ([token for token, _ in tokens], [bit for _, bit in tokens])
)


@settings(max_examples=40, deadline=None)
@given(st.lists(CONVERSATION, min_size=1, max_size=12), st.booleans())
def test_rows_are_the_conversations_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory,
    conversations: list[tuple[list[int], list[int]]],
    packing: bool,
) -> None:
    """Rebuilt by hand: inputs, labels, weights and positions of every conversation, then padding."""
    folder = tmp_path_factory.mktemp("rows")
    sft = SftConfig(packing=packing, too_long="drop", without_response="drop")
    dataset = write(folder / "chats", conversations)
    usable = [pair for pair in conversations if 1 < len(pair[0]) <= 17 and sum(pair[1][1:])]
    if not usable:
        with pytest.raises(Exception, match="none is left"):
            count_conversations(dataset, 16, sft)
        return
    counts = count_conversations(dataset, 16, sft)
    info = SourceInfo(dataset.prefix, len(dataset), dataset.num_tokens, "id", 16, counts)
    rows = RowIndex(folder / "cache", row_length=16, seed=5, sft=sft).epoch(info, 1)
    assert len(rows) == counts.num_rows
    found = []
    for number in range(len(rows)):
        row = {key: value.tolist() for key, value in rows[number].items()}
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        pieces = list(zip(starts, [*starts[1:], 16], strict=True))
        for start, end in pieces:
            assert row["position_ids"][start:end] == list(range(end - start))
        in_row = [conversations[document] for document in rows.documents(number)]
        assert sum(len(ids) - 1 for ids, _ in in_row) == rows.num_positions(number)
        filled = [piece for piece in pieces if piece[0] < rows.num_positions(number)]
        assert not any(row["loss_mask"][rows.num_positions(number) :])
        for start, end in filled:
            ids = [*row["tokens"][start:end], row["labels"][end - 1]]
            assert row["labels"][start:end] == ids[1:]
            found.append((ids, [int(weight) for weight in row["loss_mask"][start:end]]))
    assert sorted(found) == sorted((ids, mask[1:]) for ids, mask in usable)
    assert counts == ConversationCounts(
        num_conversations=len(usable),
        num_tokens=sum(len(ids) for ids, _ in usable),
        num_positions=sum(len(ids) - 1 for ids, _ in usable),
        num_response_tokens=sum(sum(mask[1:]) for _, mask in usable),
        num_rows=len(rows),
        row_length=16,
        num_too_long=sum(len(ids) > 17 for ids, _ in conversations),
        num_without_response=len(conversations)
        - len(usable)
        - sum(len(ids) > 17 for ids, _ in conversations),
    )
    blank = rows[None]
    assert not blank["loss_mask"].any()
    assert blank["position_ids"].tolist() == list(range(16))


def test_the_index_is_made_once(tmp_path: Path) -> None:
    dataset = write(tmp_path / "chats", [([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1])])
    counts = count_conversations(dataset, 8, SftConfig())
    info = SourceInfo(dataset.prefix, 2, 5, "id", 8, counts)
    index = RowIndex(tmp_path / "cache", row_length=8, seed=5, sft=SftConfig())
    assert [index.ensure_epoch(info, epoch) for epoch in (0, 1, 0, 1)] == [True, True, False, False]


def test_counting_needs_no_torch() -> None:
    """``--progress`` and the Slurm scripts look at datasets on login nodes."""
    import subprocess

    code = "import megatron_tokedit.training.length, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
