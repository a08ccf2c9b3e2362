"""Damaged files: ``verify`` finds every changed byte, and no reader does worse than a clear error."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_verify_and_manifest import make_manifest

from megatron_tokedit.dataset import (
    IndexedDataset,
    IndexedDatasetWriter,
    Journal,
    JournalWriter,
    align,
    read_manifest,
    undo_dataset,
    undo_document,
    verify_dataset,
    write_manifest,
)
from megatron_tokedit.errors import DataFormatError, TokeditError

pytestmark = pytest.mark.usefixtures("no_fsync")
VOCAB_SIZE = 1000
SUFFIXES = (".bin", ".idx", ".edits", ".manifest.json")
examples = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(prefix: Path, seed: int = 0, dtype: str = "uint16") -> str:
    """An edited dataset with everything beside it: changed, dropped and inserted tokens, some unedited and
    empty documents, one and several sequences.
    """
    rng = np.random.default_rng(seed)
    with (
        IndexedDatasetWriter(str(prefix), dtype) as writer,
        JournalWriter(f"{prefix}.edits", dtype) as journal,
    ):
        for num_sequences in (1, 2, 0, 3, 1, 1):
            original = [rng.integers(1, VOCAB_SIZE, int(rng.integers(2, 6))) for _ in range(num_sequences)]
            edited = [ids.copy() for ids in original]
            if num_sequences in (1, 3):
                edited[0] = np.concatenate([edited[0][1:], [VOCAB_SIZE - 1], edited[0][:1]])
                edited[-1][-1] = 1
            entries = align(np.concatenate([[0], *original])[1:], np.concatenate([[0], *edited])[1:])
            journal.add_document([len(ids) for ids in original], *entries)
            writer.add_document(edited)
        summary, edits = writer.finalize(), journal.finalize()
    checksums = {"bin": summary.bin_sha256, "idx": summary.idx_sha256, "edits": edits}
    tokenizer = make_manifest().tokenizer.model_copy(update={"vocab_size": VOCAB_SIZE})
    manifest = make_manifest(
        tokenizer=tokenizer, counts=summary.counts(), checksums=checksums, dtype=dtype, edit={"k": [8, {}]}
    )
    write_manifest(str(prefix), manifest)
    statistics = {"documents": {"out": summary.num_documents}, "tokens": summary.num_tokens, "edit": {}}
    Path(f"{prefix}.stats.json").write_bytes(orjson.dumps(statistics))
    verify_dataset(str(prefix))
    return str(prefix)


def refused(prefix: str, *words: str) -> None:
    with pytest.raises(DataFormatError, match="is not whole") as error:
        verify_dataset(prefix)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_flipped_byte_is_found(tmp_path: Path, suffix: str) -> None:
    prefix = write(tmp_path / "a")
    path = Path(prefix + suffix)
    good = path.read_bytes()
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        refused(prefix, f"a{suffix}")
    path.write_bytes(good)
    verify_dataset(prefix)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_truncation_and_garbage_at_the_end_is_found(tmp_path: Path, suffix: str) -> None:
    prefix = write(tmp_path / "a")
    path = Path(prefix + suffix)
    good = path.read_bytes()
    for damaged in (
        *(good[:size] for size in range(len(good))),
        *(good + garbage for garbage in (b"\0", b"\0\0", b" ", b"\n", b"\1" * 8, good)),
    ):
        path.write_bytes(damaged)
        refused(prefix, f"a{suffix}")
    path.unlink()
    if suffix == ".manifest.json":
        assert not verify_dataset(prefix).checksums_verified
    else:
        refused(prefix, f"a{suffix}")


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("suffix", [".idx", ".edits", ".manifest.json"])
def test_files_of_another_dataset_are_found(tmp_path: Path, suffix: str, manifest: bool) -> None:
    first, second = write(tmp_path / "a", 0), write(tmp_path / "b", 1)
    if not manifest:
        for prefix in (first, second):
            Path(f"{prefix}.manifest.json").unlink()
    if Path(second + suffix).exists():
        shutil.copy(second + suffix, first + suffix)
        refused(first)


def test_damage_without_a_manifest_ends_in_clear_errors_only(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    Path(f"{prefix}.manifest.json").unlink()
    for suffix in (".idx", ".edits"):
        path = Path(prefix + suffix)
        good = path.read_bytes()
        for position, mask in itertools.product(range(len(good)), (0x01, 0x80)):
            damaged = bytearray(good)
            damaged[position] ^= mask
            path.write_bytes(damaged)
            read_everything(prefix)
            if suffix == ".edits" or position < len(good) - 8 * 7:  # a moved document border is no fault
                refused(prefix)
        path.write_bytes(good)


def read_everything(prefix: str) -> int:
    """Open and read all, as commands do; returns how many documents could be undone."""
    num_undone = 0
    try:
        dataset, journal = IndexedDataset(prefix), Journal(f"{prefix}.edits")
        dataset.refuse_truncated()
    except TokeditError:
        return 0
    for index in range(min(dataset.num_documents, 100)):
        try:
            undo_document(dataset.document(index), journal.entries(index))
            num_undone += 1
        except TokeditError:
            pass
    return num_undone


@examples
@given(data=st.data())
def test_files_of_random_bytes(tmp_path: Path, data: st.DataObject) -> None:
    prefix = write(tmp_path / "a")
    for suffix in data.draw(st.sets(st.sampled_from(SUFFIXES), min_size=1)):
        path = Path(prefix + suffix)
        damaged = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 5))):
            start = data.draw(st.integers(0, len(damaged)))
            damaged[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
        path.write_bytes(damaged)
    read_everything(prefix)
    if fault := fault_of(prefix):
        assert "is not whole" in fault
        with pytest.raises(TokeditError):
            undo_dataset(prefix, f"{prefix}_undone")
        assert not Path(f"{prefix}_undone.idx").exists()


def fault_of(prefix: str) -> str | None:
    try:
        verify_dataset(prefix)
    except TokeditError as error:
        return str(error)
    return None


SECTIONS = (
    "documents",
    "entry_ends",
    "length_ends",
    "sequence_lengths",
    "positions",
    "original_ids",
    "kinds",
)


@examples
@given(data=st.data())
def test_a_journal_that_verify_lets_pass_can_be_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.setattr("megatron_tokedit.dataset.verify_journal._CHUNK_ITEMS", data.draw(st.integers(1, 9)))
    prefix = write(tmp_path / "a")
    Path(f"{prefix}.manifest.json").unlink()
    path = Path(f"{prefix}.edits")
    damaged = bytearray(path.read_bytes())
    column = Journal(str(path)).column(data.draw(st.sampled_from(SECTIONS)))
    offset = column.__array_interface__["data"][0] - start_of_file(path, column)
    changed = column.copy()
    for _ in range(data.draw(st.integers(0, 2))):
        index = data.draw(st.integers(0, len(changed) - 1))
        near = st.integers(-2, 2).map(int(changed[index]).__add__)
        value = data.draw(near | st.sampled_from([-1, 0, 1, 2, 3, 4, 2**15, 2**31 - 1]))
        changed[index] = np.clip(value, np.iinfo(changed.dtype).min, np.iinfo(changed.dtype).max)
    damaged[offset : offset + changed.nbytes] = changed.tobytes()
    damaged[-32:] = hashlib.sha256(damaged[:-32]).digest()
    path.write_bytes(damaged)
    num_documents = IndexedDataset(prefix).num_documents
    num_undone = read_everything(prefix)
    assert fault_of(prefix) or num_undone == num_documents


def start_of_file(path: Path, column: np.ndarray) -> int:
    """Address of the file's first byte in the map that a column is a view of."""
    base = column
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert base.nbytes == path.stat().st_size
    return base.__array_interface__["data"][0]


@pytest.mark.parametrize(
    ("suffix", "offsets", "read"),
    [
        (".idx", (18, 26), lambda prefix: IndexedDataset(prefix)),
        (".edits", (16, 24, 32, 40), lambda prefix: Journal(f"{prefix}.edits")),
    ],
)
def test_huge_counts_allocate_nothing(
    tmp_path: Path, suffix: str, offsets: tuple[int, ...], read: Callable[[str], object]
) -> None:
    prefix = write(tmp_path / "a")
    path = Path(prefix + suffix)
    good = path.read_bytes()
    for offset, count in itertools.product(offsets, (2**31, 2**40, 2**61, 2**63, 2**64 - 1)):
        path.write_bytes(good[:offset] + count.to_bytes(8, "little") + good[offset + 8 :])
        tracemalloc.start()
        if offset == 16:  # documents of the dataset: no section of the journal has this size
            read(prefix)
        else:
            with pytest.raises(DataFormatError, match="says"):
                read(prefix)
        refused(prefix)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
        tracemalloc.stop()


def test_a_manifest_of_an_earlier_version_has_no_checksum_and_passes(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    path = Path(f"{prefix}.manifest.json")
    fields = orjson.loads(path.read_bytes())
    manifest = read_manifest(prefix)
    del fields["manifest_sha256"]
    path.write_bytes(orjson.dumps(fields))
    assert verify_dataset(prefix).checksums_verified
    assert read_manifest(prefix) == manifest


def test_stale_manifests_and_statistics_are_found(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    manifest = read_manifest(prefix)
    assert manifest is not None
    Path(f"{prefix}.stats.json").write_bytes(b'{"documents": {"out": 7}, "tokens": [], "edit": 3}')
    refused(prefix, "documents.out is 7, the manifest's num_documents is 6", "tokens is []")
    Path(f"{prefix}.stats.json").write_bytes(b"[]")
    verify_dataset(prefix)
    Path(f"{prefix}.stats.json").write_bytes(b"{")
    refused(prefix, "stats.json: is not valid JSON")
    Path(f"{prefix}.stats.json").unlink()
    write_manifest(prefix, manifest.model_copy(update={"counts": {"num_documents": 7, "num_tokens": 1}}))
    refused(prefix, "num_documents is 6, the manifest says 7", "num_tokens is")
    checksums = {name: digest for name, digest in manifest.checksums.items() if name != "edits"}
    write_manifest(prefix, manifest.model_copy(update={"checksums": checksums}))
    refused(prefix, "a.edits: the manifest does not name it")
    write_manifest(prefix, manifest.model_copy(update={"dtype": "int32"}))
    refused(prefix, "the ids are uint16, the manifest says int32")
