"""The global batch size of every step: constant, or growing as Megatron-LM's batch-size ramp-up lets it.

Invariant: the batch size of a step depends only on the samples consumed before it, so a resumed run goes on
with the sizes of an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tokedit.config.training import TrainingConfig


@dataclass(frozen=True, slots=True)
class BatchStage:
    """Consecutive steps of one batch size.

    Attributes:
        first_step: steps done before them.
        first_sample: samples consumed before them.
        num_steps: how many.
        batch_size: sequences a step over all ranks.
    """

    first_step: int
    first_sample: int
    num_steps: int
    batch_size: int

    @property
    def end_step(self) -> int:
        """Steps done after them."""
        return self.first_step + self.num_steps

    @property
    def end_sample(self) -> int:
        """Samples consumed after them."""
        return self.first_sample + self.num_steps * self.batch_size


def batch_size_at(training: TrainingConfig, consumed_samples: int) -> int:
    """Global batch size of the step that starts after ``consumed_samples`` samples."""
    if training.rampup_batch_size is None:
        return training.global_batch_size
    start, increment, samples = training.rampup_batch_size
    if consumed_samples > samples:
        return training.global_batch_size
    num_increments = (training.global_batch_size - start) // increment
    return start + int(consumed_samples / (samples / num_increments)) * increment


def batch_stages(training: TrainingConfig, *, step: int = 0, consumed_samples: int = 0) -> list[BatchStage]:
    """The stages of a run from ``step`` on, where ``consumed_samples`` were consumed; empty at its end."""
    stages: list[BatchStage] = []
    while step < training.train_steps:
        size = batch_size_at(training, consumed_samples)
        num_steps = 1 if size < training.global_batch_size else training.train_steps - step
        if stages and stages[-1].batch_size == size:
            last = stages.pop()
            stages.append(BatchStage(last.first_step, last.first_sample, last.num_steps + num_steps, size))
        else:
            stages.append(BatchStage(step, consumed_samples, num_steps, size))
        step, consumed_samples = step + num_steps, consumed_samples + num_steps * size
    return stages


def steps_for(training: TrainingConfig, num_samples: int, *, consumed_samples: int = 0) -> int:
    """Steps that consume the samples from ``consumed_samples`` to ``num_samples``; the last may want more."""
    num_steps = 0
    while consumed_samples < num_samples:
        size = batch_size_at(training, consumed_samples)
        steps = 1 if size < training.global_batch_size else -(-(num_samples - consumed_samples) // size)
        num_steps, consumed_samples = num_steps + steps, consumed_samples + steps * size
    return num_steps


def total_samples(training: TrainingConfig, *, step: int = 0, consumed_samples: int = 0) -> int:
    """Samples that have been consumed when the run ends."""
    stages = batch_stages(training, step=step, consumed_samples=consumed_samples)
    return stages[-1].end_sample if stages else consumed_samples


def samples_before(stages: Sequence[BatchStage], step: int) -> int:
    """Samples consumed when ``step`` steps are done; ``step`` lies within ``stages``."""
    stage = next((stage for stage in stages if step <= stage.end_step), stages[-1])
    return stage.first_sample + (step - stage.first_step) * stage.batch_size
