"""Turns a signal, or the end of the time a run was given, into a request to stop that all ranks agree on.

Why: schedulers announce the end of a job with a signal and kill it soon after. Two phases:

- until :meth:`StopRequest.begin` there is nothing to save (the process group starts, indexes are built, a
  checkpoint is read): the main thread is interrupted with :class:`StopNow`, and a rank that does not get to
  hear of it, because it waits for another one, is ended;
- afterwards the handler only remembers: the step in flight, or the validation batch, is finished, and every
  rank leaves its loop there, since the ranks' votes are added up with the loss.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

from megatron_tokedit.log import get_logger

logger = get_logger(__name__)

EXIT_REQUEUE = 75
"""Exit code of a run that was stopped and goes on when started again (``EX_TEMPFAIL`` of sysexits.h)."""

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
TIME_LIMIT = "exit_after_minutes"
_GRACE_SECONDS = 5.0


class StopNow(BaseException):
    """Raised in the main thread by a signal while there is nothing to save; its text says why.

    Not an ``Exception``: nothing that goes on after an error may go on after this.
    """


class StopRequest:
    """Context manager that handles SIGTERM, SIGUSR1 and the time limit inside it.

    Outside the main thread it does nothing. SIGALRM is the time limit's, and left alone without one.

    Args:
        exit_after_minutes: the time limit.
        before_exit: called with the reason, in a thread, before a rank is ended that cannot be interrupted.
    """

    def __init__(
        self,
        exit_after_minutes: float | None = None,
        *,
        before_exit: Callable[[str], None] | None = None,
    ) -> None:
        self.exit_after_minutes = exit_after_minutes
        self._before_exit = before_exit
        self._received = 0
        self._saves = False
        self._previous: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            limited = self.exit_after_minutes is not None
            handled = [number for number in HANDLED if limited or number != signal.SIGALRM]
            self._previous = {number: signal.signal(number, self._hear) for number in handled}
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
            if self.exit_after_minutes is not None:
                signal.setitimer(signal.ITIMER_REAL, 60.0 * self.exit_after_minutes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pipe is None:
            return
        if self.exit_after_minutes is not None:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.set_wakeup_fd(-1)
        self._saves = True  # the watcher ends nobody any more
        os.close(self._pipe[1])
        self._pipe = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    @property
    def interrupted(self) -> bool:
        """The main thread was interrupted with :class:`StopNow`."""
        return bool(self._received) and not self._saves

    def begin(self) -> None:
        """From here on a signal waits for a checkpoint."""
        self._saves = True

    def votes(self) -> tuple[int, ...]:
        """This rank's votes for ``train_step`` or ``evaluate_loss``: one number a kind of request."""
        return tuple(int(number == self._received) for number in HANDLED)

    @staticmethod
    def outcome(votes: Sequence[int]) -> str | None:
        """What the ranks' summed votes ask for: a signal's name, ``exit_after_minutes``, or nothing."""
        return next((StopRequest.name(n) for n, vote in zip(HANDLED, votes, strict=False) if vote), None)

    @staticmethod
    def name(number: int) -> str:
        """How a request is called in messages."""
        return TIME_LIMIT if number == signal.SIGALRM else signal.Signals(number).name

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """The handler: remembers, and interrupts where there is nothing to save."""
        first = not self._received
        self._received = number
        if first and not self._saves:
            raise StopNow(self.name(number))

    def _watch(self, pipe: int) -> None:
        """In a thread: the main thread hears of a signal between two lines of Python only."""
        with open(pipe, "rb", buffering=0) as numbers:
            while heard := numbers.read(1):
                if heard[0] in HANDLED and not self._saves:
                    threading.Event().wait(_GRACE_SECONDS)
                    if not self._saves:
                        if self._before_exit is not None:
                            self._before_exit(self.name(heard[0]))
                        os._exit(EXIT_REQUEUE)
