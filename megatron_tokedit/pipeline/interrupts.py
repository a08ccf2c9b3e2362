"""Ctrl-C while units are done: answered once, at a place of our choosing, and never lost.

Python raises KeyboardInterrupt wherever the main thread happens to be. In a destructor or a weak reference's
callback (an import has some, and so has a progress bar) it is printed and forgotten, and the job would go on
as if nobody had pressed anything.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupts:
    """A context in which SIGINT is remembered; :meth:`check` raises it.

    In another thread than the main one, where Python forbids handlers, nothing is changed.

    Args:
        raise_at_once: raise KeyboardInterrupt where the signal finds the main thread, too.
    """

    def __init__(self, *, raise_at_once: bool) -> None:
        self._raise_at_once = raise_at_once
        self._is_pending = False
        self._previous: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self._is_pending:
            self._is_pending = False
            raise KeyboardInterrupt

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._is_pending = True
        if self._raise_at_once:
            raise KeyboardInterrupt
