"""Our training step against a bare megatron-core loop and a Hugging Face model of the same shape, in one run.

    python benchmarks/train_step.py                 # bf16; 4 x 192 Llama, vocabulary 2048, sequence 512
    python benchmarks/train_step.py --recipe bf16 fp32
    torchrun --nproc-per-node 2 benchmarks/train_step.py --tp 2      # ours against bare, tensor-parallel
    python benchmarks/train_step.py --only ours                      # one alone: its peak memory
    python benchmarks/train_step.py --shape 1b --recipe bf16 fp8_tensorwise --micro-batch-size 2   # on a GPU

On a CPU the contestants take turns step by step, so that whatever else the machine does hits all of them. On
a GPU each has a process of its own, one after the other, which shows its memory and leaves it all to it. The
table shows medians and the best step. "Bare" is megatron-core as it comes: on a CPU its local layer spec with
DotProductAttention, its cross entropy, torch's default AdamW, optimizer.step(), behind our CPU redirection;
on a GPU its Transformer Engine spec under the same TransformerConfig as ours. Hugging Face runs float32
weights under bf16 autocast (or plain float32) with SDPA attention and fused AdamW.

A shape that one GPU cannot hold with its optimizer gets fewer layers, and the first line says how many.
MFU counts the model's own operations (causal half of the attention), against the peak that the line names:
of the data sheet on a GPU, twice as high for FP8; on a CPU measured now. "Of bf16" is against bf16's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from measuring import Report, Seconds, in_turns, median_ratio, parser, product_flops, synchronize  # noqa: E402
from shapes import SHAPES, Shape, layers_that_fit  # noqa: E402
from training_loops import MAKERS, PLAIN_RECIPES, Job, Step  # noqa: E402

from megatron_tokedit.config.model import ModelConfig  # noqa: E402
from megatron_tokedit.config.recipes import RECIPES  # noqa: E402
from megatron_tokedit.config.sections import (  # noqa: E402
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    SourceConfig,
    TokenizerConfig,
    TrainingConfig,
)
from megatron_tokedit.engine import model as engine_model  # noqa: E402
from megatron_tokedit.engine.initialize import initialize  # noqa: E402
from megatron_tokedit.errors import ConfigError  # noqa: E402
from megatron_tokedit.scoring.resident import peak_resident_bytes  # noqa: E402
from megatron_tokedit.training.estimate import estimate_memory  # noqa: E402
from megatron_tokedit.training.throughput import peak_tflops  # noqa: E402

NAMES = {"ours": "ours", "bare": "bare megatron-core", "hf": "Hugging Face"}
ON_CPU = ("quickstart", "124m")
USABLE_SHARE = 0.9
"""Of a GPU's memory, what an estimate may come to."""


def needed_bytes(model: ModelConfig, vocab_size: int, args: argparse.Namespace) -> float:
    """What the package's own estimate says of one rank."""
    rows = args.micro_batch_size * args.microbatches
    return estimate_memory(
        RunConfig(
            run_dir="unused",
            tokenizer=TokenizerConfig(type="HuggingFaceTokenizer", model="unused"),
            model=model.resolved(vocab_size),
            precision=PrecisionConfig(recipe=args.recipe[0]),
            optimizer=OptimizerConfig(lr=1e-3),
            training=TrainingConfig(
                train_steps=1, micro_batch_size=args.micro_batch_size, global_batch_size=rows
            ),
            data=DataConfig(train=[SourceConfig(name="unused", prefix="unused")]),
        ),
        data_parallel_size=1,
    ).total


def chosen_shape(args: argparse.Namespace) -> Shape:
    """The shape with what the command line changes of it, and no more layers than the GPU holds."""
    shape = SHAPES[args.shape]
    changes = {
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.heads,
        "seq_length": args.seq_length,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    words = f"{shape.words} changed by {changes}" if changes else shape.words
    vocab_size = args.vocab_size or shape.vocab_size
    shape = Shape(shape.name, shape.model.model_copy(update=changes), vocab_size, words)
    layers = args.layers
    if layers is None and torch.cuda.is_available():
        usable = USABLE_SHARE * torch.cuda.get_device_properties(0).total_memory
        layers = layers_that_fit(shape, usable, lambda model: needed_bytes(model, vocab_size, args))
        if not layers:
            raise ConfigError(f"not one layer of {shape.words} fits in {usable / 1e9:.0f} GB")
    return shape if layers is None else shape.with_layers(layers)


@dataclass(slots=True)
class Found:
    """What was measured: seconds and peak memory a contestant, and what could not be."""

    seconds: Seconds
    peak_bytes: dict[str, int]
    refused: dict[str, str]


def contestants_of(args: argparse.Namespace, world_size: int) -> list[tuple[str, str]]:
    """(kind, recipe) of all that are to run."""
    kinds = [args.only] if args.only else ["ours", "bare", "hf"][: 3 if world_size == 1 else 2]
    return [
        (kind, recipe)
        for recipe in args.recipe
        for kind in kinds
        if args.only or kind != "hf" or recipe in PLAIN_RECIPES
    ]


def measure_here(job: Job) -> Found:
    """All contestants in this process, taking turns."""
    found = Found({}, {}, {})
    before = peak_resident_bytes()
    steps: dict[str, Step] = {}
    for kind, recipe in contestants_of(job.args, job.ctx.world_size):
        name = f"{NAMES[kind]}, {recipe}"
        try:
            steps[name] = MAKERS[kind](job, recipe)
        except ConfigError as error:
            found.refused[name] = str(error)
    found.seconds = in_turns(
        steps,
        rounds=job.args.steps,
        warmups=job.args.warmups,
        finish=lambda: synchronize(job.ctx.device),
    )
    if len(steps) == 1:
        on_gpu = job.ctx.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes() - before
        found.peak_bytes = dict.fromkeys(steps, peak)
    return found


def measure_apart(args: argparse.Namespace, shape: Shape) -> Found:
    """Each contestant in a process of its own, one after the other."""
    found = Found({}, {}, {})
    for kind, recipe in contestants_of(args, 1):
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "found.json"
            command = [sys.executable, *sys.argv, "--layers", str(shape.model.num_layers), "--only", kind]
            command += ["--json", str(answer), "--recipe", recipe]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                found.refused[f"{NAMES[kind]}, {recipe}"] = reason
                continue
            content = json.loads(answer.read_text())["found"]
        for mine, theirs in ((found.seconds, content["seconds"]), (found.peak_bytes, content["peak_bytes"])):
            mine.update(theirs)
        found.refused.update(content["refused"])
    return found


def report_all(report: Report, found: Found, shape: Shape, num_tokens: int, world_size: int) -> None:
    """Print the table, MFU and the ratios."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops = engine_model.flops_per_token(shape.model, shape.vocab_size)
    recipes = list(dict.fromkeys(name.rpartition(", ")[2] for name in found.seconds))
    peaks = {
        r: (peak_tflops(device, r, None) or float("nan")) * world_size * 1e12 for r in {*recipes, "bf16"}
    }
    rows = []
    for name, values in found.seconds.items():
        rate = num_tokens / statistics.median(values)
        recipe = name.rpartition(", ")[2]
        peak_memory = found.peak_bytes.get(name)
        rows.append(
            (
                name,
                rate / world_size,
                num_tokens / min(values) / world_size,
                rate * flops / 1e9 / world_size,
                f"{rate * flops / peaks[recipe]:.1%}",
                f"{rate * flops / peaks['bf16']:.1%}",
                peak_memory / 1e6 if peak_memory else None,
            )
        )
    heads = ("tokens/s/rank", "best", "GFLOP/s/rank", "MFU", "of bf16", "peak MB")
    report.table("training step", heads, rows)
    for recipe in recipes:
        mine = found.seconds.get(f"ours, {recipe}")
        for kind in ("bare", "hf"):
            theirs = found.seconds.get(f"{NAMES[kind]}, {recipe}")
            if mine and theirs:
                wanted = "rate; at least 0.98 on a GPU" if kind == "bare" else "rate"
                report.ratio(f"ours / {NAMES[kind]}, {recipe}", median_ratio(theirs, mine), wanted)
        base = found.seconds.get(f"ours, {recipes[0]}")
        if mine and base and recipe != recipes[0]:
            wanted = "rate; at least 1.25" if recipe.startswith("fp8") else "rate"
            report.ratio(f"ours, {recipe} / {recipes[0]}", median_ratio(base, mine), wanted)
        source = "data sheet" if device.type == "cuda" else "matrix products on all ranks, measured now"
        report.limit(f"{recipe}, {source}", peaks[recipe] / 1e9, "GFLOP/s")
    if device.type == "cuda":
        dtype = "fp8" if any(RECIPES[recipe].is_fp8 for recipe in recipes) else "bfloat16"
        report.limit(f"square matrix products, {dtype}", product_flops(device, dtype) / 1e9, "GFLOP/s")


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    made = parser(__doc__)
    made.add_argument("--shape", choices=SHAPES, default="quickstart")
    made.add_argument("--recipe", choices=RECIPES, nargs="+", default=["bf16"])
    made.add_argument("--layers", type=int, help="default: the shape's, on a GPU as many as fit")
    made.add_argument("--hidden-size", type=int)
    made.add_argument("--heads", type=int)
    made.add_argument("--vocab-size", type=int)
    made.add_argument("--seq-length", type=int)
    made.add_argument("--micro-batch-size", type=int, default=8)
    made.add_argument("--microbatches", type=int, default=2)
    made.add_argument("--steps", type=int, default=10)
    made.add_argument("--warmups", type=int, default=2, help="steps that do not count")
    made.add_argument("--tp", type=int, default=1)
    made.add_argument("--pp", type=int, default=1)
    made.add_argument("--threads", type=int, default=None)
    made.add_argument("--only", choices=list(NAMES), help="one contestant alone: its memory")
    return made.parse_args()


def run(report: Report, args: argparse.Namespace) -> None:
    """Measure and report."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu and args.shape not in ON_CPU:
        report.skip(f"training step, {args.shape}", "no CUDA device is usable here")
        return
    shape = chosen_shape(args)
    apart = on_gpu and not args.only and "RANK" not in os.environ
    if apart:
        found, world_size, threads = measure_apart(args, shape), 1, 1
        num_tokens = args.microbatches * args.micro_batch_size * shape.model.seq_length
    else:
        parallel = ParallelConfig(tensor_model_parallel_size=args.tp, pipeline_model_parallel_size=args.pp)
        job = Job(args, shape, parallel, initialize(parallel, seed=1, cpu_threads=args.threads))
        found, num_tokens = measure_here(job), job.num_tokens
        world_size, threads = job.ctx.world_size, torch.get_num_threads()
    report.content["found"] = {
        "seconds": found.seconds, "peak_bytes": found.peak_bytes, "refused": found.refused
    }  # fmt: skip
    num_parameters = engine_model.num_parameters(shape.model, shape.vocab_size)
    report.say(
        f"{shape.words}, {num_parameters / 1e6:.2f} M parameters, "
        f"sequence {shape.model.seq_length}, {args.microbatches} x {args.micro_batch_size} rows, "
        f"{world_size} rank(s)" + ("" if on_gpu else f" x {threads} thread(s)")
    )
    for name, reason in found.refused.items():
        report.skip(name, reason)
    if found.seconds:
        report_all(report, found, shape, num_tokens, world_size)
    if not apart:
        job.ctx.destroy()


def main() -> None:
    """Run the contestants and print the table on rank 0."""
    args = parse()
    with Report("train_step", args.json, is_quiet=os.environ.get("RANK", "0") != "0") as report:
        try:
            run(report, args)
        except ConfigError as error:
            report.skip(f"training step, {args.shape}", str(error))


if __name__ == "__main__":
    main()
