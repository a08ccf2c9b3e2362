"""The sections of a training run's YAML file.

Fields that map to a megatron-core dataclass keep megatron-core's name. Invariant: a section checks only
itself; what involves two sections (sizes that must divide each other, and so on) is checked in
``config/validate.py`` so that all faults are reported together.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt

from megatron_tokedit.config.base import Section
from megatron_tokedit.config.data import DataConfig, SourceConfig, TokenizerConfig
from megatron_tokedit.config.model import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tokedit.config.sft import SftConfig
from megatron_tokedit.config.slurm import SlurmConfig
from megatron_tokedit.config.training import (
    CheckpointConfig,
    InitFromConfig,
    LoggingConfig,
    OptimizerConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainingConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "InitFromConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RunConfig",
    "RuntimeConfig",
    "ScheduleConfig",
    "SftConfig",
    "SlurmConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainingConfig",
]


class RunConfig(Section):
    """A whole training run."""

    stage: Literal["pretrain", "continue", "sft"] = "pretrain"
    """``continue`` starts from the weights of another run (``init_from``) with its own data and schedule;
    ``sft`` does so with conversations, of which the responses are learned."""
    init_from: InitFromConfig | None = None
    run_dir: str = Field(min_length=1)
    """Folder of checkpoints, logs and the resolved config."""
    seed: NonNegativeInt = 1234
    tokenizer: TokenizerConfig
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig
    data: DataConfig
    sft: SftConfig = SftConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    slurm: SlurmConfig = SlurmConfig()
