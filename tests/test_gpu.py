"""What only a GPU can show: `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.gpu
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_every_check_that_this_gpu_can_do_passes(tmp_path: Path) -> None:
    """Docs/gpu_check.md says what they prove; what the machine lacks is skipped there."""
    output = tmp_path / "checks.json"
    done = subprocess.run(
        [sys.executable, "tools/gpu_check.py", "--output", str(output)],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = {check["name"]: check["status"] for check in json.loads(output.read_text())["checks"]}
    assert results["train_bf16"] == "passed"
