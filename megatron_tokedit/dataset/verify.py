"""Proving that a dataset on disk is whole.

Invariant: every fault that can be told from the files is found and reported together: sizes, pointers,
document ends, ids out of range, and, where a manifest lies beside the dataset, any changed byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_tokedit.dataset.atomic import sha256_of_file
from megatron_tokedit.dataset.journal import JOURNAL_SUFFIX, Journal
from megatron_tokedit.dataset.manifest import Manifest, read_manifest
from megatron_tokedit.dataset.reader import IndexedDataset
from megatron_tokedit.errors import DataFormatError

_CHUNK_ITEMS = 1 << 20


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


def verify_dataset(prefix: str, vocab_size: int | None = None) -> VerifyReport:
    """Read a whole dataset and check it, in constant memory.

    Args:
        prefix: path without suffix.
        vocab_size: ids must be below it; default: the manifest's, where there is one.

    Raises:
        DataFormatError: with every fault found.
    """
    faults: list[str] = []
    manifest = _manifest_or_fault(prefix, faults)
    if manifest is not None:
        faults += _checksum_faults(prefix, manifest)
        vocab_size = manifest.tokenizer.vocab_size if vocab_size is None else vocab_size
    try:
        dataset = IndexedDataset(prefix)
    except DataFormatError as error:
        raise _error(prefix, [str(error), *faults]) from error
    faults += _index_faults(dataset)
    faults += _journal_faults(dataset)
    max_id, id_faults = _id_range(dataset, vocab_size)
    faults += id_faults
    if manifest is not None:
        faults += _count_faults(dataset, manifest)
    if faults:
        raise _error(prefix, faults)
    return VerifyReport(
        num_documents=dataset.num_documents,
        num_sequences=dataset.num_sequences,
        num_tokens=dataset.num_tokens,
        dtype=dataset.dtype.name,
        max_id=max_id,
        checksums_verified=manifest is not None,
    )


def _error(prefix: str, faults: list[str]) -> DataFormatError:
    return DataFormatError(f"dataset {prefix} is damaged:\n  " + "\n  ".join(faults))


def _manifest_or_fault(prefix: str, faults: list[str]) -> Manifest | None:
    try:
        return read_manifest(prefix)
    except DataFormatError as error:
        faults.append(str(error))
        return None


def _checksum_faults(prefix: str, manifest: Manifest) -> Iterator[str]:
    for suffix, expected in manifest.checksums.items():
        path = f"{prefix}.{suffix}"
        if not os.path.isfile(path):
            yield f"{path}: is missing, but the manifest names it"
        elif (found := sha256_of_file(path)) != expected:
            yield f"{path}: SHA-256 is {found[:12]}..., the manifest says {expected[:12]}..."


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


def _journal_faults(dataset: IndexedDataset) -> Iterator[str]:
    path = f"{dataset.prefix}{JOURNAL_SUFFIX}"
    if not os.path.isfile(path):
        return
    try:
        journal = Journal(path)
        journal.verify()
    except DataFormatError as error:
        yield str(error)
    else:
        if journal.num_documents != dataset.num_documents:
            yield f"{path}: is for {journal.num_documents} documents, there are {dataset.num_documents}"


def _id_range(dataset: IndexedDataset, vocab_size: int | None) -> tuple[int | None, list[str]]:
    """Return the largest id, and faults."""
    low, high = 0, -1
    with open(
        f"{dataset.prefix}.bin", "rb"
    ) as file:  # a read through the map would count as this process's memory
        while (chunk := np.fromfile(file, dataset.dtype, _CHUNK_ITEMS)).size:
            low, high = min(low, int(chunk.min())), max(high, int(chunk.max()))
    faults = []
    if low < 0:
        faults.append(f"{dataset.prefix}.bin: holds the negative id {low}")
    if vocab_size is not None and high >= vocab_size:
        faults.append(f"{dataset.prefix}.bin: holds id {high}, the vocabulary has {vocab_size}")
    return (high if high >= 0 else None), faults
