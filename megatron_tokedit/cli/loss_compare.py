"""``tools/loss_compare.py``: one number of two or more runs, step by step.

Invariant: the first run is the reference; only steps that a run shares with it are compared, and what is not
compared is said.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from megatron_tokedit.cli.main import EXIT_ERROR, EXIT_OK, add_common_arguments, run_command
from megatron_tokedit.errors import ConfigError, DataFormatError
from megatron_tokedit.training.health import spelled
from megatron_tokedit.training.metrics_file import FILE_NAME, flat_numbers, read_records

_ROWS = 20

_DESCRIPTION = """\
Compare the losses of runs step by step with those of the first one:

  loss_compare.py runs/reference runs/changed --tolerance 1e-5 --plot losses.png

Exits with 1 where a run differs by more than --tolerance (0: they must be equal, bit for bit)."""


@dataclass(frozen=True, slots=True)
class Series:
    """One number of a run, by step."""

    letter: str
    path: Path
    values: dict[int, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run against the reference: the differences at the steps that both have."""

    run: Series
    differences: dict[int, float]
    left_out: tuple[list[int], list[int]]
    """Steps that the reference alone has, and the run alone."""

    @property
    def worst_step(self) -> int:
        """Where the difference is largest."""
        return max(self.differences, key=lambda step: abs(self.differences[step]))

    @property
    def largest(self) -> float:
        """The largest difference, without its sign."""
        return abs(self.differences[self.worst_step])


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="loss_compare.py", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="two or more run folders, or metrics.jsonl files"
    )
    parser.add_argument(
        "--metric",
        default="train/loss",
        metavar="NAME",
        help="what to compare, named as in TensorBoard, e.g. train/grad_norm or validation/NAME/loss "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--relative", action="store_true", help="differences as shares of the first run's value"
    )
    parser.add_argument(
        "--tolerance", type=_tolerance, metavar="T", help="largest difference that is accepted"
    )
    parser.add_argument("--first-step", type=int, default=1, metavar="N", help="leave out the steps before N")
    parser.add_argument("--last-step", type=int, metavar="N", help="leave out the steps after N")
    parser.add_argument(
        "--every", type=int, metavar="N", help=f"show every N-th step (default: about {_ROWS} of them)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the runs and their differences")
    add_common_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(_run, argv)


def compare(reference: Series, run: Series, *, relative: bool = False) -> Comparison:
    """Compare a run with the reference.

    Raises:
        ConfigError: they have no step in common.
    """
    common = sorted(reference.values.keys() & run.values.keys())
    if not common:
        raise ConfigError(f"{reference.path} and {run.path} have no step in common")
    return Comparison(
        run,
        {step: _difference(reference.values[step], run.values[step], relative) for step in common},
        (
            sorted(reference.values.keys() - run.values.keys()),
            sorted(run.values.keys() - reference.values.keys()),
        ),
    )


def _run(argv: Sequence[str]) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if not 2 <= len(arguments.runs) <= len(ascii_uppercase):
        parser.error("two or more runs are compared")
    if arguments.every is not None and arguments.every < 1:
        parser.error("--every is a number of steps, at least 1")
    if arguments.plot is not None and not arguments.plot.parent.is_dir():
        raise ConfigError(f"--plot: the folder {arguments.plot.parent} does not exist")
    reference, *others = [
        _read(letter, path, arguments) for letter, path in zip(ascii_uppercase, arguments.runs, strict=False)
    ]
    comparisons = [compare(reference, other, relative=arguments.relative) for other in others]
    if not arguments.quiet:
        print("\n".join([arguments.metric, *_legend([reference, *others]), ""]))
        print("\n".join(_table(reference, comparisons, arguments.every)) + "\n")
    verdicts = [_verdict(reference, comparison, arguments) for comparison in comparisons]
    print("\n".join(text for _, text in verdicts))
    if arguments.plot is not None:
        _plot(arguments.plot, arguments.metric, reference, comparisons)
    return EXIT_OK if all(accepted for accepted, _ in verdicts) else EXIT_ERROR


def _tolerance(text: str) -> float:
    value = float(text)
    if not value >= 0.0:
        raise argparse.ArgumentTypeError("a tolerance is a number, at least 0")
    return value


def _read(letter: str, path: Path, arguments: argparse.Namespace) -> Series:
    """The metric of one run, in the steps asked for."""
    file = path / FILE_NAME if path.is_dir() else path
    last_step = arguments.last_step if arguments.last_step is not None else math.inf
    values: dict[int, float] = {}
    names: set[str] = set()
    for record in read_records(file):
        numbers = _numbers(record)
        names |= numbers.keys()
        if arguments.metric in numbers and arguments.first_step <= record["step"] <= last_step:
            values[record["step"]] = numbers[arguments.metric]
    if arguments.metric not in names:
        raise DataFormatError(f"{file}: no {arguments.metric} in it; there are: {', '.join(sorted(names))}")
    return Series(letter, path, values)


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    if record["kind"] == "health":
        return {}
    values = {key: value for key, value in record.items() if key not in ("kind", "step")}
    return flat_numbers(values, record["kind"])


def _difference(reference: float, value: float, relative: bool) -> float:
    """Two values that are not finite are equal if they are the same; else they differ without bound."""
    if not (math.isfinite(reference) and math.isfinite(value)):
        return 0.0 if str(reference) == str(value) else math.inf
    difference = value - reference
    if not relative or difference == 0.0:
        return difference
    return difference / abs(reference) if reference else math.inf


def _legend(runs: Sequence[Series]) -> Iterator[str]:
    for run in runs:
        yield f"  {run.letter}  {run.path}: steps {spelled(list(run.values)) or 'none'}"


def _table(reference: Series, comparisons: Sequence[Comparison], every: int | None) -> Iterator[str]:
    """A row a step: the runs, then their differences from the reference."""
    steps = sorted({step for comparison in comparisons for step in comparison.differences})
    interval = every or -(-len(steps) // _ROWS)
    shown = {*steps[::interval], steps[-1], *(comparison.worst_step for comparison in comparisons)}
    letters = [comparison.run.letter for comparison in comparisons]
    heads = [reference.letter, *letters, *(f"{letter} - {reference.letter}" for letter in letters)]
    yield f"{'step':>8}" + "".join(f"{head:>14}" for head in heads)
    for step in sorted(shown):
        values = [reference.values[step], *(comparison.run.values.get(step) for comparison in comparisons)]
        differences = [comparison.differences.get(step) for comparison in comparisons]
        cells = [f"{'' if value is None else f'{value:.6f}':>14}" for value in values]
        cells += [f"{'' if value is None else f'{value:+.3e}':>14}" for value in differences]
        yield f"{step:>8}" + "".join(cells)


def _verdict(reference: Series, comparison: Comparison, arguments: argparse.Namespace) -> tuple[bool, str]:
    """(whether the run is accepted, a line on it)."""
    unit = " relative" if arguments.relative else ""
    pair = f"{comparison.run.letter} - {reference.letter}"
    mean = statistics.fmean(abs(value) for value in comparison.differences.values())
    parts = [
        f"{pair}: largest{unit} difference {comparison.largest:.3e} at step {comparison.worst_step}",
        f"mean {mean:.3e} over {len(comparison.differences)} step(s)",
    ]
    for run, steps in zip((reference, comparison.run), comparison.left_out, strict=True):
        parts += [f"steps of {run.letter} alone: {spelled(steps)}"] if steps else []
    tolerance = arguments.tolerance
    accepted = tolerance is None or comparison.largest <= tolerance
    if tolerance is not None:
        parts.append(f"{'within' if accepted else 'BEYOND'} the tolerance of {tolerance:g}")
    return accepted, "; ".join(parts)


def _plot(path: Path, metric: str, reference: Series, comparisons: Sequence[Comparison]) -> None:
    """The runs above, their differences (without sign, on a logarithmic axis) below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 7), height_ratios=(2, 1))
    for run in [reference, *(comparison.run for comparison in comparisons)]:
        steps = sorted(run.values)
        upper.plot(
            steps, [run.values[step] for step in steps], label=f"{run.letter}  {run.path}", linewidth=1
        )
    for number, comparison in enumerate(comparisons, start=1):
        # a logarithmic axis has no place for 0: equal steps are left out
        points = {step: abs(value) for step, value in comparison.differences.items() if value}
        points = {step: value for step, value in points.items() if math.isfinite(value)}
        label = f"{comparison.run.letter} - {reference.letter}"
        lower.plot([*points], [*points.values()], ".", label=label, color=f"C{number}", markersize=4)
    upper.set_ylabel(metric)
    upper.legend(fontsize="small")
    lower.set_yscale("log")
    lower.set_ylabel("difference")
    lower.set_xlabel("step")
    lower.legend(fontsize="small")
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:  # a suffix that it does not know
        raise ConfigError(f"--plot {path}: {error}") from error
    finally:
        pyplot.close(figure)
