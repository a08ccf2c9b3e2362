"""``tools/evaluate.py tasks`` as a process, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_tokedit.testing.ranks import RankPool

pytest.importorskip("lm_eval")
sys.path.append(str(Path(__file__).resolve().parent))
import task_cases

sys.path.append(str(task_cases.ROOT / "tests" / "conversion"))
import conversion_cases

TOOL = str(task_cases.ROOT / "tools" / "evaluate.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(
    *arguments: object, launcher: tuple[str, ...] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, TOOL, "tasks", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | variables,
        timeout=200,
        check=False,
    )


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


def test_two_models_side_by_side(folder: Path, tmp_path: Path) -> None:
    output, samples = tmp_path / "out" / "scores.json", tmp_path / "samples"
    (folder / "megatron" / "tensorboard").mkdir()
    shown = run(
        *("--checkpoint", folder / "megatron", folder / "hf"),
        *("--tasks", f"{folder}/tasks/choices.yaml,{folder}/tasks/texts.yaml"),
        *("--output", output, "--log-samples", samples, "--limit", 4),
    )
    assert shown.returncode == 0, shown.stderr
    head, *rows, legend = shown.stdout.splitlines()
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


def test_a_killed_evaluation_goes_on(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    arguments = ("--checkpoint", folder / "hf", "--tasks", folder / "tasks", "--output", output)
    more = ("--batch-tokens", 8)  # eight pairs at a time
    command = [sys.executable, TOOL, "tasks", *map(str, (*arguments, *more))]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    partial, deadline = Path(f"{output}.partial"), time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        if any(path.stat().st_size for path in partial.glob("*.jsonl")):
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    assert any(partial.iterdir())
    shown = run(*arguments)
    assert shown.returncode == 0, shown.stderr
    assert "answers are known from before" in shown.stderr
    assert output.exists()
    assert not partial.exists()


@pytest.mark.parametrize("more", [("--tensor-parallel", 2), ()], ids=["tensor", "data"])
def test_two_processes(folder: Path, tmp_path: Path, more: tuple[object, ...]) -> None:
    arguments = ("--checkpoint", folder / "megatron", "--tasks", folder / "tasks")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    shown = run(*arguments, *more, "--output", tmp_path / "two.json", launcher=launcher)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("local_starts") == 1
    alone = run(*arguments, "--output", tmp_path / "one.json")
    assert alone.returncode == 0, alone.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_bytes())["table"] for name in ("one", "two"))
    for row, other in zip(one, two, strict=True):
        assert other["task"] == row["task"]
        assert other["value"] == pytest.approx(row["value"], rel=1e-4)
    assert len(one) == 5


def test_one_message_and_no_traceback(folder: Path, tmp_path: Path) -> None:
    shown = run("--checkpoint", folder / "hf", "--tasks", tmp_path / "no.yaml")
    assert (shown.returncode, shown.stdout) == (1, "")
    assert shown.stderr == f"error: --tasks {tmp_path / 'no.yaml'}: no such file or folder\n"
    shown = run("--checkpoint", folder / "megatron", "--tasks", folder / "tasks", "--tensor-parallel", 2)
    assert shown.returncode == 1
    assert shown.stderr.startswith("error: --tensor-parallel 2: 1 process(es) were started; start as many as")
    assert run("--tasks", folder / "tasks").returncode == 2
    shown = run("--checkpoint", folder / "hf")
    assert shown.returncode == 2
    shown = run("--help")
    assert shown.returncode == 0
    assert max(map(len, shown.stdout.splitlines())) <= 110
