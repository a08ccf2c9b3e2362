"""Whole runs whose data change on the way: what checkpoints, logs and refusals say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_cases import train_on_rank, write_dataset, write_run

from megatron_tokedit.testing.ranks import RankFailure, RankPool
from megatron_tokedit.training.metrics import read_metrics

FIRST = ("runtime.exit_at_step=5", "schedule.lr_decay_style=constant")


def state_of(folder: Path, step: int) -> dict[str, Any]:
    (path,) = (folder / "run" / "checkpoints").glob(f"step*{step}/state.json")
    state: dict[str, Any] = json.loads(path.read_text())
    return state


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "run", "train")]


def train_source(folder: Path, name: str, weight: float) -> str:
    return f"{{name: {name}, prefix: {folder}/{name}, weight: {weight}}}"


def test_a_changed_blend_goes_on_with_every_source_at_its_counter(ranks: RankPool, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    write_dataset(tmp_path / "third", seed=9)
    ranks.run(train_on_rank, config, FIRST, world_size=1)
    assert state_of(tmp_path, 5)["drawn_samples"] == {"first": 30, "second": 10}
    blend = [train_source(tmp_path, name, 1.0) for name in ("first", "third")]
    changed = (f"data.train=[{', '.join(blend)}]", FIRST[1])
    ranks.run(train_on_rank, config, changed, world_size=1)
    state = state_of(tmp_path, 10)
    assert state["drawn_samples"] == {"first": 50, "second": 10, "third": 20}
    assert state["blend"]["start_sample"] == 40
    assert [source["drawn_samples"] for source in state["blend"]["sources"]] == [30, 0, 10]


def test_more_steps_than_planned_are_the_same_samples(ranks: RankPool, tmp_path: Path) -> None:
    """A run that was planned for 5 steps and goes on to 10 has the losses of one planned for 10."""
    folders = [tmp_path / "straight", tmp_path / "longer"]
    for folder in folders:
        folder.mkdir()
        write_run(folder)
    ranks.run(train_on_rank, folders[0] / "run.yaml", FIRST[1:], world_size=1)
    ranks.run(train_on_rank, folders[1] / "run.yaml", ("training.train_steps=5", FIRST[1]), world_size=1)
    ranks.run(train_on_rank, folders[1] / "run.yaml", FIRST[1:], world_size=1)
    assert losses(folders[0]) == losses(folders[1])


def test_refusals_before_step_1(ranks: RankPool, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train_on_rank, config, ("data.train.1.max_epochs=0.1",), world_size=2)
    for rank in (0, 1):
        assert f"rank {rank}:" in str(failure.value)
    assert "data.train.1.max_epochs (second): 0.1 x" in str(failure.value)
    assert "training.train_steps that fits is" in str(failure.value)
    ranks.run(train_on_rank, config, FIRST, world_size=1)
    write_dataset(tmp_path / "second", seed=8)
    with pytest.raises(RankFailure, match=r"content is not what .*: second \(after 10 samples\)"):
        ranks.run(train_on_rank, config, (), world_size=1)


def test_domains_are_measured_beside_their_sources(ranks: RankPool, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    held = [f"{{name: {name}, prefix: {tmp_path}/{name}, domain: made}}" for name in ("held", "first")] + [
        f"{{name: alone, prefix: {tmp_path}/second}}"
    ]
    overrides = (
        f"data.validation=[{', '.join(held)}]",
        "training.train_steps=2",
        "schedule.lr_warmup_steps=1",
    )
    ((result, _),) = ranks.run(train_on_rank, config, overrides, world_size=1)
    found = result.validation
    assert found.keys() == {"held", "first", "alone", "domain made"}
    members = [found["held"], found["first"]]
    num_tokens = sum(member["num_tokens"] for member in members)
    assert found["domain made"]["num_tokens"] == num_tokens
    mean = sum(member["loss"] * member["num_tokens"] for member in members) / num_tokens
    assert found["domain made"]["loss"] == pytest.approx(mean)
