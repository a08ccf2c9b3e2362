"""Whether a run stays within the ``max_epochs`` of its sources.

Invariant: a run that does not is refused before its first step, with the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from megatron_tokedit.config.sections import DataConfig, TrainingConfig
from megatron_tokedit.dataset.sources import SourceInfo
from megatron_tokedit.errors import ConfigError

if TYPE_CHECKING:
    from megatron_tokedit.dataset.blend_state import BlendState


class Plan(Protocol):
    """What a run draws: a ``TrainBlend``, or :class:`ExpectedBlend`."""

    def __len__(self) -> int: ...

    def counters_at(self, sample: int) -> dict[str, int]:
        """Samples drawn from each source before ``sample``."""

    def nth_draw(self, name: str, number: int) -> int | None:
        """The sample that is draw ``number`` of a source."""


class ExpectedBlend:
    """A run's draws by the shares alone, exact to a few samples: what a dry run has time for."""

    def __init__(self, state: BlendState, num_samples: int) -> None:
        self.state = state
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def counters_at(self, sample: int) -> dict[str, int]:
        """Samples drawn from each source before ``sample``."""
        return {name: round(count) for name, count in self.state.expected_at(sample).items()}

    def nth_draw(self, name: str, number: int) -> int | None:
        """The sample that is draw ``number`` of a source; None where it is not of this stretch."""
        share, ahead = self.state.shares.get(name, 0.0), number - self.state.counters[name]
        if ahead < 0 or not share or self.state.start_sample + ahead / share >= len(self):
            return None
        return self.state.start_sample + int(ahead / share)


def beyond_cap(
    data: DataConfig, infos: Mapping[str, SourceInfo], plan: Plan, training: TrainingConfig | None
) -> Iterator[str]:
    """One line for each source that would be drawn for more than its ``max_epochs``.

    Args:
        data: the sources.
        infos: by name; sources that are not in it are left out.
        plan: of the run.
        training: to name the largest ``train_steps`` that fits.
    """
    planned = plan.counters_at(len(plan))
    for index, source in enumerate(data.train):
        if source.max_epochs is None or source.name not in infos:
            continue
        samples = infos[source.name].num_samples
        allowed, drawn = math.floor(source.max_epochs * samples + 1e-6), planned[source.name]
        if drawn <= allowed:
            continue
        fits = _what_fits(plan, source.name, allowed, training)
        yield (
            f"data.train.{index}.max_epochs ({source.name}): {source.max_epochs:g} x {samples:,} samples = "
            f"{allowed:,} may be drawn, but of the run's {len(plan):,} samples {drawn:,} "
            f"({drawn / samples:.2f} epochs) are from this source; {fits}"
            f"raise max_epochs, or lower its share"
        )


def _what_fits(plan: Plan, name: str, allowed: int, training: TrainingConfig | None) -> str:
    """The largest number of steps that stays within the cap; the last steps have the full batch size."""
    first_beyond = plan.nth_draw(name, allowed)
    if training is None or first_beyond is None:
        return ""
    excess = len(plan) - first_beyond
    steps = training.train_steps - math.ceil(excess / training.global_batch_size)
    return f"the largest training.train_steps that fits is {steps:,}: lower it, " if steps > 0 else ""


def refuse_beyond_cap(
    data: DataConfig, infos: Mapping[str, SourceInfo], plan: Plan, training: TrainingConfig | None
) -> None:
    """Refuse what :func:`beyond_cap` finds.

    Raises:
        ConfigError: with every source.
    """
    if faults := list(beyond_cap(data, infos, plan, training)):
        raise ConfigError("\n  - ".join(["sources that the run would repeat too often:", *faults]))
