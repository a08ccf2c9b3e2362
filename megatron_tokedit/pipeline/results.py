"""What a unit counted, and how the counts of all units add up.

Invariant: a unit's marker holds all of its counts, so a merge needs no file of a unit but its marker and its
parts; documents in = documents out + documents dropped, by reason.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_tokedit.dataset import atomic_write_bytes
from megatron_tokedit.edit.statistics import EditStatistics
from megatron_tokedit.errors import DataFormatError, PlanError

MAX_EXAMPLES = 20
STEPS = ("read", "tokenize", "score", "edit", "reencode", "write")
ROUND_TRIP = "round_trip"
"""Why a document was dropped or left unedited: its tokenizer does not give its text back."""
NOT_WRITABLE = "not_writable"
"""Why a document was left unedited: encoded again, a sequence would vanish or a control token appear."""


@dataclass(slots=True)
class KeyCounts:
    """What a unit wrote into one dataset (a JSON key, or a key's generation).

    Attributes:
        documents: written.
        sequences: written.
        tokens: written, appended end-of-document ids included.
        spelled: control id, as a string -> how often the text itself spelled it.
        dropped: reason -> documents that were not written.
        dropped_bytes: reason -> UTF-8 bytes of their text.
        unedited: reason -> documents that were written, but not edited.
        edit: what was scored and edited; None where nothing is.
        conversations: what was counted of conversations, by name; empty where there are none.
        checksums: suffix of a part's file -> its SHA-256 (hex); of a unit, not of all together.
    """

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    spelled: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_bytes: dict[str, int] = field(default_factory=dict)
    unedited: dict[str, int] = field(default_factory=dict)
    edit: EditStatistics | None = None
    conversations: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)

    def merge(self, other: KeyCounts) -> None:
        """Add the counts of another unit."""
        self.documents += other.documents
        self.sequences += other.sequences
        self.tokens += other.tokens
        for name in ("spelled", "dropped", "dropped_bytes", "unedited", "conversations"):
            for reason, number in getattr(other, name).items():
                count(getattr(self, name), reason, number)
        if other.edit is not None:
            self.edit = self.edit or EditStatistics()
            self.edit.merge(other.edit)


class Stopwatch:
    """Time by step, told by several threads.

    Attributes:
        seconds: step -> time spent.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STEPS, 0.0)
        self._lock = threading.Lock()

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time of a block to a step."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[step] += time.perf_counter() - begin


def count(counts: dict[str, int], name: str, number: int = 1) -> None:
    """Add to one of several counts."""
    if number:
        counts[name] = counts.get(name, 0) + number


@dataclass(slots=True)
class UnitResult:
    """The counts of a finished unit, and its marker's content.

    Attributes:
        unit_id: which.
        documents_in: read, bad lines included.
        bytes_in: UTF-8 bytes of the documents' text.
        bad_lines: lines that were no documents.
        bad_bytes: their bytes.
        bad_examples: the first of them, as messages.
        device: where the prior ran; None where nothing is edited.
        environment: device and library versions that decide how floats round; None where nothing is edited.
        keys: dataset -> what was written.
        seconds: step -> time spent; the steps overlap, so their sum may exceed ``wall_seconds``.
        wall_seconds: from start to end.
        peak_bytes: largest resident memory of the worker so far.
    """

    unit_id: int
    documents_in: int = 0
    bytes_in: int = 0
    bad_lines: int = 0
    bad_bytes: int = 0
    bad_examples: list[str] = field(default_factory=list)
    device: str | None = None
    environment: str | None = None
    keys: dict[str, KeyCounts] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    wall_seconds: float = 0.0
    peak_bytes: int = 0

    def save(self, path: Path) -> None:
        """Write the marker, by rename: a line of JSON and its SHA-256."""
        content = asdict(self)
        for key, counts in self.keys.items():
            content["keys"][key]["edit"] = counts.edit.to_json() if counts.edit else None
        line = orjson.dumps(content, option=orjson.OPT_APPEND_NEWLINE)
        atomic_write_bytes(path, line + hashlib.sha256(line).hexdigest().encode())

    @classmethod
    def load(cls, path: Path) -> UnitResult:
        """Read a marker.

        Raises:
            PlanError: it is damaged.
        """
        try:
            line, _, digest = path.read_bytes().partition(b"\n")
            if hashlib.sha256(line + b"\n").hexdigest().encode() != digest:
                raise ValueError("its checksum does not fit its content")
            content: dict[str, Any] = orjson.loads(line)
            if content["unit_id"] != int(path.stem):
                raise ValueError(f"it is that of work unit {content['unit_id']}")
            for key, counts in content["keys"].items():
                edit = counts.pop("edit")
                content["keys"][key] = KeyCounts(
                    **counts, edit=EditStatistics.from_json(edit) if edit else None
                )
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                f"{path}: the marker of a finished unit is damaged ({error!r}); remove it and run again"
            ) from error


@dataclass(slots=True)
class Totals:
    """The counts of all units; the members are those of :class:`UnitResult`, added up.

    Attributes:
        devices: where the prior ran.
        environments: all that it ran in.
        peak_bytes: of the worker that needed most.
    """

    documents_in: int = 0
    bytes_in: int = 0
    bad_lines: int = 0
    bad_bytes: int = 0
    bad_examples: list[str] = field(default_factory=list)
    devices: set[str | None] = field(default_factory=set)
    environments: set[str] = field(default_factory=set)
    keys: dict[str, KeyCounts] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))
    wall_seconds: float = 0.0
    peak_bytes: int = 0

    def add(self, result: UnitResult) -> None:
        """Add a unit; units must come in the order of the plan."""
        self.documents_in += result.documents_in
        self.bytes_in += result.bytes_in
        self.bad_lines += result.bad_lines
        self.bad_bytes += result.bad_bytes
        self.bad_examples += result.bad_examples[: MAX_EXAMPLES - len(self.bad_examples)]
        self.devices.add(result.device)
        if result.environment is not None:
            self.environments.add(result.environment)
        for key, counts in result.keys.items():
            self.keys.setdefault(key, KeyCounts()).merge(counts)
        for step, seconds in result.seconds.items():
            self.seconds[step] += seconds
        self.wall_seconds += result.wall_seconds
        self.peak_bytes = max(self.peak_bytes, result.peak_bytes)


def check_devices(devices: Collection[str | None]) -> None:
    """Refuse a job whose units were scored on several kinds of device, which round differently.

    Raises:
        PlanError: with the kinds.
    """
    if len(set(devices)) > 1:
        raise PlanError(
            f"the prior ran on {' and on '.join(sorted(map(str, set(devices))))}, whose scores differ in "
            "rounding; do all units on one kind (--prior-device), or --restart"
        )


def check_bad_lines(number: int, examples: Sequence[str], allowed: int) -> None:
    """Refuse more bad lines than allowed.

    Raises:
        DataFormatError: with the first of them.
    """
    if number <= allowed:
        return
    shown = list(examples[:MAX_EXAMPLES])
    if number > len(shown):
        shown.append(f"... and {number - len(shown)} more")
    lines = "1 bad line" if number == 1 else f"{number} bad lines"
    raise DataFormatError(
        "\n  ".join([f"{lines} so far, allowed are {allowed}; mend them or raise --max-bad-lines:", *shown])
    )
