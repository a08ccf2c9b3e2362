"""The edit journal, ``PREFIX.edits``: what every changed, dropped or inserted token was; nothing is lost.

It speaks of the original corpus: the text as it came in, encoded with the dataset's own tokenizer, however
many generations of edits lie between (layout: :mod:`megatron_tokedit.dataset.journal_format`).

Invariant: dataset and journal together give the original dataset, byte for byte; merging the journals of the
parts gives the journal of a single pass.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron_tokedit.dataset.atomic import AtomicFile
from megatron_tokedit.dataset.format import supported_dtype
from megatron_tokedit.dataset.journal_format import (
    CHANGED,
    DIGEST_BYTES,
    JournalEntries,
    JournalHeader,
    entry_fault,
    read_journal_header,
)
from megatron_tokedit.errors import DataFormatError

_CHUNK_ITEMS = 1 << 20


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
            positions: ``[E]``, ascending positions in the original's sequences laid end to end; of an
                inserted token that of the original token it precedes.
            original_ids: ``[E]``; 0 for an inserted token.
            kinds: ``[E]``, ``CHANGED``, ``DROPPED`` or ``INSERTED``.

        Raises:
            ValueError: arrays that do not fit together (a fault of the caller, not of the user).
        """
        index = self.num_documents
        self.num_documents += 1
        if not len(positions):
            return
        if not len(positions) == len(original_ids) == len(kinds):
            raise ValueError(
                f"{len(positions)} positions, {len(original_ids)} ids, {len(kinds)} kinds: must be equal"
            )
        if fault := entry_fault(sum(sequence_lengths), positions, kinds):
            raise ValueError(fault)
        columns = self._columns
        columns["positions"].frombytes(positions.astype(np.int32).tobytes())
        columns["original_ids"].frombytes(original_ids.astype(self.dtype).tobytes())
        columns["kinds"].frombytes(kinds.astype(np.uint8).tobytes())
        if len(sequence_lengths) > 1 and (kinds != CHANGED).any():
            columns["sequence_lengths"].extend(sequence_lengths)
        columns["documents"].append(index)
        columns["entry_ends"].append(len(columns["positions"]))
        columns["length_ends"].append(len(columns["sequence_lengths"]))

    def finalize(self) -> str:
        """Write the file, give it its name, and return its SHA-256 (hex)."""
        columns = self._columns
        header = JournalHeader(
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
        num_entries: changed, dropped and inserted tokens.
    """

    def __init__(self, path: str) -> None:
        """Map a journal; the checksum is checked by :meth:`verify`, not here.

        Raises:
            DataFormatError: missing, truncated or of another format.
        """
        self.path = path
        self.header = read_journal_header(path)
        self.num_documents = self.header.num_documents
        self.num_entries = self.header.num_entries
        data = np.asarray(np.memmap(path, np.uint8, "r"))
        self._columns: dict[str, npt.NDArray[Any]] = {}
        offset = self.header.sections_offset
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
        remaining = self.header.num_bytes - DIGEST_BYTES
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while chunk := file.read(min(_CHUNK_ITEMS, remaining)):
                digest.update(chunk)
                remaining -= len(chunk)
            stored = file.read(DIGEST_BYTES)
        if digest.digest() != stored:
            raise DataFormatError(
                f"{self.path}: its checksum does not fit its contents; the journal is damaged"
            )


@dataclass(frozen=True, slots=True)
class NoEdits:
    """Stands in a merge for the journal of an unedited part, which has none."""

    dtype: np.dtype[Any]
    num_documents: int


def merge_journals(parts: Sequence[str | NoEdits], output_path: str) -> str:
    """Join the journals of consecutive parts, as :func:`merge_datasets` joins the parts; constant memory.

    Args:
        parts: paths of journals; :class:`NoEdits` for a part without one.
        output_path: of the new journal.

    Returns:
        SHA-256 (hex) of the file.

    Raises:
        DataFormatError: no journal is given, one is damaged, or their dtypes differ.
    """
    headers = [_verified_header(part) for part in parts]
    if not headers:
        raise DataFormatError("no journal to merge is given")
    for part, header in zip(parts, headers, strict=True):
        if header.dtype != headers[0].dtype:
            raise DataFormatError(
                f"{part} has {header.dtype} ids, {parts[0]} has {headers[0].dtype}; they do not fit together"
            )
    merged = JournalHeader(
        headers[0].dtype,
        sum(header.num_documents for header in headers),
        sum(header.num_edited_documents for header in headers),
        sum(header.num_entries for header in headers),
        sum(header.num_lengths for header in headers),
    )
    with AtomicFile(output_path) as file:
        file.write(merged.pack())
        for name, _, _ in merged.sections():
            for chunk in _shifted_chunks(parts, headers, name):
                file.write(chunk.tobytes())
        return _finish(file)


_SHIFT_OF_COLUMN = {"documents": "num_documents", "entry_ends": "num_entries", "length_ends": "num_lengths"}


def _verified_header(part: str | NoEdits) -> JournalHeader:
    if isinstance(part, NoEdits):
        return JournalHeader(part.dtype, part.num_documents, 0, 0, 0)
    journal = Journal(part)
    journal.verify()
    return journal.header


def _shifted_chunks(
    parts: Sequence[str | NoEdits], headers: Sequence[JournalHeader], name: str
) -> Iterator[npt.NDArray[Any]]:
    """A section of all journals in chunks, with counts raised by what the journals before hold.

    One journal is mapped at a time: a process may hold only some ten thousand maps.
    """
    shift = 0
    for part, header in zip(parts, headers, strict=True):
        column = np.empty(0, np.int64) if isinstance(part, NoEdits) else Journal(part).column(name)
        for start in range(0, len(column), _CHUNK_ITEMS):
            chunk = column[start : start + _CHUNK_ITEMS]
            yield chunk + shift if shift else chunk
        if name in _SHIFT_OF_COLUMN:
            shift += getattr(header, _SHIFT_OF_COLUMN[name])


def _finish(file: AtomicFile) -> str:
    file.write(file.digest)
    file.commit()
    return file.sha256
