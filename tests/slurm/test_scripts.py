"""slurm/*.sh render the right commands and answer signals; Slurm's own programs are fakes that behave."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fake_slurm import JOB, ROOT, FakeSlurm

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
PORT = 20000 + int(JOB) * 4 % 12000
TOOLS = ROOT / "tools"
NODE = ["bash", f"{ROOT}/slurm/node.sh"]


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


def srun(nodes: int, *options: str) -> list[str]:
    return [
        f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--overlap",
        "--export=ALL", *options,
    ]  # fmt: skip


def torchrun(nodes: int, node: int, ranks: int, port: int, *arguments: str) -> list[str]:
    return [
        f"--nnodes={nodes}", f"--node-rank={node}", f"--nproc-per-node={ranks}",
        "--master-addr=addr-of-node0", f"--master-port={port}", "--rdzv-conf=timeout=300",
        f"{TOOLS}/train.py", *arguments,
    ]  # fmt: skip


@pytest.mark.parametrize(("nodes", "gpus"), [(1, None), (2, 8), (64, 8)])
def test_checks_prepares_then_trains_on_every_node(slurm: FakeSlurm, nodes: int, gpus: int | None) -> None:
    slurm.environment["SLURM_JOB_NUM_NODES"] = str(nodes)
    if gpus:
        slurm.environment["SLURM_GPUS_ON_NODE"] = str(gpus)
    slurm.begins_with(missing_sources=2, gpu_type="h100" if gpus else "")
    run = ["--config", "run.yaml", "training.train_steps=7", "data.train.0.name=a b"]
    slurm.run("pretrain_edited.sh", *run[1:])

    names = ",".join(f"node{node}" for node in range(nodes))
    check = [
        f"{TOOLS}/node_check.py", "--nodes", str(nodes), "--node-names", names, "--master-addr",
        "addr-of-node0", "--master-port", str(PORT), "--path", f"{slurm.folder}/run", "--join-timeout", "300",
        *(["--gpu-type", "h100"] if gpus else []),
    ]  # fmt: skip
    begin = [f"{TOOLS}/slurm_job.py", "begin", "train", *run]
    end = [f"{TOOLS}/slurm_job.py", "end", "train", *run]
    train = [f"{TOOLS}/train.py", *run]
    head = srun(1, "--nodelist=node0")
    assert slurm.calls("srun") == [
        [*head, *NODE, "python", *begin],
        [*srun(nodes, "--job-name=check"), *NODE, "python", *check],
        [*srun(nodes, "--job-name=prepare"), *NODE, "torchrun", *train, "--prepare"],
        [*head, *NODE, "python", *end],
        [*srun(nodes, "--job-name=train"), *NODE, "torchrun", *train],
        [*head, *NODE, "python", *end],
    ]
    assert slurm.calls("torchrun") == [
        torchrun(nodes, node, gpus or 1, port, *run, *more)
        for port, more in ((PORT + 1, ["--prepare"]), (PORT + 2, []))
        for node in range(nodes)
    ]


MOUNTS = "{root}:{root},{folder}:{folder},/data:/data"


@pytest.mark.parametrize("gpus", [None, 4])
@pytest.mark.parametrize("image", ["nvcr.io#nvidia/pytorch:26.01-py3", "/images/torch.sif"])
def test_commands_run_inside_a_container(slurm: FakeSlurm, image: str, gpus: int | None) -> None:
    slurm.environment |= {"TOKEDIT_CONTAINER": image, "TOKEDIT_CONTAINER_MOUNTS": "/data:/data"}
    slurm.environment |= {"SLURM_JOB_NUM_NODES": "2", "TOKEDIT_NODE_CHECK": "0"}
    if gpus:
        slurm.environment["SLURM_GPUS_ON_NODE"] = str(gpus)
    slurm.run("pretrain_edited.sh", "run.yaml")
    mounts = MOUNTS.format(root=ROOT, folder=slurm.folder)
    options, inside = [], []
    if image.endswith(".sif"):
        inside = [
            "apptainer",
            "exec",
            *(["--nv"] if gpus else []),
            "--bind",
            mounts,
            "--pwd",
            str(slurm.folder),
            image,
        ]
    else:
        options = [
            f"--container-image={image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={slurm.folder}",
        ]
    train = ["torchrun", f"{TOOLS}/train.py", "--config", "run.yaml"]
    assert slurm.calls("srun")[1] == [*srun(2, "--job-name=train"), *options, *inside, *NODE, *train]
    assert len(slurm.calls("torchrun")) == 2


@pytest.mark.parametrize(
    ("plugin", "options"), [("task/affinity,task/cgroup", ["--cpu-bind=none"]), ("(null)", [])]
)
def test_a_task_is_not_bound_to_one_core(slurm: FakeSlurm, plugin: str, options: list[str]) -> None:
    slurm.environment |= {"FAKE_TASK_PLUGIN": plugin, "TOKEDIT_NODE_CHECK": "0"}
    slurm.run("pretrain_edited.sh", "run.yaml")
    expected = [*srun(1), *options, "--job-name=train"]
    assert slurm.calls("srun")[1][: len(expected)] == expected


@pytest.mark.parametrize(
    ("arguments", "array", "stage", "launcher"),
    [
        (["run.yaml", "seed=1"], None, "all", "torchrun"),
        (["run.yaml", "seed=1"], "3", "edit", "torchrun"),
        (["--merge", "run.yaml", "seed=1"], None, "merge", "python"),
    ],
)
def test_preprocessing_by_stage(
    slurm: FakeSlurm, arguments: list[str], array: str | None, stage: str, launcher: str
) -> None:
    slurm.environment["TOKEDIT_NODE_CHECK"] = "0"
    if array:
        slurm.environment |= {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": array}
    said = slurm.run("preprocess_edit.sh", *arguments)
    first, step, *_ = slurm.calls("srun")
    name = "merge" if stage == "merge" else "preprocess"
    assert first[-6:] == [f"{TOOLS}/slurm_job.py", "begin", name, "--config", "run.yaml", "seed=1"]
    program = [launcher, f"{TOOLS}/train.py", "--config", "run.yaml", "seed=1", "--prepare", "--stage", stage]
    assert step[-len(program) :] == program
    assert ("job 4700_3 " if array else f"job {JOB} ") in said


def test_evaluation(slurm: FakeSlurm) -> None:
    slurm.run("evaluate.sh", "run.yaml", "seed=1")
    command = [f"{TOOLS}/evaluate.py", "perplexity", "--config", "run.yaml", "seed=1"]
    assert command in slurm.calls("python")


@pytest.mark.parametrize("stage", ["pretrain", "continue"])
def test_continual_pretraining_wants_a_run_that_continues(slurm: FakeSlurm, stage: str) -> None:
    slurm.begins_with(run_stage=stage)
    said = slurm.run("continual_pretrain.sh", "run.yaml", code=int(stage == "pretrain"))
    assert len(slurm.calls("torchrun")) == int(stage == "continue")
    assert ("use pretrain_edited.sh" in said) == (stage == "pretrain")


@pytest.mark.parametrize(
    ("stage", "instead"),
    [("sft", ""), ("pretrain", "pretrain_edited.sh"), ("continue", "continual_pretrain.sh")],
)
def test_fine_tuning_wants_a_run_of_conversations(slurm: FakeSlurm, stage: str, instead: str) -> None:
    slurm.environment["TOKEDIT_NODE_CHECK"] = "0"
    slurm.begins_with(run_stage=stage)
    said = slurm.run("sft.sh", "run.yaml", "seed=1", code=int(stage != "sft"))
    train = [f"{TOOLS}/train.py", "--config", "run.yaml", "seed=1"]
    assert [call[-4:] for call in slurm.calls("torchrun")] == ([train] if stage == "sft" else [])
    assert not instead or f"the stage is {stage}; use {instead}" in said


def test_a_complete_run_starts_nothing(slurm: FakeSlurm) -> None:
    slurm.begins_with(complete=1)
    assert "nothing to do" in slurm.run("pretrain_edited.sh", "run.yaml")
    assert len(slurm.calls("srun")) == 1


# ------------------------------------------------------------------------------------------- ends of a step


@pytest.mark.parametrize("step", ["check", "prepare", "train"])
def test_a_failed_step_ends_the_job(slurm: FakeSlurm, step: str) -> None:
    slurm.environment |= {"SLURM_JOB_NUM_NODES": "2", f"FAKE_{step.upper()}_EXIT": "3"}
    slurm.begins_with(missing_sources=1)
    said = slurm.run("pretrain_edited.sh", "run.yaml", code=3)
    assert f"step {step} FAILED (exit code 3), first on node0" in said
    steps = [word for call in slurm.calls("srun") for word in call if word.startswith("--job-name=")]
    assert steps[-1] == f"--job-name={step}"
    assert not any("requeue" in call for call in slurm.calls("scontrol"))


@pytest.mark.parametrize("array", [False, True])
def test_a_step_that_stopped_in_order_is_a_requeue(slurm: FakeSlurm, array: bool) -> None:
    """torchrun says 1 whatever its ranks say; the run folder tells a time limit from an error."""
    slurm.environment |= {"FAKE_TRAIN_EXIT": "1", "FAKE_PREPARE_EXIT": "1", "TOKEDIT_NODE_CHECK": "0"}
    slurm.environment["FAKE_END"] = "continue=1 progress='step 3 of 10; to be continued'"
    if array:
        slurm.environment |= {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "3"}
    said = slurm.run("preprocess_edit.sh" if array else "pretrain_edited.sh", "run.yaml")
    assert ["requeue", "4700_3" if array else JOB] in slurm.calls("scontrol")
    assert "step 3 of 10; to be continued" in said


def test_a_node_whose_processes_are_killed_is_no_stop_in_order(slurm: FakeSlurm) -> None:
    """The ranks of the other nodes are told by TERM, and save; the cause is named instead of queued again."""
    slurm.environment |= {"FAKE_TRAIN_EXIT": "137", "FAKE_DEATH": "Killed", "TOKEDIT_NODE_CHECK": "0"}
    slurm.environment["FAKE_END"] = "continue=1 progress='step 3 of 10; stopped by SIGTERM'"
    said = slurm.run("pretrain_edited.sh", "run.yaml", code=137)
    assert "step train FAILED (exit code 137), first on node0: node0: task 0: Killed" in said
    assert not any("requeue" in call for call in slurm.calls("scontrol"))


def test_a_job_that_slurm_is_ending_is_not_queued_again(slurm: FakeSlurm) -> None:
    """After a user's scancel `scontrol requeue` would put it back, also where TERM has not come yet."""
    slurm.environment |= {"FAKE_TRAIN_EXIT": "1", "FAKE_STATE": "COMPLETING", "TOKEDIT_NODE_CHECK": "0"}
    slurm.environment["FAKE_END"] = "continue=1 progress='step 3 of 10'"
    slurm.run("pretrain_edited.sh", "run.yaml", code=143)
    assert not any("requeue" in call for call in slurm.calls("scontrol"))


def wait_for_step(slurm: FakeSlurm) -> None:
    deadline = time.monotonic() + 30
    while not slurm.calls("torchrun"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_usr1_asks_the_ranks_then_requeues(slurm: FakeSlurm) -> None:
    slurm.environment |= {"FAKE_TORCHRUN_SLEEP": "2", "FAKE_TRAIN_EXIT": "1", "TOKEDIT_NODE_CHECK": "0"}
    slurm.environment["FAKE_END"] = "continue=1 progress='step 3 of 10'"
    job = slurm.start("pretrain_edited.sh", "run.yaml")
    wait_for_step(slurm)
    job.send_signal(signal.SIGCONT)  # as Slurm does ahead of a time limit
    job.send_signal(signal.SIGUSR1)
    said = slurm.finish(job)
    assert slurm.calls("scancel")[0] == ["--signal=USR1", JOB]
    assert ["requeue", JOB] in slurm.calls("scontrol")
    assert "told by USR1" in said


def test_usr1_before_anything_else_is_remembered(slurm: FakeSlurm) -> None:
    slurm.environment["TOKEDIT_ROOT"] = str(slurm.folder)
    (slurm.folder / "slurm").mkdir()
    library = f"kill -USR1 $$; export TOKEDIT_ROOT={ROOT}; source {ROOT}/slurm/lib.sh\n"
    (slurm.folder / "slurm" / "lib.sh").write_text(library)
    said = slurm.run("pretrain_edited.sh", "run.yaml")
    assert "told by USR1" in said
    assert ["requeue", JOB] in slurm.calls("scontrol")


def test_term_is_slurms_own_end_of_the_job(slurm: FakeSlurm) -> None:
    slurm.environment |= {"FAKE_TORCHRUN_SLEEP": "2", "FAKE_TRAIN_EXIT": "1", "TOKEDIT_NODE_CHECK": "0"}
    slurm.environment["FAKE_END"] = "continue=1 progress='step 3 of 10'"
    job = slurm.start("pretrain_edited.sh", "run.yaml")
    wait_for_step(slurm)
    job.send_signal(signal.SIGTERM)
    slurm.finish(job, 143)
    assert not any("requeue" in call for call in slurm.calls("scontrol"))


# ------------------------------------------------------------------------------------------------------ usage


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if "#SBATCH" in path.read_text()])
def test_usage(slurm: FakeSlurm, script: str) -> None:
    for arguments in ([], ["training.train_steps=7"]):
        assert "usage: sbatch" in slurm.run(script, *arguments, code=2)
    assert "absent.yaml does not exist, seen from" in slurm.run(script, "absent.yaml", code=1)
    assert not slurm.calls("srun")


@pytest.mark.parametrize(("called_in", "path"), [("tests/slurm", "../../slurm/"), ("slurm", "")])
def test_the_project_is_found_from_a_relative_path(slurm: FakeSlurm, called_in: str, path: str) -> None:
    slurm.environment["SLURM_SUBMIT_DIR"] = str(ROOT / called_in)
    slurm.environment["FAKE_COMMAND"] = f"{path}pretrain_edited.sh run.yaml"
    assert "slurm: " in slurm.run("pretrain_edited.sh", "run.yaml")
    slurm.environment["FAKE_COMMAND"] = "/elsewhere/pretrain_edited.sh run.yaml"
    assert "the project is not found" in slurm.run("pretrain_edited.sh", "run.yaml", code=1)


def test_a_script_outside_a_job_says_so(slurm: FakeSlurm) -> None:
    del slurm.environment["SLURM_JOB_ID"]
    assert "SLURM_JOB_ID" in slurm.run("pretrain_edited.sh", "run.yaml", code=1)


@pytest.mark.parametrize("ranks", ["two", "0"])
def test_ranks_per_node_is_a_number(slurm: FakeSlurm, ranks: str) -> None:
    slurm.environment["RANKS_PER_NODE"] = ranks
    assert f"RANKS_PER_NODE={ranks}: expected" in slurm.run("pretrain_edited.sh", "run.yaml", code=1)


def test_scripts_pass_bash_syntax_check() -> None:
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck() -> None:
    done = subprocess.run(
        ["shellcheck", "-x", *(str(path.relative_to(ROOT)) for path in SCRIPTS)],
        cwd=ROOT, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_what_a_site_prints_is_not_taken_for_an_answer(slurm: FakeSlurm) -> None:
    """A module system's greeting, or a container's, in front of what the tool says."""
    slurm.environment["FAKE_BEGIN"] = "Loading: cuda/13.0 (default)\n" + slurm.environment["FAKE_BEGIN"]
    said = slurm.run("pretrain_edited.sh", "run.yaml")
    assert "step 0 of 10" in said
    assert "Loading" not in said
    assert len(slurm.calls("torchrun")) == 1


def test_a_site_may_use_variables_that_are_not_set(slurm: FakeSlurm, tmp_path: Path) -> None:
    """As conda's activation does; a virtual environment stands in for it."""
    activate = tmp_path / "venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text('echo "hello $NOT_SET"\nfalse\nmodule load cuda\n')
    slurm.environment["TOKEDIT_VENV"] = str(tmp_path / "venv")
    slurm.run("pretrain_edited.sh", "run.yaml")
    assert len(slurm.calls("torchrun")) == 1


def test_a_run_folder_that_only_the_container_sees(slurm: FakeSlurm) -> None:
    slurm.environment["TOKEDIT_CONTAINER"] = "image.sqsh"
    slurm.begins_with(log_dir=slurm.folder / "elsewhere")
    said = slurm.run("pretrain_edited.sh", "run.yaml", code=1)
    assert "name its file system in TOKEDIT_CONTAINER_MOUNTS" in said
    assert not slurm.calls("torchrun")
