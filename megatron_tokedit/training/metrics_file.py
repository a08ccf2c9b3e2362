"""``metrics.jsonl``: one JSON record a line, in the order of the steps.

Invariant: a step's records are in the file once. A start of a run cuts off what it is going to repeat, and a
line that a kill cut short; a record is written whole, at once, and is on the disk before a checkpoint of its
step is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from megatron_tokedit.errors import DataFormatError

FILE_NAME = "metrics.jsonl"

_BLOCK_BYTES = 1 << 16


class MetricsFile:
    """Appends records to ``metrics.jsonl``."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        """Open the file; records of ``first_step`` and later steps are dropped."""
        if path.exists():
            _cut_from(path, first_step)
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, so that it outlives this process."""
        self._file.write(json.dumps(_finite(record)).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Bring what was written to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write out and close."""
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records, in order; a last line that is not complete (a run at work, or killed) is left out.

    Raises:
        DataFormatError: there is no such file, or a line in it is not a record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataFormatError(f"{path}: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        record = _parse(line)
        if record is None:
            raise DataFormatError(f"{path}:{number}: not a record of a run's metrics")
        records.append(record)
    return records


def last_recorded_step(path: Path, kind: str | None = None) -> int:
    """The step of the last complete record, of one ``kind`` where given; 0 where there is none."""
    if path.exists():
        with open(path, "rb") as file:
            for _, line in _lines_backwards(file):
                record = _parse(line) if line.endswith(b"\n") else None
                if record is not None and kind in (None, record.get("kind")):
                    return int(record["step"])
    return 0


def flat_numbers(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Numbers by name, nested names joined with ``/``; what is None is left out."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            numbers |= flat_numbers(value, f"{prefix}/{key}")
        elif value is not None:
            numbers[f"{prefix}/{key}"] = float(value)
    return numbers


def _cut_from(path: Path, first_step: int) -> None:
    """Cut the file after the last complete record of a step before ``first_step``.

    It reads backwards and stops there, so that a start does not take longer for a long run.
    """
    with open(path, "r+b") as file:
        end = 0
        for offset, line in _lines_backwards(file):
            record = _parse(line) if line.endswith(b"\n") else None
            if record is not None and record["step"] < first_step:
                end = offset + len(line)
                break
        file.truncate(end)


def _lines_backwards(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its newline), the last line first."""
    position = end = file.seek(0, os.SEEK_END)
    pending = b""
    while position:
        size = min(_BLOCK_BYTES, position)
        position -= size
        file.seek(position)
        lines = (file.read(size) + pending).splitlines(keepends=True)
        pending = lines.pop(0) if position else b""
        for line in reversed(lines):
            end -= len(line)
            yield end, line


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if there is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: write them as text."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
