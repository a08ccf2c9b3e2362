"""``tools/convert_checkpoint.py``: Hugging Face folders and Megatron checkpoints, each as the other."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from megatron_tokedit import log
from megatron_tokedit.cli.main import add_common_arguments, run_command
from megatron_tokedit.errors import ConfigError, TokeditError

if TYPE_CHECKING:
    from megatron_tokedit.conversion.from_huggingface import PublishedModel
    from megatron_tokedit.conversion.to_huggingface import TrainedModel

logger = log.get_logger(__name__)

_DESCRIPTION = """Convert a Hugging Face model folder (llama, mistral, qwen2, qwen3, gpt2, olmo, mixtral) into
a checkpoint that training, scoring and evaluation load under any layout, or a checkpoint into a folder that
AutoModelForCausalLM loads. Weights pass through a tensor at a time. Wrong input is refused before any of them
is read; the output appears when all of it is written and, with --check, has passed."""

_INTERRUPTED = "interrupted; what was written is removed, and the same command starts anew"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert_checkpoint.py", description=_DESCRIPTION)
    kinds = ("hf", "megatron")
    parser.add_argument("--from", dest="source", choices=kinds, help="default: as the input's content tells")
    parser.add_argument("--to", dest="target", choices=kinds, help="default: the other one")
    parser.add_argument(
        "--input",
        required=True,
        metavar="DIR",
        help="model folder, or run folder (newest checkpoint), or step",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion's output")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the output's weights (default: as they are stored, but float16 as float32 in a checkpoint)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check and say what would be done; write nothing"
    )
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument(
        "--tokenizer-type",
        choices=("SentencePieceTokenizer", "HuggingFaceTokenizer"),
        help="default: as the checkpoint records; of a model folder Hugging Face's where its files are there",
    )
    tokenizer.add_argument("--tokenizer-model", metavar="PATH", help="default: the input's own")
    checkpoint = parser.add_argument_group("--to megatron")
    checkpoint.add_argument(
        "--seq-length", type=int, metavar="N", help="model.seq_length (default: all positions of the model)"
    )
    for name, what in (("tensor", "T"), ("pipeline", "P")):
        checkpoint.add_argument(
            f"--target-{name}-model-parallel-size",
            type=int,
            default=1,
            metavar=what,
            help="refuse a model that cannot be split so; the checkpoint is the same for every layout",
        )
    _add_check(parser)
    add_common_arguments(parser)
    return parser


def _add_check(parser: argparse.ArgumentParser) -> None:
    check = parser.add_argument_group("check")
    check.add_argument(
        "--check", action="store_true", help="score a text with both models; fail where they differ"
    )
    check.add_argument("--check-text", metavar="FILE", help="default: a part of Python's language reference")
    check.add_argument("--check-tokens", type=int, default=2048, metavar="N", help="default: %(default)s")
    check.add_argument(
        "--check-context",
        type=int,
        default=2048,
        metavar="N",
        help="tokens of a window, if both models take as many (default: %(default)s)",
    )
    check.add_argument(
        "--check-tolerance",
        type=float,
        metavar="X",
        help="largest difference of log-probabilities, in nats (default: 0.001; bfloat16 0.5)",
    )
    check.add_argument("--check-dtype", choices=("float32", "bfloat16"), default="float32")


def _directions(arguments: argparse.Namespace) -> tuple[str, str]:
    """What is read and what is written.

    Raises:
        ConfigError: the flags contradict each other or the input.
    """
    from megatron_tokedit.scoring.load import detect_backend

    found = detect_backend(arguments.input)
    if arguments.source not in (None, found):
        raise ConfigError(f"--from {arguments.source}: {arguments.input} is of kind {found} by its content")
    target = arguments.target or ("megatron" if found == "hf" else "hf")
    if target == found:
        raise ConfigError(f"--to {target}: {arguments.input} is of this kind already")
    if target == "hf":
        for flag, is_given in (
            ("--seq-length", arguments.seq_length is not None),
            ("--target-tensor-model-parallel-size", arguments.target_tensor_model_parallel_size != 1),
            ("--target-pipeline-model-parallel-size", arguments.target_pipeline_model_parallel_size != 1),
        ):
            if is_given:
                raise ConfigError(f"{flag}: has no meaning with --to hf; remove it")
    elif arguments.dtype == "float16":
        raise ConfigError("--dtype float16: a checkpoint is float32 or bfloat16; give one of these")
    return found, target


def _open(arguments: argparse.Namespace, source: str) -> PublishedModel | TrainedModel:
    """The input, checked."""
    import torch

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    tokenizer = {
        "tokenizer_type": arguments.tokenizer_type,
        "tokenizer_model": arguments.tokenizer_model,
    }
    if source == "megatron":
        from megatron_tokedit.conversion.to_huggingface import open_trained

        return open_trained(Path(arguments.input), dtype=dtype, **tokenizer)

    from megatron_tokedit.config.sections import ParallelConfig
    from megatron_tokedit.conversion.from_huggingface import open_published

    sizes = {
        f"{name}_model_parallel_size": getattr(arguments, f"target_{name}_model_parallel_size")
        for name in ("tensor", "pipeline")
    }
    if min(*sizes.values(), 1 if arguments.seq_length is None else arguments.seq_length) < 1:
        raise ConfigError("--seq-length and --target-* sizes: expected 1 or more")
    return open_published(
        Path(arguments.input),
        dtype=dtype,
        seq_length=arguments.seq_length,
        parallel=ParallelConfig(**sizes),
        **tokenizer,
    )


def _write(
    model: PublishedModel | TrainedModel, staging: Path, output: Path, on_bytes: Callable[[int], Any]
) -> None:
    from megatron_tokedit.conversion.from_huggingface import PublishedModel, write_checkpoint_folder
    from megatron_tokedit.conversion.to_huggingface import write_hugging_face_folder

    if isinstance(model, PublishedModel):
        write_checkpoint_folder(model, staging, output, on_bytes=on_bytes)
    else:
        write_hugging_face_folder(model, staging, on_bytes=on_bytes)


@contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; yields what is to be told of bytes, by any thread."""
    disable = quiet or not sys.stderr.isatty()
    lock = threading.Lock()
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=disable, leave=False) as bar:

        def advance(num_bytes: int) -> None:
            with lock:
                bar.update(num_bytes)

        yield advance


class _Stopped(TokeditError):
    """Ctrl-C was pressed; raised where the next weight would be read, by any thread."""


@contextmanager
def _stopping_between_weights(on_bytes: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
    """Let Ctrl-C end the writing where the next weight begins: in the middle torch takes it for a broken disk
    and its threads go on writing.
    """
    asked = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: asked.set())

    def advance(num_bytes: int) -> None:
        if asked.is_set():
            raise _Stopped
        on_bytes(num_bytes)

    try:
        yield advance
    except _Stopped:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)
    if asked.is_set():
        raise KeyboardInterrupt


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _describe(model: PublishedModel | TrainedModel, target: str) -> str:
    section, vocab_size = model.sizes.model, model.sizes.vocab_size
    what = f"{section.family}, {section.num_layers} layers x {section.hidden_size}, {vocab_size} ids"
    dtype = str(model.dtype).removeprefix("torch.")
    start = "no start token" if model.start_id is None else f"start token {model.start_id}"
    return (
        f"{what} -> {target}, {model.num_bytes / 1e9:.3f} GB, written in {dtype}; "
        f"{model.tokenizer.tokenizer_type}, {start}"
    )


def _run(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    # imported here: `--help` and wrong usage should not wait for torch
    from megatron_tokedit.cli.convert_check import check_conversion
    from megatron_tokedit.conversion.output_folder import refuse_output, staged

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a conversion is the work of one process; start it without torchrun")
    output = Path(arguments.output)
    if output.is_symlink():
        output = output.resolve()  # a link stays, and the folder appears where it leads
    source, target = _directions(arguments)

    def refuse() -> None:
        refuse_output(output, Path(arguments.input), overwrite=arguments.overwrite)

    refuse()
    model = _open(arguments, source)
    logger.info("%s", _describe(model, target))
    if arguments.dry_run:
        return
    with staged(output, before_naming=refuse) as staging:  # others may have written there meanwhile
        before, started = _peak_bytes(), time.perf_counter()
        with (
            _progress(model.num_bytes, quiet=arguments.quiet) as progress,
            _stopping_between_weights(progress) as on_bytes,
        ):
            _write(model, staging, output, on_bytes)
        seconds = time.perf_counter() - started
        peak = _peak_bytes()
        if arguments.check:
            check_conversion(
                Path(arguments.input),
                staging,
                model.tokenizer,
                start_id=model.start_id,
                text_file=arguments.check_text,
                num_tokens=arguments.check_tokens,
                context_tokens=arguments.check_context,
                tolerance=arguments.check_tolerance,
                dtype=arguments.check_dtype,
            )
    logger.info(
        "wrote %s: %.3f GB in %.3f s, %.2f GB/s; peak memory %.2f GB, %.2f GB of it before the first weight",
        output,
        model.num_bytes / 1e9,
        seconds,
        model.num_bytes / 1e9 / max(seconds, 1e-9),
        peak / 1e9,
        before / 1e9,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_run, argv, interrupted=_INTERRUPTED)
