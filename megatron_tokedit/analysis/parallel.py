"""Doing the parts of a job in several processes, with the results in order.

Invariant: results come in the order of the tasks and a task's result does not depend on who did it, so the
number of processes changes nothing; memory holds the results of a few tasks, not of all.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

from megatron_tokedit import log
from megatron_tokedit.errors import DataFormatError

Task = tuple[str, tuple[Any, ...]]
"""Name of a method of the worker, and its arguments."""
_make: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
_worker: Any = None


class OrderedWorkers:
    """Workers, one a process, that do tasks; processes are started with the first tasks.

    Args:
        make_worker: a class, or a function at the top of a module.
        setup: its arguments, picklable.
        num_workers: processes; 1: this one.
    """

    def __init__(self, make_worker: Callable[..., Any], setup: tuple[Any, ...], num_workers: int) -> None:
        self._make, self._setup, self._num_workers = make_worker, setup, num_workers
        self._own: Any = None
        self._pool: ProcessPoolExecutor | None = None

    def run(self, tasks: Sequence[Task], *, here: bool = False) -> Iterator[Any]:
        """Yield ``make_worker(*setup).METHOD(*arguments)`` of every task, in the order of the tasks.

        Args:
            tasks: what to do.
            here: in this process, for a device that is not to be shared.

        Raises:
            DataFormatError: a process died.
        """
        if here or self._num_workers <= 1:
            if self._own is None and tasks:
                self._own = self._make(*self._setup)
            for method, arguments in tasks:
                yield getattr(self._own, method)(*arguments)
            return
        pool = self._started()
        waiting: deque[Future[Any]] = deque()
        rest = iter(tasks)
        try:
            for _ in range(2 * self._num_workers):
                _submit(pool, waiting, rest)
            while waiting:
                result = waiting.popleft().result()
                _submit(pool, waiting, rest)
                yield result
        except BrokenProcessPool as error:
            raise DataFormatError(
                "a worker process died, probably for want of memory: start again with fewer --workers "
                "(what is finished is not counted again)"
            ) from error

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._num_workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start,
                initargs=(self._make, self._setup),
            )
        return self._pool

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._pool is None:
            return
        if kind is not None:  # nobody waits for what they are at
            for process in list((self._pool._processes or {}).values()):
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, waiting: deque[Future[Any]], rest: Iterator[Task]) -> None:
    if (task := next(rest, None)) is not None:
        waiting.append(pool.submit(_do, *task))


def _start(make_worker: Callable[..., Any], setup: tuple[Any, ...]) -> None:
    """Prepare a process; the worker itself is made by its first task, so that its errors reach the caller."""
    global _make
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    log.configure(quiet=True)
    _make = make_worker, setup


def _do(method: str, arguments: tuple[Any, ...]) -> Any:
    global _worker
    if _worker is None:
        assert _make is not None
        _worker = _make[0](*_make[1])
    return getattr(_worker, method)(*arguments)
