"""Steps of a unit side by side: reading ahead of the scorer in one thread, writing behind it in another.

Invariant: order is kept, at most a few items wait on either side, an error on a side surfaces in the caller,
and no thread outlives its block.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from types import TracebackType
from typing import Any, Self, TypeVar

Item = TypeVar("Item")
_POLL_SECONDS = 0.1
_END = object()


def ahead(items: Generator[Item, None, None], depth: int = 2) -> Generator[Item, None, None]:
    """Iterate over a generator that runs in a thread of its own, up to ``depth`` items ahead.

    Closing this generator ends and closes the other one, in its thread.
    """
    ready: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()

    def offer(item: Any) -> bool:
        """Put an item where the caller finds it; False where the caller wants no more."""
        while not stopped.is_set():
            try:
                ready.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            with closing(items):
                for item in items:
                    if not offer((item, None)):
                        return
            offer((_END, None))
        except BaseException as error:  # noqa: BLE001 - raised again where the items are used
            offer((_END, error))

    thread = threading.Thread(target=produce, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        thread.join()


class Behind:
    """Runs calls one after another in a thread of its own; at most ``depth`` wait.

    As a context manager: leaving the block well waits for all calls, leaving it by an error drops those that
    have not begun.
    """

    def __init__(self, depth: int = 2) -> None:
        self._depth = depth
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._waiting: deque[Future[None]] = deque()

    def submit(self, call: Callable[..., None], *arguments: Any) -> None:
        """Run a call after those submitted before.

        Raises:
            Exception: what an earlier call raised.
        """
        while len(self._waiting) >= self._depth:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(call, *arguments))

    def finish(self) -> None:
        """Wait for all calls.

        Raises:
            Exception: what one of them raised.
        """
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self._thread.shutdown(wait=True, cancel_futures=True)
