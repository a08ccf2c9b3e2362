"""The paper's continual pre-training at toy size, from a published folder to others that load."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "paper"))

import study  # noqa: E402 - scripts, not a package
import toy  # noqa: E402


def documents(path: Path, count: int) -> Path:
    lines = (
        json.dumps({"text": f"Case {i}: the dose was {i % 7} units, and the patient of ward {i % 5} rested."})
        for i in range(count)
    )
    path.write_text("".join(line + "\n" for line in lines))
    return path


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "paper" / name), *map(str, arguments)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=290,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )


def check(name: str, domains: tuple[str, ...], out: Path, *arguments: object) -> str:
    command = [name, "--smoke", "--output-dir", out, *arguments]
    done = run_script(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    rows = [line for line in (out / "report.md").read_text().splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows if row[2:].split(" ")[0] in domains] == [
        f"| {domain}" for domain in domains * 2
    ]
    for domain in domains:
        results = json.loads((out / domain / "perplexity.json").read_text())["checkpoints"]
        original, base, edited = (result["domains"][0]["perplexity"] for result in results)
        assert max(original, edited) < base, "going on with a domain's text pays on that domain"
        stats = json.loads((out / domain / "edited_text_document.stats.json").read_text())["edit"]
        assert 0 < stats["changed"] < stats["eligible"]
    assert "$ " not in run_script(*command).stdout, "nothing is run a second time"
    return done.stdout


@pytest.mark.stress
@pytest.mark.timeout(900)
def test_llama_on_a_domain_of_ones_own(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = Path(toy.write_stand_ins(tmp_path, ["biomed"], 50_000)["biomed"])
    count = len(made.read_bytes().splitlines())
    text = tmp_path / "biomed.jsonl.gz"
    text.write_bytes(gzip.compress(made.read_bytes()))
    out = tmp_path / "out"
    printed = check("llama3_8b.py", ("biomed",), out, "--biomed", text, "--toy-steps", 60)
    assert "parallel.tensor_model_parallel_size" not in printed, "the layout is that of the file"
    folder = out / "hf" / "biomed-edited"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    text = tokenizer.decode(
        model.generate(**tokenizer("The value of", return_tensors="pt"), max_new_tokens=4)[0]
    )
    assert "The value of" in text
    train, heldout = (
        (out / "biomed" / f"{part}.jsonl").read_text().splitlines() for part in ("train", "heldout")
    )
    assert len(train) + len(heldout) == count
    assert not set(train) & set(heldout)


@pytest.mark.stress
def test_olmo_on_all_domains(tmp_path: Path) -> None:
    check("olmo_1b.py", ("biomed", "finance", "math"), tmp_path / "out")


def test_what_is_held_out_depends_on_the_text_alone(tmp_path: Path) -> None:
    whole = documents(tmp_path / "a.jsonl", 500)
    study.hold_out(tmp_path / "one", [whole], 10_000_000)
    first, second = tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    lines = whole.read_text().splitlines(keepends=True)
    first.write_text("".join(lines[:200]))
    second.write_text("".join(lines[200:]))
    counts = study.hold_out(tmp_path / "two", [first, second], 10_000_000)
    assert counts["train"]["documents"] + counts["heldout"]["documents"] == 500
    for part in ("train", "heldout"):
        assert (tmp_path / "one" / f"{part}.jsonl").read_text() == (
            tmp_path / "two" / f"{part}.jsonl"
        ).read_text()
    assert 25 <= counts["heldout"]["documents"] <= 85


def test_faults_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"body": "no text key"}\n')
    with pytest.raises(SystemExit, match=r"bad\.jsonl:2: expected a JSON object with a 'text' key"):
        study.hold_out(tmp_path / "out", [bad], 100)
    with pytest.raises(SystemExit, match="too few documents"):
        study.hold_out(tmp_path / "out", [documents(tmp_path / "few.jsonl", 1)], 100)
    nothing = run_script("olmo_1b.py")
    assert nothing.returncode == 2
    assert "give --model and at least one of --biomed, --finance, --math; or --smoke" in nothing.stderr
    missing = run_script("olmo_1b.py", "--model", tmp_path, "--math", tmp_path / "none.jsonl")
    assert "no such file or folder: " in missing.stderr
