"""``examples/sft/run.py``: original against edited responses, from conversations to a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "examples/sft/run.py", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        timeout=900,
        check=False,
    )


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_from_conversations_to_a_table(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--smoke", "--output-dir", out, "--threshold", 0.001)
    arguments += ("--instructions", "docs=examples/tiny_cpu/chats.jsonl")
    done = run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "docs.json").read_text())
    base, original, edited = results["table"][0]["perplexity"]
    assert original < base, "fine-tuning pays"
    assert edited > original, "a prior that knows nothing drew nearly all responses again"
    statistics = json.loads((out / "data" / "docs" / "edited_sft_document.stats.json").read_text())
    assert statistics["edit"]["changed"] > 0
    assert (out / "responses.png").read_bytes().startswith(b"\x89PNG")
    assert f"| {base:.3f} | {original:.3f} | {edited:.3f} |" in (out / "report.md").read_text()
    assert "$ " not in run(*arguments).stdout, "nothing is run a second time"


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    mine = tmp_path / "text" / "mine.txt"
    mine.write_text("precious")
    done = run("--instructions", "docs=examples/tiny_cpu/chats.jsonl", "--output-dir", tmp_path)
    assert done.returncode == 1
    assert f"{tmp_path}/text: there already, and not made by this script" in done.stderr
    assert mine.read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--instructions", "a=nowhere.jsonl"), "no such file: "),
        (("--instructions", "a"), "expected NAME=FILE"),
        (("--instructions", "base=x.jsonl"), "base is the name of the base's own text"),
        (("--instructions", "a=x.jsonl", "--keys", "b:prompt=q"), "no instruction set is named b"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
