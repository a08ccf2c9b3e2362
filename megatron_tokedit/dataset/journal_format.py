"""The layout of the edit journal, ``PREFIX.edits``.

Little-endian, memory-mappable; M documents with edits, E entries, L lengths::

    8 bytes  "TKEDITS\\0"
    u32      version, 2 (version 1 is the same without inserted tokens)
    u32      code of the ids' dtype, as in .idx: 8 = uint16, 4 = int32
    u64      documents in the dataset; u64 M; u64 E; u64 L
    i64 [M]  index of each document that has edits, ascending
    i64 [M]  number of entries up to its end
    i64 [M]  number of lengths up to its end
    i32 [L]  sequence lengths of the original; only for documents of several sequences that lost or got tokens
    i32 [E]  position in the original document's sequences, laid end to end; ascending in a document
    ids [E]  the original id; 0 for an inserted token
    u8  [E]  1 = changed, 2 = dropped, 3 = inserted
    32 bytes SHA-256 of all before

A changed or dropped token stands at its own position, at most one a position. An inserted token, which has no
original, stands at the position of the original token it precedes (at the original's length if it is at the
end), before the entry of that token; several may stand at one position, in their order.

Invariant: this file is the only one that knows the layout and what a document's entries may look like.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_tokedit.dataset.format import DTYPE_OF_CODE, code_of_dtype
from megatron_tokedit.errors import DataFormatError

CHANGED = 1
DROPPED = 2
INSERTED = 3
JOURNAL_SUFFIX = ".edits"
DIGEST_BYTES = 32
_MAGIC = b"TKEDITS\x00"
_VERSION = 2
_READABLE_VERSIONS = (1, 2)
_HEADER = struct.Struct("<8sIIQQQQ")


@dataclass(frozen=True, slots=True)
class JournalEntries:
    """The edits of one document.

    Attributes:
        positions: int32 ``[E]``, ascending, in the original document's sequences laid end to end.
        original_ids: ``[E]``, the ids that stood there; 0 for inserted tokens.
        kinds: uint8 ``[E]``, :data:`CHANGED`, :data:`DROPPED` or :data:`INSERTED`.
        sequence_lengths: int32, lengths of the original sequences; empty where they follow from the edited
            ones.
    """

    positions: npt.NDArray[np.int32]
    original_ids: npt.NDArray[np.integer]
    kinds: npt.NDArray[np.uint8]
    sequence_lengths: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class JournalHeader:
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

    @property
    def sections_offset(self) -> int:
        """Where the first section starts."""
        return _HEADER.size

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        sections = sum(dtype.itemsize * count for _, dtype, count in self.sections())
        return _HEADER.size + sections + DIGEST_BYTES

    def pack(self) -> bytes:
        """The first bytes of the file."""
        counts = (self.num_documents, self.num_edited_documents, self.num_entries, self.num_lengths)
        return _HEADER.pack(_MAGIC, _VERSION, code_of_dtype(self.dtype), *counts)


def read_journal_header(path: str) -> JournalHeader:
    """Read the header of a journal and compare it with the file's size.

    Raises:
        DataFormatError: missing, too short, another format, version or dtype, or a size that does not fit.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(_HEADER.size)
        num_bytes = os.path.getsize(path)
    except OSError as error:
        raise DataFormatError(f"{path}: cannot be read: {error.strerror}") from error
    if len(start) < _HEADER.size or not start.startswith(_MAGIC):
        raise DataFormatError(f"{path}: is not an edit journal, or is truncated ({num_bytes} bytes)")
    _, version, code, *counts = _HEADER.unpack(start)
    if version not in _READABLE_VERSIONS or code not in DTYPE_OF_CODE:
        raise DataFormatError(
            f"{path}: is a journal of version {version}, dtype code {code}; "
            f"version {_VERSION}, dtype code 8 or 4 is expected"
        )
    header = JournalHeader(DTYPE_OF_CODE[code], *counts)
    if header.num_bytes != num_bytes:
        raise DataFormatError(
            f"{path}: has {num_bytes} bytes, its header says {header.num_bytes}; it is truncated or damaged"
        )
    return header


def entry_fault(
    num_tokens: int, positions: npt.NDArray[np.integer], kinds: npt.NDArray[np.integer]
) -> str | None:
    """Say what is wrong with the entries of one document; ``None`` if nothing is.

    Args:
        num_tokens: length of the original document.
        positions: ``[E]``, at least one.
        kinds: ``[E]``.
    """
    if kinds.min() < CHANGED or kinds.max() > INSERTED:
        return "kinds must be CHANGED, DROPPED or INSERTED"
    inserted = kinds == INSERTED
    smallest_steps = ~inserted[:-1]  # an inserted token may be followed by one at the same position
    if (positions[1:] < positions[:-1] + smallest_steps.astype(np.int64)).any():
        return "positions must ascend, and after a changed or dropped token strictly"
    last = num_tokens if inserted[-1] else num_tokens - 1
    if positions[0] < 0 or positions[-1] > last:
        return (
            f"positions {positions[0]} to {positions[-1]} must lie within an original of {num_tokens} tokens"
        )
    return None


def edited_positions(entries: JournalEntries) -> npt.NDArray[np.int64]:
    """Where each entry stands in the edited document, int64 ``[E]``; of a dropped token, where it stood."""
    dropped, inserted = entries.kinds == DROPPED, entries.kinds == INSERTED
    moves = inserted.astype(np.int64) - dropped
    places: npt.NDArray[np.int64] = entries.positions + np.cumsum(moves) - moves
    return places
