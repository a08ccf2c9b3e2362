"""``tools/train.py``: check, prepare, train.

Invariant: whatever can be found wrong without starting a process group is found before one is started.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_tokedit.cli.main import add_common_arguments, run_command
from megatron_tokedit.cli.train_progress import progress_shown
from megatron_tokedit.cli.train_report import print_progress, print_report
from megatron_tokedit.config.load import load_config
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.dataset.sources import missing_sources
from megatron_tokedit.errors import ConfigError, TokeditError
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)

_RANK_ZERO_SPEAKS_SECONDS = 5.0

_DESCRIPTION = """\
Train a model as a YAML file says. Start one process a GPU (or a CPU rank) with torchrun:

  torchrun --nproc-per-node 4 tools/train.py --config examples/tiny_cpu.yaml \\
      parallel.tensor_model_parallel_size=2 parallel.pipeline_model_parallel_size=2

Running the same command again goes on from the newest complete checkpoint in run_dir. Sources that name raw
text (`input`) and are not there yet are made first, by all ranks. SIGTERM and SIGUSR1 end the run after one
complete checkpoint; torchrun hands on SIGTERM only and dies of SIGUSR1, so send that one to the ranks."""


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
        "--world-size",
        type=int,
        metavar="N",
        help="with --dry-run: check for N ranks (default: from the launcher)",
    )
    add_common_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(_run, argv)


@contextmanager
def _rank_zero_first() -> Iterator[None]:
    """Most errors hit every rank alike: rank 0 speaks and ends, and the launcher ends the others.

    An error of one other rank is spoken of by that rank, after the same wait: while it waits it must not
    close the process group, or the ranks that wait for it would die of that first.
    """
    try:
        yield
    except TokeditError:
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(_RANK_ZERO_SPEAKS_SECONDS)
        raise


def _run(argv: Sequence[str]) -> int:
    arguments = _parse(argv)
    with _rank_zero_first():
        config = load_config(arguments.config, arguments.overrides, world_size=_world_size(arguments))
        if arguments.progress:
            return print_progress(config)
        if arguments.dry_run:
            return print_report(config, _world_size(arguments))
        _prepare(config, wanted=arguments.prepare)
    return 0 if arguments.prepare else _train(config, quiet=arguments.quiet)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = build_parser()
    arguments = parser.parse_intermixed_args(argv)
    if arguments.world_size is not None and (arguments.world_size < 1 or not arguments.dry_run):
        parser.error("--world-size is a number of ranks, at least 1, and goes with --dry-run")
    return arguments


def _prepare(config: RunConfig, *, wanted: bool) -> None:
    """Make the missing datasets and refuse those that were made otherwise than the configuration says."""
    from megatron_tokedit.cli.train_sources import outdated_sources, prepare_sources

    if wanted or missing_sources(config):
        prepare_sources(config)
    if outdated := outdated_sources(config):
        raise ConfigError("\n  - ".join(["datasets that do not fit the configuration:", *outdated]))


def _world_size(arguments: argparse.Namespace) -> int | None:
    """The number of ranks to check for; None where it does not matter or is not known."""
    if arguments.prepare or arguments.progress:
        return None
    launched = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
    if arguments.dry_run:
        return arguments.world_size or launched
    return launched or 1


def _train(config: RunConfig, *, quiet: bool) -> int:
    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.tokenizers import load_tokenizer, tokenizer_spec
    from megatron_tokedit.training.trainer import train

    with _rank_zero_first():
        spec = tokenizer_spec(load_tokenizer(config.tokenizer.type, config.tokenizer.model))
        runtime = config.runtime
        ctx = initialize(
            config.parallel, seed=config.seed, device=runtime.device, cpu_threads=runtime.cpu_threads
        )
    num_steps = config.training.train_steps
    try:
        with (
            _rank_zero_first(),
            progress_shown(num_steps, enabled=ctx.rank == 0 and not quiet) as progress,
        ):
            result = train(config, ctx, spec, progress=progress)
    finally:
        ctx.destroy()
    if result.finished:
        logger.info("finished: %d steps, checkpoint %s", result.state.step, result.checkpoint)
    elif ctx.rank == 0:
        logger.warning(
            "stopped by %s after step %d of %d; the same command goes on from %s",
            result.stopped_by,
            result.state.step,
            num_steps,
            result.checkpoint,
        )
    return 0
