"""Converting a model both ways, GB/s and peak memory, against a plain copy of the same bytes.

    python benchmarks/conversion.py                          # 1 GB of random bfloat16 weights
    python benchmarks/conversion.py --layers 60 --folder /scratch

`tools/convert_checkpoint.py` runs as a user runs it, in a process of its own; seconds and peak memory are
those of its last line: of the weights alone, without the start of the process. "Copy" reads the folder's
weights and writes them again, 16 MB at a time, and waits for the disk, as the conversions do. They take
turns, round by round. The source may come from the operating system's memory in all of them, the output goes
to the disk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from measuring import GB, Report, Seconds, in_turns, median_ratio, parser, write_file
from priors import write_model_folder
from shapes import Shape

from megatron_tokedit.config.model import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
TO_MEGATRON, TO_HF, COPY = "to Megatron", "to Hugging Face", "copy, synced"
LAST_LINE = re.compile(
    r" GB in ([\d.]+) s, .*peak memory ([\d.]+) GB, ([\d.]+) GB of it before the first weight"
)
_BLOCK_BYTES = 16 << 20


def shape_of(num_layers: int) -> Shape:
    """A Llama whose largest tensor, the embedding, is 0.1 GB."""
    model = ModelConfig(
        family="llama",
        num_layers=num_layers,
        hidden_size=1536,
        num_attention_heads=12,
        ffn_hidden_size=4096,
        seq_length=2048,
    )
    return Shape("conversion", model, 32000, f"Llama {num_layers} x 1536")


def convert(source: Path, output: Path) -> tuple[float, float, float]:
    """Seconds, peak GB, and GB before the first weight, of one conversion."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "tools/convert_checkpoint.py", "--input", str(source), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = LAST_LINE.search(done.stderr)
    if done.returncode or found is None:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    seconds, peak, before = map(float, found.groups())
    return seconds, peak, before


def copy(source: Path, output: Path) -> None:
    """The weights of a model folder, block by block."""

    def blocks(path: Path) -> Iterator[Any]:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                yield block

    output.mkdir(exist_ok=True)
    for path in sorted(source.glob("*.safetensors")):
        write_file(output / path.name, blocks(path))


def same_weights(source: Path, back: Path) -> str:
    """How many of the weights of two model folders of one file are equal."""
    from safetensors import safe_open

    (file,), (other,) = source.glob("*.safetensors"), back.glob("*.safetensors")
    with safe_open(file, "pt") as left, safe_open(other, "pt") as right:
        names, others = set(left.keys()), set(right.keys())
        same = sum(torch.equal(left.get_tensor(n), right.get_tensor(n)) for n in names & others)
    return f"{same} of {len(names | others)}"


def measure(folder: Path, rounds: int, report: Report) -> None:
    """All three in turns, and the table."""
    source = folder / "hf"
    num_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    seconds: Seconds = {TO_MEGATRON: [], TO_HF: [], COPY: []}
    peaks: dict[str, tuple[float, float]] = {}
    for _ in range(rounds):
        for name, start, end in ((TO_MEGATRON, source, "megatron"), (TO_HF, folder / "megatron", "back")):
            taken, *memory = convert(start, folder / end)
            seconds[name].append(taken)
            peaks[name] = (memory[0], memory[1])
        seconds[COPY] += in_turns({COPY: lambda: copy(source, folder / "copy")}, rounds=1, warmups=0)[COPY]
    rows = [
        (name, statistics.median(values), num_bytes / GB / statistics.median(values), *peaks.get(name, ()))
        for name, values in seconds.items()
    ]
    rows = [(*row, *(None,) * (5 - len(row))) for row in rows]
    report.table(f"{num_bytes / GB:.2f} GB", ("s", "GB/s", "peak GB", "before the weights"), rows)
    report.limit(COPY, num_bytes / GB / statistics.median(seconds[COPY]), "GB/s")
    for name in (TO_MEGATRON, TO_HF):
        report.ratio(f"{COPY} / {name}", median_ratio(seconds[COPY], seconds[name]), "time; 1 is disk speed")
    report.say(f"weights that came back as they were, bit for bit: {same_weights(source, folder / 'back')}")


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    made = parser(__doc__)
    made.add_argument("--layers", type=int, default=14, help="default 14: 1 GB")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--folder", help="which disk; needs four times the model (default: the temporary one)")
    return made.parse_args()


def main() -> None:
    """Write the model, convert it both ways, copy it."""
    args = parse()
    with Report("conversion", args.json) as report, tempfile.TemporaryDirectory(dir=args.folder) as folder:
        shape = shape_of(args.layers)
        process = multiprocessing.get_context("spawn").Process(
            target=write_model_folder, args=(f"{folder}/hf", shape)
        )
        process.start()  # a child's peak memory counts from its parent's: this process stays small
        process.join()
        if process.exitcode:
            raise SystemExit("the model could not be written")
        report.say(f"{shape.words}, bfloat16, {args.rounds} round(s), in {Path(folder).parent}")
        measure(Path(folder), args.rounds, report)


if __name__ == "__main__":
    main()
