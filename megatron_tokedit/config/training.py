"""Optimizer, schedule, batches, checkpoints, logs and the machine of a training run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_tokedit.config.base import Section


class OptimizerConfig(Section):
    """AdamW; names as in megatron-core's ``OptimizerConfig``."""

    lr: PositiveFloat
    min_lr: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.1
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(0.95, ge=0.0, lt=1.0)
    adam_eps: PositiveFloat = 1e-8
    clip_grad: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0 turns clipping off."""


class ScheduleConfig(Section):
    """The learning-rate schedule, in steps."""

    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_steps: NonNegativeInt = 0
    lr_decay_steps: PositiveInt | None = None
    """Step at which ``min_lr`` is reached; default: ``training.train_steps``."""


class TrainingConfig(Section):
    """How much is trained, in what batches."""

    train_steps: PositiveInt
    micro_batch_size: PositiveInt = 1
    global_batch_size: PositiveInt
    """Sequences a step over all data-parallel ranks; the rest is gradient accumulation."""
    eval_interval_steps: NonNegativeInt = 0
    """Validate every so many steps (0: only at the end)."""
    eval_steps: PositiveInt = 10
    """Global batches a validation source is measured on, at most (never more than one pass over it)."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    save_interval_steps: NonNegativeInt = 0
    """Save every so many steps (0: only at the end)."""
    keep_last: NonNegativeInt = 0
    """Keep only the newest so many complete checkpoints (0: all)."""


class LoggingConfig(Section):
    """What is written where. TensorBoard and ``metrics.jsonl`` in the run folder are always written."""

    log_interval_steps: PositiveInt = 10
    peak_tflops: PositiveFloat | None = None
    """Peak rate of one device for MFU; default: known for the GPU, measured on a CPU (a matrix product)."""


class RuntimeConfig(Section):
    """The machine and the job: device, threads, when to stop."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpu_threads: PositiveInt | None = None
    """torch threads a rank on CPU; default: usable cores / ranks on this node, at least 1."""
    exit_at_step: PositiveInt | None = None
    """Save a checkpoint and stop once this step is done; a rerun without it (or with a later one) goes on."""
