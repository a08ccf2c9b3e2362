"""Checkpoints that are written while training goes on, by megatron-core's asynchronous calls.

Each rank forks a writer, so what is written is the state at the moment of the fork. Invariant: at most one is
being written; its folder gets its name, and older ones are pruned, only when every rank has written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megatron_tokedit.errors import CheckpointError


@contextmanager
def writing(partial: Path) -> Iterator[None]:
    """Say on every rank what a rank could not write.

    Raises:
        CheckpointError: instead of torch's exception.
    """
    try:
        yield
    except CheckpointException as error:  # on every rank, whichever failed
        reasons = "; ".join(f"rank {rank}: {reason[0]}" for rank, reason in error.failures.items())
        raise CheckpointError(
            f"{partial}: cannot be written ({reasons[:300] or 'see rank 0'}); is the disk full? "
            f"Older checkpoints are untouched"
        ) from error


class BackgroundSave:
    """The save that is being written, if any. Its methods are collective over the world."""

    def __init__(self) -> None:
        self._queue: Any = None
        self._partial: Path | None = None
        self._folder: Path | None = None
        self.finished: Path | None = None
        """The newest checkpoint that was finished here."""

    def start(self, request: Any, partial: Path, folder: Path, finish: Callable[[], None]) -> None:
        """Fork the writer of a megatron-core ``AsyncRequest``; ``finish`` is called when all are done."""
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        if self._queue is None:
            self._queue = AsyncCallsQueue()
        request.add_finalize_fn(finish)
        self._partial, self._folder = partial, folder
        self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Finish the save if every rank has written.

        Raises:
            CheckpointError: on every rank, if a rank could not write.
        """
        self._finalize(blocking=False)

    def wait(self) -> None:
        """As :meth:`poll`, after waiting for the writers."""
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        if self._folder is None or self._partial is None:
            return
        with writing(self._partial):
            done = self._queue.maybe_finalize_async_calls(blocking=blocking)
        if done:
            self.finished, self._folder = self._folder, None
