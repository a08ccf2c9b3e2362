"""``tools/train.py --prepare --stage``: shares of an edit in many jobs, and the merge that waits for all."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from forks import Forked
from prepare_cases import ROOT, TINY, PreparedRun, clean_environment, make_prior, wait_until

from megatron_tokedit.cli.train import main

COUNTING = """
import sys
from megatron_tokedit.pipeline import plan
from megatron_tokedit.scoring import identity

def counted(name, function):
    def call(*args, **kwargs):
        with open(sys.argv[1], "a") as file:
            file.write(name + " ")
        return function(*args, **kwargs)
    return call

plan.plan_units = counted("scan", plan.plan_units)
identity.hash_files = counted("hash", identity.hash_files)
if __name__ == "__main__":
    from megatron_tokedit.cli.train import main
    sys.exit(main(sys.argv[2:]))
"""

SLOW = """
import sys, time
from megatron_tokedit.pipeline.unit import UnitWorker
process = UnitWorker.process

def slow(*args):
    time.sleep(0.3)
    return process(*args)

UnitWorker.process = slow
from megatron_tokedit.cli.train import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> PreparedRun:
    """Made by one process."""
    run = PreparedRun(tmp_path_factory.mktemp("whole"))
    run.call()
    return run


def edit(share: str) -> list[str]:
    return ["--stage", "edit", "--share", share]


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("placed", [False, True])
def test_shares_that_start_at_once_plan_once_and_make_the_same_bytes(
    tmp_path: Path, whole: PreparedRun, placed: bool
) -> None:
    """Placed: under the identity of what goes in, by the program; and with a prior, that is read once."""
    run = PreparedRun(tmp_path / "shares", make_prior(tmp_path) if placed else None)
    if placed:
        whole = PreparedRun(tmp_path / "whole", tmp_path / "prior")
        whole.call()
        nowhere = ("data.train.0.prefix=null", "data.validation.0.prefix=null")
        run.arguments += [*nowhere, f"data.prepared_dir={run.folder}/prepared"]
    num_tasks, units = (2, 9) if placed else (4, 5)  # a task with a prior is two processes with torch
    counts = tmp_path / "counts"
    shares = [edit(f"{index}/{num_tasks}") for index in range(num_tasks)]
    tasks = [
        Forked(["-c", COUNTING, counts, *run.arguments, "--prepare", *share], clean_environment())
        for share in shares
    ]
    said = [task.communicate(timeout=200)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0] * num_tasks, said
    assert sorted(counts.read_text().split()) == ["hash"] * placed + ["scan"] * 2, (
        "one reading of each source"
    )
    assert len(list(run.folder.rglob("units/*/*.json"))) == 19 + 1
    assert not list(run.folder.rglob("*_document.idx"))
    said_again = run.call(*edit(f"1/{num_tasks}"))
    assert f"nothing to do: of 19 work units {units} are for this process, and done" in said_again
    assert "nothing to do: of 1 work units 0 are for this process" in said_again
    assert "merging source docs" in run.call("--stage", "merge")
    made = {path.name: path.read_bytes() for path in run.folder.rglob("*_document.*")}
    for name, content in whole.outputs().items():
        assert (
            made[name.replace("train", "up_revise").replace("validation", "none") if placed else name]
            == content
        )
    assert "nothing to prepare" in run.call("--stage", "merge")
    assert "nothing to prepare" in run.call(*edit(f"1/{num_tasks}"))


def test_a_killed_share_runs_again_alone(tmp_path: Path, whole: PreparedRun) -> None:
    run = PreparedRun(tmp_path / "killed")
    run.arguments.append("slurm.preprocess.tasks=4")
    for index in (0, 2, 3):
        run.call(*edit(f"{index}/4"))
    assert len(run.done()) == 14
    victim = run.start(*edit("1/4"), script=("-c", SLOW))
    wait_until(victim, lambda: len(run.done()) > 14)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    done = run.done()
    undone = 19 - len(done)
    assert undone > 0
    refused = run.call("--stage", "merge", code=1)
    assert f"docs: {undone} of 19 work units are not done\nrun the edit again" in refused
    assert "slurm.preprocess.tasks=4: --array=1)" in refused
    assert not run.outputs()
    run.call(*edit("1/4"))
    assert {unit: run.done()[unit] for unit in done} == done, "what was done is left alone"
    run.call("--stage", "merge")
    assert run.outputs() == whole.outputs()


def test_tasks_of_an_array_with_several_ranks_each(
    tmp_path: Path, whole: PreparedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shares do not depend on the ranks a task has: one has two, the other one."""
    run = PreparedRun(tmp_path / "array")
    run.arguments.append("slurm.preprocess.tasks=2")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tools/train.py")
    alone = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "1"}  # submitted again
    task = run.start("--stage", "edit", script=launcher, **alone)
    _, said = task.communicate(timeout=200)
    assert task.returncode == 0, said
    assert "preparing source docs (share 1/2)" in said
    assert sorted(run.done()) == list(range(1, 19, 2))
    refused = run.call("--stage", "merge", code=1)
    assert "docs: 10 of 19 work units are not done" in refused
    assert "--array=0)" in refused
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    run.call("--stage", "edit")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    run.call("--stage", "merge")
    assert run.outputs() == whole.outputs()


def test_a_merge_before_anything_is_begun_writes_nothing(tmp_path: Path) -> None:
    run = PreparedRun(tmp_path / "early")
    refused = run.call("--stage", "merge", code=1)
    assert "docs: not begun" in refused
    assert "heldout: not begun" in refused
    assert "--array" not in refused, "nobody said how many tasks there are"
    assert "--array=0-2)" in run.call("--stage", "merge", "slurm.preprocess.tasks=3", code=1)
    assert not run.folder.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--stage", "edit"],
        ["--share", "0/2"],
        ["--prepare", "--share", "0/2"],
        ["--prepare", "--stage", "all", "--share", "0/2"],
        ["--prepare", "--stage", "merge", "--share", "0/2"],
        ["--prepare", "--stage", "edit", "--share", "2/2"],
        ["--prepare", "--stage", "edit", "--share", "2"],
        ["--prepare", "--stage", "edit", "--share=-1/2"],
        ["--prepare", "--stage", "join"],
        ["--dry-run", "--stage", "edit"],
    ],
)
def test_wrong_usage(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        main(["--config", TINY, *arguments])
    assert end.value.code == 2


def test_an_array_that_does_not_say_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PreparedRun(tmp_path / "gaps")
    for name, value in {"ID": "7", "COUNT": "2", "MIN": "3", "MAX": "7"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    refused = run.call("--stage", "edit", code=1)
    assert "set slurm.preprocess.tasks to the size of the whole array" in refused
    assert "--array=0-7" in refused
    refused = run.call("--stage", "edit", "slurm.preprocess.tasks=7", code=1)
    assert "array task 7: slurm.preprocess.tasks is 7, so the tasks are 0 to 6" in refused
    assert not run.folder.exists()


def test_every_local_rank_edits_on_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from megatron_tokedit.pipeline import workers
    from megatron_tokedit.scoring.load import resolve_device

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for workers_a_rank in (1, 2):
        chosen = []
        for local_rank in range(8 // workers_a_rank):
            for index in range(workers_a_rank):
                monkeypatch.setenv("LOCAL_RANK", str(local_rank))
                workers._choose_gpu(workers_a_rank, index)
                chosen.append(str(resolve_device("auto")))
        assert chosen == [f"cuda:{gpu}" for gpu in range(8)]
