"""Time limits for what may hang: file systems, drivers, networks, and the store itself.

Invariant: whatever was started here waits for, it does not keep the process from ending by :func:`leave`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

T = TypeVar("T")


class TookTooLong(Exception):
    """A call did not return in time; its thread is left behind."""


class Background(Generic[T]):
    """A call in a daemon thread, because one that hangs in the kernel can be left but not ended."""

    _threads: ClassVar[list[threading.Thread]] = []

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._result: list[T] = []
        self._error: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._threads.append(self._thread)
        self._thread.start()

    @classmethod
    def is_any_running(cls) -> bool:
        """Whether a call of this process goes on: then it has to end by :func:`leave`."""
        return any(thread.is_alive() for thread in cls._threads)

    def _run(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            self._error.append(error)

    def result(self, seconds: float) -> T:
        """What the call returned.

        Raises:
            TookTooLong: it has not within ``seconds`` from now.
        """
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            raise TookTooLong
        if self._error:
            raise self._error[0]
        return self._result[0]


def within(seconds: float, call: Callable[[], T]) -> T:
    """Call and wait for the result.

    Raises:
        TookTooLong: it did not come in time.
    """
    return Background(call).result(seconds)


class Watchdog:
    """Ends the process when a deadline passes, also while its main thread hangs in a call of the store's.

    Args:
        expire: says and tidies what there is to; bounded by a deadline of its own.
    """

    _LAST_WORDS_SECONDS = 3.0
    _TICK_SECONDS = 0.1

    def __init__(self, expire: Callable[[], None]) -> None:
        self._expire = expire
        self._deadline = float("inf")
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def allow(self, seconds: float) -> None:
        """The process may go on this long from now."""
        self._deadline = time.monotonic() + seconds

    def stop(self) -> None:
        """The process comes to an end by itself."""
        self._is_over.set()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._is_over.wait(self._TICK_SECONDS):
            now = time.monotonic()
            if now - last > 1.0:  # this process itself stood still: let it see first what it missed
                self._deadline = max(self._deadline, now + 1.0)
            last = now
            if now >= self._deadline:
                Background(self._expire_quietly)
                time.sleep(self._LAST_WORDS_SECONDS)
                leave(1)

    def _expire_quietly(self) -> None:
        self._expire()
        leave(1)


def leave(code: int) -> None:
    """End the process at once: threads and destructors that wait for others are not waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
