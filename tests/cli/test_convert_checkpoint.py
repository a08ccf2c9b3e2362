"""``tools/convert_checkpoint.py`` as a process: help, exit codes, dry run, overwriting, being killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import Forked, run_forked

from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.testing.ranks import RankPool

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "conversion"))
import conversion_cases  # noqa: E402

TOOL = str(ROOT / "tools" / "convert_checkpoint.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | variables,
        timeout=200,
        check=False,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conversion_cases.write_published(tmp_path_factory.mktemp("hf") / "source", "llama-tied")


def test_usage() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    assert max(map(len, shown.stdout.splitlines())) <= 110
    for flag in ("--from {hf,megatron}", "--target-tensor-model-parallel-size", "--check", "--overwrite"):
        assert flag in shown.stdout
    assert run("--input", "x").returncode == 2
    shown = run("--input", "x", "--output", "y", WORLD_SIZE="2")
    assert shown.returncode == 1
    assert shown.stderr == ("error: a conversion is the work of one process; start it without torchrun\n")


def test_a_run_and_another_over_it(ranks: RankPool, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "made"
    common = ("--input", source, "--output", output)
    calls = [
        (*common, "--dry-run"),
        ("--from", "hf", "--to", "megatron", *common, "--quiet"),
        common,
        (*common, "--overwrite", "--check", "--check-tokens", 200),
        (*common, "--overwrite", "--check", "--check-tokens", 200, "--check-context", 32),
        (*common, "--overwrite", "--check", "--check-context", 1),
    ]
    (results,) = ranks.run(conversion_cases.convert_all, calls, world_size=1)
    assert [code for code, _ in results] == [0, 0, 1, 0, 0, 1], results
    dry, quiet, again, over, short, none = (shown for _, shown in results)
    assert "llama, 4 layers x 32, 301 ids -> megatron" in dry
    assert "wrote" not in dry
    assert quiet == ""
    assert "exists; give another folder, or --overwrite to replace it" in again
    assert "check: 199 tokens in float32, in windows of 64:" in over  # the model has no more positions
    assert "check: 199 tokens in float32, in windows of 32:" in short
    assert "GB/s; peak memory" in over.splitlines()[-1]
    assert "--check-context: 1, expected 2 tokens or more" in none
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_memory_does_not_grow_with_the_model(source: Path, tmp_path: Path) -> None:
    """0.2 GB of weights, none larger than 3 MB."""
    large = conversion_cases.write_published(
        tmp_path / "large",
        "llama",
        num_hidden_layers=16,
        hidden_size=512,
        intermediate_size=1408,
        max_position_embeddings=64,
    )
    for origin, target in ((large, tmp_path / "made"), (tmp_path / "made", tmp_path / "back")):
        shown = run("--input", origin, "--output", target)
        assert shown.returncode == 0, shown.stderr
        found = re.search(r"([\d.]+) GB in .* peak memory ([\d.]+) GB, ([\d.]+) GB of it", shown.stderr)
        assert found is not None, shown.stderr
        size, peak, before = map(float, found.groups())
        assert size > 0.18
        assert peak - before < 0.08


def test_a_killed_run_leaves_nothing_that_looks_whole(source: Path, tmp_path: Path) -> None:
    output, partial = tmp_path / "made", tmp_path / "made.partial"
    process = Forked([TOOL, "--input", source, "--output", output], ENVIRONMENT)
    deadline = time.monotonic() + 100
    while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    assert partial.exists()
    shown = run_forked([TOOL, "--input", source, "--output", output], ENVIRONMENT)
    assert shown.returncode == 0, shown.stderr
    assert checkpoint_folder.is_complete(output / "checkpoints" / "step_00000000")
    assert not partial.exists()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    """And says what the same command does: it starts anew."""
    large = conversion_cases.write_published(
        tmp_path / "large", "llama", num_hidden_layers=16, hidden_size=512, intermediate_size=1408
    )
    output, partial = tmp_path / "made", tmp_path / "made.partial"
    process = Forked([TOOL, "--input", large, "--output", output], ENVIRONMENT)
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        if list(partial.glob("checkpoints/*/*.distcp")):
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    shown = process.communicate(timeout=60)[1]
    assert process.returncode == 130, shown
    assert "error: interrupted; what was written is removed, and the same command starts anew" in shown
    assert "go on from here" not in shown
    assert "Traceback" not in shown
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
