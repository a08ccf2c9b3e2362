"""Writing an indexed dataset, document by document.

Invariant: the bytes are those of megatron-core's ``IndexedDatasetBuilder``; ``.bin`` and ``.idx`` appear by
rename, ``.idx`` last, so that a dataset with an ``.idx`` is whole. Memory: 12 bytes a document.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron_tokedit.dataset.atomic import AtomicFile, sha256_of_file, sync_folder
from megatron_tokedit.dataset.format import IndexHeader, supported_dtype
from megatron_tokedit.errors import DataFormatError

_CHUNK_ITEMS = 1 << 20
_MAX_SEQUENCE_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class DatasetSummary:
    """What was written."""

    num_documents: int
    num_sequences: int
    num_tokens: int
    bin_sha256: str
    idx_sha256: str

    def counts(self) -> dict[str, int]:
        """The counts as a manifest names them."""
        return {
            "num_documents": self.num_documents,
            "num_sequences": self.num_sequences,
            "num_tokens": self.num_tokens,
        }


class IndexedDatasetWriter:
    """Writes ``PREFIX.bin`` and ``PREFIX.idx``.

    Use as a context manager: leaving it without :meth:`finalize`, for an exception or otherwise, removes what
    was written and leaves an older dataset of that prefix as it was.
    """

    def __init__(self, prefix: str, dtype: Any) -> None:
        """Start a dataset.

        Args:
            prefix: path without ``.bin``/``.idx``.
            dtype: uint16 or int32, see :func:`megatron_tokedit.dataset.best_dtype`.

        Raises:
            DataFormatError: the folder cannot be written.
        """
        self.prefix = prefix
        self.dtype = supported_dtype(dtype)
        self.num_tokens = 0
        self._bin = AtomicFile(f"{prefix}.bin")
        self._lengths = array("i")
        self._document_ends = array("q", [0])

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._document_ends) - 1

    def add_document(self, sequences: Sequence[npt.NDArray[np.integer]]) -> None:
        """Append one document.

        Args:
            sequences: id arrays ``[num_tokens]``, any integer dtype. Sequences without ids leave no trace, as
                in Megatron-LM; a document without any is written as a document of no sequences.

        Raises:
            DataFormatError: an id does not fit into the dataset's dtype; nothing of the document is written.
        """
        arrays = [self._checked(sequence) for sequence in sequences if len(sequence)]
        for ids in arrays:
            self._bin.write(ids.tobytes())
            self._lengths.append(ids.size)
            self.num_tokens += ids.size
        self._document_ends.append(len(self._lengths))

    def finalize(self) -> DatasetSummary:
        """Write the index and give both files their names."""
        header = IndexHeader(self.dtype, len(self._lengths), self.num_documents)
        with AtomicFile(f"{self.prefix}.idx") as index:
            index.write(header.pack())
            index.write(memoryview(self._lengths).cast("B"))
            for pointers in _pointer_chunks(self._lengths, self.dtype.itemsize):
                index.write(pointers.tobytes())
            index.write(memoryview(self._document_ends).cast("B"))
            commit_pair(self._bin, index)
            return DatasetSummary(
                header.num_documents, header.num_sequences, self.num_tokens, self._bin.sha256, index.sha256
            )

    def _checked(self, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu" or ids.ndim != 1:
            raise ValueError(f"ids must be a one-dimensional integer array, got {ids.dtype} {ids.shape}")
        if ids.size > _MAX_SEQUENCE_TOKENS:
            raise DataFormatError(
                f"{self.prefix}: document {self.num_documents} has a sequence of {ids.size} tokens, "
                f"the format holds at most {_MAX_SEQUENCE_TOKENS}"
            )
        if ids.dtype != self.dtype:
            limits = np.iinfo(self.dtype)
            low, high = int(ids.min()), int(ids.max())
            if low < limits.min or high > limits.max:
                raise DataFormatError(
                    f"{self.prefix}: document {self.num_documents} has token id {low if low < 0 else high}, "
                    f"which {self.dtype} cannot hold; take the dtype of the tokenizer's whole vocabulary"
                )
        return ids.astype(self.dtype, copy=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.discard()


def commit_pair(bin_file: AtomicFile, idx_file: AtomicFile) -> None:
    """Give a ``.bin`` and its ``.idx`` their names; no ``.idx`` ever stands beside another's ``.bin``.

    An equal ``.idx`` that is there already (another process did the same work) is never taken away: it fits
    the ``.bin`` before and after.
    """
    bin_file.seal()
    idx_file.seal()
    there = Path(idx_file.path)
    if there.exists() and sha256_of_file(idx_file.path) != idx_file.sha256:
        there.unlink(missing_ok=True)
        sync_folder(idx_file.path)
    bin_file.commit()
    idx_file.commit()


def _pointer_chunks(lengths: array[int], itemsize: int) -> Iterator[npt.NDArray[np.int64]]:
    """Byte offsets of the sequences, in chunks, so that they never all lie in memory."""
    return pointer_chunks(
        (
            np.frombuffer(lengths, np.int32)[i : i + _CHUNK_ITEMS]
            for i in range(0, len(lengths), _CHUNK_ITEMS)
        ),
        itemsize,
    )


def pointer_chunks(
    length_chunks: Iterable[npt.NDArray[np.int32]], itemsize: int
) -> Iterator[npt.NDArray[np.int64]]:
    """For consecutive chunks of sequence lengths, the chunks of byte offsets where the sequences start."""
    start = 0
    for lengths in length_chunks:
        ends = start + np.cumsum(lengths, dtype=np.int64) * itemsize
        yield np.concatenate(([start], ends[:-1]))
        start = int(ends[-1])
