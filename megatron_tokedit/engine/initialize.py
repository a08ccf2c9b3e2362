"""Starts the process group and megatron-core's parallel state, and hands out what the ranks are.

Invariant: every size is checked against the world size before any rank waits for another, and the same code
serves torchrun, one plain process, and a process group that somebody else has already made.
"""

from __future__ import annotations

import datetime
import os
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_tokedit.config.sections import ParallelConfig
from megatron_tokedit.engine import core_mends, cpu_device, preflight
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)


@dataclass(slots=True)
class ParallelContext:
    """Where this process stands among the others; passed around instead of global state."""

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    device: torch.device
    backend: str
    owns_process_group: bool
    cp_rank: int = 0
    cp_size: int = 1
    ep_size: int = 1
    vp_size: int = 1

    @property
    def is_first_stage(self) -> bool:
        """This rank holds the embedding (in its first chunk)."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """This rank holds the output layer (in its last chunk) and computes the loss."""
        return self.pp_rank == self.pp_size - 1

    def barrier(self) -> None:
        """Wait for all ranks. Collective over the world."""
        if self.world_size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def destroy(self) -> None:
        """Tear down megatron-core's groups, and the process group if it was made here. Collective."""
        from megatron.core import parallel_state
        from megatron.core.rerun_state_machine import destroy_rerun_state_machine

        parallel_state.destroy_model_parallel()
        destroy_rerun_state_machine()
        if self.owns_process_group and dist.is_initialized():
            dist.destroy_process_group()


def _check_sizes(parallel: ParallelConfig, world_size: int) -> None:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, ep = parallel.context_parallel_size, parallel.expert_model_parallel_size
    copy_size = tp * pp * cp
    if world_size % copy_size:
        context = f" x context_parallel_size={cp}" if cp > 1 else ""
        raise ConfigError(
            f"parallel: {world_size} ranks cannot be split into tensor_model_parallel_size={tp} x "
            f"pipeline_model_parallel_size={pp}{context} = {copy_size} ranks a model copy; start a multiple "
            f"of {copy_size} ranks (torchrun --nproc-per-node {copy_size}) or change the sizes"
        )
    if world_size // (tp * pp) % ep:
        raise ConfigError(
            f"parallel.expert_model_parallel_size: {ep} does not divide the {world_size // (tp * pp)} "
            f"data-parallel ranks ({world_size} ranks / {tp * pp}); start a multiple of {tp * pp * ep} ranks"
        )


def _check_context_parallel(parallel: ParallelConfig, device_type: str) -> None:
    size = parallel.context_parallel_size
    if size == 1:
        return
    missing = "no CUDA device" if device_type == "cpu" else None
    if missing is None and preflight.probe().transformer_engine is None:
        missing = 'no Transformer Engine (pip install --no-build-isolation -e ".[fp8]")'
    if missing:
        raise ConfigError(
            f"parallel.context_parallel_size: {size} needs Transformer Engine's attention on a GPU, and this "
            f"machine has {missing}; set it to 1"
        )


def _set_threads(device_type: str, cpu_threads: int | None) -> None:
    """Share the usable cores among the ranks of this node; unset, OMP_NUM_THREADS of the environment wins."""
    if cpu_threads is None and "OMP_NUM_THREADS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if cpu_threads is None:
        if device_type != "cpu":
            return
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cpu_threads = max(1, len(os.sched_getaffinity(0)) // local_ranks)
    torch.set_num_threads(cpu_threads)


def _start_process_group(device_type: str, timeout_minutes: int, standalone: bool) -> bool:
    """Make the default process group unless there is one; returns whether it was made here."""
    if dist.is_initialized():
        return False
    backend = "nccl" if device_type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if not standalone and "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    return True


def seed_everything(seed: int, pp_rank: int, *, cuda_graphs: bool = False) -> None:
    """Seed python, numpy, torch and megatron-core's tensor-parallel states.

    As in Megatron-LM: pipeline stages differ, tensor-parallel ranks differ inside tensor-parallel regions
    only, and data-parallel ranks share their seed. ``cuda_graphs``: keep the states so that graphs hold them;
    Transformer Engine's attention takes no tracker but its own into a graph.
    """
    from megatron.core import tensor_parallel

    seed = seed + 100 * pp_rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed,
        te_rng_tracker=cuda_graphs and preflight.probe().transformer_engine is not None,
        force_reset_rng=True,
        use_cudagraphable_rng=cuda_graphs,
    )


def current_context(*, owns_process_group: bool = False) -> ParallelContext:
    """Describe the parallel state that megatron-core is in now."""
    from megatron.core import parallel_state

    on_cuda = torch.cuda.is_available()
    return ParallelContext(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        device=torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu"),
        backend=dist.get_backend(),
        owns_process_group=owns_process_group,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        vp_size=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
    )


def describe(context: ParallelContext) -> str:
    """The layout in words, sizes of 1 left out but for the three usual ones."""
    sizes = {"context": context.cp_size, "expert": context.ep_size, "chunks a stage": context.vp_size}
    more = "".join(f", {name} {size}" for name, size in sizes.items() if size > 1)
    return (
        f"{context.world_size} rank(s): tensor {context.tp_size} x pipeline {context.pp_size} x "
        f"data {context.dp_size}{more}, {torch.get_num_threads()} thread(s) a rank"
    )


def initialize(
    parallel: ParallelConfig,
    *,
    seed: int,
    device: str = "auto",
    cpu_threads: int | None = None,
    standalone: bool = False,
    cuda_graphs: bool = False,
) -> ParallelContext:
    """Start distributed work; every rank of the job must call it.

    Args:
        parallel: model-parallel sizes; what remains of the world size is data parallel.
        seed: the run's seed.
        device: ``auto``, ``cpu`` or ``cuda``.
        cpu_threads: torch threads of this rank on CPU; default: usable cores / ranks on this node.
        standalone: be a world of one, whatever launcher started this process.
        cuda_graphs: layers will be recorded in CUDA graphs (``precision.cuda_graph_impl``).

    Raises:
        ConfigError: sizes that do not divide the world size, a device that is not there or cannot do what is
            asked, or a broken optional package.
    """
    if parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1:
        # megatron-core counts on kernels running in launch order, to overlap a collective with a product
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    preflight.check()
    device_type, reason = preflight.resolve_device(device)
    world_size = 1 if standalone else int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized():
        world_size = dist.get_world_size()
    _check_sizes(parallel, world_size)
    _check_context_parallel(parallel, device_type)
    _set_threads(device_type, cpu_threads)
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    cpu_device.install()
    core_mends.install()
    owns = _start_process_group(device_type, parallel.distributed_timeout_minutes, standalone)

    from megatron.core import parallel_state

    chunks = parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        create_gloo_process_groups=device_type == "cuda",
    )
    context = current_context(owns_process_group=owns)
    seed_everything(seed, context.pp_rank, cuda_graphs=cuda_graphs)
    logger.info("%s on %s (%s), %s", describe(context), device_type, reason, context.backend)
    return context
