"""``tools/node_check.py`` as processes: nodes that are well, missing, killed, stopped, different."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import Forked

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 100  # this machine may be busy with other tests


class Job:
    """The nodes of one check, on 127.0.0.1."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.run.mkdir()
        self.names = [f"n{number + 1}" for number in range(num_nodes)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._logs: dict[int, list[Path]] = {}
        self.nodes: dict[int, Forked | subprocess.Popen[bytes]] = {}

    def start(self, rank: int, *flags: str, forked: bool = True, **variables: str) -> None:
        command = ["tools/node_check.py", "--nodes", str(len(self.names))]
        command += ["--node-names", ",".join(self.names), "--master-addr", "127.0.0.1"]
        command += ["--master-port", str(self.port), "--path", str(self.run), "--min-bandwidth-gb", "0"]
        command += flags
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        environment = kept | {"SLURM_NODEID": str(rank), "CUDA_VISIBLE_DEVICES": ""} | variables
        self._logs[rank] = [self.folder / f"{rank}.out", self.folder / f"{rank}.err"]
        if forked:
            self.nodes[rank] = node = Forked(command, environment)
            self._logs[rank] = node.streams
            return
        with self._logs[rank][0].open("wb") as out, self._logs[rank][1].open("wb") as err:
            self.nodes[rank] = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=out, stderr=err
            )

    def start_all(self, *flags: str, forked: bool = True) -> None:
        for rank in range(len(self.names)):
            self.start(rank, *flags, forked=forked)

    def end(self, rank: int) -> int:
        return self.nodes[rank].wait(timeout=PATIENCE_SECONDS)

    def out(self, rank: int = 0) -> list[str]:
        return self._logs[rank][0].read_text().splitlines()

    def err(self, rank: int = 0) -> list[str]:
        return self._logs[rank][1].read_text().splitlines()

    def row(self, name: str) -> str:
        (row,) = [line for line in self.out() if line.startswith(f"node  {name} ")]
        return row

    def wait_for(self, text: str, rank: int = 0) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not any(line.endswith(text) for line in self.err(rank)):
            assert self.nodes[rank].poll() is None, self.err(rank)
            assert time.monotonic() < deadline, self.err(rank)
            time.sleep(0.05)

    def close(self) -> None:
        for node in self.nodes.values():
            if node.poll() is None:
                node.kill()
                node.wait()


@pytest.fixture
def job(tmp_path: Path, request: Any) -> Iterator[Job]:
    job = Job(tmp_path, getattr(request, "param", 2))
    yield job
    job.close()


def test_one_node_needs_no_network(job: Job) -> None:
    job.names = ["alone"]
    job.start(0, "--path", str(job.run / "not" / "there"))
    assert job.end(0) == 0, job.err()
    (row, *_, last) = job.out()
    assert row.startswith("node  alone  no GPU  ok  free: run ")
    assert " cores, " in row
    assert last.startswith("1 node checked in ")
    assert last.endswith(", all well")
    assert not list(job.run.iterdir())


@pytest.mark.parametrize("job", [4], indirect=True)
def test_four_nodes_that_are_well(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    job.start_all("--json", str(output))
    assert [job.end(rank) for rank in range(4)] == [0] * 4, job.err()
    rows = [line for line in job.out() if line.startswith("node ")]
    assert [row.split()[1] for row in rows] == ["n1", "n2", "n3", "n4"]
    assert all("  ok  to n" in row and " GB/s (gloo), via " in row for row in rows)
    assert all("clock " in row for row in rows[1:])
    assert job.out()[-1].startswith("4 nodes checked in ")
    assert [job.out(rank) for rank in (1, 2, 3)] == [[], [], []]
    assert not list(job.run.iterdir())
    report = json.loads(output.read_text())
    assert report["failed"] == []
    assert [node["name"] for node in report["nodes"]] == job.names
    node = report["nodes"][2]
    assert {link["partner"] for link in node["links"]} == {0, 3}
    assert all(link["gb_per_second"] > 0 for link in node["links"])
    assert abs(node["seconds_ahead"]) < 0.5
    assert node["is_folder_shared"] is True
    assert node["facts"]["versions"]["numpy"]


def test_quiet_where_all_is_well(job: Job) -> None:
    job.start_all("--quiet", forked=False)
    assert [job.end(0), job.end(1)] == [0, 0]
    assert job.out() == []
    assert job.err() == []


def test_a_node_that_does_not_come_is_named(job: Job) -> None:
    job.start(0, "--join-timeout", "4")
    assert job.end(0) == 1
    assert job.row("n1").split()[4] == "ok"
    assert job.row("n2") == "node  n2  -       FAILED  did not come within 4 s"
    assert job.err()[-1] == "error: node n2: did not come within 4 s; leave it out: sbatch --exclude=n2 ..."


@pytest.mark.parametrize("job", [4], indirect=True)
def test_nodes_that_die_or_hang_in_the_middle_are_named(job: Job) -> None:
    for rank in (0, 1, 2):
        job.start(rank, "--join-timeout", "90", "--task-timeout", "6")
    job.wait_for("waiting for n4")  # the others are there
    job.nodes[1].kill()
    job.nodes[2].send_signal(signal.SIGSTOP)
    job.start(3, "--join-timeout", "90", "--task-timeout", "6")
    assert job.end(0) == 1
    assert "FAILED  stopped answering (" in job.row("n2")
    assert "FAILED  stopped answering (" in job.row("n3")
    assert "ok      to n4" in job.row("n1")
    assert job.err()[-1].startswith("error: nodes n2, n3: stopped answering (looking at its GPUs")
    assert job.err()[-1].endswith("leave them out: sbatch --exclude=n2,n3 ...")
    assert job.end(3) == 0  # it is well itself
    assert not list(job.run.iterdir())
    job.nodes[2].send_signal(signal.SIGCONT)  # it wakes up, finds nobody and goes
    assert job.end(2) == 1


def test_a_node_that_is_different_is_named(job: Job, tmp_path: Path) -> None:
    """Another folder, another version, and a fault of its own: all are in its line."""
    metadata = tmp_path / "site" / "numpy-9.8.7.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 9.8.7\n")
    other = tmp_path / "other"
    other.mkdir()
    site = str(tmp_path / "site")
    job.start(0, "--task-timeout", "8")
    job.start(1, "--path", str(other), PYTHONPATH=site, GLOO_SOCKET_IFNAME="lo,ib7")
    assert [job.end(0), job.end(1)] == [1, 1]
    row = job.row("n2")
    assert "no GPU  FAILED  GLOO_SOCKET_IFNAME names ib7: the interfaces here are " in row
    assert "numpy 9.8.7 where n1 has " in row
    assert f"the run folder {other} is not the one of n1: " in row
    assert job.err()[-1].startswith("error: node n2: ")
    assert job.err(1)[-1].startswith("error: node n2: ")  # by itself, too
    assert not [*job.run.iterdir(), *other.iterdir()]


def test_what_is_demanded_of_all(job: Job) -> None:
    job.start_all("--gpu-type", "h100", "--min-free-gb", "1e9")
    assert [job.end(0), job.end(1)] == [1, 1]
    last = job.err()[-1]
    assert last.startswith("error: nodes n1, n2: no GPU where h100 is wanted; run folder ")
    assert last.endswith(" GB free, less than --min-free-gb 1e+09 (TOKEDIT_MIN_FREE_GB of a job)")
    assert job.out()[-1].endswith("2 failed: n1, n2")


def test_a_leftover_on_a_gpu(job: Job, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        """#!/bin/sh
case "$1" in
*=index*) echo '0, GPU-a, NVIDIA H100 80GB HBM3, 570.86, 81559, 40960' ;;
*=uuid*) echo 'GPU-a, 3' ;;
*compute-apps*) echo 'GPU-a, 4711, /usr/bin/python3, 40000' ;;
esac
"""
    )
    smi.chmod(0o755)
    job.names = ["n1"]
    job.start(0, PATH=f"{tmp_path}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="0")
    assert job.end(0) == 1
    assert "n1  1 x NVIDIA H100 80GB HBM3 (driver 570.86)  FAILED  " in job.row("n1")
    assert "GPU 0: 40.0 GiB in use by others (4711 python3, 40000 MiB)" in job.row("n1")
    assert "GPU 0: 3 uncorrected memory errors" in job.row("n1")


def test_a_node_that_cannot_reach_the_head_says_so(job: Job) -> None:
    job.start(1, "--join-timeout", "1")
    assert job.end(1) == 1
    (line,) = job.err(1)
    assert line.startswith(
        f"error: node n2: cannot reach node n1 (127.0.0.1:{job.port}): Connection refused; "
    )


def test_a_port_in_use_is_named(job: Job) -> None:
    with socket.socket() as other:
        other.bind(("", job.port))
        other.listen()
        job.start(0)
        assert job.end(0) == 1
    assert job.err()[-1].startswith(f"error: node n1 (127.0.0.1:{job.port}) cannot open its store")


@pytest.mark.parametrize("job", [3], indirect=True)
def test_nobody_waits_for_a_head_that_died(job: Job) -> None:
    for rank in (0, 1):
        job.start(rank, "--join-timeout", "90")
    job.wait_for("waiting for n3")
    job.nodes[0].kill()
    assert job.end(1) == 1
    assert job.err(1)[-1].startswith(f"error: node n1 (127.0.0.1:{job.port}), which leads the check, is gone")


@pytest.mark.stress
@pytest.mark.parametrize("job", [3], indirect=True)
def test_nobody_waits_for_a_head_that_stands_still(job: Job) -> None:
    for rank in (0, 1):
        job.start(rank, "--join-timeout", "20")
    job.wait_for("waiting for n3")
    job.nodes[0].send_signal(signal.SIGSTOP)
    assert job.end(1) == 1
    assert job.err(1)[-1].endswith("which leads the check, does not answer any more")


def test_terminated_it_leaves_nothing_behind(job: Job) -> None:
    job.start(0)
    job.wait_for("waiting for n2")
    job.nodes[0].terminate()
    assert job.end(0) == 130
    assert not list(job.run.iterdir())


@pytest.mark.parametrize(
    ("flags", "variables", "code", "said"),
    [
        (["--node-names", "a,b,c"], {}, 2, "--node-names has 3 names for --nodes 2"),
        (["--nodes", "0"], {}, 2, "--nodes is a number of nodes"),
        (["--task-timeout", "0"], {}, 2, "--task-timeout is a number of seconds above 0"),
        (["--master-addr", ""], {}, 2, "--master-addr is needed"),
        ([], {"SLURM_NODEID": ""}, 1, "SLURM_NODEID is not set, and has to be this node's number, 0 to 1"),
        ([], {"SLURM_NODEID": "2"}, 1, "SLURM_NODEID is 2"),
    ],
)
def test_arguments(job: Job, flags: list[str], variables: dict[str, str], code: int, said: str) -> None:
    job.start(0, *flags, **variables)
    assert job.end(0) == code
    assert said in job.err()[-1]
