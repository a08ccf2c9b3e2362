"""The resolved configuration as it is recorded in run folders and checkpoints, and what differs between two.

Invariant: what is recorded can be loaded again (``config_from_mapping``) and gives an equal configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.config.training_checks import run_length


def resolve(config: RunConfig, *, vocab_size: int) -> RunConfig:
    """Fill in every default that depends on another setting, so that the record says what really ran.

    Args:
        config: a validated configuration.
        vocab_size: the tokenizer's vocabulary size.
    """
    schedule, data = config.schedule, config.data
    decay = schedule.decay or run_length(schedule, config.training, config.model.seq_length) or None
    return config.model_copy(
        update={
            "model": config.model.resolved(vocab_size),
            "precision": config.precision.resolved(config.parallel),
            "schedule": schedule.model_copy(update={f"lr_decay_{schedule.unit}": decay}),
            "data": data.model_copy(update={"cache_dir": data.cache_dir or f"{config.run_dir}/index_cache"}),
        }
    )


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    return config.model_dump(mode="json")


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML text that :func:`load_config` reads back."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False, width=100)


def differences(recorded: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``section.field: recorded 4, now 8`` for every value that differs between two nested mappings."""
    return [
        f"{name}: recorded {_plain(old)}, now {_plain(new)}"
        for name, old, new in _compare(recorded, current, prefix)
    ]


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*old, *new]):
        name, left, right = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            yield from _compare(left, right, f"{name}.")
        elif left != right:
            yield name, left, right


def _plain(value: Any) -> str:
    return "nothing" if value is None else str(value)
