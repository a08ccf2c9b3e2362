"""An evaluation's numbers in the TensorBoard of a run, as TensorBoard itself reads them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_tokedit.cli.evaluate_board import append_to_board
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.training.metrics import MetricsWriter


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with metrics of ten steps and the checkpoints of two."""
    run_dir = tmp_path / "run"
    writer = MetricsWriter(run_dir, first_step=1, is_writer=True)
    for step in range(1, 11):
        writer.write("train", step, {"loss": 5.0 - step / 10})
    writer.close()
    for step in (5, 10):
        partial = run_dir / "checkpoints" / f"step_{step:08d}.partial"
        partial.mkdir(parents=True)
        folder = checkpoint_folder.step_folder(run_dir / "checkpoints", step)
        checkpoint_folder.finish(partial, folder, {"step": step}, {})
    return run_dir


def scalars(board: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(board), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def step(run_dir: Path, number: int) -> str:
    return str(checkpoint_folder.step_folder(run_dir / "checkpoints", number))


def test_numbers_at_the_steps_of_the_checkpoints(run_dir: Path) -> None:
    tag = "evaluation/perplexity/a name, with signs: 50%"
    assert append_to_board(str(run_dir), {tag: 20.0, "evaluation/bits_per_byte/a": 1.5}) == (
        run_dir / "tensorboard" / "evaluation"
    )
    board = append_to_board(step(run_dir, 5), {tag: 30.0})
    assert scalars(board) == {tag: [(5, 30.0), (10, 20.0)], "evaluation/bits_per_byte/a": [(10, 1.5)]}
    assert [s for s, _ in scalars(run_dir / "tensorboard")["train/loss"]] == list(range(1, 11))


def test_an_evaluation_that_is_repeated_replaces_its_numbers(run_dir: Path) -> None:
    for value in (30.0, 25.0, 20.0):
        board = append_to_board(step(run_dir, 10), {"evaluation/tasks/sciq/acc": value, "other": 1.0})
    append_to_board(step(run_dir, 5), {"evaluation/tasks/sciq/acc": 10.0})
    assert scalars(board) == {"evaluation/tasks/sciq/acc": [(5, 10.0), (10, 20.0)], "other": [(10, 1.0)]}
    files = sorted(board.glob("*tfevents*"))
    assert len(files) == 4, "a TensorBoard may be at any of them"
    for path in files:
        os.utime(path, (0, 0))
    append_to_board(step(run_dir, 5), {"other": 2.0})
    assert len(list(board.glob("*tfevents*"))) == 2
    assert scalars(board)["other"] == [(5, 2.0), (10, 1.0)]


def test_a_tensorboard_that_reads_along_has_no_number_twice(run_dir: Path) -> None:
    board = append_to_board(step(run_dir, 5), {"ppl": 30.0})
    live = EventAccumulator(str(board)).Reload()
    append_to_board(step(run_dir, 10), {"ppl": 20.0})
    append_to_board(step(run_dir, 5), {"ppl": 29.0})
    live.Reload()
    assert [(e.step, e.value) for e in live.Scalars("ppl")] == [(5, 29.0), (10, 20.0)]


def test_the_run_goes_on_writing_undisturbed(run_dir: Path) -> None:
    """A reader that follows the run's own file sees the steps after an evaluation."""
    live = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    writer = MetricsWriter(run_dir, first_step=11, is_writer=True)
    append_to_board(step(run_dir, 10), {"ppl": 20.0})
    writer.write("train", 11, {"loss": 1.0})
    writer.close()
    live.Reload()
    assert [e.step for e in live.Scalars("train/loss")] == list(range(1, 12))


def test_evaluations_at_the_same_time(run_dir: Path) -> None:
    with ThreadPoolExecutor(1) as pool:  # threads share a record lock: this one shows the order of processes
        done = pool.map(lambda n: append_to_board(step(run_dir, 10), {f"tag{n}": float(n)}), range(4))
        (board,) = set(done)
    assert scalars(board) == {f"tag{n}": [(10, float(n))] for n in range(4)}


def test_what_has_no_board(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert append_to_board(str(tmp_path / "hf"), {"ppl": 1.0}) is None
    assert append_to_board(str(tmp_path / "none"), {"ppl": 1.0}) is None
    assert append_to_board(step(run_dir, 5), {}) is None
    monkeypatch.setenv("RANK", "1")
    assert append_to_board(step(run_dir, 5), {"ppl": 1.0}) is None, "rank 0 writes"
    monkeypatch.delenv("RANK")
    (run_dir / "tensorboard").rename(run_dir / "elsewhere")
    assert append_to_board(step(run_dir, 5), {"ppl": 1.0}) is None
    assert not (run_dir / "tensorboard").exists()


def test_a_linked_checkpoint_belongs_to_its_run(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "best").symlink_to(step(run_dir, 5))
    assert append_to_board(str(tmp_path / "best"), {"ppl": 1.0}) == run_dir / "tensorboard" / "evaluation"


def test_what_cannot_be_written_costs_a_warning(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_tokedit import log

    log.configure()
    (run_dir / "tensorboard" / "evaluation").write_text("in the way")
    assert append_to_board(step(run_dir, 5), {"ppl": 1.0}) is None
    assert "could not be entered into TensorBoard" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_of_another_user(run_dir: Path) -> None:
    (run_dir / "tensorboard").chmod(0o555)
    assert append_to_board(step(run_dir, 5), {"ppl": 1.0}) is None
    (run_dir / "tensorboard").chmod(0o755)
