"""Answers of a model, kept line by line while an evaluation runs, so that a killed one loses next to nothing.

An answer is kept under a digest of the ids that were asked about, in files named after the model's
fingerprint; metrics are computed of answers anew. Invariant: what is read back is what the same model would
answer again, and a line that was cut off by a kill is left out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import orjson


def key_of(kind: str, *parts: Sequence[int] | str) -> str:
    """What an answer is kept under: the question, without the model."""
    return hashlib.sha256(orjson.dumps([kind, *parts])).hexdigest()[:32]


class AnswerLog:
    """The answers of one model; several processes may keep theirs in one folder.

    Args:
        folder: made where there is none; None: answers are kept in memory only.
        fingerprint: of the model and of how it is used.
        rank: number of this process, which has a file of its own.

    Attributes:
        num_found: answers that an earlier process left.
    """

    def __init__(self, folder: Path | None, fingerprint: str, rank: int = 0) -> None:
        self._answers: dict[str, Any] = {}
        self._file: BinaryIO | None = None
        self.num_found = 0
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob(f"{fingerprint[:32]}-*.jsonl")):
            self._answers.update(_read(path))
        self.num_found = len(self._answers)
        self._file = (folder / f"{fingerprint[:32]}-{rank}.jsonl").open("ab")
        if self._file.tell():
            self._file.write(b"\n")  # ends a line that was cut off

    def get(self, key: str) -> Any | None:
        """The answer, where it is known."""
        return self._answers.get(key)

    def add(self, answers: Sequence[tuple[str, Any]]) -> None:
        """Keep answers."""
        self._answers.update(answers)
        if self._file is not None:
            self._file.write(b"".join(orjson.dumps(answer) + b"\n" for answer in answers))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; the answers stay."""
        if self._file is not None:
            self._file.close()


def _read(path: Path) -> dict[str, Any]:
    answers = {}
    for line in path.read_bytes().splitlines():
        try:
            key, answer = orjson.loads(line)
        except (ValueError, TypeError):  # cut off
            continue
        answers[key] = answer
    return answers
