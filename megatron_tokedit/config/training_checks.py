"""Checks of schedule, optimizer, batch sizes, checkpoints and the stage of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_tokedit.config.arithmetic import near_multiples
from megatron_tokedit.config.batch_sizes import total_samples
from megatron_tokedit.config.faults import Fault
from megatron_tokedit.config.model import ModelConfig, ParallelConfig
from megatron_tokedit.config.parallel_checks import model_ranks
from megatron_tokedit.config.training import (
    CheckpointConfig,
    InitFromConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)


def _schedule_unit(schedule: ScheduleConfig) -> Iterator[Fault]:
    """A schedule is counted in one unit; WSD's fields go with WSD."""
    if schedule.in_tokens:
        for field in ("lr_warmup_steps", "lr_decay_steps", "lr_wsd_decay_steps"):
            if getattr(schedule, field):
                yield Fault(
                    ("schedule", field),
                    f"{getattr(schedule, field)} steps beside fields in tokens: a schedule is counted in one "
                    f"unit; use {field.replace('_steps', '_tokens')}",
                )
    is_wsd = schedule.lr_decay_style == "WSD"
    field = f"lr_wsd_decay_{schedule.unit}"
    if is_wsd and schedule.wsd_decay is None:
        yield Fault(("schedule", field), "missing: lr_decay_style WSD needs the length of its decay")
    if not is_wsd and schedule.wsd_decay is not None:
        yield Fault(
            ("schedule", field),
            f"{schedule.wsd_decay} is for lr_decay_style WSD, not {schedule.lr_decay_style}",
        )


def _schedule(schedule: ScheduleConfig, training: TrainingConfig, model: ModelConfig) -> Iterator[Fault]:
    """Warm-up and a WSD schedule's decay fit before the end of the decay."""
    if not training.train_steps or not _ramps_up_soundly(training):
        return
    unit = schedule.unit
    end = schedule.decay or run_length(schedule, training, model.seq_length)
    default = "" if schedule.decay else f" (training.train_steps{' in tokens' * schedule.in_tokens})"
    if schedule.warmup >= end:
        yield Fault(
            ("schedule", f"lr_warmup_{unit}"),
            f"{schedule.warmup} must be smaller than lr_decay_{unit} = {end}{default}",
        )
    elif schedule.wsd_decay is not None and schedule.warmup + schedule.wsd_decay > end:
        yield Fault(
            ("schedule", f"lr_wsd_decay_{unit}"),
            f"{schedule.wsd_decay} does not fit between the warm-up of {schedule.warmup} and lr_decay_{unit} "
            f"= {end}{default}",
        )


def run_length(schedule: ScheduleConfig, training: TrainingConfig, seq_length: int) -> int:
    """Length of the whole run in the schedule's unit."""
    return total_samples(training) * seq_length if schedule.in_tokens else training.train_steps


def _learning_rates(optimizer: OptimizerConfig, schedule: ScheduleConfig) -> Iterator[Fault]:
    if optimizer.min_lr > optimizer.lr:
        yield Fault(("optimizer", "min_lr"), f"{optimizer.min_lr} is larger than lr = {optimizer.lr}")
    if schedule.lr_warmup_init > optimizer.lr:
        yield Fault(
            ("schedule", "lr_warmup_init"),
            f"{schedule.lr_warmup_init} is larger than optimizer.lr = {optimizer.lr}",
        )
    if schedule.lr_warmup_init and not schedule.warmup:
        yield Fault(
            ("schedule", "lr_warmup_init"),
            f"{schedule.lr_warmup_init} has no warm-up to start; set lr_warmup_{schedule.unit}",
        )


def _weight_decay(schedule: ScheduleConfig) -> Iterator[Fault]:
    start, end = schedule.start_weight_decay, schedule.end_weight_decay
    if (start is None) != (end is None):
        given, missing = ("end", "start") if start is None else ("start", "end")
        yield Fault(
            ("schedule", f"{missing}_weight_decay"),
            f"missing: {given}_weight_decay is given, and weight decay grows from the one to the other",
        )
    elif start is not None and end is not None and end < start:
        yield Fault(("schedule", "end_weight_decay"), f"{end} is smaller than start_weight_decay = {start}")


def _ramps_up_soundly(training: TrainingConfig) -> bool:
    return not list(_rampup(training))


def _rampup(training: TrainingConfig) -> Iterator[Fault]:
    """Every batch size of the ramp-up divides by the microbatch; the last is the global batch size."""
    if training.rampup_batch_size is None:
        return
    path = ("training", "rampup_batch_size")
    start, increment, _ = training.rampup_batch_size
    rise = training.global_batch_size - start
    if rise <= 0:
        yield Fault(path, f"starts at {start}, not below global_batch_size = {training.global_batch_size}")
    elif rise % increment:
        yield Fault(
            path,
            f"steps of {increment} do not lead from {start} to global_batch_size = "
            f"{training.global_batch_size}: {rise} is not a multiple of {increment}",
        )
    for name, value in (("start", start), ("increment", increment)):
        if value % training.micro_batch_size:
            yield Fault(
                path,
                f"{name} {value} is not a multiple of micro_batch_size = {training.micro_batch_size}; "
                f"{near_multiples(value, training.micro_batch_size)}",
            )


def _rampup_ranks(parallel: ParallelConfig, training: TrainingConfig, world_size: int) -> Iterator[Fault]:
    """Every batch size of the ramp-up divides by the data-parallel ranks, and by what the pipeline needs."""
    ranks = model_ranks(parallel)
    if training.rampup_batch_size is None or world_size % ranks or not _ramps_up_soundly(training):
        return
    data_parallel = world_size // ranks
    unit = training.micro_batch_size * data_parallel
    stages = ""
    if parallel.virtual_pipeline_model_parallel_size > 1:
        unit *= parallel.pipeline_model_parallel_size
        stages = f" x {parallel.pipeline_model_parallel_size} interleaved stages"
    for name, value in zip(("start", "increment"), training.rampup_batch_size, strict=False):
        if value % unit:
            yield Fault(
                ("training", "rampup_batch_size"),
                f"{name} {value} is not a multiple of micro_batch_size x data-parallel size = "
                f"{training.micro_batch_size} x {data_parallel}{stages} = {unit}; "
                f"{near_multiples(value, unit)}",
            )


def _checkpoints(checkpoint: CheckpointConfig) -> Iterator[Fault]:
    interval = checkpoint.save_interval_steps
    if checkpoint.keep_last and not interval:
        yield Fault(
            ("checkpoint", "keep_last"),
            f"{checkpoint.keep_last} has nothing to choose from: save_interval_steps is 0",
        )
    if not checkpoint.keep_every_steps:
        return
    path = ("checkpoint", "keep_every_steps")
    if not checkpoint.keep_last:
        yield Fault(path, f"{checkpoint.keep_every_steps} goes with keep_last; without it all are kept")
    if interval and checkpoint.keep_every_steps % interval:
        yield Fault(
            path,
            f"{checkpoint.keep_every_steps} is not a multiple of save_interval_steps = {interval}; "
            f"{near_multiples(checkpoint.keep_every_steps, interval)}",
        )


def _stage(stage: str, init_from: InitFromConfig | None) -> Iterator[Fault]:
    if stage != "pretrain" and init_from is None:
        yield Fault(
            ("init_from",), f"missing: stage {stage} starts from a checkpoint; give init_from.checkpoint"
        )
    if stage == "pretrain" and init_from is not None:
        yield Fault(
            ("init_from",),
            "stage pretrain starts from fresh weights; set stage: continue or sft, or leave it out",
        )


CHECKS: tuple[Callable[..., Iterator[Fault]], ...] = (
    _schedule_unit,
    _schedule,
    _learning_rates,
    _weight_decay,
    _rampup,
    _rampup_ranks,
    _checkpoints,
    _stage,
)
