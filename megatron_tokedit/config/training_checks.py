"""Checks of schedule, optimizer and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_tokedit.config.faults import Fault
from megatron_tokedit.config.training import CheckpointConfig, OptimizerConfig, ScheduleConfig, TrainingConfig


def _schedule(schedule: ScheduleConfig, training: TrainingConfig) -> Iterator[Fault]:
    decay_steps = schedule.lr_decay_steps or training.train_steps
    if schedule.lr_warmup_steps >= decay_steps:
        default = "" if schedule.lr_decay_steps else " (training.train_steps)"
        yield Fault(
            ("schedule", "lr_warmup_steps"),
            f"{schedule.lr_warmup_steps} must be smaller than lr_decay_steps = {decay_steps}{default}",
        )


def _learning_rates(optimizer: OptimizerConfig) -> Iterator[Fault]:
    if optimizer.min_lr > optimizer.lr:
        yield Fault(("optimizer", "min_lr"), f"{optimizer.min_lr} is larger than lr = {optimizer.lr}")


def _checkpoints(checkpoint: CheckpointConfig) -> Iterator[Fault]:
    if checkpoint.keep_last and not checkpoint.save_interval_steps:
        yield Fault(
            ("checkpoint", "keep_last"),
            f"{checkpoint.keep_last} has nothing to choose from: save_interval_steps is 0",
        )


CHECKS: tuple[Callable[..., Iterator[Fault]], ...] = (
    _schedule,
    _learning_rates,
    _checkpoints,
)
