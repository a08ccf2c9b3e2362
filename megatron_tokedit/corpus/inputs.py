"""Which files are the input, and what their names say about them.

Invariant: the list is complete, free of repetitions and in a fixed order, or there is an error.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from megatron_tokedit.errors import DataFormatError

COMPRESSION_OF_SUFFIX = {".gz": "gzip", ".zst": "zstd"}
KIND_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".parquet": "parquet",
}
SUPPORTED = ".jsonl, .ndjson, .json, .txt (each also with .gz or .zst), .parquet"


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Expand shell globs into the list of input files.

    The order is that of ``patterns``; the matches of one glob are sorted. A name that exists is taken
    literally, even if it holds ``*``, ``?`` or ``[``.

    Raises:
        DataFormatError: a missing file, a glob without a match, a directory, a pipe, an unsupported suffix,
            or a file that is named twice. All faults are in one message.
    """
    paths: dict[str, str] = {}
    faults: list[str] = []
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            kind = "matches no file" if glob.has_magic(pattern) else "does not exist"
            faults.append(f"{pattern}: {kind}")
        for path in matches:
            fault = _fault(path)
            if fault:
                faults.append(f"{path}: {fault}")
            elif (same := str(Path(path).resolve())) in paths:
                faults.append(f"{path}: is named twice; give a file once and weight it when training")
            else:
                paths[same] = path
    if not patterns:
        faults.append("no input file is given")
    if faults:
        raise DataFormatError("cannot use the input:\n  " + "\n  ".join(faults))
    return list(paths.values())


def classify(path: str) -> tuple[str, str]:
    """Return kind (``jsonl``, ``text``, ``parquet``) and compression (``none``, ``gzip``, ``zstd``) by
    suffix.

    Raises:
        DataFormatError: the suffix is none of the supported ones.
    """
    name = Path(path)
    compression = COMPRESSION_OF_SUFFIX.get(name.suffix.lower(), "none")
    kind = KIND_OF_SUFFIX.get((name.with_suffix("") if compression != "none" else name).suffix.lower())
    if kind is None or (kind == "parquet" and compression != "none"):
        raise DataFormatError(f"{path}: the suffix is not supported; supported are {SUPPORTED}")
    return kind, compression


def _fault(path: str) -> str | None:
    if Path(path).is_dir():
        return f"is a directory; name its files, for example '{path.rstrip('/')}/*.jsonl'"
    if not Path(path).is_file():
        return "is a pipe or a device; give a regular file, since it is read more than once"
    try:
        classify(path)
    except DataFormatError:
        return f"the suffix is not supported; supported are {SUPPORTED}"
    return None
