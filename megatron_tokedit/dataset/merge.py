"""Joining datasets: the parts of a job, or shards that were preprocessed apart.

Invariant: merging the parts gives the bytes of a single pass over all documents. Memory does not depend on
the size or the number of the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_tokedit.dataset.atomic import AtomicFile
from megatron_tokedit.dataset.format import IndexHeader, read_header
from megatron_tokedit.dataset.reader import IndexedDataset
from megatron_tokedit.dataset.writer import DatasetSummary, commit_pair, pointer_chunks
from megatron_tokedit.errors import DataFormatError

_COPY_BYTES = 8 << 20
_CHUNK_ITEMS = 1 << 20


def merge_datasets(
    prefixes: Sequence[str], output_prefix: str, *, on_part: Callable[[str], None] | None = None
) -> DatasetSummary:
    """Write the documents of all parts, in order, as one dataset.

    Args:
        prefixes: of the parts.
        output_prefix: of the new dataset.
        on_part: told the prefix of each part before its ``.bin`` is copied; may raise to refuse it.

    Raises:
        DataFormatError: no part is given, a part is missing or damaged, parts differ in dtype, or the output
            is one of the parts.
    """
    header = _merged_header(prefixes, output_prefix)
    num_tokens = 0
    with AtomicFile(f"{output_prefix}.bin") as bin_file, AtomicFile(f"{output_prefix}.idx") as idx_file:
        for prefix in prefixes:
            if on_part is not None:
                on_part(prefix)
            num_tokens += _copy_tokens(IndexedDataset(prefix), bin_file)
        idx_file.write(header.pack())
        for lengths in _length_chunks(prefixes):
            idx_file.write(lengths.tobytes())
        for pointers in pointer_chunks(_length_chunks(prefixes), header.dtype.itemsize):
            idx_file.write(pointers.tobytes())
        for ends in _document_end_chunks(prefixes):
            idx_file.write(ends.tobytes())
        commit_pair(bin_file, idx_file)
        return DatasetSummary(
            header.num_documents, header.num_sequences, num_tokens, bin_file.sha256, idx_file.sha256
        )


def _merged_header(prefixes: Sequence[str], output_prefix: str) -> IndexHeader:
    if not prefixes:
        raise DataFormatError("no dataset to merge is given")
    if output_prefix in prefixes:
        raise DataFormatError(f"{output_prefix} is both a part and the output of the merge")
    headers = [read_header(f"{prefix}.idx") for prefix in prefixes]
    for prefix, header in zip(prefixes, headers, strict=True):
        if header.dtype != headers[0].dtype:
            raise DataFormatError(
                f"{prefix} has {header.dtype} ids, {prefixes[0]} has {headers[0].dtype}; "
                "datasets of different vocabularies cannot be merged"
            )
    return IndexHeader(
        headers[0].dtype,
        sum(header.num_sequences for header in headers),
        sum(header.num_documents for header in headers),
    )


def _copy_tokens(part: IndexedDataset, output: AtomicFile) -> int:
    """Copy a part's ``.bin``, refusing one whose size does not fit its index; return its number of tokens."""
    num_tokens = sum(int(lengths.sum(dtype=np.int64)) for lengths in _chunks(part.sequence_lengths))
    if num_tokens != part.num_tokens:
        raise DataFormatError(
            f"{part.prefix}.bin has {part.num_tokens} tokens, but its index says {num_tokens}; it is damaged"
        )
    with open(f"{part.prefix}.bin", "rb") as file:
        while chunk := file.read(_COPY_BYTES):
            output.write(chunk)
    return num_tokens


def _length_chunks(prefixes: Sequence[str]) -> Iterator[npt.NDArray[np.int32]]:
    for prefix in prefixes:
        yield from _chunks(IndexedDataset(prefix).sequence_lengths)


def _document_end_chunks(prefixes: Sequence[str]) -> Iterator[npt.NDArray[np.int64]]:
    num_sequences = 0
    yield np.zeros(1, np.int64)
    for prefix in prefixes:
        part = IndexedDataset(prefix)
        for ends in _chunks(part.document_ends[1:]):
            yield ends + num_sequences
        num_sequences += part.num_sequences


def _chunks(items: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    return (items[i : i + _CHUNK_ITEMS] for i in range(0, len(items), _CHUNK_ITEMS))
