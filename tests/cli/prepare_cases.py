"""What the tests of ``tools/train.py --prepare`` share: a run with raw text, and ways to start it."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_tokedit.cli.train import main
from megatron_tokedit.testing.models import write_hf_llama

ROOT = Path(__file__).resolve().parents[2]
TINY = "examples/tiny_cpu.yaml"
SUFFIXES = (".bin", ".idx", ".edits")


def clean_environment(**more: str) -> dict[str, str]:
    """Of this process, without a launcher's variables."""
    launcher = ("SLURM", "TOKEDIT", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "TORCHELASTIC")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


class PreparedRun:
    """The shipped example, its sources placed in one folder; with a prior its training text is edited."""

    def __init__(self, folder: Path, prior: Path | None = None) -> None:
        self.folder = folder
        self.arguments = [
            *("--config", TINY, f"run_dir={folder}/run"),
            *(f"data.{split}.0.prefix={folder}/{split}_text_document" for split in ("train", "validation")),
            *("data.train.0.edit.unit_documents=5", "data.train.0.edit.workers=1"),
        ]
        if prior:
            self.arguments += [
                *("data.train.0.edit.edit_strategy=up_revise", f"data.train.0.edit.prior={prior}"),
                *("data.train.0.edit.prior_device=cpu", "data.train.0.edit.prior_threads=1"),
            ]

    def start(
        self,
        *arguments: str,
        script: Sequence[str] = ("tools/train.py",),
        only_prepare: bool = True,
        **environment: str,
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *script, *self.arguments, *["--prepare"] * only_prepare, *arguments],
            cwd=ROOT,
            env=clean_environment(**environment),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def call(self, *arguments: str, code: int = 0) -> str:
        """Run in this process; returns what it said."""
        said = io.StringIO()
        with contextlib.chdir(ROOT), contextlib.redirect_stderr(said):
            assert main([*self.arguments, "--prepare", *arguments]) == code, said.getvalue()
        return said.getvalue()

    def done(self) -> dict[int, int]:
        """Finished work units of the training text -> when their markers were written."""
        markers = self.folder.glob("train.work/units/*/*.json")
        return {int(marker.stem): marker.stat().st_mtime_ns for marker in markers}

    def outputs(self) -> dict[str, bytes]:
        """Every dataset that is there."""
        found = (path for path in self.folder.glob("*_document.*") if path.suffix in SUFFIXES)
        return {path.name: path.read_bytes() for path in found}


def make_prior(folder: Path) -> Path:
    return write_hf_llama(folder / "prior", vocab_size=1024, seed=1)


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for a condition while the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
