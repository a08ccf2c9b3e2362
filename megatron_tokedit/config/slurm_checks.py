"""Checks of the Slurm jobs against the run that they carry."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_tokedit.config.arithmetic import near_multiples
from megatron_tokedit.config.data import DataConfig
from megatron_tokedit.config.faults import Fault
from megatron_tokedit.config.model import ParallelConfig
from megatron_tokedit.config.parallel_checks import smallest_world
from megatron_tokedit.config.slurm import SlurmConfig

WARNING_SECONDS = {"preprocess": 120, "train": 300}
"""The stages' scripts in slurm/ are told so long before the time limit (``#SBATCH --signal``), by default."""


def _world(parallel: ParallelConfig, slurm: SlurmConfig) -> Iterator[Fault]:
    """The training job's ranks make whole copies of the model."""
    world, copy = slurm.train.world_size, smallest_world(parallel)
    if world is not None and world % copy:
        yield Fault(
            ("slurm", "train", "nodes"),
            f"{slurm.train.nodes} x gpus_per_node = {slurm.train.gpus_per_node} makes {world} ranks, and the "
            f"layout under `parallel` needs a multiple of {copy}; {near_multiples(world, copy)}",
        )


def _time_limits(slurm: SlurmConfig) -> Iterator[Fault]:
    """A job that goes on after its time limit has time to do something before it is told to stop."""
    for name, usual in WARNING_SECONDS.items():
        stage = getattr(slurm, name)
        warning = stage.signal or usual
        if stage.seconds is not None and stage.seconds < 2 * warning:
            yield Fault(
                ("slurm", name, "time"),
                f"{stage.time} is shorter than {2 * warning / 60:g} minutes: the job is told to stop "
                f"{warning / 60:g} minutes before its end ({name}.signal), and would get little or nothing "
                f"done",
            )


def _gres_types(slurm: SlurmConfig) -> Iterator[Fault]:
    for name in ("preprocess", "train", "evaluate"):
        stage = getattr(slurm, name)
        if stage is not None and stage.gres_type is not None and stage.gpus_per_node is None:
            yield Fault(("slurm", name, "gres_type"), "has no effect without gpus_per_node")


def _evaluation(slurm: SlurmConfig, data: DataConfig) -> Iterator[Fault]:
    if slurm.evaluate is not None and not data.validation:
        yield Fault(("slurm", "evaluate"), "there is nothing to evaluate on: data.validation is empty")


CHECKS: tuple[Callable[..., Iterator[Fault]], ...] = (
    _world,
    _time_limits,
    _gres_types,
    _evaluation,
)
