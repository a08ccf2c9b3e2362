"""``tools/evaluate.py tasks``: lm-eval's tasks, or task files given by path, on checkpoints side by side."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_tokedit.cli.evaluate_run import add_checkpoint_arguments, take_checkpoint
from megatron_tokedit.cli.main import GOES_ON, add_common_arguments
from megatron_tokedit.config.load import load_config
from megatron_tokedit.errors import ConfigError

if TYPE_CHECKING:
    from megatron_tokedit.scoring.replica_group import Replica

_DESCRIPTION = """\
Run lm-eval's tasks on checkpoints, side by side: a row a task and metric, a column a checkpoint. Checkpoints
of this package and Hugging Face folders are scored in one way, through the project's own scorer, as lm-eval's
own model `hf` would score them. A killed evaluation with --output goes on where it was."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand ``tasks``."""
    parser = commands.add_parser(
        "tasks",
        help="task scores through lm-eval",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint_arguments(parser, gives="--checkpoint and --output")
    _add_task_arguments(parser.add_argument_group("tasks"))
    _add_output_arguments(parser.add_argument_group("output"))
    _add_model_arguments(parser.add_argument_group("model"))
    add_common_arguments(parser)


def _add_task_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="NAME",
        help="names of lm-eval's tasks, groups and tags, task files (FILE.yaml), or folders of such (./DIR); "
        "separated by spaces or commas",
    )
    group.add_argument(
        "--include-path",
        nargs="+",
        default=(),
        metavar="DIR",
        help="folders of further task files, known by their names; they go before lm-eval's own",
    )
    group.add_argument("--num-fewshot", type=int, metavar="N", help="default: as each task says")
    group.add_argument(
        "--limit", type=float, metavar="N", help="the first N documents a task only; below 1: this share"
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="of few-shot examples and sampling (default: lm-eval's seeds)"
    )
    group.add_argument(
        "--bootstrap-iters",
        type=int,
        default=100_000,
        metavar="N",
        help="for the standard errors of metrics that are no means; default: 100000, 0: none",
    )


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        metavar="FILE.json",
        help="write everything here as well; answers are kept in FILE.json.partial until it is there "
        "(default for --config without --checkpoint: RUN_DIR/evaluation/tasks_step_N.json)",
    )
    group.add_argument(
        "--log-samples", metavar="DIR", help="write every document with its answers to DIR/CHECKPOINT/*.jsonl"
    )


def _add_model_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--backend",
        choices=("project", "lm-eval"),
        default="project",
        help="who scores: this project (default), or, of Hugging Face folders, lm-eval's own model `hf`, to "
        "compare with",
    )
    group.add_argument(
        "--context", type=int, metavar="N", help="positions the model is given (default: its limit)"
    )
    group.add_argument(
        "--document-start",
        choices=("auto", "always", "never"),
        default="auto",
        help="whether BOS, or what stands before a document in training, stands before every context; "
        "default: auto, as the tokenizer of the model's Hugging Face folder does",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "fp8", "fp8_blockwise", "mxfp8"),
        default="float32",
        help="default: float32; float16 of Hugging Face folders only; the FP8 ones need a GPU with "
        "Transformer Engine and write no text",
    )
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: auto, or the run's")
    group.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="positions a forward")
    group.add_argument("--logits-bytes", type=int, default=128 << 20, metavar="N", help="memory of the head")
    group.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="processes that share a checkpoint, all that torchrun started; 1 (default): each has a copy, "
        "and its share of the documents",
    )
    group.add_argument("--tokenizer-type", metavar="TYPE", help="default: what the folder says")
    group.add_argument("--tokenizer-model", metavar="PATH", help="where the tokenizer lies now")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print the table, write the files.

    Raises:
        TokeditError: what keeps an evaluation from beginning, or a model that cannot be evaluated.
    """
    if not (arguments.config or arguments.checkpoints):
        arguments.usage_error("give --checkpoint, or --config")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-eval is not installed; install it with: pip install -e '.[eval]'")
    _check(arguments)
    _take_run(arguments)
    try:
        _evaluate_or_follow(arguments)
    except KeyboardInterrupt:
        if arguments.output:
            raise KeyboardInterrupt(GOES_ON) from None
        raise
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_at_once()


def _evaluate_or_follow(arguments: argparse.Namespace) -> None:
    """Do everything, or, in a process that shares a checkpoint with the one that does, its part."""
    with ExitStack() as stack:
        replica = _join_replica(arguments)
        if replica is not None:
            stack.enter_context(replica)
            if not replica.leads:
                from megatron_tokedit.evaluation.tasks.model import follow_tasks

                follow_tasks(replica)
                return
        from megatron_tokedit.cli.evaluate_tasks_models import evaluate_all

        evaluate_all(arguments, replica)


def _end_at_once() -> NoReturn:
    """End one of torchrun's processes without what the libraries do at exit.

    With those of lm-eval beside gloo's threads every third pair of processes aborted there ("terminate called
    without an active exception"), and torchrun then calls an evaluation failed that is complete.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _check(arguments: argparse.Namespace) -> None:
    """Split the names of tasks, and refuse arguments that no evaluation has.

    Raises:
        ConfigError: such an argument.
    """
    arguments.tasks = [name for names in arguments.tasks for name in names.split(",") if name]
    if not arguments.tasks:
        raise ConfigError("--tasks: expected at least one name or file")
    lowest = {"num_fewshot": 0, "seed": 0, "bootstrap_iters": 0, "tensor_parallel": 1, "batch_tokens": 1}
    for name, low in lowest.items():
        value = getattr(arguments, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name.replace('_', '-')}: {value}, expected at least {low}")
    if arguments.limit is not None and not arguments.limit > 0:
        raise ConfigError(f"--limit: {arguments.limit}, expected a number of documents, or a share below 1")
    if arguments.limit is not None and arguments.limit > 1 and arguments.limit % 1:
        raise ConfigError(f"--limit: {arguments.limit}, expected a whole number, or a share below 1")
    if arguments.output and Path(arguments.output).is_dir():
        raise ConfigError(f"--output {arguments.output}: is a folder; give the name of a file")


def _take_run(arguments: argparse.Namespace) -> None:
    """Fill in what ``--config`` says of checkpoint, output and device.

    Raises:
        TokeditError: the configuration is faulty, or its run has no checkpoint.
    """
    if not arguments.config:
        return
    path, *overrides = arguments.config
    config = load_config(path, overrides)
    take_checkpoint(arguments, config, "tasks")


def _join_replica(arguments: argparse.Namespace) -> Replica | None:
    """The processes that share a checkpoint; None: each has one of its own.

    Raises:
        ConfigError: another number of processes was started.
    """
    size = arguments.tensor_parallel
    if size == 1:
        return None
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != size:
        raise ConfigError(
            f"--tensor-parallel {size}: {world_size} process(es) were started; start as many as share the "
            f"checkpoint:\n  torchrun --nproc-per-node {size} tools/evaluate.py tasks ..."
        )
    from megatron_tokedit.scoring.identity import PriorLayout
    from megatron_tokedit.scoring.load import resolve_device
    from megatron_tokedit.scoring.replica_group import join

    device = resolve_device(arguments.device or "auto")
    return join(PriorLayout(tensor=size), index=0, rank=int(os.environ["RANK"]), device=device)
