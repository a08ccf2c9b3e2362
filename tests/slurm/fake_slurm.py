"""Slurm's programs, torchrun and python as small fakes that behave: they record how they were called."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JOB = "4711"

_RECORD = r"""#!/usr/bin/env bash
{ printf '%s' "${0##*/}"; printf '\x1f%s' "$@"; printf '\x1e'; } >>"$FAKE_LOG"
"""
_PROGRAMS = {
    # runs the command once a node, as srun with one task a node does
    "srun": r"""
nodes=1
while [[ "$1" == -* ]]; do case "$1" in --nodes=*) nodes="${1#*=}" ;; esac; shift; done
for ((node = 0; node < nodes; node++)); do
    status=0
    SLURM_NODEID=$node SLURMD_NODENAME=node$node "$@" || status=$?
    ((status == 0)) && continue
    echo "srun: error: node$node: task $node: ${FAKE_DEATH:-Exited}" >&2
    exit "$status"
done
""",
    "scontrol": r"""
case "$1 $2" in
    "show job") echo "JobId=$3 JobName=x JobState=$FAKE_STATE Reason=None Command=$FAKE_COMMAND WorkDir=/x" ;;
    "show hostnames") for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do echo "node$i"; done ;;
    "show node") echo "NodeName=$3 Arch=x86_64 NodeAddr=addr-of-$3 NodeHostName=$3 Version=1" ;;
    "show config") echo "TaskPlugin              = $FAKE_TASK_PLUGIN" ;;
esac
""",
    "scancel": "",
    "apptainer": r"""while [[ "$1" != *.sif ]]; do shift; done; shift; exec "$@" """,
    "torchrun": r"""
[[ -z "${FAKE_TORCHRUN_SLEEP:-}" ]] || sleep "$FAKE_TORCHRUN_SLEEP"
case "$*" in *--prepare*) exit "${FAKE_PREPARE_EXIT:-0}" ;; *) exit "${FAKE_TRAIN_EXIT:-0}" ;; esac
""",
    "python": r"""
case "$1 $2" in
    */slurm_job.py\ begin) echo "$FAKE_BEGIN" ;;
    */slurm_job.py\ end) echo "$FAKE_END" ;;
    */node_check.py\ *) exit "${FAKE_CHECK_EXIT:-0}" ;;
esac
""",
}


@dataclass
class FakeSlurm:
    """A job's environment in which all programs are fakes.

    Attributes:
        folder: where it happens; has ``run.yaml``.
        environment: of the batch script.
    """

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        programs = self.folder / "bin"
        programs.mkdir()
        for name, text in _PROGRAMS.items():
            (programs / name).write_text(_RECORD + text.lstrip("\n"))
            (programs / name).chmod(0o755)
        (self.folder / "logs").mkdir()
        (self.folder / "run.yaml").touch()
        others = ("SLURM", "SBATCH", "TOKEDIT", "RANK", "OMP_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(others)} | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "FAKE_LOG": str(self.folder / "calls"),
            "FAKE_TASK_PLUGIN": "task/none",
            "FAKE_STATE": "RUNNING",
            "FAKE_END": "continue=0 progress='step 3 of 10'",
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NODELIST": "node[0-63]",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_CPUS_ON_NODE": "16",
            "TOKEDIT_VENV": "/nonexistent",
        }
        self.begins_with()

    def begins_with(self, **values: object) -> None:
        """What slurm_job.py finds at the job's start."""
        found = {
            "run_dir": self.folder / "run",
            "log_dir": self.folder / "logs",
            "missing_sources": 0,
            "complete": 0,
            "progress": "step 0 of 10",
            "run_stage": "pretrain",
            "gpu_type": "",
        }
        self.environment["FAKE_BEGIN"] = " ".join(f"{k}='{v}'" for k, v in (found | values).items())

    def start(self, script: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a batch script as slurmd does: a copy of it, in the folder of the submission."""
        original = ROOT / "slurm" / script
        copy = self.folder / "slurm_script"
        copy.write_bytes(original.read_bytes())
        with open(self.folder / "job.log", "w") as log:
            return subprocess.Popen(
                ["bash", str(copy), *arguments],
                cwd=self.folder,
                env={"FAKE_COMMAND": " ".join([str(original), *arguments])} | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def finish(self, job: subprocess.Popen[bytes], code: int = 0) -> str:
        """Wait for the batch script's end; returns what it said."""
        found = job.wait(120)
        said = (self.folder / "job.log").read_text()
        assert found == code, said
        return said

    def run(self, script: str, *arguments: str, code: int = 0) -> str:
        """Run a batch script to its end; returns what it said."""
        return self.finish(self.start(script, *arguments), code)

    def calls(self, program: str) -> list[list[str]]:
        """How a program was called."""
        log = Path(self.environment["FAKE_LOG"])
        records = log.read_text().split("\x1e")[:-1] if log.exists() else []
        words = [record.split("\x1f") for record in records]
        return [call[1:] for call in words if call[0] == program]
