"""Results of a corpus on disk, named by everything they depend on, so that a second run does not count again.

Invariant: a file under its name is whole (it appears by rename), and a name says contents, settings and
version; what cannot be read is counted anew.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from megatron_tokedit.dataset import atomic_write_bytes

FORMAT = 1
"""Raised with every change of what is counted."""
Arrays = dict[str, npt.NDArray[Any]]


class ResultCache:
    """A folder of results."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, kind: str, depends_on: Mapping[str, Any]) -> Path:
        """The file of a result that depends on nothing else."""
        text = orjson.dumps({"format": FORMAT, **depends_on}, option=orjson.OPT_SORT_KEYS)
        return self._folder / f"{kind}-{hashlib.sha256(text).hexdigest()[:20]}.npz"

    def load(self, path: Path) -> Arrays | None:
        """The arrays of a result; None where there is none that can be read."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def store(self, path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write a result."""
        self._folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        columns: dict[str, Any] = dict(arrays)
        np.savez_compressed(buffer, **columns)
        atomic_write_bytes(path, buffer.getvalue())
