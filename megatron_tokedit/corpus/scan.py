"""Where the records of a file end and which of them are documents, found without keeping any record.

Invariant: the records are those that :func:`megatron_tokedit.corpus.streams.iter_records` reads later. Memory
does not depend on the file; for lines not even on the longest of them.

N: records of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_tokedit.corpus.records import is_blank, strip_byte_order_mark
from megatron_tokedit.corpus.streams import iter_records
from megatron_tokedit.errors import DataFormatError

Records = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]
_LINE_FEED = ord("\n")
_IS_SPACE = np.zeros(256, np.bool_)
_IS_SPACE[list(b" \t\n\r\v\f")] = True  # what bytes.strip removes
_TEXTS_A_CHUNK = 1024


def scan_lines(path: str, stream: BinaryIO, buffer: bytearray, *, json: bool) -> Iterator[Records]:
    """Yield sizes_N, line ends included, and documents_N (not blank) of the lines.

    Args:
        path: for messages.
        stream: at the beginning of the file.
        buffer: to read into; not empty. One for all files: a new one would cost more than a small file.
        json: refuse a file that begins like a JSON array.

    Raises:
        DataFormatError: it does.
    """
    view = memoryview(buffer)
    bytes_before, blank_before = 0, True  # of the line that goes on into the next chunk
    position = 0
    while count := stream.readinto(view):  # type: ignore[attr-defined]
        skipped = 0
        if position == 0:
            body = strip_byte_order_mark(bytes(view[:count]))
            skipped = count - len(body)
            if json:
                _refuse_json_array(path, body)
        position += count
        chunk_C = np.frombuffer(buffer, np.uint8, count)
        ends_N = np.flatnonzero(chunk_C == _LINE_FEED) + 1
        starts_N = np.concatenate(([0], ends_N))
        if len(ends_N) == 0:
            bytes_before += count
            blank_before = blank_before and _is_blank(view[skipped:count])
            continue
        documents_N = ~_IS_SPACE[chunk_C[starts_N[:-1]]]
        for index in np.flatnonzero(~documents_N):
            documents_N[index] = not _is_blank(view[starts_N[index] : ends_N[index]])
        if skipped:
            documents_N[0] = not _is_blank(view[skipped : ends_N[0]])
        documents_N[0] |= not blank_before
        sizes_N = np.diff(starts_N)
        sizes_N[0] += bytes_before
        yield sizes_N, documents_N
        rest = view[ends_N[-1] : count]
        bytes_before, blank_before = len(rest), _is_blank(rest)
    if bytes_before:
        yield np.array([bytes_before]), np.array([not blank_before])


def scan_texts(stream: BinaryIO) -> Iterator[Records]:
    """Yield sizes_N, separators included, and documents_N (not blank) of texts cut at ``<|endoftext|>``."""
    sizes: list[int] = []
    documents: list[bool] = []
    for index, record in enumerate(iter_records(stream, separated=True)):
        body = strip_byte_order_mark(record) if index == 0 else record
        sizes.append(len(record))
        documents.append(not is_blank(body, separated=True))
        if len(sizes) == _TEXTS_A_CHUNK:
            yield np.array(sizes), np.array(documents)
            sizes, documents = [], []
    if sizes:
        yield np.array(sizes), np.array(documents)


def _is_blank(part: memoryview) -> bool:
    """Whether there is nothing but white space."""
    return not bytes(part).strip()


def _refuse_json_array(path: str, beginning: bytes) -> None:
    if beginning.lstrip().startswith(b"["):
        raise DataFormatError(
            f"{path}:1: is a JSON array, but one JSON object a line is expected; "
            f"convert it, for example with: jq -c '.[]' {path} > NEW.jsonl"
        )
