"""Saving and loading a checkpoint with its optimizer: ours, megatron-core's default, torch.save, a raw write.

    python benchmarks/checkpoint.py                                        # GPT-2 124M, bf16, one rank
    torchrun --nproc-per-node 2 benchmarks/checkpoint.py                   # ranks share writing and reading
    python benchmarks/checkpoint.py --shape 1b --recipe fp8_tensorwise --folder /scratch   # on a GPU
    python benchmarks/checkpoint.py --cold --folder /scratch               # loading from the disk itself

All write the same tensors (parameters, main parameters, Adam's moments) and sync them to the disk. Rates are
of the bytes in those tensors. "Asynchronous, blocking" is what training waits for; "until on the disk" is the
same save to its end, with nothing else going on. megatron-core's default strategy starts writer processes at
every save. "torch.save" and "raw write" are a file a rank of the tensors that this rank writes in ours.

Loading without --cold reads what the operating system still has in memory.
Limit: the raw write and the raw read.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from measuring import (  # noqa: E402
    GB,
    Report,
    Seconds,
    forget_cached,
    in_turns,
    median_ratio,
    parser,
    read_file,
    synchronize,
    write_file,
)
from shapes import SHAPES, Shape, shape_named  # noqa: E402

from megatron_tokedit.config.sections import (  # noqa: E402
    CheckpointConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
)
from megatron_tokedit.engine import checkpoint  # noqa: E402
from megatron_tokedit.engine.background_save import BackgroundSave  # noqa: E402
from megatron_tokedit.engine.initialize import initialize  # noqa: E402
from megatron_tokedit.engine.model import build_model  # noqa: E402
from megatron_tokedit.engine.optimizer import build_optimizer, build_scheduler  # noqa: E402
from megatron_tokedit.engine.step import train_step  # noqa: E402
from megatron_tokedit.errors import ConfigError  # noqa: E402
from megatron_tokedit.testing.models import random_batches  # noqa: E402

STEP_TOKENS = 64
Contestants = dict[str, Callable[[], object]]


class Run:
    """A model that has made one step, on this rank.

    Args:
        shape: of the model.
        args: the command line.
        folder: shared by the ranks.
    """

    def __init__(self, shape: Shape, args: argparse.Namespace, folder: Path) -> None:
        parallel, precision = ParallelConfig(), PrecisionConfig(recipe=args.recipe)
        self.ctx = initialize(parallel, seed=1, cpu_threads=args.threads)
        self.folder = folder_of_all(folder)
        settings = OptimizerConfig(lr=1e-3)
        self.model = build_model(
            shape.model, precision, self.ctx, shape.vocab_size, parallel=parallel, wrap_with_ddp=True
        )
        self.optimizer = build_optimizer(settings, precision, parallel, self.model, self.ctx)
        self.scheduler = build_scheduler(settings, ScheduleConfig(), self.optimizer, train_steps=100)
        self._description = {"model": shape.model.model_dump(), "precision": precision.model_dump()}
        sizes = {"micro_batch_size": 1, "seq_length": STEP_TOKENS}
        batches = random_batches(shape.vocab_size, num_microbatches=1, **sizes)
        train_step(self.model, self.optimizer, self.scheduler, batches, self.ctx, num_microbatches=1, **sizes)
        self.background = BackgroundSave()
        self.tensors = self._written_here()

    def save(self, *, background: bool = False, fully_parallel: bool = True) -> None:
        """Our save."""
        checkpoint.save(
            self.folder / "ours",
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            state={"step": 1, "vocab_size": 0},
            run_config=self._description,
            ctx=self.ctx,
            settings=CheckpointConfig(fully_parallel_save=fully_parallel),
            background=self.background if background else None,
        )

    def save_and_wait(self) -> None:
        """Our asynchronous save, to its end."""
        self.save(background=True)
        self.background.wait()

    def save_with_core(self) -> None:
        """megatron-core's default strategy over the same state."""
        from megatron.core import dist_checkpointing

        target = self.folder / "core"
        if self.ctx.rank == 0:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
        self.ctx.barrier()
        dist_checkpointing.save(self._sharded(is_loading=False), str(target))

    def load(self, *, fully_parallel: bool = False) -> None:
        """Our load."""
        checkpoint.load(
            self.folder / "ours",
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            ctx=self.ctx,
            fully_parallel=fully_parallel,
        )

    def save_with_torch(self) -> None:
        """torch.save of what this rank writes."""
        with self.file("torch").open("wb") as file:
            torch.save(self.tensors, file)
            file.flush()
            os.fsync(file.fileno())

    def load_with_torch(self) -> None:
        """torch.load, and copy into the tensors."""
        loaded = torch.load(self.file("torch"), map_location=self.ctx.device)
        for mine, theirs in zip(self.tensors, loaded, strict=True):
            mine.copy_(theirs)

    def write_raw(self) -> None:
        """The bytes alone."""
        write_file(self.file("raw"), (memoryview(t.cpu().view(torch.uint8).numpy()) for t in self.tensors))

    def file(self, name: str) -> Path:
        """A file of this rank."""
        return self.folder / f"{name}_{self.ctx.rank}"

    def _sharded(self, *, is_loading: bool) -> dict[str, Any]:
        return checkpoint._sharded_state(self.model, self.optimizer, self.scheduler, is_loading=is_loading)

    def _written_here(self) -> list[torch.Tensor]:
        """Copies of the tensors of the state that this rank is the one to write, one-dimensional."""
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import (
            ShardedTensor,
            ShardedTensorFactory,
            is_main_replica,
        )

        found = nested_values(self._sharded(is_loading=False))
        kinds = (ShardedTensor, ShardedTensorFactory)
        written = [v.data for v in found if isinstance(v, kinds) and is_main_replica(v.replica_id)]
        exact = [
            data.dequantize() if "Float8" in type(data).__name__ else data
            for data in written
            if torch.is_tensor(data)
        ]
        return [data.detach().clone().flatten() for data in exact if data.numel()]


def folder_of_all(folder: Path) -> Path:
    """Rank 0's folder, on every rank. Collective over the world."""
    names = [str(folder)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(names, src=0)
    return Path(names[0])


def savers(run: Run) -> Contestants:
    """What writes; the asynchronous one is waited for outside of the measured time."""
    made: Contestants = {"ours, synchronous": run.save}
    if run.ctx.dp_size > 1:
        made["ours, not fully parallel"] = lambda: run.save(fully_parallel=False)
    return made | {
        "ours, asynchronous, blocking": lambda: run.save(background=True),
        "ours, asynchronous, until on the disk": run.save_and_wait,
        "megatron-core's default": run.save_with_core,
        "torch.save": run.save_with_torch,
        "raw write": run.write_raw,
    }


def loaders(run: Run) -> Contestants:
    """What reads."""
    made: Contestants = {"ours": run.load}
    if run.ctx.dp_size > 1:
        made["ours, fully parallel"] = lambda: run.load(fully_parallel=True)
    made |= {"torch.load": run.load_with_torch, "raw read": lambda: read_file(run.file("raw"))}
    return made


def measure(run: Run, args: argparse.Namespace) -> tuple[Seconds, Seconds]:
    """Seconds of the savers and of the loaders, by the slowest rank."""

    def finish() -> None:
        synchronize(run.ctx.device)
        run.ctx.barrier()

    def drop() -> None:
        gc.collect()
        if args.cold and run.ctx.rank == 0:
            forget_cached(path for path in run.folder.rglob("*") if path.is_file())
        run.ctx.barrier()

    def settle() -> None:
        run.background.wait()
        run.ctx.barrier()

    saving = in_turns(savers(run), rounds=args.rounds, finish=finish, after=settle)
    drop()
    loading = in_turns(loaders(run), rounds=args.rounds, finish=finish, after=drop)
    return saving, loading


def total_bytes(run: Run) -> int:
    """Bytes of the tensors that all ranks write. Collective over the world."""
    count = torch.tensor([sum(t.numel() * t.element_size() for t in run.tensors)], device=run.ctx.device)
    dist.all_reduce(count)
    return int(count)


def report_rates(report: Report, saving: Seconds, loading: Seconds, num_bytes: int, title: str) -> None:
    """Print the tables and the ratios."""
    for what, seconds in (("saving", saving), ("loading", loading)):
        rows = [
            (name, statistics.median(v), num_bytes / GB / statistics.median(v), num_bytes / GB / min(v))
            for name, v in seconds.items()
        ]
        report.table(f"{what} {title}", ("s", "GB/s", "best"), rows)
    ours = saving["ours, synchronous"]
    for name in ("megatron-core's default", "torch.save", "raw write"):
        report.ratio(f"save: ours / {name}", median_ratio(saving[name], ours), "rate")
    blocking = saving["ours, asynchronous, blocking"]
    report.ratio(
        "save: asynchronous / synchronous, blocking", median_ratio(blocking, ours), "time; lower is better"
    )
    for name in ("torch.load", "raw read"):
        report.ratio(f"load: ours / {name}", median_ratio(loading[name], loading["ours"]), "rate")
    report.limit("raw write, synced", num_bytes / GB / min(saving["raw write"]), "GB/s")
    report.limit("raw read", num_bytes / GB / min(loading["raw read"]), "GB/s")


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    made = parser(__doc__)
    made.add_argument("--shape", choices=SHAPES, default="124m")
    made.add_argument("--layers", type=int, help="fewer layers than the shape has")
    made.add_argument("--recipe", default="bf16", help="a recipe of engine/precision.py")
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--threads", type=int, default=None)
    made.add_argument("--cold", action="store_true", help="load from the disk, not from memory's copy")
    made.add_argument("--folder", help="on the disk to measure; default: the temporary one")
    return made.parse_args()


def main() -> None:
    """Run the contestants and print the tables on rank 0."""
    args = parse()
    is_first = os.environ.get("RANK", "0") == "0"
    with Report("checkpoint", args.json, is_quiet=not is_first) as report:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        shape = shape_named(args.shape, args.layers)
        try:
            run = Run(shape, args, folder)
            saving, loading = measure(run, args)
            num_bytes = total_bytes(run)
            report.say(f"{shape.words}, {args.recipe}, {run.ctx.world_size} rank(s)")
            report_rates(report, saving, loading, num_bytes, f"{num_bytes / GB:.2f} GB")
            run.ctx.destroy()
        except ConfigError as error:
            report.skip(f"{args.shape} in {args.recipe}", str(error))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
