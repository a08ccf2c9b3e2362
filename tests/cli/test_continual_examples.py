"""The continual recipes in examples/ run as they are shipped, but for folders and length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
