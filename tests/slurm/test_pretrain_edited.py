"""slurm/pretrain_edited.sh renders the right commands; Slurm's own programs are small fakes that behave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "pretrain_edited.sh"

FAKE_SRUN = """#!/usr/bin/env bash
# runs the command once a node, as srun with one task a node does
nodes=1
while [[ "$1" == -* ]]; do case "$1" in --nodes=*) nodes="${1#*=}" ;; esac; shift; done
for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node "$@" || exit $?; done
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do echo "node$i"; done ;;
    "show node") echo "NodeName=$3 Arch=x86_64 NodeAddr=addr-of-$3 NodeHostName=$3 Version=1" ;;
    *) echo "scontrol $*" >> "$FAKE_LOG.scontrol" ;;
esac
"""
FAKE_RECORDER = """#!{python}
import json, os, sys
with open(os.environ["FAKE_LOG"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
code = os.environ.get("FAKE_TORCHRUN_EXIT", "0")
sys.exit(int(code if "--prepare" in sys.argv else os.environ.get("FAKE_TRAIN_EXIT", code)))
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment where Slurm's programs and torchrun are fakes; FAKE_LOG holds torchrun's arguments."""
    programs = {
        "srun": FAKE_SRUN,
        "scontrol": FAKE_SCONTROL,
        "scancel": "#!/usr/bin/env bash\n",
        "torchrun": FAKE_RECORDER.replace("{python}", sys.executable),
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RANK", "OMP"))}
    return environment | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "FAKE_LOG": str(tmp_path / "torchrun.log"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[0-63]",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_CPUS_ON_NODE": "16",
        "TOKEDIT_VENV": "/nonexistent",
    }


def submit(
    cluster: dict[str, str], *arguments: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=cluster, text=True, capture_output=True, timeout=60
    )
    log = Path(cluster["FAKE_LOG"])
    return done, [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize(("nodes", "gpus"), [(1, None), (2, 8), (64, 8)])
def test_prepares_then_trains_on_every_node(cluster: dict[str, str], nodes: int, gpus: int | None) -> None:
    cluster["SLURM_JOB_NUM_NODES"] = str(nodes)
    if gpus:
        cluster["SLURM_GPUS_ON_NODE"] = str(gpus)
    done, calls = submit(cluster, "run.yaml", "training.train_steps=7", "data.train.0.name=a b")
    assert done.returncode == 0, done.stderr
    expected = [
        [
            "--shutdown-timeout=280",
            f"--nnodes={nodes}",
            f"--node-rank={node}",
            f"--nproc-per-node={gpus or 1}",
            "--master-addr=addr-of-node0",
            f"--master-port={20000 + 4711}",
            "tools/train.py",
            "--config",
            "run.yaml",
            "training.train_steps=7",
            "data.train.0.name=a b",
            *stage,
        ]
        for stage in (["--prepare"], [])
        for node in range(nodes)
    ]
    assert calls == expected


def test_failed_preparation_stops_the_job(cluster: dict[str, str]) -> None:
    cluster |= {"SLURM_JOB_NUM_NODES": "1", "FAKE_TORCHRUN_EXIT": "3"}
    done, calls = submit(cluster, "run.yaml")
    assert done.returncode == 3
    assert len(calls) == 1
    assert "--prepare" in calls[0]


@pytest.mark.parametrize(
    ("progress", "requeues"),
    [
        ("run: step 3 of 10; stopped by exit_after_minutes after step 3 of 10, to be continued", True),
        ("run: step 3 of 10", False),
    ],
)
def test_requeues_what_stopped_itself(cluster: dict[str, str], progress: str, requeues: bool) -> None:
    """torchrun says 1 whatever its ranks say; the run folder tells a time limit from an error."""
    python = Path(cluster["PATH"].split(os.pathsep)[0]) / "python"
    python.write_text(f"#!/usr/bin/env bash\necho '{progress}'\n")
    python.chmod(0o755)
    cluster |= {"SLURM_JOB_NUM_NODES": "1", "FAKE_TRAIN_EXIT": "1"}
    marker = ROOT / ".tokedit-requeue-4711"
    try:
        done, _ = submit(cluster, "run.yaml")
        assert done.returncode == (0 if requeues else 1), done.stderr
        requeued = Path(cluster["FAKE_LOG"] + ".scontrol")
        assert requeued.exists() == requeues
        if requeues:
            assert "scontrol requeue 4711" in requeued.read_text()
            assert submit(cluster, "run.yaml")[0].returncode == 1, "no progress since: not again"
    finally:
        marker.unlink(missing_ok=True)


def test_usage(cluster: dict[str, str]) -> None:
    done, calls = submit(cluster)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
    assert not calls


def test_scripts_pass_bash_syntax_check() -> None:
    for script in sorted((ROOT / "slurm").glob("*.sh")):
        subprocess.run(["bash", "-n", str(script)], check=True)
