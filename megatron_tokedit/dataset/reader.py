"""Reading an indexed dataset through memory maps.

Invariant: opening costs no memory and no pass over the data; what it cannot map safely it refuses. Use
:func:`megatron_tokedit.dataset.verify_dataset` to prove the contents.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_tokedit.dataset.format import read_header
from megatron_tokedit.errors import DataFormatError


class IndexedDataset:
    """``PREFIX.bin`` and ``PREFIX.idx``, memory-mapped and read-only.

    Attributes:
        prefix: path without suffix.
        dtype: of the token ids.
        sequence_lengths: int32 ``[num_sequences]``, tokens.
        sequence_pointers: int64 ``[num_sequences]``, byte offsets into ``.bin``.
        document_ends: int64 ``[num_documents + 1]``: document ``i`` has sequences ``[ends[i], ends[i + 1])``.
        tokens: all ids, ``[num_tokens]``, in the order of the file.
    """

    def __init__(self, prefix: str) -> None:
        """Map both files.

        Raises:
            DataFormatError: a file is missing, truncated or of another format.
        """
        self.prefix = prefix
        header = read_header(f"{prefix}.idx")
        self.dtype = header.dtype
        index = np.asarray(np.memmap(f"{prefix}.idx", np.uint8, "r"))  # asarray: slices of memmap are slow
        self.sequence_lengths = index[header.lengths_offset : header.pointers_offset].view("<i4")
        self.sequence_pointers = index[header.pointers_offset : header.documents_offset].view("<i8")
        self.document_ends = index[header.documents_offset :].view("<i8")
        self.tokens = _map_tokens(f"{prefix}.bin", header.dtype)

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return len(self.document_ends) - 1

    @property
    def num_sequences(self) -> int:
        """Sequences of all documents."""
        return len(self.sequence_lengths)

    @property
    def num_tokens(self) -> int:
        """Token ids in ``.bin``."""
        return len(self.tokens)

    def refuse_truncated(self) -> None:
        """Compare the end of the last sequence with the size of ``.bin``, without a pass over the data.

        Raises:
            DataFormatError: ``.bin`` is shorter than the index says.
        """
        if not self.num_sequences:
            return
        end = int(self.sequence_pointers[-1]) // self.dtype.itemsize + int(self.sequence_lengths[-1])
        if end > self.num_tokens:
            raise DataFormatError(
                f"{self.prefix}.bin: has {self.num_tokens} tokens, its index says {end}; it is truncated, "
                "preprocess the corpus again or copy it anew"
            )

    def sequence(self, index: int) -> npt.NDArray[np.integer]:
        """The ids of sequence ``index``, a read-only view ``[length]``.

        Raises:
            DataFormatError: the index says that it lies outside ``.bin``.
        """
        offset, length = int(self.sequence_pointers[index]), int(self.sequence_lengths[index])
        first, rest = divmod(offset, self.dtype.itemsize)
        if rest or first < 0 or length < 0 or first + length > self.num_tokens:
            raise DataFormatError(
                f"{self.prefix}.idx: sequence {index} has {length} tokens from byte {offset} on, but "
                f"{self.prefix}.bin has {self.num_tokens}; one of them is damaged"
            )
        return self.tokens[first : first + length]

    def token_offsets(self, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens before each sequence, as the index says; all tokens before the one after the last.

        Args:
            sequences: numbers of sequences, from 0 to ``num_sequences``.
        """
        offsets = np.full(len(sequences), self.num_tokens, np.int64)
        inside = sequences < self.num_sequences
        offsets[inside] = self.sequence_pointers[sequences[inside]] // self.dtype.itemsize
        return offsets

    def document(self, index: int) -> list[npt.NDArray[np.integer]]:
        """The sequences of document ``index``; empty for an empty document.

        Raises:
            IndexError: there is no such document.
            DataFormatError: the index says that it lies outside the dataset.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"{self.prefix}: no document {index}; there are {self.num_documents}")
        first, end = int(self.document_ends[index]), int(self.document_ends[index + 1])
        if not 0 <= first <= end <= self.num_sequences:
            raise DataFormatError(
                f"{self.prefix}.idx: document {index} has sequences {first} to {end} of "
                f"{self.num_sequences}; it is damaged"
            )
        return [self.sequence(i) for i in range(first, end)]

    def iter_documents(self) -> Iterator[list[npt.NDArray[np.integer]]]:
        """Yield every document's sequences in order."""
        return (self.document(index) for index in range(self.num_documents))

    def __len__(self) -> int:
        return self.num_documents

    def __reduce__(self) -> tuple[Any, ...]:
        return (IndexedDataset, (self.prefix,))


def _map_tokens(path: str, dtype: np.dtype[Any]) -> npt.NDArray[np.integer]:
    try:
        num_bytes = os.path.getsize(path)
        if num_bytes == 0:
            return np.zeros(0, dtype)  # an empty file cannot be mapped
        if num_bytes % dtype.itemsize == 0:
            return np.asarray(np.memmap(path, dtype, "r"))
    except OSError as error:
        raise DataFormatError(f"{path}: cannot be read: {error.strerror}") from error
    raise DataFormatError(
        f"{path}: has {num_bytes} bytes, no multiple of {dtype.itemsize}; it is truncated or damaged"
    )
