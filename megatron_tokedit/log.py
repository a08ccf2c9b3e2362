"""Logging for every room: the standard ``logging`` module, one line a record, only rank 0 speaks by default.

Invariant: nothing below ``cli/`` prints. Libraries log through :func:`get_logger`; ``cli/`` calls
:func:`configure` once.
"""

from __future__ import annotations

import logging
import os
import sys

ROOT_NAME = "megatron_tokedit"


class _RankFilter(logging.Filter):
    """Lets INFO and below pass on rank 0 only; warnings and errors of all pass, marked with the rank."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank = rank
        self.world_size = world_size

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank_label = f"[rank {self.rank}] " if self.world_size > 1 and self.rank > 0 else ""
        return self.rank == 0 or record.levelno >= logging.WARNING


class _StderrHandler(logging.Handler):
    """Writes to whatever ``sys.stderr`` is at that moment: a redirected stream may be closed later."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")
        sys.stderr.flush()


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; pass ``__name__``."""
    return logging.getLogger(name if name.startswith(ROOT_NAME) else f"{ROOT_NAME}.{name}")


def configure(*, quiet: bool = False, rank: int | None = None, world_size: int | None = None) -> None:
    """Send the package's records to stderr.

    Args:
        quiet: show warnings and errors only.
        rank: this process's global rank; default from ``RANK``, else 0.
        world_size: number of processes; default from ``WORLD_SIZE``, else 1.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    handler = _StderrHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(rank_label)s%(levelname).1s %(message)s", datefmt="%H:%M:%S")
    )
    handler.addFilter(_RankFilter(rank, world_size))
    root = logging.getLogger(ROOT_NAME)
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING if quiet else logging.INFO)
    root.propagate = False
