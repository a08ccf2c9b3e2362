"""kill -9 anywhere, the same command again: the same bytes, and finished units are left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pipeline_cases import TOKENIZER, VOCAB_SIZE, editing, output_bytes, settings, write_corpus

from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.pipeline import run
from megatron_tokedit.testing.models import write_hf_llama

TOOL = str(Path(__file__).resolve().parents[2] / "tools" / "preprocess_edit.py")


def start(folder, name, *flags):
    command = [
        sys.executable,
        TOOL,
        "--input",
        str(folder / "corpus.jsonl"),
        "--output-prefix",
        str(folder / name),
    ]
    command += [
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        TOKENIZER,
        "--append-eod",
        *flags,
    ]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(folder, name, *flags):
    process = start(folder, name, *flags)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()


def kill_when(process, condition):
    while not condition() and process.poll() is None:
        time.sleep(0.002)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def markers(folder, name):
    return sorted((folder / f"{name}.work").glob("units/*/*.json"))


def crash_loop(folder, name, points, *flags):
    """Kill at each point (number of finished units), then run to the end; returns how often it was killed."""
    kills = 0
    for point in points:
        before = {path: path.stat().st_mtime_ns for path in markers(folder, name)}
        process = start(folder, name, *flags)
        kills += kill_when(process, lambda: len(markers(folder, name)) >= point)  # noqa: B023
        now = {path: path.stat().st_mtime_ns for path in markers(folder, name)}
        assert before.items() <= now.items() or not now  # finished units are left alone, or all are merged
    finish(folder, name, *flags)
    return kills


NONE = ("--edit-strategy", "none", "--unit-documents", "1")


def test_killed_at_several_points_gives_the_same_bytes(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", num_documents=60)
    finish(tmp_path, "whole", *NONE)
    assert crash_loop(tmp_path, "out", (0, 3, 30, 59, 60), *NONE) >= 3
    assert output_bytes(tmp_path, "out") == output_bytes(tmp_path, "whole")
    assert not list(tmp_path.rglob("out.work/**/*.tmp"))


def test_killed_while_editing_with_workers(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", num_documents=60)
    changes = editing(write_hf_llama(tmp_path / "prior", vocab_size=VOCAB_SIZE), unit_documents=4)
    run(preprocess_config(settings(tmp_path, "whole", **changes)))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()]
    process = start(tmp_path, "out", *flags, "--workers", "2")
    assert kill_when(process, lambda: len(markers(tmp_path, "out")) >= 2)
    assert len(markers(tmp_path, "out")) < 15
    run(
        preprocess_config(settings(tmp_path, "out", **changes))
    )  # with one worker: that is not part of the plan
    suffixes = (".bin", ".idx", ".edits", ".manifest.json")
    assert output_bytes(tmp_path, "out", suffixes=suffixes) == output_bytes(
        tmp_path, "whole", suffixes=suffixes
    )


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_killed_at_random_times(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", num_documents=400)
    finish(tmp_path, "whole", *NONE)
    rng = random.Random(0)
    for trial in range(40):
        name = f"out{trial}"
        for _ in range(5):
            process = start(tmp_path, name, *NONE)
            deadline = time.monotonic() + rng.uniform(0.0, 1.5)
            kill_when(process, lambda: time.monotonic() > deadline)  # noqa: B023
        finish(tmp_path, name, *NONE)
        assert output_bytes(tmp_path, name) == output_bytes(tmp_path, "whole")
