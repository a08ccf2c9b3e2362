"""Cells of an experiment: a corpus, a model, a measurement; each made once and found again by its content.

Invariant: a cell's key holds everything its content depends on (its settings and its parents' keys), and a
cell counts once its record is written, after everything else. What a killed one left is gone on with or made
anew by the commands that make it.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from megatron_tokedit.dataset import atomic_write_bytes
from megatron_tokedit.errors import TokeditError

FORMAT = 1
"""Part of every key: other code that gives other contents has another number."""
RECORD = "cell.json"
LOG = "log.txt"
_TAIL_LINES = 15


class CellError(TokeditError):
    """A cell's command failed; the message says which, and ends with what it said."""


@dataclass(frozen=True, eq=False)
class Cell:
    """Something that is made once, in a folder of its own.

    Attributes:
        parents: what it is made from.
    """

    @property
    def kind(self) -> str:
        """Begins its folder's name."""
        return type(self).__name__.lower()

    @property
    def parents(self) -> Sequence[Cell]:
        """The cells that must be there first."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """JSON of what it depends on beside its parents."""
        raise NotImplementedError

    def make(self, bench: Bench) -> dict[str, Any]:
        """Make its files; returns what is worth knowing of it, as JSON."""
        raise NotImplementedError

    @cached_property
    def key(self) -> str:
        """SHA-256 (hex) of all that its content depends on."""
        content = [FORMAT, self.kind, self.settings, [parent.key for parent in self.parents]]
        return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()

    @property
    def folder_name(self) -> str:
        """Of its folder."""
        return f"{self.kind}-{self.key[:16]}"


@dataclass
class Store:
    """The folder of all cells.

    Attributes:
        folder: holds a folder a cell.
    """

    folder: Path

    def place(self, cell: Cell) -> Path:
        """The folder of a cell."""
        return self.folder / cell.folder_name

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What :meth:`Cell.make` returned; ``None``: it is not made."""
        try:
            record = orjson.loads((self.place(cell) / RECORD).read_bytes())
        except FileNotFoundError:
            return None
        result: dict[str, Any] = record["result"]
        return result

    def keep(self, cell: Cell, result: dict[str, Any], seconds: float) -> None:
        """Record that a cell is made."""
        record = {"kind": cell.kind, "key": cell.key, "settings": cell.settings, "seconds": seconds}
        record |= {"parents": [parent.folder_name for parent in cell.parents], "result": result}
        atomic_write_bytes(
            self.place(cell) / RECORD, orjson.dumps(record, option=orjson.OPT_INDENT_2) + b"\n"
        )


@dataclass
class Commands:
    """Starts commands, and ends those that run when the experiment is stopped.

    Attributes:
        threads: of each.
    """

    threads: int
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_stopped: bool = False

    def run(self, words: Sequence[str], log: Path) -> None:
        """Run a command to its end, its output appended to ``log``.

        Raises:
            CellError: it failed, or the experiment was stopped.
        """
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with log.open("ab") as output:
            output.write(f"$ {shlex.join(words)}\n".encode())
            output.flush()
            with self._lock:
                if self._is_stopped:
                    raise CellError("stopped")
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
                )
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
        if code:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
            raise CellError(f"{shlex.join(words)}\nfailed with exit code {code}; the end of {log}:\n{tail}")

    def stop(self) -> None:
        """End what runs, and start nothing more."""
        with self._lock:
            self._is_stopped = True
            for process in self._running:
                process.terminate()


@dataclass(frozen=True)
class Bench:
    """What a cell is made with.

    Attributes:
        place: the cell's folder, there already.
        store: of all cells.
        commands: starts processes.
    """

    place: Path
    store: Store
    commands: Commands

    def tool(self, *words: object) -> None:
        """Run one of the project's commands, its name first.

        Raises:
            CellError: it failed.
        """
        self.run_python("-m", "megatron_tokedit.cli", *words)

    def run_python(self, *words: object) -> None:
        """Run this interpreter.

        Raises:
            CellError: it failed.
        """
        self.commands.run([sys.executable, *map(str, words)], self.place / LOG)

    def result(self, cell: Cell) -> dict[str, Any]:
        """Of a parent."""
        found = self.store.result(cell)
        assert found is not None, "parents are made before their children"
        return found


def in_order(wanted: Sequence[Cell]) -> list[Cell]:
    """The wanted cells and all they are made from, once each by key, parents first."""
    found: dict[str, Cell] = {}

    def visit(cell: Cell) -> None:
        if cell.key not in found:
            for parent in cell.parents:
                visit(parent)
            found[cell.key] = cell

    for cell in wanted:
        visit(cell)
    return list(found.values())


def make_cells(
    wanted: Sequence[Cell],
    store: Store,
    commands: Commands,
    *,
    at_once: int,
    on_done: Callable[[Cell, float], None],
) -> None:
    """Make what is not there yet.

    Args:
        wanted: with their parents.
        store: where.
        commands: how; stopped when this call ends by an error.
        at_once: cells that are made at the same time.
        on_done: told each cell and the seconds it took; called in this thread.

    Raises:
        CellError: of the first cell that failed. Those that are under way then are stopped.
    """
    waiting = [cell for cell in in_order(wanted) if store.result(cell) is None]
    under_way: dict[Future[float], Cell] = {}
    with ThreadPoolExecutor(at_once) as pool:
        try:
            while waiting or under_way:
                for cell in _ready(waiting, store):
                    if len(under_way) == at_once:
                        break
                    waiting.remove(cell)
                    under_way[pool.submit(_make, cell, store, commands)] = cell
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    cell = under_way.pop(future)
                    on_done(cell, future.result())
        except BaseException:
            commands.stop()
            raise


def _ready(waiting: Sequence[Cell], store: Store) -> Iterator[Cell]:
    """Cells whose parents are made."""
    for cell in list(waiting):
        if all(store.result(parent) is not None for parent in cell.parents):
            yield cell


def _make(cell: Cell, store: Store, commands: Commands) -> float:
    """Make one cell and record it; returns the seconds that took."""
    start = time.monotonic()
    place = store.place(cell)
    place.mkdir(parents=True, exist_ok=True)
    result = cell.make(Bench(place, store, commands))
    seconds = time.monotonic() - start
    store.keep(cell, result, seconds)
    return seconds
