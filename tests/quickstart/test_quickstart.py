"""The quickstart runs from end to end at toy size, and skips what is done when it runs again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))

import collect  # noqa: E402 - the quickstart is a script, not a package

TOPICS = ("rivers", "hills", "bridges", "harbours")


def user_text(path: Path, num_documents: int) -> Path:
    """A jsonl file of a user: varied sentences in two domains."""
    with path.open("w") as file:
        for i in range(num_documents):
            sentences = (
                f"Note {i}.{j}: the {TOPICS[(i * j + j) % 4]} of region {i * 7919 % 1000} were surveyed {j} "
                f"times; survey {i * 31 + j} of {TOPICS[(i + j) % 4]} found {(i * j) % 97} in good order."
                for j in range(1, 9)
            )
            file.write(json.dumps({"text": "\n".join(sentences), "domain": ("north", "south")[i % 2]}) + "\n")
    return path


def run_quickstart(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart" / "run.py"), *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=280,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )


def test_end_to_end_on_user_text_and_again(tmp_path: Path) -> None:
    arguments = ["--smoke", "--output-dir", str(tmp_path / "out")]
    arguments += ["--input", str(user_text(tmp_path / "my.jsonl", 160))]
    done = run_quickstart(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    stats = "edited/edited_text_document.stats.json"
    for name in ("report.txt", "loss_curves.png", "perplexity.json", stats):
        assert (out / name).stat().st_size > 0
    table = json.loads((out / "perplexity.json").read_text())["table"]
    assert [row["domain"] for row in table] == [*sorted({"north", "south"}, key=done.stdout.index), "average"]
    assert "What the models learned" in done.stdout
    assert "UserWarning" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout

    again = run_quickstart(*arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "$ " not in again.stdout, "nothing is run a second time"


def test_collected_text_is_real_deduplicated_and_split(tmp_path: Path) -> None:
    collector = collect.Deduplicator()
    text = "The quick brown fox jumps over the lazy dog.\nIt does so every single day of the year."
    assert collector.is_new(text)
    assert not collector.is_new(text)
    assert not collector.is_new(text + "\nShort.")
    assert collector.is_new("Another text altogether, whose lines were never seen before by anyone.")
    parts = [collect.part_of(f"document {i}") for i in range(4000)]
    shares = [parts.count(part) / len(parts) for part in collect.PARTS]
    assert shares == pytest.approx([0.45, 0.45, 0.10], abs=0.03)
    assert len(list(collect.texts_of_domain("reference"))) > 50


def test_bad_user_text_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"body": "no text key"}\n')
    with pytest.raises(SystemExit, match=r"bad\.jsonl:2: expected a JSON object with a 'text' key"):
        list(collect.read_user_text(bad))
    with pytest.raises(SystemExit, match="too little text"):
        collect.collect(tmp_path / "corpus", user_text(tmp_path / "few.jsonl", 2), 0)
