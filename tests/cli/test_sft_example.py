"""examples/tiny_sft_cpu.yaml as it is shipped, but for folders: dry runs, the run, and how far it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tokedit.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]


def train(config: str, *arguments: str, code: int = 0) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "tools/train.py", "--config", config, *arguments],
        cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a base model of two steps."""
    path = tmp_path_factory.mktemp("sft")
    prefixes = [
        f"data.{split}.0.prefix={path}/base/{name}_text_document"
        for split, name in (("train", "corpus"), ("validation", "heldout"))
    ]
    short = ("training.train_steps=2", "schedule.lr_warmup_steps=1", "data.validation=[]")
    train("examples/tiny_cpu.yaml", f"run_dir={path}/base", prefixes[0], *short)
    return path


def perplexity_of(folder: Path) -> float:
    """Of the run on its held-out conversations, as ``tools/evaluate.py`` has it."""
    from megatron_tokedit.cli.evaluate import main

    output = folder / "perplexity.json"
    data = f"heldout={folder}/heldout_sft_document"
    arguments = ["--checkpoint", str(folder / "run"), "--data", data, "--output", str(output)]
    assert main(["perplexity", "--quiet", "--no-board", *arguments]) == 0
    return json.loads(output.read_text())["checkpoints"][0]["domains"][0]["perplexity"]


def test_the_example_from_raw_conversations_to_a_checkpoint(folder: Path) -> None:
    example = [
        "examples/tiny_sft_cpu.yaml", f"run_dir={folder}/run", f"init_from.checkpoint={folder}/base",
        f"data.train.0.prefix={folder}/chats_sft_document",
        f"data.validation.0.prefix={folder}/heldout_sft_document", "training.train_epochs=1",
    ]  # fmt: skip
    said = train(*example, "--dry-run")
    assert "to be made first: chats" in said
    assert "no problems found" in said
    train(*example, "runtime.exit_at_step=3")
    said = train(*example, "--dry-run")
    rows = len(read_metrics(folder / "run", "train"))
    assert rows == 3
    assert "chats             240" in said
    assert "the epochs come to 32 rows = 8 steps of up to 4 rows" in said
    assert "chat template: tulu" in said
    assert "step 3 of 8" in train(*example, "--progress")
    train(*example)
    steps = read_metrics(folder / "run", "train")
    assert len(steps) == 8
    assert sum(step["response_tokens"] for step in steps) == 6107
    state = json.loads((folder / "run/checkpoints/step_00000008/state.json").read_text())
    assert "message['role']" in state["chat_template"]
    validation = read_metrics(folder / "run", "validation")[-1]["heldout"]
    assert perplexity_of(folder) == pytest.approx(validation["perplexity"], rel=1e-4)
    short = train(*example, f"run_dir={folder}/short", "model.seq_length=64", "--dry-run", code=1)
    assert "119 of 240 conversations have more than model.seq_length + 1 = 65 tokens" in short
    assert "data.validation.0 (heldout)" in short, "all faults are told together"
