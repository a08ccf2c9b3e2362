"""A cluster of small fakes that behave, for the tests of ``tools/submit.py``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_tokedit.cli.submit import main
from megatron_tokedit.config.load import load_config
from megatron_tokedit.config.raw_sources import preprocessing_of
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.pipeline import run
from megatron_tokedit.pipeline.placement import Share

ROOT = Path(__file__).resolve().parents[2]
TINY = "examples/tiny_cpu.yaml"

FAKE_SBATCH = """#!{python} -SE
import json, os, sys
log = os.environ["FAKE_LOG"]
calls = sum(1 for _ in open(log)) if os.path.exists(log) else 0
if any(os.environ.get("FAKE_REFUSES", "never") in word for word in sys.argv):
    sys.exit("sbatch: error: Batch job submission failed: " + os.environ.get("FAKE_REASON", "no such thing"))
with open(log, "a") as file:
    file.write(json.dumps([os.environ.get("SBATCH_PARTITION"), *sys.argv[1:]]) + "\\n")
print(101 + calls)
"""
FAKE_SQUEUE = """#!/bin/bash
echo "squeue $*" >> "$FAKE_LOG.asked"
[[ -z "$FAKE_SQUEUE_ERROR" ]] || { echo "$FAKE_SQUEUE_ERROR" >&2; exit 1; }
echo "$FAKE_QUEUE"
"""
FAKE_SCANCEL = """#!/bin/bash
echo "scancel $*" >> "$FAKE_LOG.asked"
[[ -z "$FAKE_SCANCEL_ERROR" ]] || { echo "$FAKE_SCANCEL_ERROR" >&2; exit 1; }
"""
FAKE_SCONTROL = """#!/bin/bash
echo "SlurmctldHost = here"
echo "MaxArraySize            = ${FAKE_MAX_ARRAY:-1001}"
"""


@dataclass
class Cluster:
    """The fakes, and what they were asked.

    Attributes:
        folder: of the run and its data.
        log: of sbatch's arguments.
        out: what the last command printed.
        err: its errors.
    """

    folder: Path
    log: Path
    capture: pytest.CaptureFixture[str]
    out: str = ""
    err: str = ""

    @property
    def run_dir(self) -> str:
        return f"{self.folder}/run"

    def overrides(self, *more: str) -> list[str]:
        """Of the shipped example, with everything it writes in ``folder``, and more."""
        data = [
            f"data.{split}.0.prefix={self.folder}/data/{name}_text_document"
            for split, name in (("train", "corpus"), ("validation", "heldout"))
        ]
        return [f"run_dir={self.run_dir}", *data, *more]

    def submit(self, *more: str, flags: tuple[str, ...] = ()) -> int:
        status = main(["--config", TINY, *flags, *self.overrides(*more)])
        captured = self.capture.readouterr()
        self.out, self.err = captured.out, captured.err
        assert "Traceback" not in self.err
        return status

    def calls(self) -> list[list[str]]:
        """The arguments of every sbatch so far."""
        return (
            [json.loads(line)[1:] for line in self.log.read_text().splitlines()] if self.log.exists() else []
        )

    def scripts(self) -> list[str]:
        """The scripts submitted so far, with ``--merge``."""
        found = []
        for call in self.calls():
            (index,) = [i for i, word in enumerate(call) if word.endswith(".sh")]
            found.append(" ".join(call[index : index + 2 if "--merge" in call else index + 1]))
        return found


@pytest.fixture(name="cluster")
def cluster_fixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Cluster:
    programs = tmp_path / "bin"
    programs.mkdir()
    fakes = {
        "sbatch": FAKE_SBATCH.replace("{python}", sys.executable),
        "squeue": FAKE_SQUEUE,
        "scancel": FAKE_SCANCEL,
        "scontrol": FAKE_SCONTROL,
    }
    for name, text in fakes.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH", "TOKEDIT"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "sbatch.log"))
    return Cluster(tmp_path / "work", tmp_path / "sbatch.log", capsys)


@pytest.fixture(name="make_units")
def make_units_fixture(cluster: Cluster) -> Callable[..., None]:
    """Do the work units of some shares of a source, as the array's tasks do."""

    def make(name: str, shares: list[int], count: int, *, merged: bool = False) -> None:
        config = load_config(TINY, cluster.overrides(*UNITS))
        sources = {source.name: source for source in (*config.data.train, *config.data.validation)}
        job = preprocessing_of(sources[name], config.tokenizer)
        for index in shares:
            rank, world_size = Share(index, count).placement(0, 1)
            run(job, rank=rank, world_size=world_size, stage="edit")
        if merged:
            run(job, stage="merge")

    return make


UNITS = ("data.train.0.edit.unit_documents=2", "data.validation.0.edit.unit_documents=2")
"""Small units, so that every task has some."""


def checkpoint(run_dir: str, step: int) -> None:
    """A complete checkpoint, as far as submitting looks at one."""
    folder = checkpoint_folder.step_folder(f"{run_dir}/checkpoints", step)
    partial = folder.with_suffix(".partial")
    partial.mkdir(parents=True)
    checkpoint_folder.finish(partial, folder, {"step": step}, {})
