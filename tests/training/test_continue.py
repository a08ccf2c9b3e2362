"""Stage ``continue``: another run's weights, with data, schedule and position of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_cases import SPEC, train_on_rank, write_run

from megatron_tokedit.testing.ranks import RankFailure, RankPool
from megatron_tokedit.training.metrics import read_metrics

NEW_SCHEDULE = (
    "training.train_steps=6",
    "schedule={lr_decay_style: linear, lr_warmup_steps: 2, lr_warmup_init: 1e-4}",
    "optimizer.lr=5e-3",
)


@pytest.fixture(scope="module")
def base(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of ten steps."""
    folder = tmp_path_factory.mktemp("base")
    ranks.run(train_on_rank, write_run(folder), world_size=1)
    return folder


def continuation(base: Path, folder: Path, *more: str) -> tuple[str, ...]:
    """Overrides of a continuation of the run in ``base``, on data of which the base saw nothing."""
    return (
        "stage=continue",
        f"init_from={{checkpoint: {base}/run}}",
        f"run_dir={folder}/run",
        f"data.train=[{{name: new, prefix: {folder}/held}}]",
        *NEW_SCHEDULE,
        *more,
    )


def records(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "run", "train")


def state_of(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / "run" / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())


@pytest.mark.parametrize("optimizer", ["fresh", "kept"])
def test_starts_from_the_weights_with_the_new_schedule(
    ranks: RankPool, base: Path, tmp_path: Path, optimizer: str
) -> None:
    config = write_run(tmp_path)
    overrides = continuation(base, tmp_path, f"init_from.optimizer={optimizer}")
    result, weights = ranks.run(train_on_rank, config, overrides, world_size=1)[0]
    assert result.finished
    assert (result.state.step, result.state.consumed_samples) == (6, 48)
    steps = records(tmp_path)
    assert [record["lr"] for record in steps[:3]] == pytest.approx([1e-4, (1e-4 + 5e-3) / 2, 5e-3])
    assert steps[0]["loss"] < records(base)[0]["loss"] - 0.1, "the weights are not random"
    (ancestor,) = state_of(tmp_path, 6)["lineage"]
    assert ancestor["checkpoint"] == f"{base}/run/checkpoints/step_00000010"
    assert (ancestor["step"], ancestor["optimizer"]) == (10, optimizer)
    # stopped and started again, it goes on with its own weights: init_from may even be gone
    halves = (*overrides, f"run_dir={tmp_path}/halves")
    ranks.run(train_on_rank, config, (*halves, "runtime.exit_at_step=3"), world_size=1)
    gone = ("init_from.checkpoint=/no/such/run",)
    _, again = ranks.run(train_on_rank, config, (*halves, *gone), world_size=1)[0]
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(again, weights, strict=True))


def test_kept_moments_make_another_first_step(ranks: RankPool, base: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    losses = {}
    for optimizer in ("fresh", "kept"):
        folder = f"run_dir={tmp_path}/{optimizer}"
        overrides = continuation(base, tmp_path, f"init_from.optimizer={optimizer}", folder)
        ranks.run(train_on_rank, config, overrides, world_size=1)
        losses[optimizer] = [r["loss"] for r in read_metrics(tmp_path / optimizer, "train")]
    assert losses["fresh"][0] == losses["kept"][0]
    assert losses["fresh"][1] != losses["kept"][1]


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [((), 2), (("parallel.tensor_model_parallel_size=2",), 2), (("precision.recipe=bf16",), 1)],
)
def test_under_another_layout_or_precision(
    ranks: RankPool, base: Path, tmp_path: Path, layout: tuple[str, ...], world_size: int
) -> None:
    config = write_run(tmp_path)
    same = (*continuation(base, tmp_path), f"run_dir={tmp_path}/same")
    ranks.run(train_on_rank, config, same, world_size=1)
    ranks.run(train_on_rank, config, (*continuation(base, tmp_path), *layout), world_size=world_size)
    expected = [r["loss"] for r in read_metrics(tmp_path / "same", "train")]
    tolerance = 0.02 if "bf16" in str(layout) else 2e-5
    assert [r["loss"] for r in records(tmp_path)] == pytest.approx(expected, rel=tolerance)


def test_lineage_grows(ranks: RankPool, base: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    short = ("training.train_steps=3",)
    ranks.run(train_on_rank, config, (*continuation(base, tmp_path), *short), world_size=1)
    second = (*continuation(tmp_path, tmp_path), *short, f"run_dir={tmp_path}/second")
    ranks.run(train_on_rank, config, second, world_size=1)
    state = json.loads((tmp_path / "second" / "checkpoints" / "step_00000003" / "state.json").read_text())
    assert [ancestor["run_dir"] for ancestor in state["lineage"]] == [f"{base}/run", f"{tmp_path}/run"]


@pytest.mark.parametrize(
    ("overrides", "spec", "expected"),
    [
        (("model.num_layers=1",), SPEC, "model.num_layers: recorded 2, now 1"),
        ((), SPEC | {"fingerprint": "e" * 64}, "tokenizer.fingerprint: recorded ffff"),
        (
            ("precision.recipe=bf16", "init_from.optimizer=kept"),
            SPEC,
            "precision.recipe: recorded fp32, now bf16",
        ),
        (("init_from.checkpoint=/no/such",), SPEC, "/no/such: does not exist"),
    ],
)
def test_what_does_not_fit_is_refused(
    ranks: RankPool,
    base: Path,
    tmp_path: Path,
    overrides: tuple[str, ...],
    spec: dict[str, Any],
    expected: str,
) -> None:
    config = write_run(tmp_path)
    for manifest in tmp_path.glob("*.manifest.json"):
        manifest.unlink()
    with pytest.raises(RankFailure) as failure:
        ranks.run(train_on_rank, config, continuation(base, tmp_path, *overrides), spec, world_size=1)
    assert expected in str(failure.value)


def test_longer_texts(ranks: RankPool, base: Path, tmp_path: Path) -> None:
    """Rotary positions: length and base may change."""
    overrides = continuation(base, tmp_path, "model.seq_length=32", "model.rotary_base=50000")
    result, _ = ranks.run(train_on_rank, write_run(tmp_path), overrides, world_size=1)[0]
    assert result.finished
    assert result.state.consumed_tokens == 6 * 8 * 32
