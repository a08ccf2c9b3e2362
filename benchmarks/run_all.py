"""Runs the benchmarks one after the other and ends with one table of ratios to their baselines.

    python benchmarks/run_all.py                        # the CPU part: what `make bench` does, in ten minutes
    python benchmarks/run_all.py --gpu                  # the GPU part, on one GPU, within an hour
    python benchmarks/run_all.py --only dataset.py checkpoint.py --output found.json
    python benchmarks/run_all.py --list                 # the commands alone

A benchmark that fails does not stop the others; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import machine, machine_in_words, number

FOLDER = Path(__file__).resolve().parent
CPU_RUNS = (
    "tokenize_corpus.py --megabytes 12 --rounds 1",
    "dataset.py",
    "score.py --tokens 2000 --rounds 1",
    "generation.py --new-tokens 24 --rounds 1",
    "conversion.py --rounds 1",
    "analysis.py",
    "editing.py --tokens 2000 --dtype bfloat16 --rounds 2",
    "train_step.py --recipe bf16 fp32 --steps 8",
    "checkpoint.py --layers 2 --rounds 1",
    "scaling.py --megabytes 12 --prior-kilobytes 400",
)
_EVERY_RECIPE = "bf16 fp8_tensorwise fp8_delayed fp8_blockwise"
GPU_RUNS = (
    "score.py --device cuda --shape 8b --tokens 200000 --rounds 3",
    "score.py --device cuda --shape 1b --tokens 200000 --rounds 3",
    "generation.py --device cuda --shape 8b --dtype bfloat16 --batch 1 8 64 --new-tokens 256",
    "editing.py --device cuda --shape 8b --dtype bfloat16 --tokens 200000 --batch-tokens 16384",
    "train_step.py --shape 124m --recipe bf16 fp8_tensorwise --micro-batch-size 16 --microbatches 4",
    f"train_step.py --shape 1b --recipe {_EVERY_RECIPE} --micro-batch-size 2 --microbatches 4",
    "train_step.py --shape 3b --recipe bf16 fp8_tensorwise --micro-batch-size 1 --microbatches 4",
    "train_step.py --shape 8b --recipe bf16 fp8_tensorwise --micro-batch-size 1 --microbatches 4",
    "checkpoint.py --shape 1b --recipe bf16",
    "checkpoint.py --shape 1b --recipe fp8_tensorwise",
)


def run(command: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Run one command; what it reported, with how long it took and what went wrong.

    Args:
        command: a script of this folder and its arguments.
        folder: for its report.
        seconds: after which it is ended.
    """
    script, *arguments = command.split()
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    start = time.perf_counter()
    fault = None
    try:
        done = subprocess.run(
            [sys.executable, str(FOLDER / script), *arguments, "--json", str(report)], timeout=seconds
        )
        if done.returncode:
            fault = f"ended with code {done.returncode}"
    except subprocess.TimeoutExpired:
        fault = f"not done after {seconds:.0f} s"
    content = json.loads(report.read_text()) if report.exists() else {}
    return {**content, "command": command, "seconds": time.perf_counter() - start, "fault": fault}


def print_summary(results: list[dict[str, Any]]) -> None:
    """One line a ratio, a part that was skipped, or a command that failed."""
    rows = []
    for result in results:
        command = result["command"].partition(" --")[0]
        rows += [(command, r["name"], number(r["value"]), r["wanted"]) for r in result.get("ratios", [])]
        rows += [
            (command, f"limit: {r['name']}", f"{number(r['value'])} {r['unit']}", "")
            for r in result.get("limits", [])
        ]
        rows += [(command, s["part"], "skipped", s["reason"]) for s in result.get("skipped", [])]
        if result["fault"]:
            rows.append((command, result["command"], "FAILED", result["fault"]))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    print("\nratios to the baselines of the same run, and what the machine allows")
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        print("  ".join((*cells, row[3])).rstrip())
    total = sum(result["seconds"] for result in results)
    print(f"{len(results)} benchmarks, {total / 60:.1f} minutes")


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--gpu", action="store_true", help="the GPU part instead of the CPU part")
    made.add_argument("--only", nargs="+", metavar="SCRIPT", help="only these scripts")
    made.add_argument("--list", action="store_true", help="print the commands and do nothing")
    made.add_argument("--output", metavar="FILE", help="everything that was measured, as JSON")
    made.add_argument("--limit", type=float, default=1200.0, metavar="S", help="seconds a benchmark may take")
    return made.parse_args()


def main() -> int:
    """Run the benchmarks; 1 where one of them failed."""
    args = parse()
    commands = [
        command
        for command in (GPU_RUNS if args.gpu else CPU_RUNS)
        if not args.only or command.split()[0] in args.only
    ]
    if args.list:
        print("\n".join(f"python benchmarks/{command}" for command in commands))
        return 0
    print(machine_in_words(machine()))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for command in commands:
            print(f"\n== benchmarks/{command}", flush=True)
            results.append(run(command, Path(folder), args.limit))
    print_summary(results)
    if not args.gpu:
        print("not part of this: anything on a GPU (benchmarks/run_all.py --gpu)")
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n")
    return int(any(result["fault"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
