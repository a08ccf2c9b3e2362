"""slurm/ and tools/submit.py on a real Slurm of two nodes: the whole chain, and what interrupts it.

All in one file: the tests share one cluster and the datasets of the first run.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import Cluster
from slurm_runs import (
    PREPROCESS,
    ROOT,
    START_SECONDS,
    STEPS,
    TASKS,
    Run,
    datasets,
    job_ids,
    write_config,
)

pytestmark = pytest.mark.alone
SUBMIT = ROOT / "tools" / "submit.py"


@dataclass
class Chain:
    """What tools/submit.py submitted, after it ran to the end undisturbed."""

    run: Run
    jobs: dict[str, str]
    said: str
    plain: dict[str, bytes]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("real_slurm"))


@pytest.fixture(scope="module")
def chain(cluster: Cluster, config: Path) -> Chain:
    run = Run(cluster, config, "run")
    said = cluster.run(sys.executable, str(SUBMIT), "--config", config.name, cwd=run.work)
    jobs = job_ids(run.folder)
    plain = subprocess.run(  # beside the jobs: the same datasets without Slurm, in one process
        [sys.executable, ROOT / "tools" / "train.py", "--config", config.name, "--prepare", "run_dir=plain",
         "data.prepared_dir=plain/prepared"],
        cwd=run.work, text=True, capture_output=True, timeout=200,
    )  # fmt: skip
    assert plain.returncode == 0, plain.stderr
    run.log = run.folder / "slurm" / f"run-train-{jobs['train']}.log"
    for stage in ("preprocess", "merge", "train", "evaluate"):
        run.wait(jobs[stage], "COMPLETED", seconds=240)
    return Chain(run, jobs, said, datasets(run.work / "plain" / "prepared"))


@pytest.fixture(autouse=True)
def empty_queue(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.cancel_all()


def test_a_chain_of_jobs_makes_and_trains_on_the_bytes_of_one_process(chain: Chain) -> None:
    run = chain.run
    assert list(chain.jobs) == ["preprocess", "merge", "train", "evaluate"]
    assert all(job in chain.said for job in chain.jobs.values())
    for task in range(TASKS):
        facts = run.cluster.facts(f"{chain.jobs['preprocess']}_{task}")
        assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0")
    assert chain.plain
    assert datasets(run.work / "prepared") == chain.plain
    assert [step for step, _ in run.losses()] == list(range(1, STEPS + 1))
    assert "2 node(s) x 1 rank(s), head n1" in run.said()
    assert list((run.folder / "evaluation").glob("*.json"))
    logs = run.folder / "slurm" / chain.jobs["train"] / "restart-0"
    assert {"check-n1.log", "check-n2.log", "train-n1.log", "train-n2.log"} <= set(os.listdir(logs))
    again = run.cluster.run(sys.executable, str(SUBMIT), "--config", run.config.name, cwd=run.work)
    assert "nothing to submit" in again


def assert_like_undisturbed(run: Run, chain: Chain) -> None:
    """Every step once, the losses exact, in one TensorBoard folder."""
    assert run.losses() == chain.run.losses(), run.said()
    assert run.tensorboard_steps() == list(range(1, STEPS + 1))


def test_usr1_in_the_middle_is_a_requeue(chain: Chain, cluster: Cluster) -> None:
    """Sent to the ranks by a person, and to the script as Slurm does ahead of a time limit."""
    run = Run(cluster, chain.run.config, "usr1")
    job = run.submit()
    run.wait_for_step(10, job)
    cluster.run("scancel", "--signal=USR1", job)
    run.wait_for_restart(job, 1)
    saved = [path.name for path in (run.folder / "checkpoints").glob("step_*")]
    assert len(saved) == 1
    last = int(saved[0].removeprefix("step_"))
    assert 10 <= last < STEPS
    run.wait_for_step(last + 20, job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    run.wait_for_restart(job, 2)
    run.wait(job, "COMPLETED")
    assert_like_undisturbed(run, chain)
    assert "requeue: train stopped in order" in run.said()
    assert "requeue: told by USR1" in run.said()
    assert (run.folder / "slurm" / job / "restart-2" / "train-n2.log").exists()


def test_requeue_from_outside_and_preemption_go_on(chain: Chain, cluster: Cluster, tmp_path: Path) -> None:
    run = Run(cluster, chain.run.config, "preempted")
    job = run.submit()
    last = run.wait_for_step(10, job)
    cluster.run("scontrol", "requeue", job)
    run.wait_for_restart(job, 1)
    run.wait_for_step(last + 20, job)
    quick = tmp_path / "quick.sh"
    quick.write_text("#!/bin/sh\necho ran\n")
    other = cluster.submit(
        quick, cwd=tmp_path, log=tmp_path / "quick.log", partition="high", nodes=2, cpus_per_task=8
    )
    run.wait_for_restart(job, 2)
    cluster.wait(other, "COMPLETED", seconds=30)
    run.wait(job, "COMPLETED")
    assert_like_undisturbed(run, chain)


def test_a_cancelled_job_stays_cancelled(chain: Chain, cluster: Cluster) -> None:
    run = Run(cluster, chain.run.config, "cancelled")
    job = run.submit()
    run.wait_for_step(10, job)
    cluster.run("scancel", job)
    run.wait(job, "CANCELLED", seconds=40)
    run.stays(job, "CANCELLED", 8)  # longer than a requeue takes
    assert cluster.facts(job)["Restarts"] == "0"
    assert (run.folder / "checkpoints" / "latest").exists()


def test_a_killed_rank_ends_the_job_with_its_node_and_signal(chain: Chain, cluster: Cluster) -> None:
    run = Run(cluster, chain.run.config, "killed", "checkpoint.save_interval_steps=20")
    job = run.submit()
    run.wait_for_step(41, job)
    (rank,) = cluster.nodes["n2"].processes("train.py", RANK="1")
    os.kill(rank, signal.SIGKILL)
    begin = time.monotonic()
    facts = run.wait(job, "FAILED", seconds=60)
    assert time.monotonic() - begin < 60
    # srun gives the highest code: 143 where the other node was told to stop before it found out by itself
    assert facts["Restarts"] == "0"
    assert facts["ExitCode"] in ("1:0", "143:0")
    (line,) = [line for line in run.said().splitlines() if "step train FAILED" in line]
    assert "first on n2" in line
    assert "Signal 9" in line
    assert (run.folder / "checkpoints" / "latest").exists()
    run.wait(run.submit(), "COMPLETED")
    assert_like_undisturbed(run, chain)


@pytest.mark.stress
def test_a_dead_node_ends_the_job_instead_of_hanging_it(chain: Chain, cluster: Cluster) -> None:
    run = Run(cluster, chain.run.config, "node_died")
    job = run.submit()
    run.wait_for_step(10, job)
    cluster.nodes["n2"].kill()
    run.wait(job, "FAILED", "NODE_FAIL", "PENDING", seconds=60)
    assert "n2" in run.said()


def test_a_node_that_differs_fails_the_check_by_name(chain: Chain, cluster: Cluster, tmp_path: Path) -> None:
    """n2 has another version of a package, which its environment brings along."""
    other = tmp_path / "packages" / "sentencepiece-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: sentencepiece\nVersion: 9.9.9\n")
    activate = tmp_path / "venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f'[ "$SLURMD_NODENAME" != n2 ] || export PYTHONPATH={other.parent}\n')
    run = Run(cluster, chain.run.config, "misfit")
    job = run.submit(checks=True, env={"TOKEDIT_VENV": str(tmp_path / "venv")})
    facts = run.wait(job, "FAILED", seconds=60)
    assert facts["Restarts"] == "0"
    assert any(
        "n2" in line and "sentencepiece" in line and "9.9.9" in line for line in run.said().splitlines()
    )
    assert "step check FAILED" in run.said()
    assert "step train" not in run.said()
    assert not (run.folder / "checkpoints").exists()


def test_a_killed_array_task_is_submitted_alone(cluster: Cluster, config: Path) -> None:
    plain = "{edit_strategy: none, append_eod: true, unit_documents: 5}"
    run = Run(cluster, config, "array", f"data.train.0.edit={plain}", "data.prepared_dir=array/prepared",
              "training.train_steps=6", "slurm.evaluate=null")  # fmt: skip
    submit = [sys.executable, str(SUBMIT), "--config", config.name, *run.overrides]
    cluster.run(*submit, cwd=run.work, env={"TOKEDIT_NODE_CHECK": "0"})
    first = job_ids(run.folder)
    task = f"{first['preprocess']}_1"
    run.log = run.folder / "slurm" / f"array-preprocess-{task}.log"
    ranks = cluster.until(
        "the rank of task 1", START_SECONDS, lambda: _ranks_of_task(cluster, "1"), job=task, log=run.log
    )
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    run.wait(task, "FAILED")
    for name in ("0", "2"):
        run.wait(f"{first['preprocess']}_{name}", "COMPLETED")
    assert "Signal 9" in run.said()
    for stage in ("merge", "train"):
        run.wait(first[stage], "CANCELLED")

    refused = Run(cluster, config, "array", *run.overrides[1:])
    facts = refused.wait(refused.submit(PREPROCESS, merge=True), "FAILED")
    assert facts["ExitCode"] == "1:0"
    assert "work units" in refused.said()

    said = cluster.run(*submit, cwd=run.work, env={"TOKEDIT_NODE_CHECK": "0"})
    assert "tasks 1 of 3" in said
    second = job_ids(run.folder)
    run.log = run.folder / "slurm" / f"array-train-{second['train']}.log"
    for stage in ("preprocess", "merge", "train"):
        run.wait(second[stage], "COMPLETED")
    assert [step for step, _ in run.losses()] == [1, 2, 3, 4, 5, 6]


def _ranks_of_task(cluster: Cluster, task: str) -> list[int]:
    return [
        rank
        for node in cluster.nodes.values()
        for rank in node.processes("train.py", SLURM_ARRAY_TASK_ID=task, RANK="0")
    ]


def test_two_starts_without_progress_are_the_last(chain: Chain, cluster: Cluster) -> None:
    run = Run(cluster, chain.run.config, "standstill")
    job = run.submit()
    ledger = run.folder / "slurm" / job / "starts.jsonl"
    for restart in range(2):
        cluster.until(
            "the ledger",
            60,
            lambda restart=restart: ledger.exists() and len(ledger.read_text().splitlines()) > restart,
            job=job,
            log=run.log,
        )
        cluster.run("scontrol", "requeue", job)
        run.wait_for_restart(job, restart + 1)
    facts = run.wait(job, "FAILED", seconds=60)
    assert (facts["Restarts"], facts["ExitCode"]) == ("2", "1:0")
    assert "no progress" in run.said()
    assert not (run.folder / "checkpoints").exists()


def test_ranks_refuse_a_world_of_one(chain: Chain, cluster: Cluster) -> None:
    """Two tasks that would each train alone, and a launcher of fewer ranks than the job has room for."""
    program = str(ROOT / "tools" / "train.py")
    arguments = [
        program,
        "--config",
        chain.run.config.name,
        "run_dir=alone",
        "parallel.tensor_model_parallel_size=1",
    ]
    done = _srun(cluster, chain, 2, sys.executable, *arguments)
    assert done.returncode != 0
    assert "no launcher" in done.stderr
    done = _srun(
        cluster, chain, 1, "torchrun", "--nnodes=1", "--nproc-per-node=1", *arguments,
        TOKEDIT_EXPECTED_WORLD_SIZE="2", TOKEDIT_EXPECTED_NODES="2", RANKS_PER_NODE="1",
    )  # fmt: skip
    assert done.returncode != 0
    assert "the world size is 1, expected 2" in done.stderr
    assert not (chain.run.work / "alone" / "metrics.jsonl").exists()


def _srun(
    cluster: Cluster, chain: Chain, tasks: int, *command: str, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["srun", f"--nodes={tasks}", f"--ntasks={tasks}", *command],
        cwd=chain.run.work, env=cluster.environment | env, text=True, capture_output=True, timeout=60,
    )  # fmt: skip


@pytest.mark.stress
def test_the_time_limit_is_a_requeue(chain: Chain, cluster: Cluster) -> None:
    """Slurm tells the job up to a minute before it was asked to."""
    run = Run(
        cluster,
        chain.run.config,
        "limit",
        "training.train_steps=100000",
        "training.eval_interval_steps=50000",
    )
    job = run.submit(time=2, signal="B:USR1@20")  # a minute is little on a busy machine
    run.wait_for_step(10, job)
    run.wait_for_restart(job, 1, seconds=180)
    last = int(str(run.metrics()[-1]["step"]))
    run.wait_for_step(last + 10, job)
    cluster.run("scancel", job)
    assert "told by USR1" in run.said()
    steps = [step for step, _ in run.losses()]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.stress
def test_a_frozen_node_ends_the_job_instead_of_hanging_it(chain: Chain, cluster: Cluster) -> None:
    """Its connections stay open, so nobody but Slurm can know; Slurm queues the job again."""
    run = Run(cluster, chain.run.config, "frozen", "checkpoint.save_interval_steps=20")
    job = run.submit()
    run.wait_for_step(41, job)
    node = cluster.nodes["n2"]
    node.freeze()
    run.wait(job, "PENDING", seconds=120)
    node.kill()
    node.start()
    run.wait_for_restart(job, 1)
    run.wait(job, "COMPLETED")
    assert_like_undisturbed(run, chain)


_STARTS_A_CLUSTER = """
import sys
from cluster import running_cluster
with running_cluster() as cluster:
    print(cluster.folder, flush=True)
    sys.stdin.read()
"""


def test_a_killed_test_session_leaves_no_daemon(cluster: Cluster) -> None:
    session = subprocess.Popen(
        [sys.executable, "-c", _STARTS_A_CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    assert session.stdout is not None
    folder = session.stdout.readline().strip()
    assert _below(folder)
    session.kill()
    session.communicate()
    cluster.until("no daemon", 10, lambda: not _below(folder))
    shutil.rmtree(folder)


def _below(folder: str) -> list[str]:
    """Processes that have the folder in their environment."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            text = Path(f"/proc/{process}/environ").read_text(errors="replace")
        except OSError:
            continue
        if f"SLURM_CONF={folder}/" in text:
            found.append(process)
    return found
