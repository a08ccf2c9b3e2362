"""Which files are the input, and what their names say about them.

Invariant: the list is complete, free of repetitions and in a fixed order, or there is an error.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Sequence

from megatron_tokedit.errors import DataFormatError

COMPRESSION_OF_SUFFIX = {".gz": "gzip", ".zst": "zstd"}
KIND_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".parquet": "parquet",
}
_MAX_FAULTS_SHOWN = 100
SUPPORTED = ".jsonl, .ndjson, .json, .txt (each also with .gz or .zst), .parquet"


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Expand shell globs into the list of input files.

    The order is that of ``patterns``; the matches of one glob are sorted. A name that exists is taken
    literally, even if it holds ``*``, ``?`` or ``[``.

    Raises:
        DataFormatError: a missing file, a glob without a match, a directory, a pipe, an unsupported suffix,
            or a file that is named twice. All faults are in one message.
    """
    paths: list[str] = []
    faults: list[str] = []
    path_of_inode: dict[tuple[int, int], str] = {}
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            kind = "matches no file" if glob.has_magic(pattern) else "does not exist"
            faults.append(f"{pattern}: {kind}")
        for path in matches:
            fault = _fault(path, path_of_inode)
            if fault:
                faults.append(f"{path}: {fault}")
            else:
                paths.append(path)
    if not patterns:
        faults.append("no input file is given")
    if faults:
        if (more := len(faults) - _MAX_FAULTS_SHOWN) > 0:
            faults[_MAX_FAULTS_SHOWN:] = [f"... and {more} more"]
        raise DataFormatError("cannot use the input:\n  " + "\n  ".join(faults))
    return paths


def classify(path: str) -> tuple[str, str]:
    """Return kind (``jsonl``, ``text``, ``parquet``) and compression (``none``, ``gzip``, ``zstd``) by
    suffix.

    Raises:
        DataFormatError: the suffix is none of the supported ones.
    """
    name, suffix = os.path.splitext(path)
    compression = COMPRESSION_OF_SUFFIX.get(suffix.lower(), "none")
    kind = KIND_OF_SUFFIX.get((os.path.splitext(name)[1] if compression != "none" else suffix).lower())
    if kind is None or (kind == "parquet" and compression != "none"):
        raise DataFormatError(f"{path}: the suffix is not supported; supported are {SUPPORTED}")
    return kind, compression


def _fault(path: str, path_of_inode: dict[tuple[int, int], str]) -> str | None:
    """What is wrong with an input file; one that is not is entered into ``path_of_inode``."""
    try:
        state = os.stat(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if stat.S_ISDIR(state.st_mode):
        return f"is a directory; name its files, for example '{path.rstrip('/')}/*.jsonl'"
    if not stat.S_ISREG(state.st_mode):
        return "is a pipe or a device; give a regular file, since it is read more than once"
    try:
        classify(path)
    except DataFormatError:
        return f"the suffix is not supported; supported are {SUPPORTED}"
    same = path_of_inode.setdefault((state.st_dev, state.st_ino), path)
    if same is not path and os.path.realpath(same) == os.path.realpath(path):  # else a hard link
        return "is named twice; give a file once and weight it when training"
    return None
