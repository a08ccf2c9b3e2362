"""What a rank asserts before anything expensive: the world, its nodes, its GPU."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prepare_cases import ROOT, TINY, PreparedRun, clean_environment

from megatron_tokedit.cli.world_check import (
    check_gpu_type,
    check_world,
    gpu_in_words,
    gpu_name,
    refuse_idle_gpus,
    refuse_other_gpu,
)
from megatron_tokedit.config.load import load_config
from megatron_tokedit.errors import ConfigError

JOB = {"TOKEDIT_EXPECTED_WORLD_SIZE": "16", "TOKEDIT_EXPECTED_NODES": "2", "RANKS_PER_NODE": "8"}
RANK_12 = {
    "SLURMD_NODENAME": "gpu07", "RANK": "12",
    "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2",
}  # fmt: skip


def complaint(environment: dict[str, str], **options: bool) -> str:
    with pytest.raises(ConfigError) as raised:
        check_world(environment, **options)
    return str(raised.value)


def test_what_is_as_expected_goes() -> None:
    check_world({})
    check_world(RANK_12)
    check_world(JOB | RANK_12)
    check_world(JOB | {name: value for name, value in RANK_12.items() if name != "GROUP_WORLD_SIZE"})
    check_world({"TOKEDIT_EXPECTED_WORLD_SIZE": "1", "TOKEDIT_EXPECTED_NODES": "1", "RANKS_PER_NODE": "1"})
    check_world(JOB, alone=True)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}, "the world size is 8, expected 16 (TOKEDIT"),
        ({"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}, "the number of nodes is 1, expected 2 (TOKEDIT"),
        ({"LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "4"}, "ranks on this node is 4, expected 8 (RANKS"),
        ({"WORLD_SIZE": "many"}, "environment variable WORLD_SIZE='many': expected a whole number"),
    ],
)  # fmt: skip
def test_another_world_is_refused(found: dict[str, str], expected: str) -> None:
    message = complaint(JOB | RANK_12 | found)
    assert message.startswith("node gpu07 rank 12: ")
    assert expected in message


def test_a_world_of_one_where_sixteen_are_expected() -> None:
    message = complaint(JOB)
    assert message.startswith(f"node {socket.gethostname()} rank 0: ")
    assert "the world size is 1, expected 16" in message


def test_tasks_of_a_step_without_a_launcher() -> None:
    """Sixteen worlds of one; the batch script itself has the variables of the job, but is in no step."""
    batch = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURMD_NODENAME": "n1"}
    check_world(batch)
    step = batch | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "16"}
    assert "node n1 rank 3: this step has 16 tasks and no launcher, so each of 16" in complaint(step)
    check_world(step | {"WORLD_SIZE": "16", "RANK": "3"})
    check_world(step | {"SLURM_STEP_NUM_TASKS": "1"})
    check_world(step, alone=True)


def test_the_type_of_the_gpu() -> None:
    environment = {"SLURM_JOB_ID": "1", "SLURMD_NODENAME": "gpu07", "RANK": "12"}
    config = load_config(TINY, ["slurm.train.gpu_type=h100"])
    check_gpu_type(config, environment, "NVIDIA H100 80GB HBM3")
    check_gpu_type(config, {}, "NVIDIA A100-SXM4-80GB")  # not in a job of Slurm
    check_gpu_type(load_config(TINY), environment, None)
    for name, shown in (("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB"), (None, "no GPU")):
        with pytest.raises(
            ConfigError, match=f"node gpu07 rank 12: slurm.train.gpu_type is h100, and this rank has {shown};"
        ):
            check_gpu_type(config, environment, name)


def test_gpus_of_two_kinds() -> None:
    here = gpu_in_words({"SLURMD_NODENAME": "n2", "RANK": "8"}, "NVIDIA A100")
    first = gpu_in_words({"SLURMD_NODENAME": "n1", "RANK": "0"}, "NVIDIA H100")
    with pytest.raises(
        ConfigError, match="node n2 rank 8: NVIDIA A100, but node n1 rank 0: NVIDIA H100; ask"
    ):
        refuse_other_gpu(here, first)
    refuse_other_gpu(here, here.replace("n2", "n3"))


def test_the_gpu_of_a_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert gpu_name(load_config(TINY)) == "GPU 3"
    assert gpu_name(load_config(TINY, ["runtime.device=cpu"])) is None


def test_a_wrong_world_ends_before_torch_is_imported(tmp_path: Path) -> None:
    """And before anything is written; with one message, from rank 0, under torchrun."""
    run = PreparedRun(tmp_path / "out")
    script = (
        "import sys; from megatron_tokedit.cli.train import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script, *run.arguments],
        cwd=ROOT, env=clean_environment(**JOB), text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "the world size is 1, expected 16" in done.stderr
    assert time.monotonic() - begin < 20
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tools/train.py")
    process = run.start(script=launcher, only_prepare=False, **JOB)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.count("error: ") == 1
    assert "rank 0: " in said
    assert "the world size is 2, expected 16" in said
    assert "the number of nodes is 1, expected 2" in said
    assert not run.folder.exists()


def test_a_rank_with_another_gpu_is_refused_before_the_process_group(tmp_path: Path) -> None:
    """Two ranks whose GPUs are said to differ."""
    script = tmp_path / "mixed.py"
    script.write_text(
        "import os, sys\n"
        "from megatron_tokedit.cli import train\n"
        "train.gpu_name = lambda config: 'NVIDIA ' + ('H100', 'A100')[int(os.environ['RANK'])]\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    run = PreparedRun(tmp_path / "out")
    run.call()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    process = run.start(
        script=launcher, only_prepare=False, PYTHONPATH=str(ROOT), **{"SLURMD_NODENAME": "n1"}
    )
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: the ranks of this job have different GPUs: node n1 rank 1: NVIDIA A100, but node" in said
    assert not (run.folder / "run" / "checkpoints").exists()


def test_gpus_that_no_rank_would_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    job = {"TOKEDIT_RANKS_ARE_ASKED_FOR": "", "LOCAL_WORLD_SIZE": "1", "SLURMD_NODENAME": "gpu07"}
    config = load_config(TINY)
    with pytest.raises(ConfigError, match=r"node gpu07 rank 0: 8 GPUs .* 1 rank\(s\) .*--gpus-per-node=8"):
        refuse_idle_gpus(config, job)
    refuse_idle_gpus(config, job | {"LOCAL_WORLD_SIZE": "8"})
    refuse_idle_gpus(config, job | {"TOKEDIT_RANKS_ARE_ASKED_FOR": "1"})
    refuse_idle_gpus(config, {"LOCAL_WORLD_SIZE": "1"})  # not a job of the scripts
