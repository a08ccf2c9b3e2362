"""The continual recipes in examples/ run as they are shipped, but for folders; their script at toy size."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from forks import run_as_typed

from megatron_tokedit.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]


def train(config: str, *overrides: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "tools/train.py", "--config", config, *overrides],
        cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def in_folder(config: str, folder: Path) -> list[str]:
    """Overrides that put the datasets of a configuration into ``folder``."""
    data = yaml.safe_load((ROOT / config).read_text())["data"]
    return [
        f"data.{split}.{index}.prefix={folder}/data/{Path(source['prefix']).name}"
        for split in ("train", "validation")
        for index, source in enumerate(data[split])
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config = "examples/tiny_cpu.yaml"
    train(config, f"run_dir={folder}/run", *in_folder(config, folder))
    return folder


@pytest.mark.parametrize(
    ("name", "first_lr", "sources"),
    [
        ("rewarm_redecay", 5e-4, {"new"}),
        ("wsd_infinite", 0.0, {"new"}),
        ("replay", 5e-4, {"new", "docs"}),
    ],
)
@pytest.mark.stress
def test_recipe(base: Path, tmp_path: Path, name: str, first_lr: float, sources: set[str]) -> None:
    config = f"examples/continual/{name}.yaml"
    train(config, f"run_dir={tmp_path}/run", f"init_from.checkpoint={base}/run", *in_folder(config, base))
    steps = read_metrics(tmp_path / "run", "train")
    assert len(steps) == 40
    assert steps[0]["lr"] == pytest.approx(first_lr)
    assert steps[0]["loss"] < read_metrics(base / "run", "train")[0]["loss"] - 1
    newest = tmp_path / "run" / "checkpoints" / "step_00000040" / "state.json"
    assert json.loads(newest.read_text())["drawn_samples"].keys() == sources
    if name == "wsd_infinite":
        assert {round(step["lr"], 6) for step in steps[6:30]} == {2e-3}
        assert (tmp_path / "run" / "checkpoints" / "step_00000030").exists()


def text(path: Path, words: str) -> Path:
    """Half a hundred documents, as a plain text file or as jsonl."""
    parts = [
        " ".join(f"{word} {i * 7919 % 1000}" for i in range(j, j + 60) for word in words.split())
        for j in range(0, 3000, 60)
    ]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    else:
        path.write_text("\n\n".join(parts))
    return path


def test_the_script_from_text_to_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its commands are forked; the quickstart starts them."""
    base = text(tmp_path / "base.txt", "the old house of")
    new = text(tmp_path / "new.jsonl", "doses are given")
    script = str(ROOT / "examples" / "continual" / "run.py")
    arguments = ["--base", f"rooms={base}", "--new", f"drugs={new}"]
    arguments += ["--replay", "0.3", "--ranks", "1", "--smoke", "--output-dir", str(tmp_path / "out")]
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr("stages.subprocess", SimpleNamespace(run=run_as_typed))
    monkeypatch.setattr("sys.argv", [script, *arguments])
    monkeypatch.chdir(ROOT)
    runpy.run_path(script, run_name="__main__")
    assert "6-evaluate" in capsys.readouterr().out
    rows = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows[4:]] == ["| base", "| no-replay", "| replay-30"]
    assert (tmp_path / "out" / "forgetting.png").stat().st_size > 10_000
    steps = read_metrics(tmp_path / "out" / "replay-30", "train")
    assert len(steps) == 4
    again = subprocess.run([sys.executable, script, *arguments], text=True, capture_output=True, timeout=250)
    assert again.returncode == 0, again.stderr
    assert "6-evaluate: done" in again.stdout
    assert "$ " not in again.stdout, "nothing is run a second time"
