"""Where the numbers of a run go: TensorBoard, ``metrics.jsonl``, and one readable line a log interval.

Invariant: only rank 0 writes; a rerun drops the records of steps that it repeats, so each step is in
``metrics.jsonl`` once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tokedit.dataset.atomic import atomic_write_bytes
from megatron_tokedit.training.throughput import Rates

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Writes to a run folder; on ranks other than 0 it does nothing."""

    def __init__(self, run_dir: Path, *, first_step: int, is_writer: bool) -> None:
        """Open the logs.

        Args:
            run_dir: the run's folder.
            first_step: the step that comes next; records of this and later steps are dropped.
            is_writer: true on rank 0 only.
        """
        self._file = None
        if not is_writer:
            return
        from torch.utils.tensorboard import SummaryWriter

        run_dir.mkdir(parents=True, exist_ok=True)
        _drop_records_from(run_dir / FILE_NAME, first_step)
        self._file = open(run_dir / FILE_NAME, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one record.

        Args:
            kind: ``train`` or ``validation``; the first part of TensorBoard's names.
            step: the step it belongs to.
            values: numbers; one level of nesting is allowed (a mapping a validation source).
        """
        if self._file is None:
            return
        record = {"kind": kind, "step": step, **values}
        self._file.write(json.dumps(_finite(record)) + "\n")
        self._file.flush()
        for name, value in _flat(values, kind):
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out and close."""
        if self._file is not None:
            self._file.close()
            self._board.close()
            self._file = None


def read_metrics(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run, in order; those of one ``kind`` where given."""
    lines = (run_dir / FILE_NAME).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line]
    return [record for record in records if kind is None or record["kind"] == kind]


def step_line(
    *, step: int, train_steps: int, loss: float, lr: float, grad_norm: float, rates: Rates, skipped_steps: int
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
    if rates.mfu is not None:
        parts.append(f"MFU {rates.mfu:.1%}")
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


def _drop_records_from(path: Path, first_step: int) -> None:
    """Rewrite the file without records from ``first_step`` on, and without a line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < first_step:
                kept.append(line + "\n")
        except ValueError:
            continue
    atomic_write_bytes(path, "".join(kept).encode())


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    """``(name, number)`` pairs, nested names joined with ``/``."""
    pairs: list[tuple[str, float]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}/{key}")
        elif value is not None:
            pairs.append((f"{prefix}/{key}", float(value)))
    return pairs


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: write them as text."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
