"""``tools/slurm_job.py``: what a batch script is told, by environment variables instead of a Slurm."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from prepare_cases import ROOT, TINY, PreparedRun, clean_environment

from megatron_tokedit.cli.slurm_job import LEDGER, main
from megatron_tokedit.config.load import load_config
from megatron_tokedit.config.raw_sources import preprocessing_of
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.pipeline import run as run_job


@pytest.fixture(autouse=True)
def _job_4711(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM", "TOKEDIT", "RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.chdir(ROOT)


class Job:
    """A run and the job that is about to work on it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.run = PreparedRun(folder)
        self.run_dir = folder / "run"
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def at(self, **variables: object) -> Job:
        """With variables of Slurm."""
        for name, value in variables.items():
            self._monkeypatch.setenv(name, str(value))
        return self

    def call(self, action: str, stage: str, *overrides: str, code: int = 0) -> dict[str, str]:
        """What is printed as shell assignments; ``said`` is the rest."""
        assert main([action, stage, *self.run.arguments, *overrides]) == code
        shown = self._capsys.readouterr()
        values = dict(line.split("=", 1) for line in shlex.split(shown.out))
        return values | {"said": shown.err}

    def save(self, step: int) -> None:
        """A complete checkpoint, as far as the progress of a run goes."""
        folder = checkpoint_folder.step_folder(self.run_dir / "checkpoints", step)
        partial = folder.with_name(folder.name + ".partial")
        partial.mkdir(parents=True)
        checkpoint_folder.finish(partial, folder, {"step": step}, {})

    def edit(self, rank: int, world_size: int) -> None:
        """Some of the training text's units."""
        config = load_config(TINY, self.run.arguments[2:])
        job = preprocessing_of(config.data.train[0], config.tokenizer)
        run_job(job, rank=rank, world_size=world_size, stage="edit")

    def ledger(self, name: str = "4711") -> Path:
        return self.run_dir / "slurm" / name / LEDGER

    def starts(self, name: str = "4711") -> list[dict[str, int]]:
        lines = self.ledger(name).read_text().splitlines()
        return [json.loads(line) for line in lines if "torn" not in line]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    return Job(tmp_path / "a folder", monkeypatch, capsys)


def test_begin_says_where_the_run_is(job: Job) -> None:
    found = job.call("begin", "train")
    assert found == {
        "run_dir": str(job.run_dir),
        "log_dir": f"{job.run_dir}/slurm/4711/restart-0",
        "missing_sources": "2",
        "complete": "0",
        "progress": "step 0 of 40; preparing docs: not begun; preparing heldout: not begun",
        "run_stage": "pretrain",
        "gpu_type": "",
        "said": "",
    }
    assert Path(found["log_dir"]).is_dir()
    (start,) = job.starts()
    assert start == {"restart": 0, "stage": "train", "step": 0, "units": 0, "time": start["time"]}
    job.edit(0, 2)
    job.save(7)
    found = job.at(SLURM_RESTART_COUNT=1).call("begin", "train", "slurm.train.gpu_type=h100")
    assert found["progress"] == "step 7 of 40; preparing docs: 10 of 19 units; preparing heldout: not begun"
    assert found["log_dir"].endswith("/4711/restart-1")
    assert found["gpu_type"] == "h100"
    assert "restart 1 goes on from step 7 of 40; preparing docs: 10 of 19 units" in found["said"]
    assert "the start before left no log" in found["said"]
    assert (job.starts()[1]["step"], job.starts()[1]["units"]) == (7, 10)


def test_units_do_not_fall_when_they_are_merged(job: Job) -> None:
    job.edit(0, 1)
    job.call("begin", "merge")
    job.run.call("--stage", "edit")
    job.run.call("--stage", "merge")
    found = job.at(SLURM_RESTART_COUNT=1).call("begin", "train")
    assert found["missing_sources"] == "0"
    assert [start["units"] for start in job.starts()] == [19, 20]


def test_a_complete_run(job: Job) -> None:
    job.run.call()
    job.save(40)
    for restart in range(4):
        found = job.at(SLURM_RESTART_COUNT=restart).call("begin", "train")
        assert (found["complete"], found["missing_sources"]) == ("1", "0")


def test_a_restart_says_how_long_the_start_before_lasted(job: Job) -> None:
    log = Path(job.call("begin", "train")["log_dir"]) / "train-n1.log"
    log.touch()
    os.utime(log, times=(1, job.starts()[0]["time"] + 2530))
    said = job.at(SLURM_RESTART_COUNT=1).call("begin", "train")["said"]
    assert "the start before lasted 0:42:10, by its logs" in said


def test_two_starts_without_progress_are_enough(job: Job) -> None:
    """Whoever queued the job again: its script, ``scontrol requeue`` or a preemption."""
    for restart, step in enumerate((0, 12, 12)):
        if step and restart == 1:
            job.save(step)
        job.at(SLURM_RESTART_COUNT=restart).call("begin", "train")
    found = job.at(SLURM_RESTART_COUNT=3).call("begin", "train", code=1)
    assert set(found) == {"said"}, "nothing to eval"
    assert "stopped: restart 1 and restart 2 of job 4711 made no progress (step 12 of 40;" in found["said"]
    assert f"as when restart 1 began); see {job.run_dir}/slurm/4711/restart-2; mend" in found["said"]
    for restart in (4, 5):  # somebody mended the cause and said `scontrol requeue`
        job.at(SLURM_RESTART_COUNT=restart).call("begin", "train")
    job.at(SLURM_RESTART_COUNT=6).call("begin", "train", code=1)
    job.at(SLURM_JOB_ID=4712, SLURM_RESTART_COUNT=0).call("begin", "train")  # submitted again


def test_a_time_limit_that_leaves_no_time_is_named(job: Job) -> None:
    for restart in (0, 1):
        job.at(SLURM_RESTART_COUNT=restart).call("begin", "train")
        (job.run_dir / "requeue").write_text("SIGUSR1 before its first step\n")
    said = job.at(SLURM_RESTART_COUNT=2).call("begin", "train", code=1)["said"]
    assert "(restart 1 was stopped by SIGUSR1 before its first step: where that is the notice of" in said


def test_progress_of_any_kind_counts(job: Job) -> None:
    for restart in range(5):
        if restart % 2:
            job.edit(restart, 8)
        job.at(SLURM_RESTART_COUNT=restart).call("begin", "train")
    job.save(1)
    job.at(SLURM_RESTART_COUNT=5).call("begin", "train")


def test_what_has_no_progress_to_make_may_start_again(job: Job) -> None:
    """An evaluation that is preempted, a preprocessing that is done."""
    job.run.call()
    for restart in range(4):
        job.at(SLURM_RESTART_COUNT=restart).call("begin", "evaluate")
        job.call("begin", "merge")


def test_a_start_that_is_seen_twice_is_one(job: Job) -> None:
    for _ in range(4):
        job.call("begin", "train")


def test_a_torn_ledger_goes_on(job: Job) -> None:
    job.call("begin", "train")
    with job.ledger().open("a") as file:
        file.write('{"restart": 1, "torn": tr')
    for restart in (1, 2):
        job.at(SLURM_RESTART_COUNT=restart)
        job.call("begin", "train", code=int(restart == 2))
    assert [start["restart"] for start in job.starts()] == [0, 1, 2, 2]
    assert job.starts()[-1]["stopped"]


def test_array_tasks_count_their_own_units(job: Job) -> None:
    job.at(SLURM_JOB_ID=4715, SLURM_ARRAY_JOB_ID=4711, SLURM_ARRAY_TASK_ID=1, SLURM_ARRAY_TASK_COUNT=2)
    job.edit(0, 4)  # of task 0
    job.edit(3, 4)  # of task 1
    found = job.call("begin", "preprocess", "slurm.preprocess.tasks=2")
    assert found["log_dir"] == f"{job.run_dir}/slurm/4711_1/restart-0"
    assert found["progress"] == "step 0 of 40; preparing docs: 4 of 9 units; preparing heldout: not begun"
    assert job.starts("4711_1")[0]["units"] == 4
    assert (
        "the tasks are 0 to 0" in job.call("begin", "preprocess", "slurm.preprocess.tasks=1", code=1)["said"]
    )


def test_the_end_of_a_step_says_whether_to_go_on(job: Job) -> None:
    job.run_dir.mkdir(parents=True)
    note = job.run_dir / "requeue"
    note.write_text("left by an earlier job\n")
    job.call("begin", "train")
    assert job.call("end", "train")["continue"] == "0", "begin took it away"
    note.write_text("SIGUSR1 after step 3 of 40\n")
    found = job.call("end", "train")
    assert found["continue"] == "1"
    assert found["progress"].startswith("step 0 of 40;")
    assert found["progress"].endswith("; stopped by SIGUSR1 after step 3 of 40, to be continued")


def test_an_array_task_reads_its_own_note_only(job: Job) -> None:
    job.at(SLURM_ARRAY_JOB_ID=4711, SLURM_ARRAY_TASK_ID=0, SLURM_ARRAY_TASK_COUNT=2)
    job.run_dir.mkdir(parents=True)
    others = job.run_dir / "requeue"
    others.write_text("another job's\n")
    log_dir = Path(job.call("begin", "preprocess")["log_dir"])
    assert others.exists()
    assert job.call("end", "preprocess")["continue"] == "0"
    (log_dir / "requeue").write_text("SIGUSR1 while preparing the data\n")
    assert job.call("end", "preprocess")["continue"] == "1"


@pytest.mark.parametrize(
    ("stage", "overrides", "variables", "complaint"),
    [
        ("train", ["slurm.train.nodes=2"], {}, "slurm.train.nodes: the job has 1 node(s), expected 2;"),
        ("train", ["slurm.train.nodes=2"], {"SLURM_JOB_NUM_NODES": 4}, "or give slurm.train.nodes=4"),
        ("train", ["slurm.train.gpus_per_node=8"], {"SLURM_GPUS_ON_NODE": 4}, "the job has 4 GPU(s) on this"),
        ("preprocess", ["slurm.preprocess.gpus_per_node=1"], {}, "gpus_per_node: the job has 0"),
        ("merge", [], {"SLURM_JOB_NUM_NODES": 2}, "stage merge: the job has 2 node(s), expected 1"),
        ("train", ["model.num_layer=2"], {}, "did you mean num_layers?"),
        ("train", ["parallel.tensor_model_parallel_size=4"], {"TOKEDIT_EXPECTED_WORLD_SIZE": 6}, "6 ranks"),
        ("train", ["stage=continue", "init_from={checkpoint: /no/run}"], {}, "checkpoint: /no/run: does"),
        ("train", [], {"SLURM_RESTART_COUNT": "x"}, "SLURM_RESTART_COUNT='x': expected a whole number"),
        ("preprocess", [], {"SLURM_ARRAY_TASK_ID": 5, "SLURM_ARRAY_TASK_COUNT": 2}, "from 0 to 5 does not"),
    ],
)  # fmt: skip
def test_a_job_that_does_not_fit_is_refused(
    job: Job, stage: str, overrides: list[str], variables: dict[str, object], complaint: str
) -> None:
    found = job.at(**variables).call("begin", stage, *overrides, code=1)
    assert complaint in found["said"]
    assert not job.run_dir.exists()


def test_what_the_configuration_leaves_open_goes(job: Job) -> None:
    job.at(SLURM_JOB_NUM_NODES=4, SLURM_GPUS_ON_NODE=8).call("begin", "train")
    job.at(SLURM_JOB_NUM_NODES=1, SLURM_JOB_ID=1).call("begin", "evaluate")


def test_outside_a_job(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    assert "not inside a Slurm job" in job.call("begin", "train", code=1)["said"]


@pytest.mark.parametrize("arguments", [["begin"], ["start", "train"], ["begin", "sft"], ["begin", "train"]])
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


def test_it_needs_no_torch(job: Job) -> None:
    script = (
        "import sys; from megatron_tokedit.cli.slurm_job import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", script, "begin", "train", *job.run.arguments]
    done = subprocess.run(command, env=clean_environment(SLURM_JOB_ID="1"), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "complete=0" in done.stdout
