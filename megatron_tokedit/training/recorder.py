"""What is measured, written and said of a run's steps, and whether they are sound.

Invariant: the ranks talk to each other at a log interval only; a step that ends the run because too many were
not finite is written down before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.dataset.batches import BatchShape
from megatron_tokedit.dataset.blend import TrainBlend
from megatron_tokedit.dataset.rank_zero import from_rank_zero
from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.engine.step import StepResult
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.log import get_logger
from megatron_tokedit.training.health import HealthMonitor, Samples
from megatron_tokedit.training.metrics import MetricsWriter, open_metrics, step_line
from megatron_tokedit.training.state import TrainState
from megatron_tokedit.training.step_times import StepTimes
from megatron_tokedit.training.throughput import Throughput
from megatron_tokedit.training.trackers import Outcome

logger = get_logger(__name__)

_Batch = TypeVar("_Batch")


class Progress(Protocol):
    """Something that shows how far the run is, such as a progress bar."""

    def update(self, step: int, loss: float) -> None:
        """``step`` steps are finished; the last one had this loss."""


@dataclass(frozen=True, slots=True)
class Fill:
    """Positions of a step's rows that hold a token, and all of them."""

    positions: int
    padded: int


class Recorder:
    """Takes in every step of this start of a run, on every rank."""

    def __init__(
        self,
        config: RunConfig,
        ctx: ParallelContext,
        state: TrainState,
        *,
        model: list[Any],
        blend: TrainBlend,
        throughput: Throughput,
        health: Mapping[str, Any] | None,
        progress: Progress | None,
    ) -> None:
        """Open the logs. Collective over the world.

        Args:
            config: resolved.
            ctx: the layout.
            state: of the run; it counts a step before the step is recorded.
            model: the chunks of this rank.
            blend: the training samples.
            throughput: the meter of the run's speed.
            health: what a checkpoint has kept of :attr:`health`; None in a new run.
            progress: is told of every step on rank 0.

        Raises:
            ConfigError: a tracking service cannot be used; on every rank.
        """
        self.config, self.ctx, self.state, self.blend = config, ctx, state, blend
        self.has_rows = config.stage == "sft"
        self.progress = progress if ctx.rank == 0 else None
        self.throughput = throughput
        self.times = StepTimes(model, ctx, straggler_ratio=config.logging.straggler_ratio)
        self.metrics = MetricsWriter(Path(config.run_dir), first_step=state.step + 1, is_writer=False)
        from_rank_zero(self._open)
        self.health = HealthMonitor(config.training, speaks=ctx.rank == 0, record=self.metrics.event)
        if health is not None:
            self.health.restore(health)

    def loading(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """The same batches, with the time that they take to come measured."""
        return self.times.loading(batches)

    def step(
        self, result: StepResult, *, first: int, lr: float, seconds: float, shape: BatchShape, is_last: bool
    ) -> None:
        """Record the step that ``state`` has just counted. Collective over the world at a log interval.

        Args:
            result: of the step.
            first: its first sample.
            lr: its learning rate.
            seconds: that it took.
            shape: how its batch was cut up.
            is_last: it is the last one of this start.

        Raises:
            DivergenceError: too many steps in a row were not finite; on every rank.
            DataFormatError: no token of the step counts in the loss; on every rank.
        """
        step = self.state.step
        samples = Samples.of_step(first, self.blend, shape, result.bad_microbatches)
        if not result.num_tokens:
            raise DataFormatError(f"step {step}: no token counts in the loss; samples {samples}")
        fill = self._fill(first, shape) if self.has_rows else None
        self.throughput.add(seconds=seconds, tokens=fill.positions if fill else result.num_tokens)
        self.times.add(seconds)
        values: dict[str, float | None] = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "skipped": result.skipped,
            "step_seconds": seconds,
            "tokens_per_second": (fill.positions if fill else result.num_tokens) / seconds,
            "consumed_samples": self.state.consumed_samples,
            "consumed_tokens": self.state.consumed_tokens,
        }
        if fill:
            values |= {
                "response_tokens": result.num_tokens,
                "packing_efficiency": fill.positions / fill.padded,
                "padded_tokens_per_second": fill.padded / seconds,
            }
        if is_last or step % self.config.logging.log_interval_steps == 0:
            values |= self._interval(result, lr, fill)
        self.metrics.write("train", step, values)
        if self.progress is not None:
            self.progress.update(step, result.loss)
        self.health.observe(
            step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            skipped=result.skipped,
            samples=samples,
        )

    def validation(self, results: Mapping[str, Mapping[str, float]]) -> None:
        """Record a validation after the last step."""
        step = self.state.step
        self.metrics.write("validation", step, results)
        for name, values in results.items():
            logger.info(
                "step %d | validation %s: loss %.4f, perplexity %.2f over %s tokens",
                step, name, values["loss"], values["perplexity"], f"{values['num_tokens']:,}",
            )  # fmt: skip

    def close(self, outcome: Outcome) -> None:
        """Write out and close the logs."""
        self.metrics.close(outcome)

    def _open(self) -> None:
        self.metrics = open_metrics(self.config, first_step=self.state.step + 1, is_writer=True)

    def _fill(self, first: int, shape: BatchShape) -> Fill:
        """How full the rows of a step are."""
        end = first + shape.global_batch_size
        padded = shape.global_batch_size * self.config.model.seq_length
        return Fill(self.blend.num_positions(first, end), padded)

    def _interval(self, result: StepResult, lr: float, fill: Fill | None) -> dict[str, float | None]:
        """Say how the steps since the last log line went; returns their numbers."""
        rates, report = self.throughput.rates(), self.times.report()
        line = step_line(
            step=self.state.step,
            train_steps=self.config.training.train_steps,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            rates=rates,
            skipped_steps=self.state.skipped_steps,
            peak_memory_bytes=report.peak_memory_bytes,
            response_tokens=result.num_tokens if fill else None,
            filled=fill.positions / fill.padded if fill else None,
        )
        logger.info("%s", line)
        return {"tflops_per_device": rates.tflops_per_device, "mfu": rates.mfu, **asdict(report)}
