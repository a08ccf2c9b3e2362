"""Signals and the time limit in every phase: one complete checkpoint, or none, and the code for a requeue."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from forks import fork_ranks, run_forked
from training_cases import interrupted_at_start, interrupted_in_validation, train_on_rank, write_run

from megatron_tokedit.testing.ranks import RankPool
from megatron_tokedit.training.metrics import read_metrics
from megatron_tokedit.training.signals import EXIT_REQUEUE, StopRequest


@pytest.fixture(scope="module")
def straight(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps on two ranks."""
    folder = tmp_path_factory.mktemp("straight")
    ranks.run(train_on_rank, write_run(folder), world_size=2)
    return folder


def records(folder: Path, kind: str) -> list[Any]:
    keys = ("step", "loss") if kind == "train" else ("step", "held")
    return [[record[key] for key in keys] for record in read_metrics(folder / "run", kind)]


@pytest.mark.parametrize("eval_interval", [5, 10])
def test_in_validation(ranks: RankPool, straight: Path, tmp_path: Path, eval_interval: int) -> None:
    """The batch is finished, the validation is not; the next start makes up for it before it trains."""
    config = write_run(tmp_path)
    interval = (f"training.eval_interval_steps={eval_interval}",)
    results = ranks.run(interrupted_in_validation, config, interval, world_size=2)
    assert {(result.stopped_by, result.finished) for result, _ in results} == {("SIGUSR1", False)}
    assert [Path(result.checkpoint).name for result, _ in results] == [f"step_{eval_interval:08d}"] * 2
    assert not records(tmp_path, "validation")
    assert ranks.run(train_on_rank, config, interval, world_size=2)[0][0].finished
    assert records(tmp_path, "train") == records(straight, "train")
    assert records(tmp_path, "validation") == records(straight, "validation")[-(10 // eval_interval) :]


def test_while_there_is_nothing_to_save(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(interrupted_at_start, write_run(tmp_path), world_size=1) == ["SIGTERM"]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_time_limit(ranks: RankPool, tmp_path: Path) -> None:
    endless = ("training.train_steps=4000", "runtime.exit_after_minutes=0.08")
    results = ranks.run(train_on_rank, write_run(tmp_path), endless, world_size=2)
    assert {result.stopped_by for result, _ in results} == {"exit_after_minutes"}
    (step,) = {result.state.step for result, _ in results}
    assert Path(results[0][0].checkpoint).name == f"step_{step:08d}"


def test_votes() -> None:
    with StopRequest() as stop:
        stop.begin()
        assert stop.votes() == (0, 0, 0)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.votes() == (0, 1, 0)
    assert StopRequest.outcome((0, 2, 1)) == "SIGUSR1"
    assert StopRequest.outcome((0, 0, 4)) == "exit_after_minutes"
    assert StopRequest.outcome((0, 0, 0)) is None
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


SLOW_INDEXES = """
import sys, time
from megatron_tokedit.dataset import index_cache
def slow(*args, **kwargs):
    print("building", flush=True)
    time.sleep(60)
index_cache.IndexCache.ensure_epoch = slow
from megatron_tokedit.cli.train import main
sys.exit(main(sys.argv[1:]))
"""


class TwoRanks:
    """Two ranks without a launcher, so that their exit codes are seen; killed at the end."""

    def __init__(self, program: list[str], arguments: list[str]) -> None:
        environment = os.environ | {"PYTHONFAULTHANDLER": "1"}
        self.processes = fork_ranks(2, [*program, *arguments], environment, stderr=subprocess.STDOUT)
        self.logs = [process.streams[0] for process in self.processes]

    def __enter__(self) -> TwoRanks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Until rank 0 printed ``text``; where a rank ends before or time is up: all output, with stacks."""
        deadline = time.monotonic() + seconds
        while text not in self.logs[0].read_text():
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                for process in self.processes:
                    process.send_signal(signal.SIGABRT)
                    process.wait()
                pytest.fail(f"no {text!r} in\n{self.output()}")
            time.sleep(0.05)

    def wait(self, seconds: float = 60) -> list[int]:
        """Exit codes."""
        return [process.wait(seconds) for process in self.processes]


def tiny(folder: Path, *overrides: str) -> list[str]:
    data = [
        f"data.{split}.0.prefix={folder}/data/{name}_text_document"
        for split, name in (("train", "corpus"), ("validation", "heldout"))
    ]
    return ["--config", "examples/tiny_cpu.yaml", f"run_dir={folder}/run", *data, *overrides]


def run_alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return run_forked(["tools/train.py", *arguments], environment | {"OMP_NUM_THREADS": "1"})


def test_while_indexes_are_built(tmp_path: Path) -> None:
    """Rank 0 builds and is interrupted; rank 1 waits for it inside a collective and is ended."""
    arguments = tiny(tmp_path)
    assert run_alone(*arguments, "--prepare").returncode == 0
    with TwoRanks(["-c", SLOW_INDEXES], arguments) as ranks:
        ranks.wait_for("building\n")
        sent = time.monotonic()
        for process in ranks.processes:
            process.send_signal(signal.SIGUSR1)
        assert ranks.wait() == [EXIT_REQUEUE] * 2, ranks.output()
    assert time.monotonic() - sent < 30
    assert not (tmp_path / "run" / "checkpoints").exists()
    shown = run_alone(*arguments, "--progress").stdout
    assert (
        shown == f"{tmp_path}/run: step 0 of 40; stopped by SIGUSR1 before its first step, to be continued\n"
    )


def test_exit_code_in_training(tmp_path: Path) -> None:
    arguments = tiny(tmp_path, "data.num_workers=1")
    assert run_alone(*arguments, "--prepare").returncode == 0
    endless = [*arguments, "training.train_steps=4000", "logging.log_interval_steps=1"]
    with TwoRanks(["tools/train.py"], endless) as ranks:
        ranks.wait_for("step    3/")
        ranks.processes[1].send_signal(signal.SIGTERM)  # one rank is told, all stop
        assert ranks.wait() == [EXIT_REQUEUE] * 2, ranks.output()
    shown = run_alone(*arguments, "--progress").stdout
    assert "stopped by SIGTERM after step " in shown
    assert shown.endswith(", to be continued\n")
    done = run_alone(*arguments, "parallel.tensor_model_parallel_size=1")
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stderr
    assert "to be continued" not in run_alone(*arguments, "--progress").stdout
