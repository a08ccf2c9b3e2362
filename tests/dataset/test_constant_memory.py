"""Ten times the input, the same memory: planning, reading, writing, merging, verifying, undoing."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_tokedit.corpus import plan_units, read_unit
from megatron_tokedit.dataset import (
    CHANGED,
    IndexedDatasetWriter,
    JournalWriter,
    merge_datasets,
    merge_journals,
    undo_dataset,
    verify_dataset,
)

UNIT_DOCUMENTS = 100
LINE = b'{"text": "' + b"some words of a document " * 600 + b'"}\n'


def preprocess(source: Path, folder: Path) -> None:
    """What a job does with its files, without tokenizer and prior: bytes are ids, some are edited."""
    _, units = plan_units([str(source)], unit_documents=UNIT_DOCUMENTS)
    for unit in units:
        prefix = str(folder / f"unit{unit.unit_id}")
        with (
            IndexedDatasetWriter(prefix, np.uint16) as writer,
            JournalWriter(f"{prefix}.edits", np.uint16) as journal,
        ):
            for document in read_unit(unit, ["text"], on_bad=pytest.fail):
                ids = np.frombuffer(document.fields["text"][0].encode(), np.uint8)
                positions = np.arange(1, len(ids), 100)
                writer.add_document([ids])
                journal.add_document(
                    [len(ids)], positions, ids[positions], np.full(len(positions), CHANGED, np.uint8)
                )
            writer.finalize()
            journal.finalize()
    parts = [str(folder / f"unit{unit.unit_id}") for unit in units]
    merge_datasets(parts, str(folder / "all"))
    merge_journals([f"{part}.edits" for part in parts], str(folder / "all.edits"))
    assert verify_dataset(str(folder / "all")).num_documents == UNIT_DOCUMENTS * len(units)
    undo_dataset(str(folder / "all"), str(folder / "undone"))


@pytest.mark.usefixtures("no_fsync")
def test_memory_does_not_grow_with_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("merge", "verify", "verify_journal", "writer", "journal"):
        monkeypatch.setattr(f"megatron_tokedit.dataset.{module}._CHUNK_ITEMS", 1000)
    monkeypatch.setattr("megatron_tokedit.dataset.merge._COPY_BYTES", 1 << 16)
    peaks = []
    for num_units in (2, 20):
        folder = tmp_path / str(num_units)
        folder.mkdir()
        source = tmp_path / f"{num_units}.jsonl.gz"
        source.write_bytes(gzip.compress(LINE * UNIT_DOCUMENTS * num_units, 1))
        tracemalloc.start()
        preprocess(source, folder)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_000_000, f"peaks of traced memory, bytes, at 1x and 10x: {peaks}"
