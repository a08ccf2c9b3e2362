"""Where a run is: the numbers that a checkpoint must hold so that a rerun goes on as if nothing had happened.

Invariant: the state after step ``n`` depends on the configuration and ``n`` only, not on how often the run
was interrupted (wall time aside).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(slots=True)
class TrainState:
    """Progress of a run.

    Attributes:
        step: finished optimizer steps.
        consumed_samples: sequences drawn from the training blend.
        consumed_tokens: tokens that took part in the loss.
        skipped_steps: steps without an update because the loss or the gradient was not finite.
        train_seconds: wall time spent in steps, over all starts of the run.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    train_seconds: float = 0.0

    def to_mapping(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainState:
        """From a checkpoint's state; keys of other owners are ignored."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})
