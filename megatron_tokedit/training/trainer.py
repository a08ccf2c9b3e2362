"""The training loop: one loop for every stage, driven by the configuration.

What a step does is ``engine.step``, what a sample is ``dataset``; this file only decides when to step, log,
validate, save and stop. Invariant: the state after step ``n`` is the same whether or not the run was
interrupted before it, and every rank takes every decision alike.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tokedit.config.record import resolve, to_yaml
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.config.validate import validate
from megatron_tokedit.dataset.atomic import atomic_write_bytes
from megatron_tokedit.dataset.blend import Datasets
from megatron_tokedit.dataset.rank_zero import from_rank_zero
from megatron_tokedit.engine.cuda_graphs import LayerGraphs
from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.engine.model import flops_per_token, num_parameters
from megatron_tokedit.engine.optimizer import learning_rate
from megatron_tokedit.engine.step import train_step
from megatron_tokedit.errors import ConfigError, DivergenceError
from megatron_tokedit.log import get_logger
from megatron_tokedit.training.chat_template import chat_template_state
from megatron_tokedit.training.feed import BatchFeed, packs_rows
from megatron_tokedit.training.length import with_train_steps
from megatron_tokedit.training.metrics_file import FILE_NAME as METRICS_FILE
from megatron_tokedit.training.metrics_file import last_recorded_step
from megatron_tokedit.training.origin import Origin, find_origin
from megatron_tokedit.training.recorder import Progress, Recorder
from megatron_tokedit.training.run_lock import RunLock
from megatron_tokedit.training.saver import Saver
from megatron_tokedit.training.signals import StopRequest
from megatron_tokedit.training.start import build_trained, load_trained, open_data
from megatron_tokedit.training.state import TrainState
from megatron_tokedit.training.throughput import Throughput, device_peak
from megatron_tokedit.training.trackers import Outcome, check_packages
from megatron_tokedit.training.validation import validate_sources

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended, the same on every rank.

    Attributes:
        state: at the end.
        finished: all of ``training.train_steps`` are done, and the validation after them.
        stopped_by: why it ended early (a signal's name, ``exit_after_minutes`` or ``exit_at_step``); None if
            it did not.
        loss: of the last step; None if no step was taken.
        validation: last validation result by source; empty if none was made.
        checkpoint: the newest complete checkpoint.
        train_steps: of the whole run.
    """

    state: TrainState
    finished: bool
    stopped_by: str | None
    loss: float | None
    validation: dict[str, dict[str, float]]
    checkpoint: str | None
    train_steps: int


def train(
    config: RunConfig,
    ctx: ParallelContext,
    tokenizer_spec: Mapping[str, Any],
    *,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
) -> TrainResult:
    """Train, or go on training, as configured. Collective over the world.

    Args:
        config: validated.
        ctx: from ``engine.initialize.initialize(config.parallel, ...)``.
        tokenizer_spec: ``type``, ``model``, ``vocab_size``, ``eod`` and ``fingerprint`` of the tokenizer.
        progress: is told of every step on rank 0.
        stop: handles signals and the time limit since before this call; default: one from here on.

    Raises:
        StopNow: stopped before there was anything to save.
        ConfigError: sizes that do not fit the world size, or a run folder that is in use or not writable.
        DataFormatError: sources that are missing, damaged or written with another tokenizer.
        CheckpointError: a checkpoint of another model or tokenizer is in the run folder.
        DivergenceError: too many steps in a row without a finite loss and gradient.
    """
    config = from_rank_zero(lambda: with_train_steps(config, tokenizer_spec))
    config = resolve(config, vocab_size=tokenizer_spec["vocab_size"])
    validate(config, ctx.world_size)
    check_packages(config.logging)
    if config.model.vocab_size < tokenizer_spec["vocab_size"]:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} ids cannot hold the tokenizer's "
            f"{tokenizer_spec['vocab_size']}; leave it out or raise it"
        )
    return Trainer(config, ctx, tokenizer_spec, progress, stop).run()


class Trainer:
    """One run on one rank. Its methods are collective over the world unless they say otherwise."""

    def __init__(
        self,
        config: RunConfig,
        ctx: ParallelContext,
        tokenizer_spec: Mapping[str, Any],
        progress: Progress | None,
        stop: StopRequest | None = None,
    ) -> None:
        self.config, self.ctx, self.tokenizer_spec = config, ctx, dict(tokenizer_spec)
        self.progress = progress
        self.stop = stop
        self.run_dir = Path(config.run_dir)
        self.state = TrainState()
        self.validation: dict[str, dict[str, float]] = {}
        self.loss: float | None = None

    def run(self) -> TrainResult:
        """Everything from the data to the last checkpoint."""
        if self.stop is None:
            with StopRequest(self.config.runtime.exit_after_minutes) as self.stop:
                return self._run(self.stop)
        return self._run(self.stop)

    def _run(self, stop: StopRequest) -> TrainResult:
        with RunLock(self.run_dir):
            checkpoint_dir = self.run_dir / "checkpoints"
            origin = find_origin(self.config, self.tokenizer_spec, checkpoint_dir, speaks=self.ctx.rank == 0)
            latest = origin.folder if origin.is_own else None
            self.saver = Saver(self.config, self.ctx, checkpoint_dir, latest=latest)
            if origin.is_own:
                self.state = TrainState.from_mapping(origin.state)
            self.owes_validation = from_rank_zero(self._owes_validation)
            if self.state.step >= self._last_step() and not self.owes_validation:
                logger.info("nothing to do: %d of %d steps are done", self.state.step, self._last_step())
                return self._result(None)
            datasets = self._prepare(origin)
            self.ctx.barrier()  # so that a signal finds all ranks in the same phase
            stop.begin()
            self.recorder = self._recorder(origin, datasets)
            outcome: Outcome = "failed"
            try:
                result = self._result(self._loop(datasets, stop))
                outcome = "finished" if result.finished else "stopped"
                return result
            except DivergenceError:  # on every rank alike
                self.saver.wait()
                raise
            finally:
                self.recorder.close(outcome)

    # ----------------------------------------------------------------------------------------- start

    def _prepare(self, origin: Origin) -> Datasets:
        """Datasets, model and optimizer, with the state of a checkpoint where there is one."""
        started = time.perf_counter()
        config, ctx = self.config, self.ctx
        datasets, identities = open_data(
            config, self.tokenizer_spec, origin, self.state, speaks=ctx.rank == 0
        )
        inherited = {key: origin.state[key] for key in ("stop_ids",) if key in origin.state}
        template = from_rank_zero(lambda: chat_template_state(config, origin.state, speaks=True))
        self.lasting = {
            **inherited,
            **template,
            "validation_data": identities,
            "lineage": list(origin.lineage),
        }
        self.model, self.optimizer, self.scheduler = build_trained(config, ctx, self.state)
        if origin.folder is not None:
            load_trained(
                (self.model, self.optimizer, self.scheduler), config, ctx, origin.folder,
                state=self.state, is_own=origin.is_own,
            )  # fmt: skip
        self.graphs = LayerGraphs(
            config.precision,
            self.model,
            self.optimizer,
            ctx,
            micro_batch_size=config.training.micro_batch_size,
            seq_length=config.model.seq_length,
            global_batch_size=config.training.global_batch_size,
        )
        from_rank_zero(self._write_config)
        logger.info("start-up took %.1f s", time.perf_counter() - started)
        return datasets

    def _recorder(self, origin: Origin, datasets: Datasets) -> Recorder:
        """What takes in the steps."""
        return Recorder(
            self.config,
            self.ctx,
            self.state,
            model=self.model,
            blend=datasets.train,
            throughput=self._throughput(),
            health=origin.state.get("health") if origin.is_own else None,
            progress=self.progress,
        )

    def _owes_validation(self) -> bool:
        """Whether the validation after the last step was cut short or put off by a signal. Not collective."""
        if not self.config.data.validation or self.state.step == 0 or not self._validates_now():
            return False
        metrics = self.run_dir / METRICS_FILE
        return metrics.exists() and last_recorded_step(metrics, "validation") < self.state.step

    def _throughput(self) -> Throughput:
        """The meter of the run's speed; says what model it measures."""
        config, ctx = self.config, self.ctx
        vocab_size = config.model.vocab_size or 0
        peak = device_peak(ctx.device, config.precision.recipe, config.logging.peak_tflops)
        logger.info(
            "model %s: %s parameters, %s, peak %s",
            config.model.family,
            f"{num_parameters(config.model, vocab_size):,}",
            config.precision.recipe,
            peak,
        )
        return Throughput(
            flops_per_token=flops_per_token(config.model, vocab_size),
            world_size=ctx.world_size,
            peak_tflops=peak.tflops,
        )

    def _write_config(self) -> None:
        """Record the resolved configuration in the run folder; not collective."""
        atomic_write_bytes(self.run_dir / "config.yaml", to_yaml(self.config).encode())

    def _last_step(self) -> int:
        """The step after which this start of the run ends."""
        limit = self.config.runtime.exit_at_step
        return min(self.config.training.train_steps, limit or self.config.training.train_steps)

    # ------------------------------------------------------------------------------------------ loop

    def _loop(self, datasets: Datasets, stop: StopRequest) -> str | None:
        """Train up to the last step; returns why it ended early: a signal's name, or the time limit."""
        feed = BatchFeed(datasets.train, self.config, self.ctx)
        reason = self._validate(datasets, stop) if self.owes_validation else None
        while self.state.step < self._last_step() and reason is None:
            reason = self._step(feed, stop)
            self.owes_validation = bool(datasets.validation) and self._validates_now()
            if self.owes_validation and reason is None:
                reason = self._validate(datasets, stop)
            last = reason is not None or self.state.step == self._last_step()
            if last or _is_due(self.state.step, self.config.checkpoint.save_interval_steps):
                self._save(datasets, last=last)
            elif _is_due(self.state.step, self.config.logging.log_interval_steps):
                self.saver.poll()
        return reason

    def _step(self, feed: BatchFeed, stop: StopRequest) -> str | None:
        """One optimizer step and its record; returns why the run is to end, if it is."""
        self.graphs.before_step()
        lr = learning_rate(self.optimizer)
        seq_length = self.config.model.seq_length
        started = time.perf_counter()
        shape, batches = feed.at(step=self.state.step, consumed_samples=self.state.consumed_samples)
        result = train_step(
            self.model,
            self.optimizer,
            self.scheduler,
            self.recorder.loading(batches),
            self.ctx,
            num_microbatches=shape.num_microbatches,
            micro_batch_size=shape.micro_batch_size,
            seq_length=seq_length,
            packed=packs_rows(self.config),
            schedule_increment=(
                shape.global_batch_size * seq_length if self.config.schedule.in_tokens else 1
            ),
            votes=stop.votes,
        )
        seconds = time.perf_counter() - started
        self.state.step += 1
        first = self.state.consumed_samples
        self.state.consumed_samples = min(first + shape.global_batch_size, len(feed))
        self.state.consumed_tokens += result.num_tokens
        self.state.skipped_steps += result.skipped
        self.state.train_seconds += seconds
        self.loss = result.loss
        is_last = self.state.step == self._last_step()
        self.recorder.step(result, first=first, lr=lr, seconds=seconds, shape=shape, is_last=is_last)
        return stop.outcome(result.votes)

    def _validates_now(self) -> bool:
        """Whether a validation belongs to the step that is done. Not collective."""
        step, training = self.state.step, self.config.training
        return step == training.train_steps or _is_due(step, training.eval_interval_steps)

    def _validate(self, datasets: Datasets, stop: StopRequest) -> str | None:
        """Measure the validation sources and record them; returns why it was cut short, if it was."""
        results, reason = validate_sources(self.model, datasets.validation, self.config, self.ctx, stop)
        if reason is not None:
            return reason
        self.validation, self.owes_validation = results, False
        self.recorder.validation(results)
        return None

    def _save(self, datasets: Datasets, *, last: bool) -> None:
        """Save a complete checkpoint; the logs are on the disk before it is."""
        self.recorder.metrics.sync()
        self.saver.save(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            state={
                **self.state.to_mapping(),
                "tokenizer": self.tokenizer_spec,
                "vocab_size": self.config.model.vocab_size,
                "blend": datasets.train.state.to_mapping(),
                "drawn_samples": datasets.train.counters_at(self.state.consumed_samples),
                "health": self.recorder.health.to_mapping(),
                **self.lasting,
            },
            last=last,
        )

    def _result(self, reason: str | None) -> TrainResult:
        """What to report."""
        finished = self.state.step >= self.config.training.train_steps and not self.owes_validation
        stopped_by = None if finished else (reason or "exit_at_step")
        latest = self.saver.latest
        steps = self.config.training.train_steps
        return TrainResult(self.state, finished, stopped_by, self.loss, self.validation, latest, steps)


def _is_due(step: int, interval: int) -> bool:
    """Whether something that happens every ``interval`` steps (0: never) happens after ``step``."""
    return interval > 0 and step % interval == 0
