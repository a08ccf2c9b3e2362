"""``tools/train.py``: check, prepare, train.

Invariant: whatever can be found wrong without starting a process group is found before one is started.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_tokedit.cli.main import EXIT_OK, GOES_ON, add_common_arguments, run_command
from megatron_tokedit.cli.train_progress import progress_shown
from megatron_tokedit.cli.train_report import REQUEUE_FILE, print_progress, print_report
from megatron_tokedit.cli.world_check import (
    check_gpu_type,
    check_world,
    gpu_in_words,
    gpu_name,
    refuse_idle_gpus,
    refuse_other_gpu,
)
from megatron_tokedit.config.faults import Fault
from megatron_tokedit.config.gpus import GPU_NAMES
from megatron_tokedit.config.load import load_config
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.dataset.sources import all_sources
from megatron_tokedit.errors import ConfigError, TokeditError
from megatron_tokedit.log import get_logger
from megatron_tokedit.pipeline.placement import WHOLE, Share, array_share

if TYPE_CHECKING:
    from megatron_tokedit.engine.preflight import Probe
    from megatron_tokedit.training.signals import StopRequest
    from megatron_tokedit.training.trainer import TrainResult

logger = get_logger(__name__)

_RANK_ZERO_SPEAKS_SECONDS = 5.0

_DESCRIPTION = """\
Train a model as a YAML file says. Start one process a GPU (or a CPU rank) with torchrun:

  torchrun --nproc-per-node 4 tools/train.py --config examples/tiny_cpu.yaml \\
      parallel.tensor_model_parallel_size=2 parallel.pipeline_model_parallel_size=2

Running the same command again goes on from the newest complete checkpoint in run_dir. Sources that name raw
text (`input`) and are not there yet are made first, by all ranks; --prepare --stage edit does a share of
their work units (in a Slurm array the task's), --prepare --stage merge joins them. SIGTERM, SIGUSR1 and the
time limit runtime.exit_after_minutes end the run after one complete checkpoint; the ranks exit with 75: run
it again to go on. torchrun makes 1 of it (--progress tells it from an error), hands on SIGTERM only and dies
of SIGUSR1, so send that one to the ranks."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="RUN.yaml", help="the run's configuration")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="replaces a setting; values are YAML, list entries go by index: data.train.0.weight=2",
    )
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, sizes, sources, memory and every problem; needs no GPU",
    )
    actions.add_argument("--prepare", action="store_true", help="make the missing datasets and stop")
    actions.add_argument("--progress", action="store_true", help="print how far the run is and stop")
    parser.add_argument(
        "--stage",
        choices=("all", "edit", "merge"),
        help="with --prepare: do work units, join them when all are done, or both (default)",
    )
    parser.add_argument(
        "--share",
        type=_share,
        metavar="I/N",
        help="with --prepare --stage edit: share I of N, from 0 (default: a Slurm array's task, else all)",
    )
    parser.add_argument(
        "--build-index",
        action="store_true",
        help="with --dry-run: build the index cache (data.cache_dir) of the run, for any number of ranks",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="with --dry-run: check for N ranks (default: from the launcher)",
    )
    parser.add_argument(
        "--for-gpu",
        choices=GPU_NAMES,
        help="with --dry-run: check for machines with this GPU and Transformer Engine, not for this one",
    )
    add_common_arguments(parser)
    return parser


def _share(text: str) -> Share:
    """``3/16``."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N - 1, such as 3/16")
    return Share(int(index), int(count))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(_run, argv, interrupted=GOES_ON)


@contextmanager
def _rank_zero_first() -> Iterator[None]:
    """Most errors hit every rank alike: rank 0 speaks and ends, and the launcher ends the others.

    An error of one other rank is spoken of by that rank, after the same wait: while it waits it must not
    close the process group, or the ranks that wait for it would die of that first.
    """
    try:
        yield
    except TokeditError:
        if _rank(os.environ) > 0:
            time.sleep(_RANK_ZERO_SPEAKS_SECONDS)
        raise


def _rank(environment: Mapping[str, str]) -> int:
    """This process's number: torchrun's, else srun's."""
    return int(environment.get("RANK") or environment.get("SLURM_PROCID") or "0")


def _run(argv: Sequence[str]) -> int:
    arguments = _parse(argv)
    if arguments.progress:
        return print_progress(_load(arguments))
    if arguments.dry_run:
        return _dry_run(arguments)
    from megatron_tokedit.training.signals import EXIT_REQUEUE, StopNow, StopRequest

    note = partial(_note_early_stop, arguments, is_rank_zero=int(os.environ.get("RANK", "0")) == 0)
    try:
        with StopRequest(before_exit=note) as early:
            code = _work(arguments, early)
    except StopNow as reason:
        note(str(reason))
        _exit_at_once(EXIT_REQUEUE)
    if code == EXIT_REQUEUE:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's answer to the rank that is out first
        # who reads the note in the run folder may ask for a code that torchrun prints no traceback for
        code = int(os.environ.get("TOKEDIT_EXIT_CODE_OF_STOP", code))
    return code


def _dry_run(arguments: argparse.Namespace) -> int:
    with _rank_zero_first():
        config = _load(arguments)
        _check_packages()
        return print_report(
            config,
            _world_size(arguments),
            build_index=arguments.build_index,
            machine=_machine(arguments.for_gpu),
        )


def _work(arguments: argparse.Namespace, early: StopRequest) -> int:
    """Make the missing datasets and train, or only the former."""
    with _rank_zero_first():
        check_world(os.environ, alone=arguments.share is not None or arguments.stage == "merge")
        config = _load(arguments)
        if arguments.stage != "edit":  # a share is one of many: it has no say on the run
            _note_stop(config, None)
        config = _prepare(config, arguments)
    return EXIT_OK if arguments.prepare else _train(config, early, quiet=arguments.quiet)


def _note_early_stop(arguments: argparse.Namespace, reason: str, *, is_rank_zero: bool) -> None:
    """Leave word of a stop before training began: in the run folder, or in that of a share's own job."""
    if not is_rank_zero:
        return
    what = "while preparing the data" if arguments.prepare else "before its first step"
    logger.warning("stopped by %s %s; what is done stays, the same command goes on", reason, what)
    if arguments.stage == "edit":
        log_dir = os.environ.get("TOKEDIT_LOG_DIR")
        folder = Path(log_dir) if log_dir else None
    else:
        try:
            folder = Path(load_config(arguments.config, arguments.overrides).run_dir)
        except ConfigError:
            return
    if folder is not None:
        _write_note(folder / REQUEUE_FILE, f"{reason} {what}")


def _exit_at_once(code: int) -> NoReturn:
    """End this process and its children: other ranks may wait for it, nothing can be taken down in order."""
    for child in multiprocessing.active_children():
        child.kill()
    logging.shutdown()
    os._exit(code)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = build_parser()
    arguments = parser.parse_intermixed_args(argv)
    if arguments.world_size is not None and (arguments.world_size < 1 or not arguments.dry_run):
        parser.error("--world-size is a number of ranks, at least 1, and goes with --dry-run")
    if (arguments.stage or arguments.share) and not arguments.prepare:
        parser.error("--stage and --share go with --prepare")
    if arguments.share and arguments.stage != "edit":
        parser.error("--share goes with --stage edit: a merge is for one job, when all shares are done")
    for name in ("build_index", "for_gpu"):
        if getattr(arguments, name) and not arguments.dry_run:
            parser.error(f"--{name.replace('_', '-')} goes with --dry-run")
    return arguments


def _check_packages() -> None:
    """Refuse what is installed but broken: a dry run imports megatron-core, whichever machine it is for."""
    from megatron_tokedit.engine import preflight

    preflight.check()


def _machine(gpu: str | None) -> Probe:
    """What this machine offers, or one with the GPU that was named."""
    from megatron_tokedit.engine import preflight

    return preflight.assumed(gpu) if gpu else preflight.probe()


def _load(arguments: argparse.Namespace) -> RunConfig:
    """The configuration, checked against the machine where it is to be trained on.

    A dry run reports a sound configuration together with what the machine lacks.
    """

    def load(machine_faults: Callable[[Mapping[str, Any]], list[Fault]] | None) -> RunConfig:
        return load_config(
            arguments.config,
            arguments.overrides,
            world_size=_world_size(arguments),
            machine_faults=machine_faults,
        )

    def faults(sections: Mapping[str, Any]) -> list[Fault]:
        from megatron_tokedit.engine import preflight

        return preflight.section_faults(sections, _machine(arguments.for_gpu))

    if arguments.progress or arguments.prepare:
        return load(None)
    if not arguments.dry_run:
        return load(faults)
    try:
        return load(None)
    except ConfigError:
        return load(faults)  # raises the same, and what the machine lacks


def _prepare(config: RunConfig, arguments: argparse.Namespace) -> RunConfig:
    """Make the missing datasets and refuse those that were made otherwise than the configuration says.

    Returns the configuration with the prefixes of all datasets.
    """
    from megatron_tokedit.cli.train_sources import outdated_sources, prepare_sources

    share = arguments.share
    if arguments.stage == "edit" and share is None:
        share = array_share(os.environ, config.slurm.preprocess.tasks)
    # not whether one is missing: ranks that look by themselves could part ways
    if arguments.prepare or any(source.input is not None for _, source in all_sources(config.data)):
        config = prepare_sources(config, arguments.stage or "all", share or WHOLE)
    if outdated := outdated_sources(config):
        raise ConfigError("\n  - ".join(["datasets that do not fit the configuration:", *outdated]))
    return config


def _world_size(arguments: argparse.Namespace) -> int | None:
    """The number of ranks to check for; None where it does not matter or is not known."""
    if arguments.prepare or arguments.progress:
        return None
    launched = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
    if arguments.dry_run:
        return arguments.world_size or launched
    return launched or 1


def _train(config: RunConfig, early: StopRequest, *, quiet: bool) -> int:
    """Train; 0 at the end or at ``runtime.exit_at_step``, else the code that asks for a requeue."""
    from megatron_tokedit.training.signals import EXIT_REQUEUE, StopRequest

    def note(reason: str) -> None:
        _note_stop(config, f"{reason} before its first step")

    with StopRequest(config.runtime.exit_after_minutes, before_exit=note) as stop:
        early.begin()  # from here on signals are this one's
        result = _train_until(stop, config, quiet=quiet)
    if result.finished:
        logger.info("finished: %d steps, checkpoint %s", result.state.step, result.checkpoint)
        return EXIT_OK
    stopped = f"{result.stopped_by} after step {result.state.step} of {result.train_steps}"
    if int(os.environ.get("RANK", "0")) == 0:
        logger.warning("stopped by %s; the same command goes on from %s", stopped, result.checkpoint)
    if result.stopped_by == "exit_at_step":
        return EXIT_OK
    _note_stop(config, stopped)
    return EXIT_REQUEUE


def _note_stop(config: RunConfig, reason: str | None) -> None:
    """Leave word in the run folder for ``--progress`` that the run is to go on: torchrun hides exit codes."""
    if int(os.environ.get("RANK", "0")) == 0:
        _write_note(Path(config.run_dir) / REQUEUE_FILE, reason)


def _write_note(path: Path, reason: str | None) -> None:
    try:
        if reason is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(reason + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error.strerror)


def _check_gpu(config: RunConfig) -> None:
    """Refuse a GPU that is not what was asked for or, under torchrun, not of rank 0's model. Collective."""
    from megatron_tokedit.cli.train_sources import Ranks

    name = gpu_name(config)
    check_gpu_type(config, os.environ, name)
    refuse_idle_gpus(config, os.environ)
    # elsewhere rank 0 would have to open the process group's own address a second time
    if config.runtime.device != "cpu" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        here = gpu_in_words(os.environ, name)
        with Ranks("gpus") as ranks:
            refuse_other_gpu(here, ranks.word_of_rank_zero("model", here))


def _train_until(stop: StopRequest, config: RunConfig, *, quiet: bool) -> TrainResult:
    """Start the ranks and train until the run is complete or told to stop."""
    from megatron_tokedit.dataset.rank_zero import from_rank_zero
    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.tokenizers import load_tokenizer, tokenizer_spec
    from megatron_tokedit.training.length import with_train_steps
    from megatron_tokedit.training.trainer import train

    with _rank_zero_first():
        spec = tokenizer_spec(load_tokenizer(config.tokenizer.type, config.tokenizer.model))
        _check_gpu(config)
        runtime = config.runtime
        ctx = initialize(
            config.parallel,
            seed=config.seed,
            device=runtime.device,
            cpu_threads=runtime.cpu_threads,
            cuda_graphs=config.precision.cuda_graph_impl != "none",
        )
    try:
        with _rank_zero_first():
            config = from_rank_zero(partial(with_train_steps, config, spec))
        with (
            _rank_zero_first(),
            progress_shown(config.training.train_steps, enabled=ctx.rank == 0 and not quiet) as progress,
        ):
            result = train(config, ctx, spec, progress=progress, stop=stop)
        ctx.barrier()  # none goes before all are done: the launcher ends the others then
        return result
    finally:
        if not stop.interrupted:
            ctx.destroy()
