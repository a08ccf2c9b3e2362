"""Whole runs: growing batches, schedules in tokens, saves in the background, kills, golden losses."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import Forked, run_forked
from training_cases import train_on_rank, write_run

from megatron_tokedit.testing.ranks import RankPool
from megatron_tokedit.training.metrics import read_metrics

RAMP = (
    "training.rampup_batch_size=[2, 2, 24]",
    "schedule={lr_warmup_tokens: 500, lr_decay_style: WSD, lr_wsd_decay_tokens: 200}",
)


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir, "train")]


def same(ours: list[Any], theirs: list[Any]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_growing_batches_resume_bit_for_bit(ranks: RankPool, tmp_path: Path, workers: int) -> None:
    config = write_run(tmp_path)
    overrides = (*RAMP, f"data.num_workers={workers}")
    straight, weights = ranks.run(
        train_on_rank, config, (*overrides, f"run_dir={tmp_path}/straight"), world_size=1
    )[0]
    consumed = [record["consumed_samples"] for record in read_metrics(tmp_path / "straight", "train")]
    assert consumed == [2, 4, 6, 8, 12, 16, 22, 28, 36, 44]
    assert straight.state.consumed_tokens == 44 * 16
    for step in (2, 5, 9):  # inside a batch size, at a change, in the last one
        ranks.run(train_on_rank, config, (*overrides, f"runtime.exit_at_step={step}"), world_size=1)
    result, again = ranks.run(train_on_rank, config, overrides, world_size=1)[0]
    assert result.state.consumed_samples == 44
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    rates = [[r["lr"] for r in read_metrics(tmp_path / name, "train")] for name in ("run", "straight")]
    assert rates[0] == rates[1]
    assert rates[0][1] == pytest.approx(1e-2 * 2 * 16 / 500)
    assert same(again, weights)


def test_a_schedule_may_change_its_unit_on_resume(ranks: RankPool, tmp_path: Path) -> None:
    """The position follows from the run's own counts, not from what the old schedule counted."""
    config = write_run(tmp_path)
    ranks.run(train_on_rank, config, ("runtime.exit_at_step=4",), world_size=1)
    tokens = (f"schedule={{lr_warmup_tokens: {2 * 128}}}",)
    ranks.run(train_on_rank, config, tokens, world_size=1)
    ranks.run(train_on_rank, config, (f"run_dir={tmp_path}/straight",), world_size=1)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_saves_in_the_background(ranks: RankPool, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    overrides = (
        "checkpoint.async_save=true",
        "checkpoint.save_interval_steps=2",
        "logging.log_interval_steps=1",
    )
    _, weights = ranks.run(train_on_rank, config, (f"run_dir={tmp_path}/straight",), world_size=2)[0]
    ranks.run(train_on_rank, config, (*overrides, "runtime.exit_at_step=5"), world_size=2)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step_00000002", "step_00000004", "step_00000005", "latest"}
    # from one that was written in the background
    subprocess.run(["rm", "-r", tmp_path / "run" / "checkpoints" / "step_00000005"], check=True)
    result, again = ranks.run(train_on_rank, config, overrides, world_size=2)[0]
    assert result.checkpoint == f"{tmp_path}/run/checkpoints/step_00000010"
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert same(again, weights)


@pytest.mark.parametrize("in_background", [False, pytest.param(True, marks=pytest.mark.stress)])
def test_kill_during_a_save(tmp_path: Path, in_background: bool) -> None:
    """SIGKILL as soon as a checkpoint is being written: the newest whole one is gone on from."""
    data = [
        f"data.{split}.0.prefix={tmp_path}/data/{name}_text_document"
        for split, name in (("train", "corpus"), ("validation", "heldout"))
    ]
    setting = f"checkpoint.async_save={str(in_background).lower()}"
    steps = ("training.train_steps=9", "checkpoint.save_interval_steps=3", setting)
    command = ["tools/train.py", "--config", "examples/tiny_cpu.yaml", *data, *steps]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run_forked([*command, f"run_dir={tmp_path}/straight"], environment).check_returncode()
    for first_step in (1, 4):
        process = Forked([*command, f"run_dir={tmp_path}/run"], environment, start_new_session=True)
        partial = tmp_path / "run" / "checkpoints" / f"step_{first_step + 2:08d}.partial"
        while not partial.exists():
            assert process.poll() is None
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if first_step == 1:  # let the first one through, so that there is something to go on from
            steps_done = [*command, f"run_dir={tmp_path}/run", "runtime.exit_at_step=3"]
            run_forked(steps_done, environment).check_returncode()
    run_forked([*command, f"run_dir={tmp_path}/run"], environment).check_returncode()
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))


GOLDEN = [
    4.571829, 4.56652, 4.400305, 4.184156, 3.966167, 3.823259, 3.796455, 3.53276, 3.470041, 3.331699,
    3.132257, 2.993671, 3.078602, 2.886975, 2.90782, 2.867752, 2.76022, 2.766724, 2.709129, 2.718537,
]  # fmt: skip
"""Losses of the first twenty steps of the run in training_cases.py: order of the data, weights, all."""


@pytest.mark.parametrize("world_size", [1, 2])
def test_golden_losses(ranks: RankPool, tmp_path: Path, world_size: int) -> None:
    ranks.run(train_on_rank, write_run(tmp_path), ("training.train_steps=20",), world_size=world_size)
    assert losses(tmp_path / "run") == pytest.approx(GOLDEN, rel=2e-4)
