"""The layout of Megatron's indexed dataset.

``PREFIX.bin`` holds the token ids of all sequences, one after the other, without separators.
``PREFIX.idx`` holds, little-endian::

    9 bytes  "MMIDIDX\\0\\0"
    u64      version, 1
    u8       code of the ids' dtype: 8 = uint16, 4 = int32; 1 = uint8, of a loss mask
    u64      S, number of sequences
    u64      D + 1, where D is the number of documents
    i32 [S]      length of each sequence, in tokens
    i64 [S]      byte offset of each sequence in .bin
    i64 [D + 1]  0, then for each document the number of sequences up to its end

Invariant: this file is the only one that knows the layout.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_tokedit.errors import DataFormatError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE: dict[int, np.dtype[Any]] = {8: np.dtype("<u2"), 4: np.dtype("<i4"), 1: np.dtype("u1")}
_UINT16_VOCAB_LIMIT = 65500  # Megatron's rule; the ids above it are not used


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """Megatron's rule: uint16 for a vocabulary below 65500, else int32."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCAB_LIMIT else np.int32)


@dataclass(frozen=True, slots=True)
class IndexHeader:
    """The counts in an ``.idx`` file and where its three arrays lie, in bytes."""

    dtype: np.dtype[Any]
    num_sequences: int
    num_documents: int

    @property
    def lengths_offset(self) -> int:
        """Start of the sequence lengths, int32 ``[num_sequences]``."""
        return _HEADER.size

    @property
    def pointers_offset(self) -> int:
        """Start of the byte offsets, int64 ``[num_sequences]``."""
        return self.lengths_offset + 4 * self.num_sequences

    @property
    def documents_offset(self) -> int:
        """Start of the document ends, int64 ``[num_documents + 1]``."""
        return self.pointers_offset + 8 * self.num_sequences

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return self.documents_offset + 8 * (self.num_documents + 1)

    def pack(self) -> bytes:
        """The first bytes of the file."""
        code = code_of_dtype(self.dtype)
        return _HEADER.pack(_MAGIC, _VERSION, code, self.num_sequences, self.num_documents + 1)


def read_header(path: str) -> IndexHeader:
    """Read the header of an ``.idx`` file and compare it with the file's size.

    Raises:
        DataFormatError: missing, too short, another format, version or dtype, or a size that does not fit.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(_HEADER.size)
            num_bytes = file.seek(0, 2)
    except OSError as error:
        raise DataFormatError(f"{path}: cannot be read: {error.strerror}") from error
    if len(start) < _HEADER.size:
        raise DataFormatError(
            f"{path}: has {num_bytes} bytes, fewer than the header of an .idx file; it is truncated"
        )
    magic, version, code, num_sequences, num_ends = _HEADER.unpack(start)
    if magic != _MAGIC or version != _VERSION:
        raise DataFormatError(
            f"{path}: is not an .idx file of version 1 (it begins with {start[:17].hex(' ')})"
        )
    if code not in DTYPE_OF_CODE:
        raise DataFormatError(
            f"{path}: has dtype code {code}; token ids are uint16 (code 8) or int32 (code 4)"
        )
    if num_ends < 1:
        raise DataFormatError(
            f"{path}: has a document count of {num_ends}; the smallest is 1, for no documents"
        )
    header = IndexHeader(DTYPE_OF_CODE[code], num_sequences, num_ends - 1)
    if header.num_bytes != num_bytes:
        raise DataFormatError(
            f"{path}: has {num_bytes} bytes, but its header says {header.num_bytes} "
            f"({num_sequences} sequences, {num_ends - 1} documents); it is truncated or damaged"
        )
    return header


def code_of_dtype(dtype: np.dtype[Any]) -> int:
    """The format's code of a supported dtype."""
    return next(code for code, known in DTYPE_OF_CODE.items() if known == dtype)


def supported_dtype(dtype: Any) -> np.dtype[Any]:
    """Return ``dtype`` as one of the format's: that of token ids, or uint8, of a loss mask.

    Raises:
        ValueError: another one.
    """
    found: np.dtype[Any] = np.dtype(dtype)
    if found not in DTYPE_OF_CODE.values():
        raise ValueError(f"token ids are uint16 or int32, got {found}")
    return found
