"""Watches the numbers of a run: steps whose loss or gradient is not finite, and losses out of the ordinary.

A step that is not finite makes no update, so the weights stay good; many in a row mean that they are not, and
end the run. Invariant: what is decided depends on the steps of the run only (the state is part of a
checkpoint) and is decided alike on every rank.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megatron_tokedit.config.training import TrainingConfig
from megatron_tokedit.errors import DivergenceError
from megatron_tokedit.log import get_logger

if TYPE_CHECKING:
    from megatron_tokedit.dataset.batches import BatchShape

logger = get_logger(__name__)

_MAD_TO_SIGMA = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""
_SMALLEST_SIGMA = 1e-3
"""Smallest deviation, as a share of the median, so that rounding of a constant loss is no spike."""
_SHOWN_RANGES = 12


class Location(Protocol):
    """Where a training sample is from, as ``TrainBlend.locate`` says it."""

    @property
    def source(self) -> str:
        """The source's name."""

    @property
    def epoch(self) -> int:
        """Of the source, from 0."""

    @property
    def sample_in_epoch(self) -> int:
        """The sample's number in this epoch."""

    @property
    def documents(self) -> tuple[int, ...]:
        """The documents of a row of conversations; none in other stages."""


class Blend(Protocol):
    """Training samples by number, as ``TrainBlend``."""

    def __len__(self) -> int:
        """One past the last sample."""

    def locate(self, sample: int) -> Location:
        """Where a sample is from."""


class Samples:
    """Samples of the training data, by number, named by source and epoch for people."""

    def __init__(self, numbers: Sequence[int], locate: Callable[[int], Location]) -> None:
        self.numbers = numbers
        self._locate = locate

    def by_source(self) -> dict[str, list[int]]:
        """Sample numbers in ``source, epoch n``; of conversations ``source, epoch n, documents``."""
        found: dict[str, list[int]] = {}
        for number in self.numbers:
            place = self._locate(number)
            name = f"{place.source}, epoch {place.epoch}"
            if place.documents:
                found.setdefault(f"{name}, documents", []).extend(place.documents)
            else:
                found.setdefault(name, []).append(place.sample_in_epoch)
        return {name: sorted(samples) for name, samples in sorted(found.items())}

    @classmethod
    def of_step(
        cls, first: int, blend: Blend, shape: BatchShape, bad_microbatches: Sequence[tuple[int, int]] = ()
    ) -> Samples:
        """The samples of a step, or those of its ``bad_microbatches`` where there are any.

        Args:
            first: the step's first sample.
            blend: the training samples; rows beyond its end are filling.
            shape: how the step's batch was cut up.
            bad_microbatches: (microbatch, data-parallel rank).
        """
        end = min(first + shape.global_batch_size, len(blend))
        if not bad_microbatches:
            return cls(range(first, end), blend.locate)
        places = [microbatch * shape.data_parallel_size + rank for microbatch, rank in bad_microbatches]
        size = shape.micro_batch_size
        numbers = sorted(first + place * size + row for place in places for row in range(size))
        return cls([number for number in numbers if number < end], blend.locate)

    def __str__(self) -> str:
        places = "; ".join(f"{name}: {spelled(ids)}" for name, ids in self.by_source().items())
        return f"{spelled(self.numbers)} of the run ({places})"


def spelled(numbers: Sequence[int]) -> str:
    """``3, 5-8``; a long list is cut short and says so."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:_SHOWN_RANGES]]
    left_out = sum(last - first + 1 for first, last in ranges[_SHOWN_RANGES:])
    return ", ".join(shown) + (f" and {left_out} more" if left_out else "")


@dataclass(frozen=True, slots=True)
class Spike:
    """A loss out of the ordinary: above ``limit`` = median + sigma x robust deviation."""

    loss: float
    median: float
    limit: float


class LossWatch:
    """Compares a loss with the median of those before it.

    The deviation is the median absolute deviation: up to half of the window may be spikes without moving
    either.
    """

    def __init__(self, sigma: float, window_steps: int, losses: Sequence[float] = ()) -> None:
        self.sigma = sigma
        self.losses: deque[float] = deque(losses, maxlen=window_steps)

    def add(self, loss: float) -> Spike | None:
        """Take in a finite loss; returns the spike that it is, if it is one."""
        spike = None
        if self.sigma > 0 and len(self.losses) == self.losses.maxlen:
            median = statistics.median(self.losses)
            deviation = _MAD_TO_SIGMA * statistics.median(abs(past - median) for past in self.losses)
            limit = median + self.sigma * max(deviation, _SMALLEST_SIGMA * abs(median))
            spike = Spike(loss, median, limit) if loss > limit else None
        self.losses.append(loss)
        return spike


class HealthMonitor:
    """Looks at every step. Its methods make no collective calls, and every rank must call them alike."""

    def __init__(
        self, training: TrainingConfig, *, speaks: bool, record: Callable[[int, str, Mapping[str, Any]], None]
    ) -> None:
        """Start with a clean record.

        Args:
            training: the limits.
            speaks: whether to log warnings; true on one rank only.
            record: writes down (step, event, details), where ``speaks``.
        """
        self.speaks = speaks
        self.max_skipped_steps = training.max_skipped_steps
        self.skipped_in_a_row = 0
        self.spike_since: int | None = None
        self.watch = LossWatch(training.loss_spike_sigma, training.loss_spike_window_steps)
        self._record = record

    def to_mapping(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "skipped_in_a_row": self.skipped_in_a_row,
            "spike_since": self.spike_since,
            "losses": list(self.watch.losses),
        }

    def restore(self, values: Mapping[str, Any]) -> None:
        """Take over what :meth:`to_mapping` gave."""
        self.skipped_in_a_row = values["skipped_in_a_row"]
        self.spike_since = values["spike_since"]
        self.watch.losses.extend(values["losses"])

    def observe(self, step: int, *, loss: float, grad_norm: float, skipped: bool, samples: Samples) -> None:
        """Judge a finished step.

        Args:
            step: its number.
            loss: of the step.
            grad_norm: of the step.
            skipped: no update was made, because one of the two is not finite.
            samples: of the step, or those of them that are known to be the cause.

        Raises:
            DivergenceError: ``training.max_skipped_steps`` in a row were not finite; on every rank.
        """
        if skipped:
            self._skipped(step, loss, grad_norm, samples)
            return
        self.skipped_in_a_row = 0
        spike = self.watch.add(loss)
        if spike is not None and self.spike_since is None:
            self.spike_since = step
            self._report_spike(step, spike, samples)
        elif spike is None and self.spike_since is not None:
            num_steps, self.spike_since = step - self.spike_since, None
            logger.info("step %d: the loss is back to normal after %d step(s)", step, num_steps)

    def _skipped(self, step: int, loss: float, grad_norm: float, samples: Samples) -> None:
        self.skipped_in_a_row += 1
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {grad_norm}"
        if self.speaks:
            details = {"loss": loss, "grad_norm": grad_norm, "in_a_row": self.skipped_in_a_row}
            self._record(step, "not_finite", {**details, "samples": samples.by_source()})
        if 0 < self.max_skipped_steps <= self.skipped_in_a_row:
            raise DivergenceError(
                f"step {step}: {what}, in {self.skipped_in_a_row} step(s) in a row no update could be made "
                f"(training.max_skipped_steps).\n"
                f"  Samples of the last of them: {samples}.\n"
                f"  Look at these samples; or lower optimizer.lr, or remove the newest folders in "
                f"checkpoints/ to go on from an earlier step."
            )
        if self.speaks:
            in_a_row = self.skipped_in_a_row
            logger.warning("step %d: no update, %s (%d in a row); samples %s", step, what, in_a_row, samples)

    def _report_spike(self, step: int, spike: Spike, samples: Samples) -> None:
        if not self.speaks:
            return
        self._record(step, "loss_spike", {**asdict(spike), "samples": samples.by_source()})
        logger.warning(
            "step %d: loss %.4f is a spike: median of the last %d steps %.4f, limit %.4f; samples %s",
            step, spike.loss, self.watch.losses.maxlen, spike.median, spike.limit, samples,
        )  # fmt: skip
