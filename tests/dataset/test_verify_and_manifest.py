"""Manifest, verification and atomic files."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_tokedit.dataset import (
    AtomicFile,
    IndexedDatasetWriter,
    InputRecord,
    JournalWriter,
    Manifest,
    TokenizerRecord,
    atomic_write_bytes,
    check_compatible,
    read_manifest,
    sha256_of_file,
    shorten_inputs,
    verify_dataset,
    write_manifest,
)
from megatron_tokedit.errors import DataFormatError, TokenizerError

DOCUMENTS = [[[1, 2, 3]], [], [[4], [5, 6]], [[7]]]


def write(prefix: Path, *, manifest: bool, dtype: str = "uint16") -> str:
    with (
        IndexedDatasetWriter(str(prefix), dtype) as writer,
        JournalWriter(f"{prefix}.edits", dtype) as journal,
    ):
        for document in DOCUMENTS:
            writer.add_document([np.array(ids) for ids in document])
            journal.add_document([len(ids) for ids in document], *[np.array([], int)] * 3)
        summary, edits = writer.finalize(), journal.finalize()
    if manifest:
        counts = {name: getattr(summary, name) for name in ("num_documents", "num_sequences", "num_tokens")}
        checksums = {"bin": summary.bin_sha256, "idx": summary.idx_sha256, "edits": edits}
        write_manifest(str(prefix), make_manifest(counts=counts, checksums=checksums, dtype=dtype))
    return str(prefix)


def make_manifest(**changes: object) -> Manifest:
    fields: dict[str, object] = {
        "versions": {"megatron_tokedit": "0.1.0"},
        "inputs": [InputRecord(path="a.jsonl", format="jsonl", num_bytes=3, sha256="00", num_documents=4)],
        "json_key": "text",
        "tokenizer": TokenizerRecord(
            type="SentencePieceTokenizer", model="m", vocab_size=8, eod=2, fingerprint="f" * 64
        ),
        "append_eod": True,
        "dtype": "uint16",
        "counts": {},
        "checksums": {},
    }
    return Manifest.model_validate(fields | changes)


def test_a_whole_dataset_is_reported(tmp_path: Path) -> None:
    report = verify_dataset(write(tmp_path / "a", manifest=False))
    assert (report.num_documents, report.num_sequences, report.num_tokens) == (4, 4, 7)
    assert (report.dtype, report.max_id, report.checksums_verified) == ("uint16", 7, False)
    assert verify_dataset(write(tmp_path / "b", manifest=True)).checksums_verified


def test_an_empty_dataset_is_whole(tmp_path: Path) -> None:
    with IndexedDatasetWriter(str(tmp_path / "a"), np.uint16) as writer:
        writer.finalize()
    assert verify_dataset(str(tmp_path / "a"), 1).max_id is None


def test_every_flipped_length_or_pointer_is_found_without_a_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write(tmp_path / "a", manifest=False)
    monkeypatch.setattr("megatron_tokedit.dataset.verify._CHUNK_ITEMS", 2)
    verify_dataset(prefix)
    path = Path(f"{prefix}.idx")
    good = path.read_bytes()
    for position in range(34 + 4 * 4 + 8 * 4):
        for bit in range(8):
            flipped = bytearray(good)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(DataFormatError, match=r"a\.(idx|bin)"):
                verify_dataset(prefix)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([0, 2, 1, 3, 4], "document 1 ends at sequence 1, before it begins"),
        ([1, 1, 1, 3, 4], "documents span sequences 1 to 4, expected 0 to 4"),
        ([0, 1, 1, 3, 3], "documents span sequences 0 to 3"),
    ],
)
def test_wrong_document_ends_are_found(tmp_path: Path, ends: list[int], message: str) -> None:
    prefix = write(tmp_path / "a", manifest=False)
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[: -8 * 5] + np.array(ends, np.int64).tobytes())
    with pytest.raises(DataFormatError, match=message):
        verify_dataset(prefix)


def test_ids_out_of_range_are_found(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", manifest=False, dtype="int32")
    with pytest.raises(DataFormatError, match="holds id 7, the vocabulary has 7"):
        verify_dataset(prefix, 7)
    tokens = np.fromfile(f"{prefix}.bin", np.int32)
    tokens[3] = -5
    tokens.tofile(f"{prefix}.bin")
    with pytest.raises(DataFormatError, match="holds the negative id -5"):
        verify_dataset(prefix, 8)


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", manifest=True)
    np.array([1, 2, 3, 4, 5, 9], np.uint16).tofile(f"{prefix}.bin")
    Path(f"{prefix}.edits").write_bytes(b"junk")
    with pytest.raises(DataFormatError) as error:
        verify_dataset(prefix)
    for part in ("a.bin: SHA-256", "a.bin: has 6 tokens, the index says 7", "holds id 9", "a.edits: SHA-256",
                 "a.edits: is not an edit journal", "num_tokens is 6, the manifest says 7"):  # fmt: skip
        assert part in str(error.value)


def test_a_stale_manifest_is_found(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", manifest=False)
    write_manifest(prefix, make_manifest(counts={"num_documents": 5}, dtype="int32"))
    with pytest.raises(DataFormatError, match="num_documents is 4, the manifest says 5") as error:
        verify_dataset(prefix)
    assert "the ids are uint16, the manifest says int32" in str(error.value)


def test_a_manifest_survives_the_disk_and_is_stable(tmp_path: Path) -> None:
    manifest = make_manifest(seed=3, edit={"threshold": 0.99, "sampler": "top_k"}, prior={"path": "p"})
    for name in "ab":
        write_manifest(str(tmp_path / name), manifest)
        assert read_manifest(str(tmp_path / name)) == manifest
    assert (tmp_path / "a.manifest.json").read_bytes() == (tmp_path / "b.manifest.json").read_bytes()


def test_no_manifest_is_none(tmp_path: Path) -> None:
    assert read_manifest(str(tmp_path / "a")) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{broken", r"a\.manifest\.json: is not valid JSON"),
        (b'{"json_key": 1, "extra": 2}', r"json_key: .*string.*tokenizer: Field required"),
        (b"[]", "is not a manifest of this version"),
    ],
)
def test_a_broken_manifest_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    prefix = write(tmp_path / "a", manifest=False)
    (tmp_path / "a.manifest.json").write_bytes(data)
    with pytest.raises(DataFormatError, match=message):
        read_manifest(prefix)
    with pytest.raises(DataFormatError, match=message):
        verify_dataset(prefix)


def test_a_dataset_of_another_tokenizer_is_refused() -> None:
    manifest = make_manifest()
    check_compatible("p", manifest)
    check_compatible("p", manifest, tokenizer_fingerprint="f" * 64, vocab_size=8)
    with pytest.raises(TokenizerError) as error:
        check_compatible("p", manifest, tokenizer_fingerprint="e" * 64, vocab_size=7)
    for part in ("dataset p does not fit", "SentencePieceTokenizer m", "fingerprint eeeeeeeeeeee", "only 7"):
        assert part in str(error.value)


def test_atomic_files_appear_whole_and_replace(tmp_path: Path) -> None:
    path = tmp_path / "a"
    atomic_write_bytes(path, b"old")
    with AtomicFile(path) as file:
        file.write(b"ne")
        file.write(memoryview(b"w"))
        assert path.read_bytes() == b"old"
        file.commit()
        assert (file.num_bytes, file.sha256) == (3, hashlib.sha256(b"new").hexdigest())
    assert path.read_bytes() == b"new"
    assert sha256_of_file(path) == hashlib.sha256(b"new").hexdigest()
    assert [found.name for found in tmp_path.iterdir()] == ["a"]


def test_two_writers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    with AtomicFile(tmp_path / "a") as first, AtomicFile(tmp_path / "a") as second:
        first.write(b"first")
        second.write(b"second")
        first.commit()
        second.commit()
    assert (tmp_path / "a").read_bytes() == b"second"


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 21, hard))
    try:
        with (
            IndexedDatasetWriter(str(tmp_path / "a"), np.uint16) as writer,
            pytest.raises(DataFormatError, match=r"cannot write .*a\.bin: File too large"),
        ):
            writer.add_document([np.zeros(1 << 18, np.uint16)] * 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
import numpy as np
import megatron_tokedit.dataset.atomic as atomic
from megatron_tokedit.dataset import IndexedDatasetWriter
steps = int(sys.argv[2])
for name in ("replace", "unlink", "fsync"):  # every moment at which the folder can change
    def dying(*arguments, real=getattr(os, name), **named):
        global steps
        if steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        steps -= 1
        return real(*arguments, **named)
    setattr(os, name, dying)
with IndexedDatasetWriter(sys.argv[1], np.uint16) as writer:
    writer.add_document([np.array([9, 9])])
    writer.finalize()
"""


def test_killed_at_any_moment_there_is_no_index_beside_another_s_bin(tmp_path: Path) -> None:
    for steps in range(20):
        prefix = write(tmp_path / "a", manifest=False)
        os.unlink(f"{prefix}.edits")
        old = sha256_of_file(f"{prefix}.bin")
        code = subprocess.run([sys.executable, "-c", KILLED, prefix, str(steps)], check=False).returncode
        if code == 0:
            assert verify_dataset(prefix).num_tokens == 2
            break
        assert code == -signal.SIGKILL
        if os.path.exists(f"{prefix}.idx"):
            expected = 7 if sha256_of_file(f"{prefix}.bin") == old else 2
            assert verify_dataset(prefix).num_tokens == expected
    assert steps > 5


def test_many_input_files_are_listed_in_bounded_memory():
    def record(index):
        return InputRecord(
            path=f"{index}.jsonl", format="jsonl", num_bytes=index, sha256=f"{index:064x}", num_documents=2
        )

    kept, omitted = shorten_inputs(record(index) for index in range(1003))
    assert [entry.num_bytes for entry in kept] == list(range(1000))
    assert (omitted.num_files, omitted.num_bytes, omitted.num_documents) == (3, 1000 + 1001 + 1002, 6)
    others = [record(index) for index in range(1000)] + [record(5)] * 3
    assert shorten_inputs(others)[1].sha256 != omitted.sha256
    kept, both = shorten_inputs([record(1)], [omitted, omitted])
    assert (len(kept), both.num_files, both.num_documents) == (1, 6, 12)
    assert shorten_inputs([record(1)]) == ([record(1)], None)
