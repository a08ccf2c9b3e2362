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
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    adam_eps: PositiveFloat = 1e-8
    clip_grad: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this; 0 turns clipping off."""


class ScheduleConfig(Section):
    """Learning rate and weight decay over the run; names as in megatron-core's ``OptimizerParamScheduler``.

    Counted in steps, or in tokens (``model.seq_length`` x the global batch size a step) where a ``_tokens``
    field is given.
    """

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    lr_warmup_init: NonNegativeFloat = 0.0
    """Learning rate that the warm-up starts from."""
    lr_warmup_steps: NonNegativeInt = 0
    lr_decay_steps: PositiveInt | None = None
    """Step at which ``min_lr`` is reached; default: ``training.train_steps``."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """How a WSD schedule (warm-up, stable, decay) falls at its end."""
    lr_wsd_decay_steps: PositiveInt | None = None
    """Length of that fall: the last so many steps up to ``lr_decay_steps``."""
    lr_warmup_tokens: NonNegativeInt | None = None
    lr_decay_tokens: PositiveInt | None = None
    """Tokens at which ``min_lr`` is reached; default: those of ``training.train_steps`` steps."""
    lr_wsd_decay_tokens: PositiveInt | None = None
    start_weight_decay: NonNegativeFloat | None = None
    """With ``end_weight_decay`` instead of a constant ``optimizer.weight_decay``: rises over the run."""
    end_weight_decay: NonNegativeFloat | None = None
    weight_decay_incr_style: Literal["linear", "cosine"] = "linear"

    @property
    def in_tokens(self) -> bool:
        """Whether it is counted in tokens."""
        fields = (self.lr_warmup_tokens, self.lr_decay_tokens, self.lr_wsd_decay_tokens)
        return any(value is not None for value in fields)

    @property
    def unit(self) -> str:
        """``steps`` or ``tokens``: the ending of the fields that count."""
        return "tokens" if self.in_tokens else "steps"

    @property
    def warmup(self) -> int:
        """Length of the warm-up in this schedule's unit."""
        return (self.lr_warmup_tokens or 0) if self.in_tokens else self.lr_warmup_steps

    @property
    def decay(self) -> int | None:
        """Where the decay ends, in this schedule's unit."""
        return self.lr_decay_tokens if self.in_tokens else self.lr_decay_steps

    @property
    def wsd_decay(self) -> int | None:
        """Length of a WSD schedule's decay in this schedule's unit."""
        return self.lr_wsd_decay_tokens if self.in_tokens else self.lr_wsd_decay_steps


class TrainingConfig(Section):
    """How much is trained, in what batches."""

    train_steps: NonNegativeInt = 0
    """Needed; but in stage ``sft`` the epochs may be given instead: then 0 until the data are read, and so
    many as they come to from then on."""
    train_epochs: PositiveFloat | None = None
    """Stage ``sft``: passes over every source that has no ``epochs`` of its own. The last step is as large as
    what is left for it."""
    micro_batch_size: PositiveInt = 1
    global_batch_size: PositiveInt
    """Sequences a step over all data-parallel ranks; the rest is gradient accumulation."""
    rampup_batch_size: list[PositiveInt] | None = Field(default=None, min_length=3, max_length=3)
    """``[start, increment, samples]``: the global batch size grows from ``start`` by ``increment`` in equal
    parts of the first ``samples`` samples, as in Megatron-LM."""
    eval_interval_steps: NonNegativeInt = 0
    """Validate every so many steps (0: only at the end)."""
    eval_steps: PositiveInt = 10
    """Global batches a validation source is measured on, at most (never more than one pass over it)."""
    max_skipped_steps: NonNegativeInt = 10
    """Steps without a finite loss and gradient make no update; so many in a row end the run (0: never)."""
    loss_spike_sigma: NonNegativeFloat = 6.0
    """Report a loss above the running median by so many (robust) standard deviations (0: never)."""
    loss_spike_window_steps: int = Field(default=100, ge=10)
    """Steps that the running median is taken over; nothing is reported before there are as many."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    save_interval_steps: NonNegativeInt = 0
    """Save every so many steps (0: only at the end)."""
    keep_last: NonNegativeInt = 0
    """Keep only the newest so many complete checkpoints (0: all)."""
    keep_every_steps: NonNegativeInt = 0
    """With ``keep_last``: also keep the checkpoints of every multiple of so many steps, for good."""
    async_save: bool = False
    """Write in the background while training goes on; the checkpoint counts once every rank has written."""
    fully_parallel_save: bool = True
    """Data-parallel ranks share the writing of what they hold in common."""
    fully_parallel_load: bool = False
    """Data-parallel ranks share the reading and exchange what they have read."""


class InitFromConfig(Section):
    """Where a run of stage ``continue`` or ``sft`` takes its weights from; all else is its own."""

    checkpoint: str = Field(min_length=1)
    """A run folder, its ``checkpoints`` folder, or one step's folder."""
    optimizer: Literal["fresh", "kept"] = "fresh"
    """Whether Adam's moments start at zero or come along with the weights."""


class WandbConfig(Section):
    """A run in Weights & Biases (extra ``wandb``); names as in ``wandb.init``."""

    project: str = Field(min_length=1)
    entity: str | None = None
    name: str | None = None
    """Default: the name of the run's folder."""
    group: str | None = None
    tags: list[str] = Field(default_factory=list)
    mode: Literal["online", "offline"] = "online"
    """``offline`` writes below the run folder, for ``wandb sync --append RUN_DIR/wandb/offline-run-*``."""


class MlflowConfig(Section):
    """A run in MLflow (extra ``mlflow``); names as in ``mlflow.set_experiment`` and ``start_run``."""

    experiment_name: str = Field(min_length=1)
    tracking_uri: str | None = None
    """Default: ``MLFLOW_TRACKING_URI`` of the environment, else the database ``RUN_DIR/mlflow.db``."""
    run_name: str | None = None
    """Default: the name of the run's folder."""


class LoggingConfig(Section):
    """What is written where. TensorBoard and ``metrics.jsonl`` in the run folder are always written."""

    log_interval_steps: PositiveInt = 10
    peak_tflops: PositiveFloat | None = None
    """Peak rate of one device for MFU; default: known for the GPU, measured on a CPU (a matrix product)."""
    straggler_ratio: float = Field(default=1.5, gt=1.0)
    """Warn of a rank whose own work takes so many times the median of its pipeline stage."""
    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None


class RuntimeConfig(Section):
    """The machine and the job: device, threads, when to stop."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpu_threads: PositiveInt | None = None
    """torch threads a rank on CPU; default: usable cores / ranks on this node, at least 1."""
    exit_at_step: PositiveInt | None = None
    """Save a checkpoint and stop once this step is done; a rerun without it (or with a later one) goes on."""
    exit_after_minutes: PositiveFloat | None = None
    """Save a checkpoint and stop so many minutes after the start; as a signal, it asks to be queued again."""
