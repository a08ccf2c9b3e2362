"""Files that appear whole or not at all.

Invariant: a file under its final name was written, flushed to the disk and closed before it got that name; a
crash leaves at most a ``*.tmp`` beside it. The temporary name is unique, so two writers never share one.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_tokedit.errors import DataFormatError


@contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataFormatError(f"cannot write {path}: {error.strerror}") from error


class AtomicFile:
    """A new file, hashed while it is written, that gets its name with :meth:`commit`.

    As a context manager it discards the file unless :meth:`commit` was called.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a temporary file beside ``path``.

        Raises:
            DataFormatError: the folder does not exist or cannot be written.
        """
        self.path = os.fspath(path)
        self._temporary = f"{self.path}.{secrets.token_hex(6)}.tmp"
        with _writing(self.path):
            self._file = io.BufferedWriter(io.FileIO(self._temporary, "xb"), 1 << 20)
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    @property
    def sha256(self) -> str:
        """Hex digest of what was written so far."""
        return self._hash.hexdigest()

    @property
    def digest(self) -> bytes:
        """SHA-256 of what was written so far."""
        return self._hash.digest()

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``.

        Raises:
            DataFormatError: the disk is full, or the file cannot be written for another reason.
        """
        with _writing(self.path):
            self._file.write(data)
        self._hash.update(data)
        self.num_bytes += memoryview(data).nbytes

    def seal(self) -> None:
        """Flush to the disk and close; :meth:`commit` then only renames."""
        if not self._file.closed:
            with _writing(self.path):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()

    def commit(self) -> None:
        """Give the file its name, replacing what bore it."""
        self.seal()
        with _writing(self.path):
            os.replace(self._temporary, self.path)
            sync_folder(self.path)

    def discard(self) -> None:
        """Close and remove the temporary file, if it is still there."""
        with suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        Path(self._temporary).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole file: temporary file, fsync, rename, fsync of the folder."""
    with AtomicFile(path) as file:
        file.write(data)
        file.commit()


def remove_temporaries(path: str | os.PathLike[str]) -> None:
    """Remove what writers of ``path`` left that were killed. There must be no writer at work."""
    for leftover in glob.glob(f"{glob.escape(os.fspath(path))}.*.tmp"):
        Path(leftover).unlink(missing_ok=True)


def sync_folder(path: str) -> None:
    """Flush the folder that holds ``path``, so that a rename in it survives a power cut."""
    descriptor = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
