"""Byte streams over plain, gzip and zstd files, and their records.

Invariant: damaged or truncated data raises :class:`DataFormatError`; it never looks like the end of the file.
Memory does not depend on the size of the file, only on its longest record.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import zstandard

from megatron_tokedit.errors import DataFormatError

CHUNK_BYTES = 1 << 20
_ZSTD_INPUT_BYTES = 1 << 12  # small, because one chunk may expand ten-thousandfold
SEPARATOR = b"<|endoftext|>"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# One decompressing stream, left where a unit ended, for the next unit of the same process: (process, path) ->
# (position, stream). Without it every unit of a compressed file would decompress the file from its beginning.
_parked: dict[tuple[int, str], tuple[int, BinaryIO]] = {}


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what goes wrong in a file into :class:`DataFormatError`."""
    try:
        yield
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataFormatError(f"{path}: cannot be read: {reason}") from error


class HashingFile(io.RawIOBase):
    """A file that is read once from start to end, with the SHA-256 and number of the bytes read so far."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._file = io.FileIO(path)
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read into ``buffer``, hashing what was read."""
        count = self._file.readinto(buffer) or 0
        self._hash.update(memoryview(buffer)[:count])
        self.num_bytes += count
        return count

    @property
    def sha256(self) -> str:
        """Hex digest of the bytes read so far."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


class _GzipFile(gzip.GzipFile):
    """A GzipFile that closes the stream it was given."""

    def close(self) -> None:
        compressed: Any = self.fileobj
        super().close()
        if compressed is not None:
            compressed.close()


class _ZstdFile(io.RawIOBase):
    """Decompressed zstd frames. (The library's own stream reader takes a truncated frame for a whole one.)"""

    def __init__(self, compressed: BinaryIO) -> None:
        super().__init__()
        self._compressed = compressed
        self._library = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame = self._library.decompressobj()
        self._inside_frame = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read decompressed bytes into ``buffer``."""
        while not self._ready and self._fill():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _fill(self) -> bool:
        """Decompress one more chunk; False at the end of the file."""
        if self._frame.eof:
            chunk = self._frame.unused_data
            self._frame = self._library.decompressobj()
            self._inside_frame = False
        else:
            chunk = b""
        chunk = chunk or self._compressed.read(_ZSTD_INPUT_BYTES)
        if not chunk:
            if self._inside_frame:
                raise EOFError("zstd data ends inside a frame")
            return False
        self._inside_frame = True
        self._ready = memoryview(self._frame.decompress(chunk))
        return True

    def close(self) -> None:
        """Close the compressed stream."""
        self._compressed.close()
        super().close()


def decompressed(raw: io.RawIOBase, compression: str) -> BinaryIO:
    """Wrap ``raw`` into a buffered stream of decompressed bytes."""
    buffered = io.BufferedReader(raw, CHUNK_BYTES)
    if compression == "gzip":
        return io.BufferedReader(cast(io.RawIOBase, _GzipFile(fileobj=buffered)), CHUNK_BYTES)
    if compression == "zstd":
        return io.BufferedReader(_ZstdFile(buffered), CHUNK_BYTES)
    return buffered


def iter_records(stream: BinaryIO, separated: bool, num_bytes: int | None = None) -> Iterator[bytes]:
    """Yield records with their terminators, so that their lengths add up to positions in the stream.

    Args:
        stream: positioned at the start of a record.
        separated: records end with ``<|endoftext|>``; else with a line feed.
        num_bytes: stop after this many bytes, which end a record, and leave the stream there; default: read
            all.
    """
    remaining = sys.maxsize if num_bytes is None else num_bytes
    if separated:
        yield from _iter_separated(stream, remaining)
        return
    while remaining > 0 and (record := stream.readline()):
        remaining -= len(record)
        yield record


def _iter_separated(stream: BinaryIO, remaining: int) -> Iterator[bytes]:
    pending = bytearray()
    searched = 0
    while chunk := stream.read(min(CHUNK_BYTES, remaining)):
        remaining -= len(chunk)
        pending += chunk
        start = 0
        while (found := pending.find(SEPARATOR, max(start, searched))) >= 0:
            stop = found + len(SEPARATOR)
            yield bytes(pending[start:stop])
            start = stop
        del pending[:start]
        searched = max(0, len(pending) - len(SEPARATOR))
    if pending:
        yield bytes(pending)


def contains_separator(path: str, compression: str) -> bool:
    """Whether ``<|endoftext|>`` occurs anywhere in the (decompressed) file; reads up to the first one."""
    tail = b""
    with reading(path), decompressed(io.FileIO(path), compression) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            if SEPARATOR in tail + chunk:
                return True
            tail = chunk[-len(SEPARATOR) :]
    return False


def open_at(path: str, compression: str, start: int) -> BinaryIO:
    """Open a file for reading at byte ``start`` of its decompressed contents.

    A compressed file continues from where this process left it with :func:`park`, if that is not past
    ``start``.
    """
    if compression == "none":
        stream = decompressed(io.FileIO(path), compression)
        stream.seek(start)
        return stream
    parked = _parked.pop((os.getpid(), path), None)
    if parked is not None and parked[0] > start:
        parked[1].close()
        parked = None
    position, stream = parked or (0, decompressed(io.FileIO(path), compression))
    while position < start:
        skipped = len(stream.read(min(CHUNK_BYTES, start - position)))
        if not skipped:
            raise EOFError(f"ends at byte {position}, before byte {start}, where the work unit starts")
        position += skipped
    return stream


def park(path: str, compression: str, position: int, stream: BinaryIO) -> None:
    """Leave a stream that stands at ``position`` for the next unit of the file; closes any other one."""
    if compression == "none":
        stream.close()
        return
    for key in list(_parked):  # of another file, or of the process that this one was forked from
        if (other := _parked.pop(key, None)) is not None:
            other[1].close()
    _parked[(os.getpid(), path)] = (position, stream)
