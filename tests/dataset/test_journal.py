"""The edit journal: undo gives the original bytes, merging those of a single pass, damage is found."""

from __future__ import annotations

import filecmp
import hashlib
from itertools import chain, count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_tokedit.dataset import (
    CHANGED,
    DROPPED,
    INSERTED,
    IndexedDatasetWriter,
    Journal,
    JournalWriter,
    NoEdits,
    merge_datasets,
    merge_journals,
    undo_dataset,
    undo_document,
)
from megatron_tokedit.errors import DataFormatError

pytestmark = pytest.mark.usefixtures("no_fsync")
KEPT = 0
# A document: its sequences, each token an (id, what happens to it, its new id if changed or inserted). An
# inserted token is none of the original's, whose sequences are never empty.
tokens = st.tuples(
    st.integers(0, 99), st.sampled_from([KEPT, KEPT, CHANGED, DROPPED, INSERTED]), st.integers(0, 99)
)
sequences = st.lists(tokens, min_size=1, max_size=6).filter(
    lambda items: any(kind != INSERTED for _, kind, _ in items)
)
documents = st.lists(st.lists(sequences, max_size=4), max_size=8)
numbers = count()
examples = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def original_of(document: list) -> list[list[int]]:
    return [[token for token, kind, _ in sequence if kind != INSERTED] for sequence in document]


def edited_of(document: list) -> list[np.ndarray]:
    return [
        np.array([new if kind in (CHANGED, INSERTED) else old for old, kind, new in s if kind != DROPPED])
        for s in document
    ]


def record(writer: JournalWriter, document: list) -> None:
    edits, position = [], 0
    for old, kind, _ in chain.from_iterable(document):
        if kind != KEPT:
            edits.append((position, 0 if kind == INSERTED else old, kind))
        position += kind != INSERTED
    positions, ids, kinds = np.array(edits, np.int64).reshape(-1, 3).T
    writer.add_document([len(sequence) for sequence in original_of(document)], positions, ids, kinds)


def write(prefix: Path, corpus: list, dtype: str = "uint16") -> str:
    """The edited dataset of ``corpus`` with its journal, as the pipeline writes them."""
    with (
        JournalWriter(f"{prefix}.edits", dtype) as journal,
        IndexedDatasetWriter(str(prefix), dtype) as writer,
    ):
        for document in corpus:
            record(journal, document)
            writer.add_document(edited_of(document))
        journal.finalize()
        writer.finalize()
    return str(prefix)


def write_original(prefix: Path, corpus: list, dtype: str = "uint16") -> str:
    with IndexedDatasetWriter(str(prefix), dtype) as writer:
        for document in corpus:
            writer.add_document([np.array(ids) for ids in original_of(document)])
        writer.finalize()
    return str(prefix)


def same(first: str, second: str, *suffixes: str) -> bool:
    return all(filecmp.cmp(f"{first}.{s}", f"{second}.{s}", shallow=False) for s in suffixes)


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@examples
@given(corpus=documents)
def test_undo_gives_the_original_byte_for_byte(tmp_path: Path, dtype: str, corpus: list) -> None:
    edited = write(tmp_path / "edited", corpus, dtype)
    original = write_original(tmp_path / "original", corpus, dtype)
    undone = str(tmp_path / f"undone{next(numbers)}")
    summary = undo_dataset(edited, undone)
    assert same(original, undone, "bin", "idx")
    assert not Path(f"{undone}.manifest.json").exists()
    assert summary.num_documents == len(corpus)


@examples
@given(parts=st.lists(documents, min_size=1, max_size=4))
def test_merging_gives_the_bytes_of_a_single_pass(tmp_path: Path, parts: list) -> None:
    prefixes = [write(tmp_path / f"part{i}", part) for i, part in enumerate(parts)]
    single = write(tmp_path / "single", list(chain.from_iterable(parts)))
    merge_datasets(prefixes, str(tmp_path / "merged"))
    digest = merge_journals([f"{prefix}.edits" for prefix in prefixes], str(tmp_path / "merged.edits"))
    assert same(single, str(tmp_path / "merged"), "bin", "idx", "edits")
    assert len(digest) == 64


def test_what_a_journal_holds(tmp_path: Path) -> None:
    with JournalWriter(str(tmp_path / "a.edits"), np.uint16) as writer:
        writer.add_document([4], np.array([]), np.array([]), np.array([]))
        writer.add_document([3, 2], np.array([1, 3]), np.array([50, 60]), np.array([CHANGED, DROPPED]))
        writer.add_document([4], np.array([2]), np.array([65535]), np.array([DROPPED]))
        writer.finalize()
    journal = Journal(str(tmp_path / "a.edits"))
    journal.verify()
    assert (journal.num_documents, journal.num_entries) == (3, 3)
    assert not len(journal.entries(0).positions)
    entries = journal.entries(1)
    assert (entries.positions.tolist(), entries.original_ids.tolist()) == ([1, 3], [50, 60])
    assert (entries.kinds.tolist(), entries.sequence_lengths.tolist()) == ([CHANGED, DROPPED], [3, 2])
    assert journal.entries(2).original_ids.tolist() == [65535]
    assert not len(journal.entries(2).sequence_lengths)
    assert not len(journal.entries(7).positions)
    undone = undo_document([np.array([10, 11, 12]), np.array([13])], entries)
    assert [ids.tolist() for ids in undone] == [[10, 50, 12], [60, 13]]


def test_an_unfinished_journal_leaves_no_file(tmp_path: Path) -> None:
    with JournalWriter(str(tmp_path / "a.edits"), np.uint16) as writer:
        record(writer, [[(1, CHANGED, 2)]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("positions", "ids", "kinds", "message"),
    [
        ([1, 0], [1, 1], [1, 1], "must ascend"),
        ([0, 0], [1, 1], [1, 1], "must ascend"),
        ([1, 1], [1, 0], [2, 3], "must ascend"),
        ([1, 0], [0, 0], [3, 3], "must ascend"),
        ([3], [1], [1], "original of 3 tokens"),
        ([4], [0], [3], "original of 3 tokens"),
        ([-1], [1], [1], "original of 3 tokens"),
        ([0], [1, 2], [1], "must be equal"),
        ([0], [1], [4], "CHANGED, DROPPED or INSERTED"),
    ],
)
def test_entries_that_make_no_sense_are_our_own_bug(
    tmp_path: Path, positions: list[int], ids: list[int], kinds: list[int], message: str
) -> None:
    with (
        JournalWriter(str(tmp_path / "a.edits"), np.uint16) as writer,
        pytest.raises(ValueError, match=message),
    ):
        writer.add_document([3], np.array(positions), np.array(ids), np.array(kinds))


def test_where_inserted_tokens_stand(tmp_path: Path) -> None:
    with JournalWriter(str(tmp_path / "a.edits"), np.uint16) as writer:
        kinds = [INSERTED, INSERTED, CHANGED, INSERTED, DROPPED, INSERTED]
        writer.add_document(
            [2, 1], np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 7, 0, 8, 0]), np.array(kinds)
        )
        writer.finalize()
    entries = Journal(str(tmp_path / "a.edits")).entries(0)
    assert entries.sequence_lengths.tolist() == [2, 1]
    edited = [np.array([101, 102, 17, 103]), np.array([9, 104])]
    assert [ids.tolist() for ids in undo_document(edited, entries)] == [[7, 8], [9]]
    with pytest.raises(DataFormatError, match="do not belong together"):
        undo_document(edited[:1], entries)


def test_an_older_journal_is_read_and_a_newer_one_is_not(tmp_path: Path) -> None:
    edited = write(tmp_path / "a", CORPUS)
    data = bytearray(Path(f"{edited}.edits").read_bytes())
    assert data[8] == 2
    for version in (1, 3):
        data[8] = version
        data[-32:] = hashlib.sha256(data[:-32]).digest()
        Path(f"{edited}.edits").write_bytes(data)
        if version == 1:
            undo_dataset(edited, str(tmp_path / "undone"))
        else:
            with pytest.raises(DataFormatError, match=r"journal of version 3, .*version 2"):
                Journal(f"{edited}.edits")
    original = write_original(tmp_path / "original", CORPUS)
    assert same(original, str(tmp_path / "undone"), "bin", "idx")


def test_an_unedited_part_needs_no_journal_to_be_merged(tmp_path: Path) -> None:
    plain = [[[(1, KEPT, 0)]], []]
    first, last = write(tmp_path / "first", CORPUS), write(tmp_path / "last", CORPUS)
    single = write(tmp_path / "single", [*CORPUS, *plain, *CORPUS])
    parts = [f"{first}.edits", NoEdits(np.dtype(np.uint16), len(plain)), f"{last}.edits"]
    merge_journals(parts, str(tmp_path / "merged.edits"))
    assert same(single, str(tmp_path / "merged"), "edits")


CORPUS = [
    [[(1, KEPT, 0), (2, CHANGED, 9), (3, DROPPED, 0)], [(4, DROPPED, 0)]],
    [],
    [[(5, KEPT, 0), (6, CHANGED, 8)]],
]


def test_every_flipped_byte_of_a_journal_is_found(tmp_path: Path) -> None:
    edited = Path(f"{write(tmp_path / 'a', CORPUS)}.edits")
    good = edited.read_bytes()
    for position in range(len(good)):
        for bit in (0, 7):
            flipped = bytearray(good)
            flipped[position] ^= 1 << bit
            edited.write_bytes(flipped)
            with pytest.raises(DataFormatError, match=r"a\.edits"):
                Journal(str(edited)).verify()


def test_every_truncation_of_a_journal_is_found(tmp_path: Path) -> None:
    edited = Path(f"{write(tmp_path / 'a', CORPUS)}.edits")
    good = edited.read_bytes()
    for size in range(len(good)):
        edited.write_bytes(good[:size])
        with pytest.raises(DataFormatError, match="truncated"):
            Journal(str(edited))


def test_undo_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    edited = write(tmp_path / "a", CORPUS)
    other = write(tmp_path / "b", CORPUS[:1])
    with pytest.raises(DataFormatError, match=r"a\.bin, .*a\.idx, .*a\.edits: there already"):
        undo_dataset(edited, edited)
    with pytest.raises(DataFormatError, match=r"gone\.edits: is not there"):
        undo_dataset(str(tmp_path / "gone"), str(tmp_path / "out"))
    Path(f"{edited}.edits").write_bytes(Path(f"{other}.edits").read_bytes())
    with pytest.raises(DataFormatError, match="is for 1 documents, there are 3"):
        undo_dataset(edited, str(tmp_path / "out"))
    longer = write(tmp_path / "c", [[[(1, KEPT, 0)] * 9 + [(1, CHANGED, 2)]], [], []])
    Path(f"{edited}.edits").write_bytes(Path(f"{longer}.edits").read_bytes())
    with pytest.raises(DataFormatError, match="journal and dataset do not belong together"):
        undo_dataset(edited, str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_merge_refuses_what_does_not_fit(tmp_path: Path) -> None:
    first, wide = write(tmp_path / "first", CORPUS), write(tmp_path / "wide", CORPUS, "int32")
    with pytest.raises(DataFormatError, match=r"wide\.edits has int32 ids"):
        merge_journals([f"{first}.edits", f"{wide}.edits"], str(tmp_path / "out"))
    with pytest.raises(DataFormatError, match="no journal to merge"):
        merge_journals([], str(tmp_path / "out"))
    with pytest.raises(DataFormatError, match="gone: cannot be read"):
        Journal(str(tmp_path / "gone"))
