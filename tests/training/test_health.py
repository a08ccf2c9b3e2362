"""Steps that are not finite, loss spikes, stragglers: what is said, when, alike on every rank."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tokedit.config.training import TrainingConfig
from megatron_tokedit.dataset.batches import BatchShape, MicrobatchSampler
from megatron_tokedit.errors import DivergenceError
from megatron_tokedit.testing.ranks import RankPool
from megatron_tokedit.training.health import HealthMonitor, LossWatch, Samples, spelled
from megatron_tokedit.training.step_times import StepTimes, compare


@dataclass(frozen=True)
class Place:
    source: str
    epoch: int
    sample_in_epoch: int
    documents: tuple[int, ...] = ()


def locate(number: int) -> Place:
    """Every third sample is from the second source."""
    return Place("second" if number % 3 == 2 else "first", number // 100, number)


def test_rows_of_conversations_are_named_by_their_documents() -> None:
    found = Samples(
        [4, 6], lambda number: Place("chats", 1, number, documents=(number * 10, number * 10 + 1))
    )
    assert found.by_source() == {"chats, epoch 1, documents": [40, 41, 60, 61]}
    assert str(found) == "4, 6 of the run (chats, epoch 1, documents: 40-41, 60-61)"


def samples(first: int = 8, last: int = 16) -> Samples:
    return Samples(range(first, last), locate)


class Record:
    """A monitor and what it has written down."""

    def __init__(self, *, speaks: bool = True, **settings: Any) -> None:
        self.events: list[tuple[int, str, Mapping[str, Any]]] = []
        training = TrainingConfig(train_steps=10, global_batch_size=8, **settings)
        self.monitor = HealthMonitor(training, speaks=speaks, record=lambda *event: self.events.append(event))

    def observe(self, step: int, loss: float, grad_norm: float = 1.0, of: Samples | None = None) -> None:
        skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        self.monitor.observe(step, loss=loss, grad_norm=grad_norm, skipped=skipped, samples=of or samples())


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="megatron_tokedit"):
        yield caplog


def test_spelled() -> None:
    assert spelled([]) == ""
    assert spelled([4]) == "4"
    assert spelled([9, 1, 2, 3, 5]) == "1-3, 5, 9"
    assert spelled(range(0, 60, 2)) == "0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22 and 18 more"


def test_fatal_after_so_many_in_a_row(said: pytest.LogCaptureFixture) -> None:
    record = Record(max_skipped_steps=3)
    for step, loss in enumerate([1.0, math.nan, math.nan, 1.0, math.nan, math.inf], start=1):
        record.observe(step, loss)
    assert (
        "step 3: no update, the loss is nan (2 in a row); samples 8-15 of the run (first, epoch 0: 9-10, "
        in said.text
    )
    with pytest.raises(DivergenceError) as error:
        record.observe(7, 1.0, grad_norm=math.inf, of=samples(16, 20))
    message = str(error.value)
    assert "step 7: the gradient's norm is inf, in 3 step(s) in a row no update could be made" in message
    assert "16-19 of the run (first, epoch 0: 16, 18-19; second, epoch 0: 17)" in message
    assert [(step, event) for step, event, _ in record.events] == [(n, "not_finite") for n in (2, 3, 5, 6, 7)]
    assert record.events[-1][2]["samples"] == {"first, epoch 0": [16, 18, 19], "second, epoch 0": [17]}


def test_never_fatal_with_zero() -> None:
    record = Record(max_skipped_steps=0)
    for step in range(1, 50):
        record.observe(step, math.nan)
    assert record.monitor.skipped_in_a_row == 49


def test_silent_ranks_decide_alike(said: pytest.LogCaptureFixture) -> None:
    record = Record(speaks=False, max_skipped_steps=2)
    record.observe(1, math.nan)
    assert not said.records
    assert not record.events
    with pytest.raises(DivergenceError):
        record.observe(2, math.nan)


def noisy_losses(num_steps: int, seed: int = 0) -> list[float]:
    """A falling loss with noise."""
    draw = random.Random(seed)
    return [2.0 + 4.0 / (1 + step / 50) + draw.gauss(0.0, 0.05) for step in range(num_steps)]


def test_noise_and_a_falling_loss_are_no_spikes() -> None:
    for seed in range(20):
        watch = LossWatch(6.0, 100)
        assert [watch.add(loss) for loss in noisy_losses(1000, seed)] == [None] * 1000
    watch = LossWatch(6.0, 10)
    assert not any(watch.add(loss) for loss in [2.0] * 20 + [2.0001] + [2.0] * 20)
    assert LossWatch(0.0, 10, [1.0] * 10).add(100.0) is None


def test_a_spike_is_reported_once_with_its_samples(said: pytest.LogCaptureFixture) -> None:
    record = Record(loss_spike_sigma=6.0, loss_spike_window_steps=50)
    losses = noisy_losses(300)
    losses[200:205] = [6.0, 7.0, 8.0, 7.0, 6.0]
    losses[250] = math.nan
    for step, loss in enumerate(losses):
        record.observe(step, loss, of=samples(step * 8, step * 8 + 8))
    (step, event, details), *others = record.events
    assert (step, event, details["loss"]) == (200, "loss_spike", 6.0)
    assert [event for _, event, _ in others] == ["not_finite"]
    assert 2.0 < details["median"] < details["limit"] < 6.0
    assert details["samples"]["second, epoch 16"] == [1601, 1604, 1607]
    assert "samples 1600-1607 of the run" in said.text
    assert "step 205: the loss is back to normal after 5 step(s)" in said.text


def test_robust_against_the_spikes_themselves() -> None:
    """A mean and a standard deviation over the window would have taken the second spike for normal."""
    watch = LossWatch(6.0, 50)
    losses = noisy_losses(200)
    losses[150:160] = [50.0] * 10
    losses[170] = 5.0
    found = [step for step, loss in enumerate(losses) if watch.add(loss)]
    assert found == [*range(150, 160), 170]
    assert np.mean(losses[120:170]) + 6 * np.std(losses[120:170]) > losses[170]


def test_a_new_level_becomes_normal() -> None:
    watch = LossWatch(6.0, 20)
    found = [watch.add(loss) is not None for loss in [2.0] * 30 + [3.0] * 30]
    assert found[30:40] == [True] * 10
    assert not any(found[42:])


def test_state_goes_through_a_checkpoint() -> None:
    """Interrupted anywhere, the same things are said at the same steps."""
    losses = noisy_losses(120)
    losses[80:84] = [9.0] * 4
    losses[100:103] = [math.nan] * 3
    straight = Record(loss_spike_window_steps=30, max_skipped_steps=4)
    for step, loss in enumerate(losses):
        straight.observe(step, loss)
    for cut in (10, 82, 101):
        halves = [Record(loss_spike_window_steps=30, max_skipped_steps=4) for _ in range(2)]
        for step, loss in enumerate(losses[:cut]):
            halves[0].observe(step, loss)
        halves[1].monitor.restore(json.loads(json.dumps(halves[0].monitor.to_mapping())))
        for step, loss in enumerate(losses[cut:], start=cut):
            halves[1].observe(step, loss)
        assert halves[0].events + halves[1].events == straight.events
        assert halves[1].monitor.to_mapping() == straight.monitor.to_mapping()


# --------------------------------------------------------------------------------------------- stragglers


def test_ranks_are_compared_within_their_stage() -> None:
    """Columns: p50, p95, max, load, forward, memory, stage; the last stage has more work to do."""
    table = np.array(
        [
            [1.0, 1.2, 1.5, 0.1, 0.4, 100, 0],
            [1.0, 1.2, 1.5, 0.1, 0.4, 100, 0],
            [1.0, 1.1, 1.6, 0.4, 0.7, 100, 0],
            [1.0, 1.2, 1.5, 0.0, 0.9, 300, 1],
            [1.1, 1.2, 1.5, 0.0, 1.0, 200, 1],
            [1.0, 1.2, 1.5, 0.0, 0.9, 200, 1],
        ]
    )
    report = compare(table)
    assert (report.step_seconds_p50, report.step_seconds_p95, report.step_seconds_max) == (1.1, 1.2, 1.6)
    assert (report.slowest_rank, report.slowest_ratio) == (2, pytest.approx(2.2))
    assert (report.load_seconds, report.forward_seconds) == (0.4, 1.0)
    assert (report.peak_memory_bytes, report.peak_memory_rank) == (300, 3)


def test_a_tie_is_no_straggler() -> None:
    assert compare(np.ones((4, 7))).slowest_ratio == 1.0
    assert compare(np.zeros((4, 7))).slowest_ratio == 0.0


class SlowLayer(torch.nn.Linear):
    def __init__(self, seconds: float) -> None:
        super().__init__(2, 2)
        self.seconds = seconds

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().forward(values)


def measure(slow_rank: int, part: str) -> Any:
    """Three steps of 3 microbatches on every rank, one of which is slow; the report and the warnings."""
    import torch.distributed as dist

    from megatron_tokedit.config.model import ParallelConfig
    from megatron_tokedit.engine.initialize import initialize

    ctx = initialize(ParallelConfig(), seed=1, device="cpu", cpu_threads=1)
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_tokedit.training.step_times")
    logger.addHandler(handler)
    seconds = 0.03 if ctx.rank == slow_rank else 0.004
    layer = SlowLayer(seconds if part == "forward" else 0.004)
    times = StepTimes([layer], ctx, straggler_ratio=1.5)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            time.sleep(seconds if part == "load" else 0.0)
            yield torch.ones(1, 2)

    stream = times.loading(batches())
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(3):
            layer(next(stream))
        dist.barrier()
        times.add(time.perf_counter() - started)
    layer.eval()(torch.ones(1, 2))  # validation is not counted
    report = times.report()
    again = times.report()
    logger.removeHandler(handler)
    assert again.step_seconds_max == again.slowest_ratio == 0.0, "every report starts anew"
    return report, warnings, os.getpid()


@pytest.mark.parametrize("part", ["load", "forward"])
def test_the_straggler_speaks_up(ranks: RankPool, part: str) -> None:
    """Seen from the step's time alone all ranks are equally slow: they wait for each other."""
    results = ranks.run(measure, 1, part, world_size=3)
    (report, warnings, _) = results[1]
    assert [result[0] for result in results] == [report] * 3
    assert report.slowest_rank == 1
    assert report.slowest_ratio > 2.0
    assert report.step_seconds_p50 >= 0.09
    assert report.load_seconds > (0.08 if part == "load" else 0.0)
    assert report.peak_memory_bytes > 50_000_000
    assert [len(result[1]) for result in results] == [0, 1, 0]
    assert "rank 1 on" in warnings[0]
    assert "is a straggler" in warnings[0]


def test_loading_ends_with_its_batches(tmp_path: Path) -> None:
    from megatron_tokedit.engine.initialize import ParallelContext

    ctx = object.__new__(ParallelContext)
    ctx.device = torch.device("cpu")
    times = StepTimes([], ctx, straggler_ratio=2.0)
    assert list(times.loading(iter([1, 2, 3]))) == [1, 2, 3]


class FakeBlend:
    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def locate(self, sample: int) -> Place:
        return locate(sample)


def test_samples_of_a_step() -> None:
    """Microbatch m of rank r starts at row (m * ranks + r) * rows, as the sampler deals them out."""
    shape = BatchShape(12, 2, 3, 1)
    assert Samples.of_step(24, FakeBlend(100), shape).numbers == range(24, 36)
    assert Samples.of_step(24, FakeBlend(30), shape).numbers == range(24, 30)
    assert Samples.of_step(24, FakeBlend(100), shape, [(0, 0)]).numbers == [24, 25]
    assert Samples.of_step(24, FakeBlend(100), shape, [(1, 2), (0, 1)]).numbers == [26, 27, 34, 35]
    dealt = list(MicrobatchSampler(shape, 24, 36))
    assert Samples.of_step(24, FakeBlend(100), shape, [(1, 1)]).numbers == dealt[1]
