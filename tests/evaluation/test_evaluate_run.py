"""``tools/evaluate.py perplexity --config``: a run's newest checkpoint on its own validation sources."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from forks import run_forked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_tokedit.cli.evaluate import main

ROOT = Path(__file__).resolve().parents[2]
TINY = "examples/tiny_cpu.yaml"


@pytest.fixture(autouse=True)
def _project_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run_of(folder: Path) -> list[str]:
    """The shipped example, with everything it writes in ``folder``; its sources have no prefix."""
    places = [f"run_dir={folder}/run", f"data.prepared_dir={folder}/prepared"]
    return [TINY, *places, "data.train.0.prefix=null", "data.validation.0.prefix=null"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of two steps, with a checkpoint of each."""
    config, *overrides = run_of(tmp_path_factory.mktemp("trained"))
    short = ("training.train_steps=2", "schedule.lr_warmup_steps=1", "checkpoint.save_interval_steps=1")
    overrides += [*short, "training.eval_steps=1"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = run_forked(["tools/train.py", "--config", config, *overrides], environment)
    assert done.returncode == 0, done.stderr
    return [config, *overrides]


def test_newest_checkpoint_on_all_validation_sources(
    trained: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_dir = Path(trained[1].removeprefix("run_dir="))
    assert main(["perplexity", "--quiet", "--config", *trained]) == 0, capsys.readouterr().err
    table = capsys.readouterr().out
    assert "step_00000002" in table
    assert [line.split()[0] for line in table.splitlines()[:2]] == ["domain", "heldout"]
    (written,) = (run_dir / "evaluation").iterdir()
    assert written.name == "perplexity_step_2.json"
    result = json.loads(written.read_text())
    (heldout,) = result["checkpoints"][0]["domains"]
    assert heldout["num_bytes"] > heldout["num_words"] > 0
    low, high = heldout["intervals"]["perplexity"]
    assert low < heldout["perplexity"] < high
    board = EventAccumulator(str(run_dir / "tensorboard" / "evaluation")).Reload()
    (event,) = board.Scalars("evaluation/perplexity/heldout")
    assert (event.step, event.value) == (2, pytest.approx(heldout["perplexity"]))
    assert [e.value for e in board.Scalars("evaluation/bits_per_byte/average")] == [
        pytest.approx(heldout["bits_per_byte"])
    ]
    assert [Path(column["checkpoint"]).name for column in result["checkpoints"]] == ["step_00000002"]

    prefix = next((run_dir.parent / "prepared").glob("*/*.idx")).with_suffix("")
    output = tmp_path / "others.json"
    others = [str(run_dir / "checkpoints" / f"step_0000000{step}") for step in (1, 2)]
    more = ["--checkpoint", *others, "--data", f"more={prefix}", "--output", str(output), "--no-board"]
    more += ["--plot", str(tmp_path / "plots" / "compared.png"), "--baseline", "step_00000002"]
    assert main(["perplexity", "--quiet", "--config", *trained, *more]) == 0
    compared = json.loads(output.read_text())
    assert [row["domain"] for row in compared["table"]] == ["heldout", "more", "average"]
    assert len(compared["checkpoints"]) == 2
    assert compared["checkpoints"][1]["domains"][0] == result["checkpoints"][0]["domains"][0]
    assert [path.name for path in (run_dir / "evaluation").iterdir()] == ["perplexity_step_2.json"]
    assert "against step_00000002" in capsys.readouterr().out
    assert (tmp_path / "plots" / "compared.png").stat().st_size > 1000
    board.Reload()
    assert len(board.Scalars("evaluation/perplexity/heldout")) == 1, "--no-board"


def test_faults(trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        ([*trained, "data.validation=[]"], "data.validation: is empty"),
        ([*trained, f"run_dir={tmp_path}/none"], f"{tmp_path}/none/checkpoints: does not exist"),
        (
            run_of(tmp_path),
            f"data.validation.0 (heldout): no dataset in {tmp_path}/prepared, for this `input` and `edit`",
        ),
        (
            [*trained, f"data.validation.0.prefix={tmp_path}/v_text_document"],
            f"data.validation.0 (heldout): no dataset {tmp_path}/v_text_document",
        ),
        ([*trained, "data.validation.0.nam=x"], "data.validation.0.nam: unknown key"),
        ([*trained, "--data", "heldout=x"], "--data: the name 'heldout' is given twice"),
    ):
        assert main(["perplexity", "--config", *arguments]) == 1
        shown = capsys.readouterr().err
        assert expected in shown
        assert "Traceback" not in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["--checkpoint", "x"], ["--data", "a=b"], ["--config"]])
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["perplexity", *arguments])
    assert end.value.code == 2
