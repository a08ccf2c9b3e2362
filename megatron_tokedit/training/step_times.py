"""How long steps take on every rank, who holds the others up, and how much memory is used.

All ranks finish a step together, because they wait for each other in its collectives: the time of a step
says that there is a straggler, not who. So each rank also measures its own work: loading its samples, and the
forward pass, which on a GPU is timed by events on the device. Ranks of one pipeline stage do the same work
and are compared with each other; tensor-parallel ranks wait for each other inside the forward pass, so that a
slow one shows together with its group.

Invariant: ranks exchange times at a log interval only, in one collective, and nothing else waits for a
device.
"""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)

_Batch = TypeVar("_Batch")


@dataclass(frozen=True, slots=True)
class IntervalReport:
    """The steps since the last report, over all ranks; the same on every rank.

    Attributes:
        step_seconds_p50: median seconds of a step, on the slowest rank.
        step_seconds_p95: 95th percentile, on the slowest rank.
        step_seconds_max: the longest step.
        load_seconds: mean seconds a step that the slowest loader took.
        forward_seconds: mean seconds a step of the slowest forward pass.
        slowest_rank: whose own work took longest, compared with its pipeline stage.
        slowest_ratio: how many times the stage's median that was.
        peak_memory_bytes: of the rank with the highest peak: on the device, or resident memory on a CPU.
        peak_memory_rank: that rank.
    """

    step_seconds_p50: float
    step_seconds_p95: float
    step_seconds_max: float
    load_seconds: float
    forward_seconds: float
    slowest_rank: int
    slowest_ratio: float
    peak_memory_bytes: int
    peak_memory_rank: int


class StepTimes:
    """Measures the steps of this rank between two reports."""

    def __init__(
        self, model: Sequence[torch.nn.Module], ctx: ParallelContext, *, straggler_ratio: float
    ) -> None:
        """Start measuring.

        Args:
            model: the chunks of this rank; their forward passes in training mode are timed.
            ctx: the layout.
            straggler_ratio: warn of a rank whose own work takes so many times its stage's median.
        """
        self.ctx, self.straggler_ratio = ctx, straggler_ratio
        self._forward = _DeviceClock() if ctx.device.type == "cuda" else _HostClock()
        self._step_seconds: list[float] = []
        self._load_seconds = 0.0
        for chunk in model:
            chunk.register_forward_pre_hook(self._before)
            chunk.register_forward_hook(self._after)

    def loading(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """The same batches, with the time that each takes to come measured."""
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._load_seconds += time.perf_counter() - started
            yield batch

    def add(self, seconds: float) -> None:
        """Count one step."""
        self._step_seconds.append(seconds)

    def report(self) -> IntervalReport:
        """Compare the ranks over the steps since the last report. Collective over the world.

        The straggler itself warns, with the name of its host.
        """
        steps = np.array(self._step_seconds or [0.0])
        num_steps = len(steps)
        own = [
            float(np.percentile(steps, 50)),
            float(np.percentile(steps, 95)),
            float(steps.max()),
            self._load_seconds / num_steps,
            self._forward.take() / num_steps,
            float(_peak_memory_bytes(self.ctx.device)),
            float(self.ctx.pp_rank),
        ]
        self._step_seconds, self._load_seconds = [], 0.0
        report = compare(self._gather(own))
        if report.slowest_rank == self.ctx.rank and report.slowest_ratio > self.straggler_ratio:
            logger.warning(
                "rank %d on %s is a straggler: loading (%.3f s a step) and forward (%.3f s) took %.1f times "
                "the median of its pipeline stage",
                self.ctx.rank, socket.gethostname(), own[3], own[4], report.slowest_ratio,
            )  # fmt: skip
        return report

    def _gather(self, own: list[float]) -> np.ndarray:
        """Every rank's numbers, ``[ranks, numbers]``."""
        if self.ctx.world_size == 1:
            return np.array([own])
        mine = torch.tensor(own, dtype=torch.float64, device=self.ctx.device)
        gathered = [torch.empty_like(mine) for _ in range(self.ctx.world_size)]
        dist.all_gather(gathered, mine)
        return torch.stack(gathered).cpu().numpy()

    def _before(self, chunk: torch.nn.Module, inputs: Any) -> None:
        if chunk.training:
            self._forward.start()

    def _after(self, chunk: torch.nn.Module, inputs: Any, output: Any) -> None:
        if chunk.training:
            self._forward.stop()


def compare(ranks: np.ndarray) -> IntervalReport:
    """The report of a table ``[ranks, (p50, p95, max, load, forward, memory, stage)]``."""
    p50, p95, longest, load, forward, memory, stage = ranks.T
    work = load + forward
    medians = np.array([np.median(work[stage == own]) for own in stage])
    ratios = work / np.maximum(medians, 1e-9)
    slowest, fullest = int(ratios.argmax()), int(memory.argmax())
    return IntervalReport(
        step_seconds_p50=float(p50.max()),
        step_seconds_p95=float(p95.max()),
        step_seconds_max=float(longest.max()),
        load_seconds=float(load.max()),
        forward_seconds=float(forward.max()),
        slowest_rank=slowest,
        slowest_ratio=float(ratios[slowest]),
        peak_memory_bytes=int(memory[fullest]),
        peak_memory_rank=fullest,
    )


class _HostClock:
    """Adds up intervals of this process's time."""

    def __init__(self) -> None:
        self._seconds = self._started = 0.0

    def start(self) -> None:
        """Begin an interval."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """End the interval."""
        self._seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _DeviceClock:
    """Adds up intervals of the current CUDA stream's time; only :meth:`take` waits for the device."""

    def __init__(self) -> None:
        self._intervals: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._spare: list[torch.cuda.Event] = []

    def start(self) -> None:
        """Begin an interval."""
        self._started = self._event()

    def stop(self) -> None:
        """End the interval."""
        self._intervals.append((self._started, self._event()))

    def take(self) -> float:
        """Seconds since the last call."""
        if self._intervals:
            self._intervals[-1][1].synchronize()
        milliseconds = sum(start.elapsed_time(stop) for start, stop in self._intervals)
        self._spare += [event for interval in self._intervals for event in interval]
        self._intervals = []
        return milliseconds / 1000

    def _event(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this rank has had so far: reserved on its GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
