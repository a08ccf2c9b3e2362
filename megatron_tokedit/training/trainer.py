"""The training loop: one loop for every stage, driven by the configuration.

What a step does is ``engine.step``, what a sample is ``dataset``; this file only decides when to step, log,
validate, save and stop. Invariant: the state after step ``n`` is the same whether or not the run was
interrupted before it, and every rank takes every decision alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from megatron_tokedit.config.record import resolve, to_mapping, to_yaml
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.config.validate import validate
from megatron_tokedit.dataset.atomic import atomic_write_bytes
from megatron_tokedit.dataset.batches import BatchShape, microbatches
from megatron_tokedit.dataset.blend import Datasets, build_datasets
from megatron_tokedit.dataset.rank_zero import from_rank_zero
from megatron_tokedit.dataset.sources import format_shares, inspect_sources, source_shares
from megatron_tokedit.engine import checkpoint, checkpoint_folder
from megatron_tokedit.engine.initialize import ParallelContext
from megatron_tokedit.engine.model import build_model, flops_per_token, num_parameters
from megatron_tokedit.engine.optimizer import build_optimizer, build_scheduler, learning_rate
from megatron_tokedit.engine.step import StepResult, train_step
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.log import get_logger
from megatron_tokedit.training.metrics import MetricsWriter, step_line
from megatron_tokedit.training.resume import check_resumable
from megatron_tokedit.training.run_lock import RunLock
from megatron_tokedit.training.signals import StopRequest
from megatron_tokedit.training.state import TrainState
from megatron_tokedit.training.throughput import Throughput, peak_tflops
from megatron_tokedit.training.validation import validate_sources

logger = get_logger(__name__)

_RECORDED_PACKAGES = ("megatron_tokedit", "torch", "megatron-core", "numpy")


class Progress(Protocol):
    """Something that shows how far the run is, such as a progress bar."""

    def update(self, step: int, loss: float) -> None:
        """``step`` steps are finished; the last one had this loss."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended, the same on every rank.

    Attributes:
        state: at the end.
        finished: all of ``training.train_steps`` are done.
        stopped_by: why it ended early (a signal's name, or ``exit_at_step``); None if it did not.
        loss: of the last step; None if no step was taken.
        validation: last validation result by source; empty if none was made.
        checkpoint: the newest complete checkpoint.
    """

    state: TrainState
    finished: bool
    stopped_by: str | None
    loss: float | None
    validation: dict[str, dict[str, float]]
    checkpoint: str | None


def train(
    config: RunConfig,
    ctx: ParallelContext,
    tokenizer_spec: Mapping[str, Any],
    *,
    progress: Progress | None = None,
) -> TrainResult:
    """Train, or go on training, as configured. Collective over the world.

    Args:
        config: validated.
        ctx: from ``engine.initialize.initialize(config.parallel, ...)``.
        tokenizer_spec: ``type``, ``model``, ``vocab_size``, ``eod`` and ``fingerprint`` of the tokenizer.
        progress: is told of every step on rank 0.

    Raises:
        ConfigError: sizes that do not fit the world size, or a run folder that is in use or not writable.
        DataFormatError: sources that are missing, damaged or written with another tokenizer.
        CheckpointError: a checkpoint of another model or tokenizer is in the run folder.
    """
    config = resolve(config, vocab_size=tokenizer_spec["vocab_size"])
    validate(config, ctx.world_size)
    if config.model.vocab_size < tokenizer_spec["vocab_size"]:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} ids cannot hold the tokenizer's "
            f"{tokenizer_spec['vocab_size']}; leave it out or raise it"
        )
    return Trainer(config, ctx, tokenizer_spec, progress).run()


class Trainer:
    """One run on one rank. Its methods are collective over the world unless they say otherwise."""

    def __init__(
        self,
        config: RunConfig,
        ctx: ParallelContext,
        tokenizer_spec: Mapping[str, Any],
        progress: Progress | None,
    ) -> None:
        self.config, self.ctx, self.tokenizer_spec = config, ctx, dict(tokenizer_spec)
        self.progress = progress if ctx.rank == 0 else None
        self.run_dir = Path(config.run_dir)
        self.checkpoint_dir = self.run_dir / "checkpoints"
        self.shape = BatchShape(
            config.training.global_batch_size, config.training.micro_batch_size, ctx.dp_size, ctx.dp_rank
        )
        self.state = TrainState()
        self.latest: str | None = None
        self.validation: dict[str, dict[str, float]] = {}
        self.loss: float | None = None

    def run(self) -> TrainResult:
        """Everything from the data to the last checkpoint."""
        with StopRequest() as stop, RunLock(self.run_dir):
            resume_from = self._find_checkpoint()
            if self.state.step >= self._last_step():
                logger.info("nothing to do: %d of %d steps are done", self.state.step, self._last_step())
                return self._result(None)
            datasets = self._prepare(resume_from)
            self.metrics = MetricsWriter(
                self.run_dir, first_step=self.state.step + 1, is_writer=self.ctx.rank == 0
            )
            try:
                return self._result(self._loop(datasets, stop))
            finally:
                self.metrics.close()

    # ----------------------------------------------------------------------------------------- start

    def _prepare(self, resume_from: str | None) -> Datasets:
        """Datasets, model and optimizer, with the state of a checkpoint where there is one."""
        started = time.perf_counter()
        config = self.config
        infos = from_rank_zero(
            lambda: inspect_sources(
                config.data, tokenizer_spec=self.tokenizer_spec, seq_length=config.model.seq_length
            )
        )
        shares = source_shares(
            config.data,
            infos,
            num_train_samples=self._num_samples(),
            seq_length=config.model.seq_length,
        )
        logger.info("training data:\n  %s", "\n  ".join(format_shares(shares)))
        datasets = build_datasets(
            config.data,
            infos,
            num_train_samples=self._num_samples(),
            seq_length=config.model.seq_length,
            seed=config.seed,
            tokenizer_spec=self.tokenizer_spec,
            cache_dir=config.data.cache_dir or self.run_dir / "index_cache",
        )
        self._build()
        if resume_from is not None:
            self._load(resume_from)
        from_rank_zero(self._write_config)
        logger.info("start-up took %.1f s", time.perf_counter() - started)
        return datasets

    def _find_checkpoint(self) -> str | None:
        """The newest complete checkpoint, as rank 0 sees it; takes over where it stands in the run.

        Raises:
            CheckpointError: it does not fit the model or the tokenizer.
        """
        found = from_rank_zero(lambda: checkpoint_folder.find_latest(self.checkpoint_dir))
        folder = str(found) if found else None
        if folder is not None:
            state = checkpoint_folder.read_json(folder, checkpoint_folder.STATE_FILE)
            changes = check_resumable(
                folder,
                recorded_config=checkpoint_folder.read_json(folder, checkpoint_folder.RUN_CONFIG_FILE),
                config=to_mapping(self.config),
                recorded_tokenizer=state["tokenizer"],
                tokenizer=self.tokenizer_spec,
            )
            for change in changes if self.ctx.rank == 0 else ():
                logger.warning("changed since %s: %s", Path(folder).name, change)
            self.state = TrainState.from_mapping(state)
            self.latest = folder
        return folder

    def _build(self) -> None:
        """Model, optimizer, schedule, and the throughput meter."""
        config, ctx = self.config, self.ctx
        vocab_size = config.model.vocab_size or 0
        self.model = build_model(
            config.model,
            config.precision,
            ctx,
            vocab_size,
            parallel=config.parallel,
            wrap_with_ddp=True,
            documents_masked=config.data.reset_attention_mask,
        )
        for chunk in self.model:
            chunk.train()
        self.optimizer = build_optimizer(config.optimizer, config.precision, config.parallel, self.model, ctx)
        self.scheduler = build_scheduler(
            config.optimizer, config.schedule, self.optimizer, train_steps=config.training.train_steps
        )
        peak = peak_tflops(ctx.device, config.precision.recipe, config.logging.peak_tflops)
        self.throughput = Throughput(
            flops_per_token=flops_per_token(config.model, vocab_size),
            world_size=ctx.world_size,
            peak_tflops=peak,
        )
        logger.info(
            "model %s: %s parameters, %s, peak %s TFLOP/s a rank",
            config.model.family,
            f"{num_parameters(config.model, vocab_size):,}",
            config.precision.recipe,
            f"{peak:.3g}" if peak else "unknown",
        )

    def _load(self, folder: str) -> None:
        """Load weights, optimizer and schedule."""
        checkpoint.load(
            folder, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, ctx=self.ctx
        )
        logger.info("resuming after step %d from %s", self.state.step, folder)

    def _write_config(self) -> None:
        """Record the resolved configuration in the run folder; not collective."""
        atomic_write_bytes(self.run_dir / "config.yaml", to_yaml(self.config).encode())

    def _num_samples(self) -> int:
        """Samples that the run draws in all, those of earlier starts included."""
        remaining_steps = self.config.training.train_steps - self.state.step
        return self.state.consumed_samples + remaining_steps * self.shape.global_batch_size

    def _last_step(self) -> int:
        """The step after which this start of the run ends."""
        limit = self.config.runtime.exit_at_step
        return min(self.config.training.train_steps, limit or self.config.training.train_steps)

    # ------------------------------------------------------------------------------------------ loop

    def _loop(self, datasets: Datasets, stop: StopRequest) -> str | None:
        """Train up to the last step; returns the name of the signal that ended it early."""
        training = self.config.training
        batches = microbatches(
            datasets.train,
            self.shape,
            start=self.state.consumed_samples,
            stop=self._num_samples(),
            vocab_size=self.config.model.vocab_size or 0,
            num_workers=self.config.data.num_workers,
            pin_memory=self.ctx.device.type == "cuda",
        )
        signal_name = None
        while self.state.step < self._last_step() and signal_name is None:
            self._step(batches)
            signal_name = stop.agreed(self.ctx)
            finished = self.state.step == training.train_steps
            if finished or (signal_name is None and _is_due(self.state.step, training.eval_interval_steps)):
                self._validate(datasets)
            last = signal_name is not None or self.state.step == self._last_step()
            if last or _is_due(self.state.step, self.config.checkpoint.save_interval_steps):
                self._save()
        return signal_name

    def _step(self, batches: Iterator[Mapping[str, Any]]) -> None:
        """One optimizer step and its record."""
        lr = learning_rate(self.optimizer)
        started = time.perf_counter()
        result = train_step(
            self.model,
            self.optimizer,
            self.scheduler,
            batches,
            self.ctx,
            num_microbatches=self.shape.num_microbatches,
            micro_batch_size=self.shape.micro_batch_size,
            seq_length=self.config.model.seq_length,
        )
        seconds = time.perf_counter() - started
        self.state.step += 1
        self.state.consumed_samples += self.shape.global_batch_size
        self.state.consumed_tokens += result.num_tokens
        self.state.skipped_steps += result.skipped
        self.state.train_seconds += seconds
        self.loss = result.loss
        self.throughput.add(seconds=seconds, tokens=result.num_tokens)
        self._record(result, lr, seconds)

    def _record(self, result: StepResult, lr: float, seconds: float) -> None:
        """Write a step's numbers; a readable line every log interval. Rank 0 only has an effect."""
        step, train_steps = self.state.step, self.config.training.train_steps
        values: dict[str, float | None] = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "skipped": result.skipped,
            "step_seconds": seconds,
            "tokens_per_second": result.num_tokens / seconds,
            "consumed_samples": self.state.consumed_samples,
            "consumed_tokens": self.state.consumed_tokens,
        }
        if result.skipped and self.ctx.rank == 0:
            logger.warning("step %d: no update, the loss or the gradient is not finite", step)
        if _is_due(step, self.config.logging.log_interval_steps) or step == self._last_step():
            rates = self.throughput.rates()
            values |= {"tflops_per_device": rates.tflops_per_device, "mfu": rates.mfu}
            line = step_line(
                step=step,
                train_steps=train_steps,
                loss=result.loss,
                lr=lr,
                grad_norm=result.grad_norm,
                rates=rates,
                skipped_steps=self.state.skipped_steps,
            )
            logger.info("%s", line)
        self.metrics.write("train", step, values)
        if self.progress is not None:
            self.progress.update(step, result.loss)

    def _validate(self, datasets: Datasets) -> None:
        """Measure the validation sources and record them."""
        if not datasets.validation:
            return
        self.validation = validate_sources(self.model, datasets.validation, self.config, self.ctx, self.shape)
        self.metrics.write("validation", self.state.step, self.validation)
        for name, values in self.validation.items():
            logger.info(
                "step %d | validation %s: loss %.4f, perplexity %.2f over %s tokens",
                self.state.step,
                name,
                values["loss"],
                values["perplexity"],
                f"{values['num_tokens']:,}",
            )

    def _save(self) -> None:
        """Save a complete checkpoint."""
        self.latest = str(
            checkpoint.save(
                self.checkpoint_dir,
                model=self.model,
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                state={
                    **self.state.to_mapping(),
                    "tokenizer": self.tokenizer_spec,
                    "vocab_size": self.config.model.vocab_size,
                    "versions": {name: version(name) for name in _RECORDED_PACKAGES},
                },
                run_config=to_mapping(self.config),
                ctx=self.ctx,
                keep_last=self.config.checkpoint.keep_last,
            )
        )

    def _result(self, signal_name: str | None) -> TrainResult:
        """What to report."""
        finished = self.state.step >= self.config.training.train_steps
        stopped_by = signal_name or (None if finished else "exit_at_step")
        return TrainResult(self.state, finished, stopped_by, self.loss, self.validation, self.latest)


def _is_due(step: int, interval: int) -> bool:
    """Whether something that happens every ``interval`` steps (0: never) happens after ``step``."""
    return interval > 0 and step % interval == 0
