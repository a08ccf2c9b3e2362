"""The command line of ``tools/gpu_check.py``, its table and its JSON.

Invariant: the exit code is 1 exactly where a check failed (or, with ``--no-skips``, was skipped), and what
was found is told and written though the checks were interrupted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tokedit import __version__
from megatron_tokedit.cli.gpu_check.checks import Bench, Check, Outcome, run_check
from megatron_tokedit.cli.gpu_check.plan import all_checks, choose
from megatron_tokedit.cli.gpu_check.runner import JobFailed, Runner
from megatron_tokedit.cli.main import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_OK,
    add_common_arguments,
    run_command,
)
from megatron_tokedit.errors import ConfigError

_PARALLEL = {"gpu": 4, "cpu": 1}
"""Most of a job is the start of its process, which keeps one core busy and no GPU."""
_NAME_WIDTH = 36

_DESCRIPTION = """\
Check on this machine what no test without a GPU can: FP8 layers, training under every precision recipe,
resuming from one to another, sizes at the edges, writing text, priors, speed and memory. What the machine
lacks is skipped, with the reason; on a machine without a GPU that is most of it.

  gpu_check.py --output gpu_check.json
  gpu_check.py --only 'linear_*' train_fp8_tensorwise
  gpu_check.py --list

Exits with 1 where a check failed."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the checks and what each proves, and stop")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="these checks only; * stands for anything"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the results there too")
    parser.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="keep runs, checkpoints and the jobs' logs there; a new or empty folder, about 5 GB "
        "(default: a temporary one, removed at the end)",
    )
    parser.add_argument(
        "--parallel",
        type=int,
        metavar="N",
        help="checks at a time, but for those that measure speed (default: 4 on a GPU, else 1)",
    )
    parser.add_argument("--no-skips", action="store_true", help="what the machine lacks counts as failed")
    add_common_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(_run, argv)


def _run(argv: Sequence[str]) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    checks, unknown = choose(all_checks(), arguments.only)
    if unknown:
        parser.error(f"--only: no check is named {', '.join(unknown)}; --list prints the names")
    if arguments.parallel is not None and arguments.parallel < 1:
        parser.error("--parallel is a number of checks, at least 1")
    if arguments.list:
        print("\n".join(f"{check.name:{_NAME_WIDTH}} {check.proves}" for check in checks))
        return EXIT_OK
    if arguments.output is not None:
        _require_writable(arguments.output)
    folder = _work_folder(arguments.work_dir)
    try:
        report = _check_all(checks, folder, parallel=arguments.parallel, quiet=arguments.quiet)
    finally:
        if arguments.work_dir is None:
            shutil.rmtree(folder, ignore_errors=True)
    try:
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    finally:  # a disk that is full by now costs the file, not the table
        print("\n".join(_table(report)))
    if report["interrupted"]:
        return EXIT_INTERRUPTED
    bad = ("failed", "skipped") if arguments.no_skips else ("failed",)
    return EXIT_ERROR if any(check["status"] in bad for check in report["checks"]) else EXIT_OK


def _require_writable(output: Path) -> None:
    """Find out now rather than after ten minutes; a file that is there is left as it is."""
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output: the folder {output.absolute().parent} does not exist")
    try:
        output.open("a").close()
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written: {error.strerror}") from error


def _work_folder(wanted: Path | None) -> Path:
    """A folder with nothing in it."""
    if wanted is None:
        return Path(tempfile.mkdtemp(prefix="gpu_check_"))
    if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
        raise ConfigError(f"--work-dir: {wanted} is not an empty folder; give a new one")
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--work-dir: {wanted} cannot be made: {error.strerror}") from error
    return wanted.absolute()


@contextmanager
def _ended(runner: Runner) -> Iterator[None]:
    """SIGTERM is an interrupt meanwhile, and no job outlives it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        runner.close()
        signal.signal(signal.SIGTERM, before)


def _check_all(checks: Sequence[Check], folder: Path, *, parallel: int | None, quiet: bool) -> dict[str, Any]:
    """Do the checks, telling of each as it is done."""

    def tell(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    begin = time.monotonic()
    runner = Runner(folder, lambda name: tell(f"  ... {name}"))
    bench = Bench(runner)
    done: dict[str, Outcome] = {}

    def do(check: Check) -> None:
        outcome = run_check(check, bench)
        if runner.is_closed:  # its jobs were ended: that says nothing of the machine
            return
        done[check.name] = outcome
        if outcome.status != "skipped":
            tell(_line(asdict(outcome)))

    machine: dict[str, Any] = {}
    interrupted = False
    with _ended(runner):
        try:
            machine |= _machine(bench)  # before any thread asks for it
            _do_all(checks, do, runner, parallel or _PARALLEL[runner.scale.name])
        except KeyboardInterrupt:
            interrupted = True
    outcomes = [done[check.name] for check in checks if check.name in done]
    return {
        "version": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "seconds": round(time.monotonic() - begin, 1),
        "scale": runner.scale.name,
        "job_seconds": runner.job_seconds,
        "interrupted": interrupted,
        "not_done": [check.name for check in checks if check.name not in done],
        "counts": _counts(outcomes),
        "checks": [asdict(outcome) for outcome in outcomes],
    }


def _do_all(checks: Sequence[Check], do: Callable[[Check], None], runner: Runner, parallel: int) -> None:
    """Several checks at a time, then those that run alone."""
    with ThreadPoolExecutor(parallel) as pool:
        try:
            list(pool.map(do, [check for check in checks if not check.runs_alone]))
            for check in checks:
                if check.runs_alone:
                    do(check)
        except BaseException:
            runner.close()  # or the pool would wait for its jobs
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _machine(bench: Bench) -> dict[str, Any]:
    try:
        return bench.machine
    except JobFailed as failure:
        return {"failed": str(failure)}


def _counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    return {
        status: sum(outcome.status == status for outcome in outcomes)
        for status in ("passed", "failed", "skipped")
    }


def _line(check: dict[str, Any]) -> str:
    """One row of the table."""
    if check["status"] == "passed":
        told = ", ".join(_spelled(check["numbers"]))
    else:
        told = "; ".join(check["reasons"])
    return f"{check['status']:8} {check['name']:{_NAME_WIDTH}} {check['seconds']:7.1f} s  {told}"


def _skipped(checks: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What was skipped, by reason."""
    names: dict[str, list[str]] = {}
    for check in checks:
        if check["status"] == "skipped":
            names.setdefault("; ".join(check["reasons"]), []).append(check["name"])
    for reason, skipped in names.items():
        yield f"skipped  {', '.join(skipped)}\n         {reason}"


def _spelled(numbers: dict[str, Any]) -> Iterator[str]:
    """``name value``, without what is not known."""
    for name, value in numbers.items():
        if isinstance(value, dict):
            yield f"{name} ({', '.join(_spelled(value))})"
        elif isinstance(value, float):
            yield f"{name} {value:.4g}" if abs(value) < 1e4 else f"{name} {value:,.0f}"
        elif value is not None:
            yield f"{name} {value}"


def _table(report: dict[str, Any]) -> Iterator[str]:
    """Every check, the tracebacks of the failed ones, and the sum."""
    yield ""
    if report["scale"] == "cpu":
        yield "without a GPU the models are tiny: this shows that the checks themselves work"
    yield from (_line(check) for check in report["checks"] if check["status"] != "skipped")
    yield from _skipped(report["checks"])
    for check in report["checks"]:
        if check["details"]:
            yield f"\n{check['name']}:"
            yield "\n".join(f"  {line}" for line in check["details"].splitlines())
    counts = report["counts"]
    yield (
        f"\n{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped "
        f"in {report['seconds']:.0f} s"
    )
    if report["interrupted"]:
        yield f"interrupted: {len(report['not_done'])} checks were not done; a new start does all anew"
