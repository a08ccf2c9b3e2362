"""The edit journal, ``PREFIX.edits``: what every changed or dropped token was, so that nothing is ever lost.

Layout, little-endian, memory-mappable; M documents with edits, E entries, L lengths::

    8 bytes  "TKEDITS\\0"
    u32      version, 1
    u32      code of the ids' dtype, as in .idx: 8 = uint16, 4 = int32
    u64      documents in the dataset; u64 M; u64 E; u64 L
    i64 [M]  index of each document that has edits, ascending
    i64 [M]  number of entries up to its end
    i64 [M]  number of lengths up to its end
    i32 [L]  sequence lengths of the original; only for documents of several sequences that lost a token
    i32 [E]  position in the original document's sequences, laid end to end; ascending in a document
    ids [E]  the original id
    u8  [E]  1 = changed, 2 = dropped
    32 bytes SHA-256 of all before

Invariant: dataset and journal together give the original dataset, byte for byte; merging the journals of the
parts gives the journal of a single pass.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron_tokedit.dataset.atomic import AtomicFile
from megatron_tokedit.dataset.format import DTYPE_OF_CODE, code_of_dtype, supported_dtype
from megatron_tokedit.errors import DataFormatError

CHANGED = 1
DROPPED = 2
JOURNAL_SUFFIX = ".edits"
_MAGIC = b"TKEDITS\x00"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQQQ")
_DIGEST_BYTES = 32
_CHUNK_ITEMS = 1 << 20


@dataclass(frozen=True, slots=True)
class JournalEntries:
    """The edits of one document.

    Attributes:
        positions: int32 ``[E]``, ascending, in the original document's sequences laid end to end.
        original_ids: ``[E]``, the ids that stood there.
        kinds: uint8 ``[E]``, :data:`CHANGED` or :data:`DROPPED`.
        sequence_lengths: int32, lengths of the original sequences; empty where they follow from the edited
            ones.
    """

    positions: npt.NDArray[np.int32]
    original_ids: npt.NDArray[np.integer]
    kinds: npt.NDArray[np.uint8]
    sequence_lengths: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Header:
    """Counts, and the sections that follow from them."""

    dtype: np.dtype[Any]
    num_documents: int
    num_edited_documents: int
    num_entries: int
    num_lengths: int

    def sections(self) -> list[tuple[str, np.dtype[Any], int]]:
        """Name, dtype and number of items of every section, in file order."""
        edited, entries = self.num_edited_documents, self.num_entries
        return [
            ("documents", np.dtype("<i8"), edited),
            ("entry_ends", np.dtype("<i8"), edited),
            ("length_ends", np.dtype("<i8"), edited),
            ("sequence_lengths", np.dtype("<i4"), self.num_lengths),
            ("positions", np.dtype("<i4"), entries),
            ("original_ids", self.dtype, entries),
            ("kinds", np.dtype("u1"), entries),
        ]

    def num_bytes(self) -> int:
        """Size of the whole file."""
        return (
            _HEADER.size + _DIGEST_BYTES + sum(dtype.itemsize * count for _, dtype, count in self.sections())
        )

    def pack(self) -> bytes:
        """The first bytes of the file."""
        counts = (self.num_documents, self.num_edited_documents, self.num_entries, self.num_lengths)
        return _HEADER.pack(_MAGIC, _VERSION, code_of_dtype(self.dtype), *counts)


class JournalWriter:
    """Writes a journal document by document, in the order of the dataset; 8 bytes an entry in memory.

    As a context manager it leaves no file unless :meth:`finalize` was called.
    """

    def __init__(self, path: str, dtype: Any) -> None:
        """Start a journal for a dataset of ``dtype`` ids.

        Raises:
            DataFormatError: the folder cannot be written.
        """
        self.path = path
        self.dtype = supported_dtype(dtype)
        self.num_documents = 0
        self._file = AtomicFile(path)
        id_code = "H" if self.dtype.itemsize == 2 else "i"
        self._columns = {
            "documents": array("q"),
            "entry_ends": array("q"),
            "length_ends": array("q"),
            "sequence_lengths": array("i"),
            "positions": array("i"),
            "original_ids": array(id_code),
            "kinds": array("B"),
        }

    def add_document(
        self,
        sequence_lengths: Sequence[int],
        positions: npt.NDArray[np.integer],
        original_ids: npt.NDArray[np.integer],
        kinds: npt.NDArray[np.integer],
    ) -> None:
        """Record the edits of the next document; call it for every document, with empty arrays for an
        unedited one.

        Args:
            sequence_lengths: tokens of each sequence of the original.
            positions: ``[E]``, strictly ascending positions in the original's sequences laid end to end.
            original_ids: ``[E]``.
            kinds: ``[E]``, :data:`CHANGED` or :data:`DROPPED`.

        Raises:
            ValueError: arrays that do not fit together (a fault of the caller, not of the user).
        """
        index = self.num_documents
        self.num_documents += 1
        if not len(positions):
            return
        _check_entries(sum(sequence_lengths), positions, original_ids, kinds)
        columns = self._columns
        columns["positions"].frombytes(positions.astype(np.int32).tobytes())
        columns["original_ids"].frombytes(original_ids.astype(self.dtype).tobytes())
        columns["kinds"].frombytes(kinds.astype(np.uint8).tobytes())
        if len(sequence_lengths) > 1 and (kinds == DROPPED).any():
            columns["sequence_lengths"].extend(sequence_lengths)
        columns["documents"].append(index)
        columns["entry_ends"].append(len(columns["positions"]))
        columns["length_ends"].append(len(columns["sequence_lengths"]))

    def finalize(self) -> str:
        """Write the file, give it its name, and return its SHA-256 (hex)."""
        columns = self._columns
        header = _Header(
            self.dtype,
            self.num_documents,
            len(columns["documents"]),
            len(columns["positions"]),
            len(columns["sequence_lengths"]),
        )
        self._file.write(header.pack())
        for name, _, _ in header.sections():
            self._file.write(memoryview(columns[name]).cast("B"))
        return _finish(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.discard()


class Journal:
    """A journal on disk, memory-mapped.

    Attributes:
        num_documents: documents of the dataset, edited or not.
        num_entries: changed and dropped tokens.
    """

    def __init__(self, path: str) -> None:
        """Map a journal; the checksum is checked by :meth:`verify`, not here.

        Raises:
            DataFormatError: missing, truncated or of another format.
        """
        self.path = path
        self.header = _read_header(path)
        self.num_documents = self.header.num_documents
        self.num_entries = self.header.num_entries
        data = np.asarray(np.memmap(path, np.uint8, "r"))
        self._columns: dict[str, npt.NDArray[Any]] = {}
        offset = _HEADER.size
        for name, dtype, count in self.header.sections():
            end = offset + dtype.itemsize * count
            self._columns[name] = data[offset:end].view(dtype)
            offset = end

    def column(self, name: str) -> npt.NDArray[Any]:
        """One section of the file, a read-only view."""
        return self._columns[name]

    def entries(self, document: int) -> JournalEntries:
        """The edits of document ``document``; empty arrays where it has none."""
        column = self._columns
        row = int(np.searchsorted(column["documents"], document))
        if row == len(column["documents"]) or column["documents"][row] != document:
            first = last = first_length = last_length = 0
        else:
            last, last_length = int(column["entry_ends"][row]), int(column["length_ends"][row])
            first, first_length = (
                (int(column["entry_ends"][row - 1]), int(column["length_ends"][row - 1])) if row else (0, 0)
            )
        return JournalEntries(
            column["positions"][first:last],
            column["original_ids"][first:last],
            column["kinds"][first:last],
            column["sequence_lengths"][first_length:last_length],
        )

    def verify(self) -> None:
        """Check the checksum.

        Raises:
            DataFormatError: a byte differs from what was written.
        """
        remaining = self.header.num_bytes() - _DIGEST_BYTES
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while chunk := file.read(min(_CHUNK_ITEMS, remaining)):
                digest.update(chunk)
                remaining -= len(chunk)
            stored = file.read(_DIGEST_BYTES)
        if digest.digest() != stored:
            raise DataFormatError(
                f"{self.path}: its checksum does not fit its contents; the journal is damaged"
            )


def merge_journals(paths: Sequence[str], output_path: str) -> str:
    """Join the journals of consecutive parts, as :func:`merge_datasets` joins the parts; constant memory.

    Returns:
        SHA-256 (hex) of the file.

    Raises:
        DataFormatError: no journal is given, one is damaged, or their dtypes differ.
    """
    headers = [_verified_header(path) for path in paths]
    if not headers:
        raise DataFormatError("no journal to merge is given")
    for path, header in zip(paths, headers, strict=True):
        if header.dtype != headers[0].dtype:
            raise DataFormatError(
                f"{path} has {header.dtype} ids, {paths[0]} has {headers[0].dtype}; they do not fit together"
            )
    merged = _Header(
        headers[0].dtype,
        sum(header.num_documents for header in headers),
        sum(header.num_edited_documents for header in headers),
        sum(header.num_entries for header in headers),
        sum(header.num_lengths for header in headers),
    )
    with AtomicFile(output_path) as file:
        file.write(merged.pack())
        for name, _, _ in merged.sections():
            for chunk in _shifted_chunks(paths, name):
                file.write(chunk.tobytes())
        return _finish(file)


_SHIFT_OF_COLUMN = {"documents": "num_documents", "entry_ends": "num_entries", "length_ends": "num_lengths"}


def _verified_header(path: str) -> _Header:
    journal = Journal(path)
    journal.verify()
    return journal.header


def _shifted_chunks(paths: Sequence[str], name: str) -> Iterator[npt.NDArray[Any]]:
    """A section of all journals in chunks, with counts raised by what the journals before hold.

    One journal is mapped at a time: a process may hold only some ten thousand maps.
    """
    shift = 0
    for path in paths:
        journal = Journal(path)
        column = journal.column(name)
        for start in range(0, len(column), _CHUNK_ITEMS):
            chunk = column[start : start + _CHUNK_ITEMS]
            yield chunk + shift if shift else chunk
        if name in _SHIFT_OF_COLUMN:
            shift += getattr(journal.header, _SHIFT_OF_COLUMN[name])


def _finish(file: AtomicFile) -> str:
    file.write(file.digest)
    file.commit()
    return file.sha256


def _check_entries(num_tokens: int, positions: Any, original_ids: Any, kinds: Any) -> None:
    if not len(positions) == len(original_ids) == len(kinds):
        raise ValueError(
            f"{len(positions)} positions, {len(original_ids)} ids, {len(kinds)} kinds: must be equal"
        )
    if positions[0] < 0 or positions[-1] >= num_tokens or (positions[1:] <= positions[:-1]).any():
        raise ValueError(f"positions must ascend strictly within [0, {num_tokens})")
    if ((kinds != CHANGED) & (kinds != DROPPED)).any():
        raise ValueError("kinds must be CHANGED or DROPPED")


def _read_header(path: str) -> _Header:
    try:
        with open(path, "rb") as file:
            start = file.read(_HEADER.size)
        num_bytes = os.path.getsize(path)
    except OSError as error:
        raise DataFormatError(f"{path}: cannot be read: {error.strerror}") from error
    if len(start) < _HEADER.size or not start.startswith(_MAGIC):
        raise DataFormatError(f"{path}: is not an edit journal, or is truncated ({num_bytes} bytes)")
    _, version, code, *counts = _HEADER.unpack(start)
    if version != _VERSION or code not in DTYPE_OF_CODE:
        raise DataFormatError(
            f"{path}: is a journal of version {version}, dtype code {code}; version 1 is expected"
        )
    header = _Header(DTYPE_OF_CODE[code], *counts)
    if header.num_bytes() != num_bytes:
        raise DataFormatError(
            f"{path}: has {num_bytes} bytes, its header says {header.num_bytes()}; it is truncated or damaged"
        )
    return header
