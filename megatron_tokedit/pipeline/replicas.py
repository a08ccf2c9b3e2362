"""Priors that several processes hold together: which replica this process belongs to, and its part there.

    torchrun --nproc-per-node 8 tools/preprocess_edit.py ... --prior-tensor-parallel 4

starts 8 processes: replica 0 of processes 0 to 3, replica 1 of processes 4 to 7. The first process of a
replica does the job's work units, a share of one of as many shares as there are replicas; the others follow
it. Invariant: replicas share only the file system, as processes that have a prior each do, so the number of
replicas changes no byte.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.pipeline.placement import WHOLE, Share, placement

if TYPE_CHECKING:  # these import torch
    from megatron_tokedit.scoring.identity import PriorLayout
    from megatron_tokedit.scoring.replica_group import Replica

Outcome = TypeVar("Outcome")
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_own: Replica | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands.

    Attributes:
        index: number of its replica among those of this launcher.
        count: replicas of this launcher.
        rank: of the process in its replica; 0 leads.
        share: which of several launchers this is, as ``--rank`` and ``--world-size`` say.
    """

    index: int
    count: int
    rank: int
    share: Share

    @property
    def of_units(self) -> tuple[int, int]:
        """Rank and world size by which the replica's share of the work units is found."""
        return self.share.placement(self.index, self.count)


def needs_replicas(config: PreprocessConfig) -> bool:
    """Whether one process cannot run the prior of a job."""
    return config.edits and config.prior_ranks > 1


def find_place(
    config: PreprocessConfig,
    environment: Mapping[str, str],
    share: Share = WHOLE,
    command: Sequence[str] = (),
) -> Place:
    """This process's place among the replicas that its launcher started.

    Args:
        config: a job whose prior takes several processes.
        environment: the launcher's.
        share: which of several launchers this is.
        command: the arguments that the user gave, for the message.

    Raises:
        ConfigError: no launcher, a number of processes that replicas do not fit into, or fewer GPUs than
            processes.
    """
    size = config.prior_ranks
    sizes = f"prior_tensor_parallel={config.prior_tensor_parallel}"
    if config.prior_pipeline_parallel > 1:
        sizes += f" x prior_pipeline_parallel={config.prior_pipeline_parallel}"
    if any(name not in environment for name in _LAUNCHED):
        raise ConfigError(
            f"{sizes}: a copy of the prior takes {size} processes, and this one was started alone; start a "
            f"multiple of {size}, one a GPU:\n  torchrun --nproc-per-node {size} {_script(command)}"
        )
    rank, world_size = placement(environment)
    if world_size % size:
        raise ConfigError(
            f"{sizes}: a copy of the prior takes {size} processes, and {world_size} were started; start a "
            f"multiple of {size} (torchrun --nproc-per-node {size}) or change the sizes"
        )
    return Place(rank // size, world_size // size, rank % size, share)


def _script(command: Sequence[str]) -> str:
    """The command to start, as far as it is known."""
    return shlex.join(["tools/preprocess_edit.py", *command]) if command else "tools/preprocess_edit.py ..."


def run_in_replica(
    config: PreprocessConfig,
    place: Place,
    environment: Mapping[str, str],
    job: Callable[[PreprocessConfig, int, int], Outcome],
) -> Outcome | None:
    """Do this process's part: the job where it leads its replica, what the leader says where it does not.

    Args:
        config: the job.
        place: from :func:`find_place`.
        environment: the launcher's.
        job: is given the configuration, and rank and world size of the share of the work units.

    Returns:
        What the job came to; None in a process that follows.

    Raises:
        TokeditError: what the job raised; in the other processes that it did, or that one of them failed.
    """
    global _own
    from megatron_tokedit.scoring.identity import PriorLayout
    from megatron_tokedit.scoring.load import resolve_device
    from megatron_tokedit.scoring.replica import follow
    from megatron_tokedit.scoring.replica_group import join

    device = resolve_device(config.prior_device)
    if device.type == "cuda":
        _refuse_shared_gpus(environment)
    layout = PriorLayout(config.prior_tensor_parallel, config.prior_pipeline_parallel)
    with join(layout, index=place.index, rank=place.rank, device=device) as replica:
        if not replica.leads:
            follow(replica)
            return None
        _own = replica
        try:
            # in this process, which the others follow
            return job(config.model_copy(update={"workers": 1}), *place.of_units)
        finally:
            _own = None


def own_replica(layout: PriorLayout) -> Replica:
    """The replica that this process leads.

    Raises:
        ConfigError: there is none.
    """
    if _own is None:
        raise ConfigError(
            f"a copy of the prior takes {layout.num_ranks} processes (prior_tensor_parallel={layout.tensor}, "
            f"prior_pipeline_parallel={layout.pipeline}), and this one is alone; make the dataset with\n  "
            f"torchrun --nproc-per-node {layout.num_ranks} {_script(())}"
        )
    return _own


def _refuse_shared_gpus(environment: Mapping[str, str]) -> None:
    """Refuse more processes than GPUs on this node: NCCL takes one process a GPU.

    Raises:
        ConfigError: with both numbers.
    """
    import torch

    num_processes, num_gpus = int(environment["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if num_processes > num_gpus:
        raise ConfigError(
            f"{num_processes} processes on this node, and {num_gpus} GPU(s) for them: each needs its own; "
            f"start torchrun --nproc-per-node {num_gpus}, or show it more GPUs"
        )
