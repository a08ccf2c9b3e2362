"""What the subcommands of ``tools/evaluate.py`` share: checkpoints, or a run whose newest one is meant."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.engine import checkpoint_folder


def evaluation_file(run_dir: str, step: int, what: str = "perplexity") -> Path:
    """Where the evaluation of a run's checkpoint is written to."""
    return Path(run_dir) / "evaluation" / f"{what}_step_{step}.json"


def add_checkpoint_arguments(parser: argparse.ArgumentParser, *, gives: str) -> None:
    """Add ``--config`` and ``--checkpoint``.

    Args:
        parser: of a subcommand.
        gives: the flags that ``--config`` stands for.
    """
    parser.set_defaults(usage_error=parser.error)
    parser.add_argument(
        "--config",
        nargs="+",
        metavar=("RUN.yaml", "section.field=value"),
        help=f"a run and its overrides: gives {gives} where they are not given",
    )
    parser.add_argument(
        *("--checkpoint", "--checkpoints"),
        dest="checkpoints",
        nargs="+",
        metavar="DIR",
        help="run folders (their newest complete checkpoint), step folders, or Hugging Face model folders",
    )


def take_checkpoint(arguments: argparse.Namespace, config: RunConfig, what: str) -> None:
    """Fill in what a run says of device, checkpoint and output, where the command line does not.

    Raises:
        CheckpointError: the run has no checkpoint.
    """
    arguments.device = arguments.device or config.runtime.device
    if arguments.checkpoints is None:
        folder = checkpoint_folder.require(Path(config.run_dir) / "checkpoints")
        step = checkpoint_folder.read_json(folder, checkpoint_folder.STATE_FILE)["step"]
        arguments.checkpoints = [str(folder)]
        arguments.output = arguments.output or str(evaluation_file(config.run_dir, step, what))
