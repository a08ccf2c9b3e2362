"""Checks that involve more than one section, with the arithmetic in the message.

Why: megatron-core finds out about most of these after the cluster has started, one at a time and as an
assertion. Invariant: a check is a generator of faults over the sections it names as parameters, so that it
can run on the sound sections of a configuration while others are still faulty.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from megatron_tokedit.config import (
    data_checks,
    model_checks,
    precision_checks,
    sft_checks,
    slurm_checks,
    training_checks,
)
from megatron_tokedit.config.faults import Fault, raise_faults
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.config.training import TrainingConfig

_CHECKS = (
    *model_checks.CHECKS,
    *precision_checks.CHECKS,
    *training_checks.CHECKS,
    *data_checks.CHECKS,
    *sft_checks.CHECKS,
    *slurm_checks.CHECKS,
)


def validate(config: RunConfig, world_size: int | None = None) -> None:
    """Check a configuration across its sections.

    Args:
        config: sound section by section.
        world_size: number of ranks; without it the checks that need it are left out.

    Raises:
        ConfigError: one message with every fault.
    """
    sections = {name: getattr(config, name) for name in RunConfig.model_fields}
    raise_faults(cross_section_faults(sections, world_size=world_size), "configuration")


def cross_section_faults(sections: Mapping[str, Any], *, world_size: int | None = None) -> list[Fault]:
    """Run every check whose sections (its parameter names) are among ``sections``."""
    known = dict(sections)
    if world_size is not None:
        known["world_size"] = world_size
    faults: list[Fault] = []
    for check in _CHECKS:
        needed = inspect.signature(check).parameters
        if needed.keys() <= known.keys():
            faults += check(**{name: known[name] for name in needed})
    return faults


def num_microbatches(training: TrainingConfig, data_parallel_size: int) -> int:
    """Microbatches a rank runs for one step (gradient accumulation)."""
    return training.global_batch_size // (training.micro_batch_size * data_parallel_size)
