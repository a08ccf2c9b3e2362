"""What the benchmarks share: contestants in turns, the machine and its limits, tables, ratios, a JSON file.

Invariant: a ratio compares what was measured in the same run, in turns, so that whatever else the machine
does hits both sides; limits are measured too, nothing is read off a data sheet unless the line says so.
torch is imported where it is needed only: spawned workers of what is measured import this again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

MB, GB = 1e6, 1e9
Seconds = dict[str, list[float]]
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "tokenizers", "gigatoken")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_PRODUCT_SECONDS = 0.1
_FP8_SIZES = {"cpu": (512,), "cuda": (4096, 8192)}


def in_turns(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmups: int = 1,
    finish: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
) -> Seconds:
    """Seconds of every round of every contestant, the contestants taking turns.

    Args:
        contestants: name -> what is measured.
        rounds: that count.
        warmups: rounds before them that do not.
        finish: called inside the measured time, to wait for a device or for other ranks.
        after: called after it, outside of the measured time.
    """
    seconds: Seconds = {name: [] for name in contestants}
    for index in range(warmups + rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            finish()
            if index >= warmups:
                seconds[name].append(time.perf_counter() - start)
            after()
    return seconds


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the rounds of one contestant's seconds over another's."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def net_rate(part: tuple[float, float], whole: tuple[float, float]) -> float:
    """Amount a second that a job does more for more input, without its start; NaN where it is too short.

    Args:
        part: amount and seconds of the job on a part of the input.
        whole: of the job on all of it.
    """
    more = whole[1] - part[1]
    return (whole[0] - part[0]) / more if more > 0.5 else math.nan


def copy_bytes_per_second(num_bytes: int = 256 << 20) -> float:
    """Bytes a second that copying memory moves (each counted once), one thread, best of five."""
    block = np.ones(num_bytes, np.uint8)
    target = np.empty_like(block)
    times = in_turns({"copy": lambda: np.copyto(target, block)}, rounds=5)
    return num_bytes / min(times["copy"])


def write_file(path: Path, blocks: Iterable[Any]) -> None:
    """Write blocks to a file and wait for the disk."""
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def read_file(path: Path) -> int:
    """Read a file into memory; returns its bytes."""
    size = path.stat().st_size
    buffer = bytearray(size)
    with path.open("rb", buffering=0) as file:
        view, done = memoryview(buffer), 0
        while done < size:
            done += file.readinto(view[done:])
    return size


def forget_cached(paths: Iterable[Path]) -> None:
    """Have the operating system drop its copies of files, so that the next read is the disk's."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fp8_product_flops(device: torch.device) -> float:
    """Operations a second of large square FP8 products (e4m3, one scale a tensor, bfloat16 out)."""
    import torch

    best, one = 0.0, torch.ones((), device=device)
    for size in _FP8_SIZES[device.type]:
        left = torch.rand(size, size, device=device).to(torch.float8_e4m3fn)
        right = torch.rand(size, size, device=device).to(torch.float8_e4m3fn).t()  # must be column-major

        def product(left: torch.Tensor = left, right: torch.Tensor = right) -> None:
            torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16)
            synchronize(device)

        product()
        num_products, seconds, start = 0, 0.0, time.perf_counter()
        while seconds < _PRODUCT_SECONDS:
            product()
            num_products, seconds = num_products + 1, time.perf_counter() - start
        best = max(best, 2 * size**3 * num_products / seconds)
    return best


def product_flops(device: torch.device, dtype: str) -> float:
    """Operations a second of large square matrix products, here and now.

    Args:
        device: where.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``fp8``.
    """
    import torch

    from megatron_tokedit.scoring.cost import matrix_product_rate

    if dtype == "fp8":
        return fp8_product_flops(device)
    return matrix_product_rate(device, getattr(torch, dtype))


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock tells what it did."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    cpu: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            cpu.setdefault(key.strip(), value.strip())
    flags = set(cpu.get("flags", "").split())
    versions: dict[str, str] = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu.get("model name", "unknown CPU"),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": sys.version.split()[0],
        "versions": versions,
    }


def machine_in_words(found: Mapping[str, Any]) -> str:
    """One line of :func:`machine`."""
    gpus = ", ".join(found["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"{found['date']}, {found['cores']} cores of {found['cpu']} ({' '.join(found['flags'])}), "
        f"{found['memory_bytes'] / GB:.0f} GB, {gpus}; Python {found['python']}, {versions}"
    )


def number(value: float | int | str | None) -> str:
    """A table's cell: three or four digits that count, and nothing where there is no number."""
    if isinstance(value, str):
        return value
    if value is None or math.isnan(value):
        return "-"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


class Report:
    """Prints as it goes; with a path also writes JSON, which ``run_all.py`` collects.

    Use as a context manager: the file is written at the end, also where nothing could be measured.
    """

    def __init__(self, benchmark: str, json_path: str | None, *, is_quiet: bool = False) -> None:
        """Begin a report.

        Args:
            benchmark: its name.
            json_path: of the file; None: none.
            is_quiet: print and write nothing, on all ranks but one.
        """
        self._json_path, self._is_quiet = None if is_quiet else json_path, is_quiet
        self.content: dict[str, Any] = {
            "benchmark": benchmark,
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "machine": machine(),
            "tables": [],
            "ratios": [],
            "limits": [],
            "skipped": [],
        }

    def say(self, line: str) -> None:
        """A line of text."""
        if not self._is_quiet:
            print(line, flush=True)

    def table(self, title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; the first cell of a row is its name."""
        self.content["tables"].append({"title": title, "heads": list(heads), "rows": [list(r) for r in rows]})
        cells = [[title, *heads], *([number(cell) for cell in row] for row in rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        for row in cells:
            first, *others = (cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in
                              enumerate(zip(row, widths, strict=True)))  # fmt: skip
            self.say("  ".join([first, *others]))

    def ratio(self, name: str, value: float, wanted: str = "") -> None:
        """A ratio to a baseline of the same run; ``wanted`` says which way is good, or the target."""
        self.content["ratios"].append({"name": name, "value": value, "wanted": wanted})
        self.say(f"{name}: {value:.3g}" + (f" ({wanted})" if wanted else ""))

    def limit(self, name: str, value: float, unit: str) -> None:
        """What the machine allows, measured now."""
        self.content["limits"].append({"name": name, "value": value, "unit": unit})
        self.say(f"limit: {name} {number(value)} {unit}")

    def skip(self, part: str, reason: str) -> None:
        """A part that this machine cannot do; one line, whatever the reason looks like."""
        reason = " ".join(reason.split())
        self.content["skipped"].append({"part": part, "reason": reason})
        self.say(f"skipped: {part}: {reason}")

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *error: object) -> None:
        if self._json_path and error[0] is None:
            Path(self._json_path).write_text(json.dumps(self.content, indent=1) + "\n")


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """A parser with the option that every benchmark has."""
    made = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", metavar="FILE", help="also write what was measured here")
    return made
