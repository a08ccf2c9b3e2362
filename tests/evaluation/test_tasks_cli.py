"""``tools/evaluate.py tasks``: what it shows and writes, over processes, killed, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forks import Forked

from megatron_tokedit.cli.evaluate import main
from megatron_tokedit.testing.ranks import RankPool

pytest.importorskip("lm_eval")
sys.path.append(str(Path(__file__).resolve().parent))
import task_cases

sys.path.append(str(task_cases.ROOT / "tests" / "conversion"))
import conversion_cases

TOOL = str(task_cases.ROOT / "tools" / "evaluate.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def folder(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``hf`` and ``megatron``, the same model; ``tasks``."""
    folder = tmp_path_factory.mktemp("models")
    task_cases.write_tasks(folder / "tasks")
    source = conversion_cases.write_published(folder / "hf", "llama")
    calls = [("--input", source, "--output", folder / "megatron")]
    (((code, shown),),) = ranks.run(conversion_cases.convert_all, calls, world_size=1)
    assert code == 0, shown
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict[str, Any]]:
    """The table of the checkpoint, by one process."""
    output = folder / "alone.json"
    command = ("--checkpoint", folder / "megatron", "--tasks", folder / "tasks", "--output", output)
    assert evaluate(*command) == 0
    table: list[dict[str, Any]] = json.loads(output.read_bytes())["table"]
    assert len(table) == 5
    return table


def evaluate(*arguments: object) -> int:
    return main(["tasks", *map(str, arguments), "--device", "cpu"])


def test_two_models_side_by_side(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, samples = tmp_path / "out" / "scores.json", tmp_path / "samples"
    (folder / "megatron" / "tensorboard").mkdir()
    code = evaluate(
        *("--checkpoint", folder / "megatron", folder / "hf"),
        *("--tasks", f"{folder}/tasks/choices.yaml,{folder}/tasks/texts.yaml"),
        *("--output", output, "--log-samples", samples, "--limit", 4),
    )
    shown = capsys.readouterr()
    assert code == 0, shown.err
    head, *rows, legend = shown.out.splitlines()
    assert head.split() == ["task", "metric", "documents", "megatron", "hf"]
    assert [row.split()[:3] for row in rows] == [
        ["local_choices", "acc", "4"],
        ["local_choices", "acc_norm", "4"],
        ["local_texts", "word_perplexity", "4"],
        ["local_texts", "bits_per_byte", "4"],
    ]
    assert legend == "value +- standard error; *: best of its row"
    record = json.loads(output.read_bytes())
    ours, theirs = record["checkpoints"]
    assert [ours["backend"], theirs["backend"]] == ["megatron", "hf"]
    assert ours["fingerprint"] != theirs["fingerprint"]
    for task, other in zip(ours["tasks"], theirs["tasks"], strict=True):
        assert task["config_sha256"] == other["config_sha256"]
        assert (task["version"], task["num_fewshot"], task["num_documents"]) == ("1.0", 0, 4)
        for score, expected in zip(task["scores"], other["scores"], strict=True):
            assert score["value"] == pytest.approx(expected["value"], rel=1e-4)
    assert record["settings"]["limit"] == 4
    assert record["versions"]["lm_eval"]
    assert record["configs"]["local_choices"]["output_type"] == "multiple_choice"
    assert len(record["table"]) == 4
    assert not list(tmp_path.glob("out/*.partial"))
    for name in ("megatron", "hf"):
        lines = (samples / name / "local_choices.jsonl").read_text().splitlines()
        assert [json.loads(line)["doc_id"] for line in lines] == [0, 1, 2, 3]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "megatron" / "tensorboard" / "evaluation")).Reload()
    (event,) = board.Scalars("evaluation/tasks/local_choices/acc")
    assert event.value == pytest.approx(ours["tasks"][0]["scores"][0]["value"])


def test_a_run_by_its_configuration(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(task_cases.ROOT)
    config = ("--config", "examples/tiny_cpu.yaml", f"run_dir={folder}/megatron")
    choices = ("--tasks", folder / "tasks" / "choices.yaml", "--limit", 2)
    assert evaluate(*config, *choices, "--num-fewshot", 1) == 0, capsys.readouterr().err
    assert "step_00000000" in capsys.readouterr().out.splitlines()[0]
    (written,) = (folder / "megatron" / "evaluation").iterdir()
    assert written.name == "tasks_step_0.json"
    (checkpoint,) = json.loads(written.read_bytes())["checkpoints"]
    assert Path(checkpoint["checkpoint"]) == folder / "megatron" / "checkpoints" / "step_00000000"
    assert checkpoint["tasks"][0]["num_fewshot"] == 1
    assert evaluate(*config[:2], f"run_dir={tmp_path}/none", *choices) == 1
    assert f"{tmp_path}/none/checkpoints" in capsys.readouterr().err


def test_lm_evals_own_model_beside(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate")
    tasks = task_cases.write_tasks(tmp_path / "tasks", task_cases.CHOICES_FOR_HF)
    for backend in ("project", "lm-eval"):
        command = ("--checkpoint", folder / "hf", "--tasks", tasks, "--output", tmp_path / f"{backend}.json")
        assert evaluate(*command, "--backend", backend) == 0, capsys.readouterr().err
    ours, theirs = (json.loads((tmp_path / f"{b}.json").read_bytes()) for b in ("project", "lm-eval"))
    assert [record["checkpoints"][0]["backend"] for record in (ours, theirs)] == ["hf", "lm-eval"]
    assert len(theirs["table"]) == 5
    for row, other in zip(ours["table"], theirs["table"], strict=True):
        assert (row["task"], row["metric"]) == (other["task"], other["metric"])
        assert row["value"] == pytest.approx(other["value"], rel=1e-5)
        for error, expected in zip(row["stderr"], other["stderr"], strict=True):
            assert error == (None if expected is None else pytest.approx(expected, rel=1e-4))
    for changes, message in (
        (("--checkpoint", folder / "megatron"), "megatron is no Hugging Face folder"),
        (("--checkpoint", folder / "hf", "--dtype", "fp8"), "dtype fp8, expected float32 or bfloat16"),
        (("--checkpoint", folder / "hf", "--tokenizer-model", "x"), "takes the folder's own tokenizer"),
    ):
        assert evaluate(*changes, "--tasks", tasks, "--backend", "lm-eval") == 1
        assert message in capsys.readouterr().err


def test_a_killed_evaluation_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores.json"
    arguments = ("--checkpoint", folder / "hf", "--tasks", folder / "tasks", "--output", output)
    more = ("--batch-tokens", 8)  # eight pairs at a time
    process = Forked([TOOL, "tasks", *arguments, *more], ENVIRONMENT)
    partial, deadline = Path(f"{output}.partial"), time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        if any(path.stat().st_size for path in partial.glob("*.jsonl")):
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    assert any(partial.iterdir())
    assert evaluate(*arguments) == 0
    assert "answers are known from before" in capsys.readouterr().err
    assert output.exists()
    assert not partial.exists()


@pytest.mark.parametrize(
    "more", [(), pytest.param(("--tensor-parallel", 2), marks=pytest.mark.stress)], ids=["data", "tensor"]
)
def test_two_processes(
    folder: Path, tmp_path: Path, alone: list[dict[str, Any]], more: tuple[object, ...]
) -> None:
    output = tmp_path / "two.json"
    arguments = ("--checkpoint", folder / "megatron", "--tasks", folder / "tasks", *more, "--output", output)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    shown = subprocess.run(
        [sys.executable, *launcher, TOOL, "tasks", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=200,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("local_starts") == 1
    for row, other in zip(alone, json.loads(output.read_bytes())["table"], strict=True):
        assert other["task"] == row["task"]
        assert other["value"] == pytest.approx(row["value"], rel=1e-4)


def test_one_message_and_no_traceback(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, message in (
        (
            ("--checkpoint", folder / "hf", "--tasks", tmp_path / "no.yaml"),
            f"error: --tasks {tmp_path / 'no.yaml'}: no such file or folder\n",
        ),
        (
            ("--checkpoint", folder / "megatron", "--tasks", folder / "tasks", "--tensor-parallel", 2),
            "error: --tensor-parallel 2: 1 process(es) were started; start as many as",
        ),
    ):
        assert evaluate(*command) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith(message)
    for wrong in (("--tasks", folder / "tasks"), ("--checkpoint", folder / "hf")):
        with pytest.raises(SystemExit) as usage:
            evaluate(*wrong)
        assert usage.value.code == 2


def test_the_help_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main(["tasks", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "--tensor-parallel" in shown
    assert max(map(len, shown.splitlines())) <= 110
