"""Where the numbers of a run go: ``metrics.jsonl``, TensorBoard, tracking services, and one readable line a
log interval.

Invariant: only rank 0 writes; each step is in ``metrics.jsonl`` once, whatever interrupted the run; a
tracking service that fails while the run is on costs a warning, not the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.log import get_logger
from megatron_tokedit.training.metrics_file import (
    FILE_NAME,
    MetricsFile,
    flat_numbers,
    last_recorded_step,
    read_records,
)
from megatron_tokedit.training.throughput import Rates
from megatron_tokedit.training.trackers import Outcome, Tracker, open_trackers

logger = get_logger(__name__)


class MetricsWriter:
    """Writes to a run folder and to tracking services; on ranks other than 0 it does nothing."""

    def __init__(
        self, run_dir: Path, *, first_step: int, is_writer: bool, trackers: Sequence[Tracker] = ()
    ) -> None:
        """Open the logs.

        Args:
            run_dir: the run's folder.
            first_step: the step that comes next; records of this and later steps are dropped.
            is_writer: true on rank 0 only.
            trackers: services to send the numbers to as well.
        """
        self._file: MetricsFile | None = None
        self._trackers, self._failed = tuple(trackers), set[str]()
        if not is_writer:
            return
        from torch.utils.tensorboard import SummaryWriter

        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = MetricsFile(run_dir / FILE_NAME, first_step=first_step)
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one record.

        Args:
            kind: ``train`` or ``validation``; the first part of the names in TensorBoard and the services.
            step: the step it belongs to.
            values: numbers; one level of nesting is allowed (a mapping a validation source).
        """
        if self._file is None:
            return
        self._file.append({"kind": kind, "step": step, **values})
        numbers = flat_numbers(values, kind)
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        for tracker in self._trackers:
            if step > tracker.sent_step:
                self._send(tracker, numbers, step)

    def event(self, step: int, event: str, details: Mapping[str, Any]) -> None:
        """Write down something that happened in a step; of the kind ``health``, in ``metrics.jsonl`` only."""
        if self._file is not None:
            self._file.append({"kind": "health", "step": step, "event": event, **details})

    def sync(self) -> None:
        """Bring all that was written to the disk; call it before a checkpoint is made."""
        if self._file is not None:
            self._file.sync()
            self._board.flush()

    def close(self, outcome: Outcome = "stopped") -> None:
        """Write out and close; ``outcome`` is what the services show."""
        if self._file is None:
            return
        self._file.close()
        self._board.close()
        self._file = None
        for tracker in self._trackers:
            try:
                tracker.close(outcome)
            except Exception as error:  # noqa: BLE001 - whatever a service raises, the run itself is over
                logger.warning("logging.%s: not closed: %s: %s", tracker.name, type(error).__name__, error)

    def _send(self, tracker: Tracker, numbers: Mapping[str, float], step: int) -> None:
        try:
            tracker.log(numbers, step)
        except Exception as error:  # noqa: BLE001 - whatever a service raises, the run goes on
            if tracker.name not in self._failed:
                self._failed.add(tracker.name)
                logger.warning(
                    "logging.%s: step %d could not be sent: %s: %s; the run goes on, %s has every step",
                    tracker.name, step, type(error).__name__, error, FILE_NAME,
                )  # fmt: skip


def open_metrics(config: RunConfig, *, first_step: int, is_writer: bool) -> MetricsWriter:
    """The logs that a run's configuration asks for; not collective.

    Args:
        config: resolved.
        first_step: the step that comes next.
        is_writer: true on rank 0 only.

    Raises:
        ConfigError: a tracking service's package is not installed, or the service refuses.
    """
    run_dir = Path(config.run_dir)
    trackers = []
    if is_writer:
        run_dir.mkdir(parents=True, exist_ok=True)
        trackers = open_trackers(config, last_step=last_recorded_step(run_dir / FILE_NAME))
    return MetricsWriter(run_dir, first_step=first_step, is_writer=is_writer, trackers=trackers)


def read_metrics(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run, in order; those of one ``kind`` where given."""
    return [record for record in read_records(run_dir / FILE_NAME) if kind in (None, record["kind"])]


def step_line(
    *,
    step: int,
    train_steps: int,
    loss: float,
    lr: float,
    grad_norm: float,
    rates: Rates,
    skipped_steps: int,
    peak_memory_bytes: int | None = None,
    response_tokens: int | None = None,
    filled: float | None = None,
) -> str:
    """The readable line of a log interval."""
    parts = [
        f"step {step:>{len(str(train_steps))}}/{train_steps}",
        f"loss {loss:.4f}",
        f"lr {lr:.3e}",
        f"grad norm {grad_norm:.3f}",
        f"{rates.tokens_per_second:,.0f} tokens/s",
        _flops(rates.tflops_per_device),
    ]
    if response_tokens is not None and filled is not None:
        parts.append(f"{response_tokens:,} response tokens in rows {filled:.1%} full")
    if rates.mfu is not None:
        parts.append(f"MFU {rates.mfu:.1%}")
    if peak_memory_bytes is not None:
        parts.append(f"{peak_memory_bytes / 1024**3:.1f} GiB")
    if skipped_steps:
        parts.append(f"skipped {skipped_steps}")
    parts.append(f"ETA {duration((train_steps - step) * rates.step_seconds)}")
    return " | ".join(parts)


def _flops(tflops: float) -> str:
    """A rate in the unit that suits the device."""
    return f"{tflops:.1f} TFLOP/s a rank" if tflops >= 1.0 else f"{tflops * 1000:.1f} GFLOP/s a rank"


def duration(seconds: float) -> str:
    """``1d 02:03:04``, ``2:03:04`` or ``3:04``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
