"""Whether the launcher started what the job was meant to be, before anything expensive is done.

Why: a rank that does not find the others trains alone and looks healthy; a job on a node with other GPUs runs
at the pace of the slowest. Invariant: every check is of facts that all ranks share, or names the rank that is
off, and says on which node.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.errors import ConfigError


def check_world(environment: Mapping[str, str], *, alone: bool = False) -> None:
    """Compare the launcher's world with the job's, as slurm/ exports it; without torch.

    ``TOKEDIT_EXPECTED_WORLD_SIZE``, ``TOKEDIT_EXPECTED_NODES`` and ``RANKS_PER_NODE`` count where the first
    is set.

    Args:
        environment: of this process.
        alone: a process without a launcher is in order: it was told its share, or its work is for one.

    Raises:
        ConfigError: names the node, the rank and what is off.
    """
    if "WORLD_SIZE" not in environment and alone:
        return
    tasks = _step_tasks(environment)
    if "WORLD_SIZE" not in environment and tasks > 1:
        raise ConfigError(
            f"{where(environment)}: this step has {tasks} tasks and no launcher, so each of {tasks} tasks "
            "would work alone; start one task a node (srun --ntasks-per-node=1) with torchrun in it, as the "
            "scripts in slurm/ do"
        )
    if "TOKEDIT_EXPECTED_WORLD_SIZE" not in environment:
        return
    found = _found(environment)
    faults = []
    for name, what in _EXPECTED.items():
        expected = _number(environment, name)
        if expected is not None and found[name] != expected:
            faults.append(f"{what} is {found[name]}, expected {expected} ({name})")
    if faults:
        raise ConfigError(
            f"{where(environment)}: not the ranks that the job has room for: {'; '.join(faults)}; "
            "check torchrun's --nnodes and --nproc-per-node, and that every node's launcher was started"
        )


_EXPECTED = {
    "TOKEDIT_EXPECTED_WORLD_SIZE": "the world size",
    "TOKEDIT_EXPECTED_NODES": "the number of nodes",
    "RANKS_PER_NODE": "the number of ranks on this node",
}


def where(environment: Mapping[str, str]) -> str:
    """``node gpu07 rank 12``: this process."""
    node = environment.get("SLURMD_NODENAME") or socket.gethostname()
    rank = environment.get("RANK") or environment.get("SLURM_PROCID") or "0"
    return f"node {node} rank {rank}"


def _step_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the Slurm step that this process is one of; 1 outside a step (the batch script is in none)."""
    if "SLURM_PROCID" not in environment or not environment.get("SLURM_STEP_ID", "").isdecimal():
        return 1
    return _number(environment, "SLURM_STEP_NUM_TASKS") or _number(environment, "SLURM_NTASKS") or 1


def _found(environment: Mapping[str, str]) -> dict[str, int]:
    """What the launcher says; a plain process is a world of its own."""
    world_size = _number(environment, "WORLD_SIZE") or 1
    on_node = _number(environment, "LOCAL_WORLD_SIZE") or world_size
    nodes = _number(environment, "GROUP_WORLD_SIZE") or -(-world_size // on_node)
    return dict(zip(_EXPECTED, (world_size, nodes, on_node), strict=True))


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if not value:
        return None
    if not value.isdecimal():
        raise ConfigError(
            f"{where(environment)}: environment variable {name}={value!r}: expected a whole number"
        )
    return int(value)


# ---------------------------------------------------------------------------------------------- GPUs


def gpu_name(config: RunConfig) -> str | None:
    """The model of this rank's GPU; None where it computes on a CPU."""
    import torch

    count = torch.cuda.device_count()
    if config.runtime.device == "cpu" or not count:
        return None
    return torch.cuda.get_device_name(int(os.environ.get("LOCAL_RANK", "0")) % count)


def check_gpu_type(config: RunConfig, environment: Mapping[str, str], name: str | None) -> None:
    """Refuse a GPU that is not of ``slurm.train.gpu_type``, inside a Slurm job.

    Args:
        config: the run's.
        environment: of this process.
        name: from :func:`gpu_name`.

    Raises:
        ConfigError: names the node and the GPU.
    """
    wanted = config.slurm.train.gpu_type
    if wanted is None or "SLURM_JOB_ID" not in environment:
        return
    if name is None or wanted.lower() not in name.lower():
        raise ConfigError(
            f"{where(environment)}: slurm.train.gpu_type is {wanted}, and this rank has {name or 'no GPU'}; "
            "ask for the right nodes (slurm.train.constraint or gres_type), leave this one out (sbatch "
            "--exclude), or change slurm.train.gpu_type"
        )


def refuse_idle_gpus(config: RunConfig, environment: Mapping[str, str]) -> None:
    """Refuse a job that starts fewer ranks a node than there are GPUs, unless ``RANKS_PER_NODE`` said so.

    A job without ``--gpus-per-node``, on a cluster that does not hide GPUs, would train on one of eight.

    Args:
        config: the run's.
        environment: of this process.

    Raises:
        ConfigError: names the node and both numbers.
    """
    import torch

    if config.runtime.device == "cpu" or environment.get("TOKEDIT_RANKS_ARE_ASKED_FOR") != "":
        return
    ranks, gpus = _number(environment, "LOCAL_WORLD_SIZE") or 1, torch.cuda.device_count()
    if ranks < gpus:
        raise ConfigError(
            f"{where(environment)}: {gpus} GPUs are visible and the job starts {ranks} rank(s) a node; "
            f"submit with --gpus-per-node={gpus}, or set RANKS_PER_NODE={ranks} to leave the others idle"
        )


def refuse_other_gpu(here: str, of_rank_zero: str) -> None:
    """Refuse a rank whose GPU is of another model than rank 0's: it would hang or slow down all others.

    Args:
        here: :func:`gpu_in_words` of this rank.
        of_rank_zero: and of rank 0.

    Raises:
        ConfigError: names both.
    """
    if here.partition(": ")[2] != of_rank_zero.partition(": ")[2]:
        raise ConfigError(
            f"the ranks of this job have different GPUs: {here}, but {of_rank_zero}; ask for nodes of one "
            "kind (slurm.train.constraint or gres_type), or leave the one that is off out (sbatch --exclude)"
        )


def gpu_in_words(environment: Mapping[str, str], name: str | None) -> str:
    """``node gpu07 rank 12: NVIDIA H100 80GB HBM3``."""
    return f"{where(environment)}: {name or 'no GPU'}"
