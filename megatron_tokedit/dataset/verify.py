"""Proving that a dataset on disk is whole.

Invariant: every fault that can be told from the files is found and reported together: sizes, pointers,
document ends, ids out of range, a journal that cannot be undone, counts that disagree, and, where a manifest
lies beside the dataset, any changed byte.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from megatron_tokedit.dataset.journal import Journal
from megatron_tokedit.dataset.journal_format import JOURNAL_SUFFIX
from megatron_tokedit.dataset.loss_mask import has_loss_mask, loss_mask_faults
from megatron_tokedit.dataset.manifest import (
    CHECKSUMMED,
    MANIFEST_SUFFIX,
    STATISTICS_SUFFIX,
    Manifest,
    manifest_is_as_written,
    read_manifest,
)
from megatron_tokedit.dataset.reader import IndexedDataset
from megatron_tokedit.dataset.verify_journal import journal_faults
from megatron_tokedit.errors import DataFormatError

_CHUNK_ITEMS = 1 << 20
_COUNT_OF_STATISTIC = {
    ("documents", "in"): "num_documents_in",
    ("documents", "out"): "num_documents",
    ("sequences",): "num_sequences",
    ("tokens",): "num_tokens",
    ("edit", "tokens"): "num_tokens_in",
    ("edit", "scored"): "num_scored_tokens",
    ("edit", "eligible"): "num_eligible_tokens",
    ("edit", "resampled"): "num_resampled_tokens",
    ("edit", "changed"): "num_changed_tokens",
    ("edit", "dropped"): "num_dropped_tokens",
}
"""Place in ``.stats.json`` -> the manifest's name of the same count."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """A dataset found to be whole.

    ``checksums_verified`` is False where no manifest lies beside it: then a changed id that is still a valid
    id cannot be told.
    """

    num_documents: int
    num_sequences: int
    num_tokens: int
    dtype: str
    max_id: int | None
    checksums_verified: bool


def verify_dataset(
    prefix: str, vocab_size: int | None = None, *, on_bytes: Callable[[int], None] | None = None
) -> VerifyReport:
    """Read a whole dataset and check it, in constant memory.

    Args:
        prefix: path without suffix.
        vocab_size: ids must be below it; default: the manifest's, where there is one.
        on_bytes: told how many more bytes of the files were read.

    Raises:
        DataFormatError: with every fault found.
    """
    faults: list[str] = []
    manifest = _manifest_or_fault(prefix, faults)
    if manifest is not None and vocab_size is None:
        vocab_size = manifest.tokenizer.vocab_size
    dataset = _dataset_or_fault(prefix, faults)
    contents = _Contents(prefix, manifest, on_bytes)
    faults += contents.faults(dataset, vocab_size)
    if dataset is not None:
        index_faults = list(_index_faults(dataset))
        faults += index_faults
        faults += _journal_faults(dataset, vocab_size, whole=not index_faults)
        if has_loss_mask(prefix) or (manifest is not None and manifest.conversation is not None):
            faults += loss_mask_faults(dataset, _journal_if_whole(dataset, faults))
    if manifest is not None:
        faults += _count_faults(dataset, manifest) if dataset is not None else ()
        faults += _statistics_faults(prefix, manifest)
    if faults or dataset is None:
        raise DataFormatError(f"dataset {prefix} is not whole:\n  " + "\n  ".join(faults))
    return VerifyReport(
        num_documents=dataset.num_documents,
        num_sequences=dataset.num_sequences,
        num_tokens=dataset.num_tokens,
        dtype=dataset.dtype.name,
        max_id=contents.max_id,
        checksums_verified=manifest is not None,
    )


def _manifest_or_fault(prefix: str, faults: list[str]) -> Manifest | None:
    try:
        manifest = read_manifest(prefix)
    except DataFormatError as error:
        faults.append(str(error))
        return None
    if manifest is not None and not manifest_is_as_written(prefix):
        faults.append(
            f"{prefix}{MANIFEST_SUFFIX}: was changed after it was written (its own checksum differs)"
        )
    return manifest


def _dataset_or_fault(prefix: str, faults: list[str]) -> IndexedDataset | None:
    try:
        return IndexedDataset(prefix)
    except DataFormatError as error:
        faults.append(str(error))
        return None


class _Contents:
    """Reads every file once: for its checksum, and ``.bin`` for the range of its ids.

    Attributes:
        max_id: the largest id, after :meth:`faults`; None where there is none.
    """

    def __init__(
        self, prefix: str, manifest: Manifest | None, on_bytes: Callable[[int], None] | None
    ) -> None:
        self.max_id: int | None = None
        self._prefix = prefix
        self._manifest = manifest
        self._on_bytes = on_bytes or (lambda num_bytes: None)

    def faults(self, dataset: IndexedDataset | None, vocab_size: int | None) -> Iterator[str]:
        """Yield files that are missing or changed, and ids out of range."""
        checksums = self._manifest.checksums if self._manifest else {}
        for suffix in dict.fromkeys((*CHECKSUMMED, *checksums)):
            path = self._prefix + CHECKSUMMED.get(suffix, f".{suffix}")
            if not os.path.isfile(path):
                if suffix in checksums:
                    yield f"{path}: is missing, but the manifest names it"
                continue
            dtype = dataset.dtype if dataset is not None and suffix == "bin" else None
            sha256, low, high = self._scan(path, dtype)
            if suffix in checksums and sha256 != checksums[suffix]:
                yield f"{path}: SHA-256 is {sha256[:12]}..., the manifest says {checksums[suffix][:12]}..."
            if self._manifest is not None and suffix not in checksums:
                yield f"{path}: the manifest does not name it; it belongs to another dataset"
            if low < 0:
                yield f"{path}: holds the negative id {low}"
            if vocab_size is not None and high >= vocab_size:
                yield f"{path}: holds id {high}, the vocabulary has {vocab_size}"
            if suffix == "bin" and high >= 0:
                self.max_id = high

    def _scan(self, path: str, dtype: np.dtype[Any] | None) -> tuple[str, int, int]:
        """SHA-256 (hex) of a file; with ``dtype`` also its smallest (at most 0) and largest id (-1: none).

        A read through the map of the dataset would count as this process's memory.
        """
        digest = hashlib.sha256()
        low, high = 0, -1
        with open(path, "rb") as file:
            while chunk := file.read(4 * _CHUNK_ITEMS):
                digest.update(chunk)
                self._on_bytes(len(chunk))
                if dtype is not None:
                    ids = np.frombuffer(chunk, dtype)
                    low, high = min(low, int(ids.min())), max(high, int(ids.max()))
        return digest.hexdigest(), low, high


def _count_faults(dataset: IndexedDataset, manifest: Manifest) -> Iterator[str]:
    for name in ("num_documents", "num_sequences", "num_tokens"):
        found, expected = getattr(dataset, name), manifest.counts.get(name)
        if expected is not None and found != expected:
            yield f"{name} is {found}, the manifest says {expected}"
    if dataset.dtype.name != manifest.dtype:
        yield f"the ids are {dataset.dtype.name}, the manifest says {manifest.dtype}"


def _index_faults(dataset: IndexedDataset) -> Iterator[str]:
    yield from _sequence_faults(dataset)
    index, ends = f"{dataset.prefix}.idx", dataset.document_ends
    for start in range(0, dataset.num_documents, _CHUNK_ITEMS):
        chunk = ends[start : start + _CHUNK_ITEMS + 1]
        falling = np.flatnonzero(chunk[1:] < chunk[:-1])
        if falling.size:
            document = start + int(falling[0])
            yield f"{index}: document {document} ends at sequence {ends[document + 1]}, before it begins"
            break
    if ends[0] != 0 or ends[-1] != dataset.num_sequences:
        expected = f"expected 0 to {dataset.num_sequences}"
        yield f"{index}: documents span sequences {ends[0]} to {ends[-1]}, {expected}"


def _sequence_faults(dataset: IndexedDataset) -> Iterator[str]:
    index, lengths, pointers = f"{dataset.prefix}.idx", dataset.sequence_lengths, dataset.sequence_pointers
    itemsize = dataset.dtype.itemsize
    num_tokens = 0
    for start in range(0, dataset.num_sequences, _CHUNK_ITEMS):
        chunk = lengths[start : start + _CHUNK_ITEMS].astype(np.int64)
        ends = num_tokens + np.cumsum(chunk)
        wrong = np.flatnonzero(
            (pointers[start : start + _CHUNK_ITEMS] != (ends - chunk) * itemsize) | (chunk < 0)
        )
        if wrong.size:
            sequence = start + int(wrong[0])
            yield (
                f"{index}: sequence {sequence} ({lengths[sequence]} tokens) is at byte {pointers[sequence]}, "
                f"the lengths before it add up to byte {int((ends - chunk)[wrong[0]]) * itemsize}"
            )
            return
        num_tokens = int(ends[-1])
    if num_tokens != dataset.num_tokens:
        yield f"{dataset.prefix}.bin: has {dataset.num_tokens} tokens, the index says {num_tokens}"


def _journal_faults(dataset: IndexedDataset, vocab_size: int | None, *, whole: bool) -> Iterator[str]:
    """Faults of the journal, if there is one; ``whole``: whether the index has none of its own."""
    path = f"{dataset.prefix}{JOURNAL_SUFFIX}"
    if not os.path.isfile(path):
        return
    try:
        journal = Journal(path)
    except DataFormatError as error:
        yield str(error)
        return
    try:
        journal.verify()
    except DataFormatError as error:
        yield str(error)
    if whole:
        yield from journal_faults(dataset, journal, vocab_size)


def _journal_if_whole(dataset: IndexedDataset, faults: Sequence[str]) -> Journal | None:
    """The journal, if there is one and nothing is wrong with what was looked at so far."""
    path = f"{dataset.prefix}{JOURNAL_SUFFIX}"
    return Journal(path) if os.path.isfile(path) and not faults else None


def _statistics_faults(prefix: str, manifest: Manifest) -> Iterator[str]:
    """Counts in ``.stats.json``, if it is there, that are not the manifest's."""
    path = f"{prefix}{STATISTICS_SUFFIX}"
    if not os.path.isfile(path):
        return
    try:
        with open(path, "rb") as file:
            statistics = orjson.loads(file.read())
    except orjson.JSONDecodeError as error:
        yield f"{path}: is not valid JSON: {error}"
        return
    for place, name in _COUNT_OF_STATISTIC.items():
        found: Any = statistics
        for key in place:
            found = found.get(key) if isinstance(found, dict) else None
        expected = manifest.counts.get(name)
        if expected is not None and found is not None and found != expected:
            yield f"{path}: {'.'.join(place)} is {found}, the manifest's {name} is {expected}"
