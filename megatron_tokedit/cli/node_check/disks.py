"""Free space, and whether the run folder is one and the same on all nodes.

Every node writes a small file of its own into the run folder (the first folder above it that is there), and
looks for those of others only when they are known to be written: a name that a network file system was never
asked for in vain is not in its cache of absent ones. Every node removes all of them in the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

_PLACES = ("/tmp", "/dev/shm")
_RETRY_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system's room.

    Attributes:
        folder: that was looked at.
        free_bytes: for this user.
        free_files: how many more there can be; None: as many as fit.
        fault: why nothing is known.
    """

    folder: str
    free_bytes: int = 0
    free_files: int | None = None
    fault: str | None = None


def existing_folder(path: Path) -> Path:
    """The folder, or the first one above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def look_at_disks(path: Path) -> dict[str, Disk]:
    """By what they are for: ``run`` and the usual places that this node has."""
    places = {"run": path} | {place: Path(place) for place in _PLACES if Path(place).is_dir()}
    return {name: _look(place) for name, place in places.items()}


def _look(path: Path) -> Disk:
    try:
        folder = existing_folder(path)
        status = os.statvfs(folder)
    except OSError as error:
        return Disk(str(path), fault=f"{path}: {error.strerror}")
    free_files = status.f_favail if status.f_files else None  # some file systems do not count them
    return Disk(str(folder), shutil.disk_usage(folder).free, free_files)


class SharedFolder:
    """The test of one folder on many nodes.

    Args:
        path: the run folder, there or not.
        nonce: of this check, in every file's name and content.
    """

    def __init__(self, path: Path, nonce: str) -> None:
        self.folder = existing_folder(path)
        self._nonce = nonce

    def _file(self, rank: int) -> Path:
        return self.folder / f".node_check-{self._nonce}-{rank}"

    def write(self, rank: int) -> str | None:
        """Write this node's file; what was wrong, or None."""
        try:
            with self._file(rank).open("w", encoding="ascii") as stream:
                stream.write(f"{self._nonce} {rank}\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            return f"cannot write to {self.folder}: {error.strerror}"
        return None

    def sees(self, rank: int, deadline: float) -> bool:
        """Whether that node's file is here, with its content, before a moment of ``time.monotonic``."""
        while True:
            try:
                os.listdir(self.folder)  # makes a network file system look again
                if self._file(rank).read_text(encoding="ascii") == f"{self._nonce} {rank}\n":
                    return True
            except OSError:
                pass
            if time.monotonic() > deadline:
                return False
            time.sleep(_RETRY_SECONDS)

    def clear(self, rank: int | None = None) -> None:
        """Remove a node's file, or (None) every node's; what is not here or not ours to remove stays."""
        with contextlib.suppress(OSError):
            for path in self.folder.glob(f".node_check-{self._nonce}-{'*' if rank is None else rank}"):
                with contextlib.suppress(OSError):
                    path.unlink()
