"""Training on real gloo ranks: layouts agree, interrupted equals straight, what does not fit is refused."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_cases import SPEC, train_on_rank, write_dataset, write_run

from megatron_tokedit.testing.ranks import RankFailure, RankPool
from megatron_tokedit.training.metrics import read_metrics

TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"


@pytest.fixture(scope="module")
def straight(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Ten steps at once on one rank: the folder and (result, weights)."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, ranks.run(train_on_rank, write_run(folder), world_size=1)[0]


def losses(folder: Path, run: str = "run") -> list[float]:
    return [record["loss"] for record in read_metrics(folder / run, "train")]


def test_ten_steps(straight: tuple[Path, Any]) -> None:
    folder, (result, _) = straight
    assert result.finished
    assert result.state.step == 10
    assert result.state.consumed_samples == 80
    assert result.state.consumed_tokens == 80 * 16
    records = read_metrics(folder / "run", "train")
    assert [record["step"] for record in records] == list(range(1, 11))
    assert records[-1]["loss"] < records[0]["loss"] < math.log(200)
    assert [record["lr"] for record in records[:3]] == pytest.approx([0.0, 0.005, 0.01])
    assert [record["step"] for record in read_metrics(folder / "run", "validation")] == [5, 10]
    assert set(result.validation) == {"held"}
    names = {path.name for path in (folder / "run" / "checkpoints").iterdir()}
    assert names == {"step_00000005", "step_00000010", "latest"}
    assert any((folder / "run" / "tensorboard").iterdir())
    assert "vocab_size: 97" in (folder / "run" / "config.yaml").read_text()


def test_five_and_five_are_ten_bit_for_bit(
    ranks: RankPool, straight: tuple[Path, Any], tmp_path: Path
) -> None:
    config = write_run(tmp_path)
    half = ranks.run(train_on_rank, config, ("runtime.exit_at_step=4",), world_size=1)[0][0]
    assert (half.finished, half.stopped_by, half.state.step) == (False, "exit_at_step", 4)
    result, weights = ranks.run(train_on_rank, config, world_size=1)[0]
    assert result.finished
    assert losses(tmp_path) == losses(straight[0])
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(weights, straight[1][1], strict=True))


def test_a_signal_gives_one_complete_checkpoint(
    ranks: RankPool, straight: tuple[Path, Any], tmp_path: Path
) -> None:
    config = write_run(tmp_path)
    results = ranks.run(train_on_rank, config, kill_at=3, world_size=2)  # after step 3: step 4 hears of it
    assert {(result.stopped_by, result.state.step) for result, _ in results} == {("SIGTERM", 4)}
    assert Path(results[0][0].checkpoint).name == "step_00000004"
    assert json.loads((Path(results[0][0].checkpoint) / "state.json").read_text())["consumed_samples"] == 32
    finished = ranks.run(train_on_rank, config, world_size=2)[0][0]
    assert finished.finished
    assert losses(tmp_path) == pytest.approx(losses(straight[0]), rel=1e-5)


@pytest.mark.parametrize(("world_size", "layout"), [(2, ()), (2, (TP2,)), (2, (PP2,)), (4, (TP2, PP2))])
def test_resumes_under_another_layout(
    ranks: RankPool, straight: tuple[Path, Any], tmp_path: Path, world_size: int, layout: tuple[str, ...]
) -> None:
    """The checkpoint of step 5, made on one rank, goes on under every layout with the same losses."""
    config = write_run(tmp_path)
    shutil.copytree(straight[0] / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000010")
    results = ranks.run(train_on_rank, config, layout, world_size=world_size)
    assert len({result.loss for result, _ in results}) == 1
    assert losses(tmp_path) == pytest.approx(losses(straight[0]), rel=2e-5)
    held = results[0][0].validation["held"]
    assert held == pytest.approx(straight[1][0].validation["held"], rel=2e-5)


def test_smaller_batch_on_resume(ranks: RankPool, straight: tuple[Path, Any], tmp_path: Path) -> None:
    """Samples are counted, not steps: the run still has data for all of its steps."""
    config = write_run(tmp_path)
    shutil.copytree(straight[0] / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000010")
    overrides = ("training.global_batch_size=2", f"data.cache_dir={tmp_path}/elsewhere")
    result, _ = ranks.run(train_on_rank, config, overrides, world_size=1)[0]
    assert result.finished
    assert result.state.consumed_samples == 5 * 8 + 5 * 2


def test_bf16_and_gpt2_train(ranks: RankPool, tmp_path: Path) -> None:
    masks = ("data.reset_attention_mask=true", "data.reset_position_ids=true", "data.eod_mask_loss=true")
    overrides = ("precision.recipe=bf16", "model.family=gpt2", "model.hidden_dropout=0.1", *masks)
    result, _ = ranks.run(train_on_rank, write_run(tmp_path), overrides, world_size=1)[0]
    assert result.finished
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_dropout_resumes_bit_for_bit(ranks: RankPool, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    dropout = ("model.hidden_dropout=0.2", "training.train_steps=4", "schedule.lr_warmup_steps=1")
    ranks.run(train_on_rank, config, (*dropout, f"run_dir={tmp_path}/straight"), world_size=1)
    ranks.run(train_on_rank, config, (*dropout, "runtime.exit_at_step=2"), world_size=1)
    ranks.run(train_on_rank, config, dropout, world_size=1)
    assert losses(tmp_path) == losses(tmp_path, "straight")


def test_finished_run_has_nothing_to_do(ranks: RankPool, straight: tuple[Path, Any]) -> None:
    before = losses(straight[0])
    result, weights = ranks.run(train_on_rank, straight[0] / "run.yaml", world_size=1)[0]
    assert result.finished
    assert not weights, "no model is built"
    assert losses(straight[0]) == before


@pytest.mark.parametrize(
    ("overrides", "spec", "named"),
    [
        (("model.num_attention_heads=8",), SPEC, ["model.num_attention_heads: recorded 4, now 8"]),
        (("precision.recipe=bf16",), SPEC, ["precision.recipe: recorded fp32, now bf16"]),
        ((), SPEC | {"fingerprint": "e" * 64}, ["tokenizer.fingerprint: recorded ffff", "now eeee"]),
        (
            ("model.vocab_size=128",),
            SPEC | {"eod": 0},
            ["model.vocab_size: recorded 97, now 128", "tokenizer.eod"],
        ),
    ],
)
def test_another_model_is_refused(
    ranks: RankPool,
    straight: tuple[Path, Any],
    overrides: tuple[str, ...],
    spec: dict[str, Any],
    named: list[str],
) -> None:
    with pytest.raises(RankFailure) as failure:
        ranks.run(train_on_rank, straight[0] / "run.yaml", overrides, spec, world_size=1)
    assert "CheckpointError" in str(failure.value)
    for text in named:
        assert text in str(failure.value)


def test_all_unusable_sources_are_reported_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    (tmp_path / "first.idx").unlink()
    write_dataset(tmp_path / "second", num_documents=60, seed=9, manifest=False)  # leaves the old manifest
    write_dataset(tmp_path / "held", num_documents=1)
    overrides = ("model.seq_length=128",)
    with pytest.raises(RankFailure) as failure:
        ranks.run(train_on_rank, config, overrides, world_size=2)
    text = str(failure.value)
    assert "rank 0:" in text
    assert "rank 1:" in text
    assert "data.train.0 (first)" in text
    assert "first.bin and .idx are not there" in text
    assert "second.manifest.json does not belong to" in text
    assert "one sample needs model.seq_length + 1 = 129" in text


def test_a_run_folder_takes_one_run(ranks: RankPool, straight: tuple[Path, Any]) -> None:
    run = straight[0] / "run"
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    holder = [sys.executable, "-c", hold, str(run / "lock")]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(RankFailure, match=r"run is in use by another run \(process \d+ on "):
            ranks.run(train_on_rank, straight[0] / "run.yaml", world_size=2)
        process.communicate(b"\n")
    assert ranks.run(train_on_rank, straight[0] / "run.yaml", world_size=1)[0][0].finished


def test_run_folder_that_cannot_be_written(ranks: RankPool, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    file = tmp_path / "first.bin"
    with pytest.raises(RankFailure, match=r"ConfigError: run_dir: .*first\.bin cannot be written"):
        ranks.run(train_on_rank, config, (f"run_dir={file}",), world_size=1)
    with pytest.raises(
        RankFailure, match=r"DataFormatError: data\.cache_dir: .*first\.bin cannot be written"
    ):
        ranks.run(train_on_rank, config, (f"data.cache_dir={file}",), world_size=1)


def test_another_tokenizer_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="fingerprint"):
        ranks.run(train_on_rank, write_run(tmp_path), (), SPEC | {"fingerprint": "e" * 64}, world_size=1)


def test_ids_beyond_the_vocabulary_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    config = write_run(tmp_path)
    for manifest in tmp_path.glob("*.manifest.json"):
        manifest.unlink()
    with pytest.raises(RankFailure, match="another tokenizer"):
        ranks.run(train_on_rank, config, (), SPEC | {"vocab_size": 50}, world_size=1)


@pytest.mark.parametrize(
    ("old", "new", "notes"),
    [
        ("bf16", "fp8_tensorwise", ["precision.recipe: recorded bf16, now fp8_tensorwise"]),
        ("fp8_delayed", "bf16", ["precision.recipe: recorded fp8_delayed, now bf16"]),
        ("fp8_delayed", "fp8_blockwise", ["precision.recipe: recorded fp8_delayed, now fp8_blockwise"]),
        ("fp8_delayed", "fp8_delayed", []),
        ("fp32", "fp8_tensorwise", None),
        ("mxfp8", "fp32", None),
    ],
)
def test_precision_on_resume(old: str, new: str, notes: list[str] | None) -> None:
    """Between bfloat16 and FP8 a run may go any way; float32 is another optimizer."""
    from megatron_tokedit.errors import CheckpointError
    from megatron_tokedit.training.resume import check_continuable, check_resumable

    def config(recipe: str, optimizer: str = "kept") -> dict[str, Any]:
        init_from = {"checkpoint": "x", "optimizer": optimizer}
        return {"model": {}, "precision": {"recipe": recipe}, "data": {}, "init_from": init_from}

    tokenizer = {"recorded_tokenizer": SPEC, "tokenizer": SPEC}
    for check in (check_resumable, check_continuable):
        if notes is None:
            with pytest.raises(CheckpointError, match=f"precision.recipe: recorded {old}, now {new}"):
                check("x", recorded_config=config(old), config=config(new), **tokenizer)
        else:
            assert check("x", recorded_config=config(old), config=config(new), **tokenizer) == notes
    fresh = config(new, "fresh")
    said = check_continuable("x", recorded_config=config(old), config=fresh, **tokenizer)
    assert said == ([f"precision.recipe: recorded {old}, now {new}"] if old != new else [])


def test_changed_data_on_resume_is_reported(
    ranks: RankPool, straight: tuple[Path, Any], tmp_path: Path
) -> None:
    from megatron_tokedit.training.resume import check_resumable

    recorded = json.loads(
        (straight[0] / "run" / "checkpoints" / "step_00000010" / "run_config.json").read_text()
    )
    changed = {**recorded, "training": {**recorded["training"], "train_steps": 20}, "seed": 8}
    notes = check_resumable(
        "x", recorded_config=recorded, config=changed, recorded_tokenizer=SPEC, tokenizer=SPEC
    )
    assert "seed: recorded 7, now 8" in notes
    assert "training.train_steps: recorded 10, now 20" in notes
    assert not any("data" in note for note in notes), "resume_blend speaks of the data"
