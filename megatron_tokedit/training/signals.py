"""Turns a signal into a request to stop after the current step, agreed on by all ranks.

Why: schedulers announce the end of a job with a signal and kill it soon after. Invariant: the handler only
remembers; the step in flight is finished, and every rank leaves the loop after the same step.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_tokedit.engine.initialize import ParallelContext

HANDLED = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Context manager that handles SIGTERM and SIGUSR1 inside it; outside the main thread it does nothing."""

    def __init__(self) -> None:
        self._received: int = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in HANDLED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def agreed(self, ctx: ParallelContext) -> str | None:
        """The signal that any rank has received, the same on every rank. Collective over the world."""
        received = self._received
        if ctx.world_size > 1:
            largest = torch.tensor([received], dtype=torch.int32, device=ctx.device)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            received = int(largest.item())
        return signal.Signals(received).name if received else None
