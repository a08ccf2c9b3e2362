"""How far a job is: an interface for bars and logs, and the one that logs.

Invariant: progress is told in documents of this process's share, finished units of earlier runs included.
"""

from __future__ import annotations

import time
from typing import Protocol

from megatron_tokedit.log import get_logger

logger = get_logger(__name__)
_LOG_SECONDS = 30.0
_LEAST_SECONDS = 1.0
"""Between two lines, however fast it goes."""


class Progress(Protocol):
    """Is told what happens; shows it or not."""

    def start(self, total_documents: int, done_documents: int) -> None:
        """Work begins on ``total_documents``, of which ``done_documents`` were done by an earlier run."""

    def advance(self, documents: int, tokens: int) -> None:
        """So many more documents, with so many tokens, are done."""

    def close(self) -> None:
        """Work has ended, well or not."""


class LogProgress:
    """Logs a line about every ``interval`` documents, at least every half minute and at most every second.

    Args:
        interval: documents between two lines.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._total = self._done = self._tokens = self._next = 0
        self._begin_seconds = self._last_seconds = 0.0

    def start(self, total_documents: int, done_documents: int) -> None:
        """See :class:`Progress`."""
        self._total, self._done, self._tokens = total_documents, done_documents, 0
        self._next = done_documents + self._interval
        self._begin_seconds = time.perf_counter()
        self._last_seconds = self._begin_seconds

    def advance(self, documents: int, tokens: int) -> None:
        """See :class:`Progress`."""
        self._done += documents
        self._tokens += tokens
        now = time.perf_counter()
        waited = now - self._last_seconds
        if waited >= _LOG_SECONDS or (self._done >= self._next and waited >= _LEAST_SECONDS):
            self._next = self._done + self._interval
            self._last_seconds = now
            seconds = max(now - self._begin_seconds, 1e-9)
            logger.info(
                "%s of %s documents (%.1f%%), %s tokens/s",
                f"{self._done:,}",
                f"{self._total:,}",
                100.0 * self._done / max(self._total, 1),
                f"{self._tokens / seconds:,.0f}",
            )

    def close(self) -> None:
        """See :class:`Progress`."""
