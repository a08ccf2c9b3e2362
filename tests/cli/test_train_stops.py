"""``tools/train.py --prepare`` told to stop: it does so quietly, and leaves word for the scheduler."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from prepare_cases import PreparedRun, clean_environment, make_prior, wait_until

from megatron_tokedit.training.signals import EXIT_REQUEUE

SLOW = """
import sys, time
from megatron_tokedit.pipeline.unit import UnitWorker
process = UnitWorker.process

def slow(*args):
    time.sleep(1)
    return process(*args)

UnitWorker.process = slow
if __name__ == "__main__":
    from megatron_tokedit.cli.train import main
    sys.exit(main(sys.argv[1:]))
"""
DEAF = """
import ctypes, signal, sys
from megatron_tokedit.training.signals import StopRequest

with StopRequest(before_exit=lambda reason: print("told by", reason, flush=True)):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # nothing interrupts the call
    sleep = ctypes.CDLL(None).sleep
    print("deaf", flush=True)
    sleep(60)
"""
BOTH = [signal.SIGUSR1, signal.SIGTERM]


@pytest.fixture
def slow(tmp_path: Path) -> str:
    """A script: train.py whose work units take a second more, in its workers, too."""
    path = tmp_path / "slow.py"
    path.write_text(SLOW)
    return str(path)


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def tell(processes: list[psutil.Process], number: int) -> None:
    """As Slurm signals a step: every process of it."""
    for process in processes:
        if process.is_running():
            process.send_signal(number)


def check_quiet(said: str) -> None:
    assert "error: " not in said
    assert "a worker" not in said
    assert "megatron_tokedit/" not in said, "no traceback of ours"


def check_all_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


@pytest.mark.parametrize("number", BOTH)
def test_one_process_that_works_itself(tmp_path: Path, slow: str, number: int) -> None:
    run = PreparedRun(tmp_path / "out")
    process = run.start(script=(slow,))
    wait_until(process, lambda: len(run.done()) >= 1)
    tell(family(process), number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, said
    check_quiet(said)
    name = signal.Signals(number).name
    assert f"stopped by {name} while preparing the data" in said
    assert (run.folder / "run" / "requeue").read_text() == f"{name} while preparing the data\n"
    done = run.done()
    assert 0 < len(done) < 19
    process = run.start("data.train.0.input=[no-such-file]")
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert not (run.folder / "run" / "requeue").exists(), "an error is no reason to go on"


@pytest.mark.parametrize("number", BOTH)
def test_a_process_with_workers_ends_them(tmp_path: Path, slow: str, number: int) -> None:
    prior = make_prior(tmp_path) if number == signal.SIGTERM else None
    run = PreparedRun(tmp_path / "out", prior)
    process = run.start("data.train.0.edit.workers=2", script=(slow,))
    wait_until(process, lambda: len(run.done()) >= 1)
    processes = family(process)
    assert len(processes) >= 3
    tell(processes[::-1], number)  # the workers first
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, said
    check_quiet(said)
    check_all_gone(processes)
    assert 0 < len(run.done()) < 19


def torchrun(run: PreparedRun, slow: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Two ranks, started as slurm/node.sh does: with USR1 ignored."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", slow)
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        return run.start(*arguments, script=launcher, **environment)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("number", BOTH)
def test_two_ranks_of_torchrun(tmp_path: Path, slow: str, number: int) -> None:
    run = PreparedRun(tmp_path / "out")
    process = torchrun(run, slow)
    wait_until(process, lambda: len(run.done()) >= 2)
    processes = family(process)
    tell(processes if number == signal.SIGUSR1 else processes[:1], number)
    _, said = process.communicate(timeout=60)
    check_quiet(said)
    assert said.count("stopped by") == 1, "rank 0 speaks"
    note = (run.folder / "run" / "requeue").read_text()
    assert note == f"{signal.Signals(number).name} while preparing the data\n"
    check_all_gone(processes)
    assert 0 < len(run.done()) < 19


def test_a_rank_that_waits_for_the_others_ends_them_too(tmp_path: Path, slow: str) -> None:
    """One unit: rank 1 has nothing to do and waits; only it is told."""
    run = PreparedRun(tmp_path / "out")
    process = torchrun(run, slow, "data.train.0.edit.unit_documents=100")
    wait_until(
        process, lambda: len(family(process)) >= 3 and bool(list(run.folder.glob("train.work/*.json")))
    )
    time.sleep(0.2)
    ranks = family(process)[0].children()
    begin = time.monotonic()
    ranks[1].send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - begin < 30
    assert (run.folder / "run" / "requeue").exists()


def test_a_share_notes_its_stop_in_the_folder_of_its_job(tmp_path: Path, slow: str) -> None:
    run = PreparedRun(tmp_path / "out")
    log_dir = tmp_path / "out" / "run" / "slurm" / "4711_1" / "restart-0"
    environment = {"TOKEDIT_LOG_DIR": str(log_dir), "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    process = run.start("--stage", "edit", script=(slow,), **environment)
    wait_until(process, lambda: len(run.done()) >= 1)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, said
    assert (log_dir / "requeue").read_text() == "SIGUSR1 while preparing the data\n"
    assert not (run.folder / "run" / "requeue").exists(), "it is one of many"


def test_training_is_told_while_it_prepares(tmp_path: Path, slow: str) -> None:
    run = PreparedRun(tmp_path / "out")
    process = run.start(script=(slow,), only_prepare=False)
    wait_until(process, lambda: len(run.done()) >= 1)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE, said
    check_quiet(said)
    assert (run.folder / "run" / "requeue").read_text() == "SIGUSR1 before its first step\n"


def test_a_rank_that_does_not_hear_leaves_word_before_it_is_ended() -> None:
    """It waits in a library for the others, as rank 0 may for the process group."""
    command = [sys.executable, "-c", DEAF]
    process = subprocess.Popen(command, env=clean_environment(), text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "deaf\n"
    time.sleep(2)  # one line of Python is still to be run before it is
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == EXIT_REQUEUE
    assert said == "told by SIGUSR1\n"
