"""A perplexity report as a picture: a group of points a domain (and for the average of several), a point with
its interval a checkpoint.

Invariant: the points and bars are the report's estimates and 95 % intervals, of one unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from megatron_tokedit.evaluation.perplexity_report import QUANTITY
from megatron_tokedit.evaluation.perplexity_statistics import Estimate, PerplexityReport, Unit

_COLOURS = ("#4c566a", "#d08770", "#5e81ac", "#a3be8c", "#b48ead", "#bf616a", "#8fbcbb", "#ebcb8b")
_MARKERS = "osD^vPX*"
_WIDE_RANGE = 8.0
"""From this ratio of the highest to the lowest value on the axis is logarithmic."""


def plot(report: PerplexityReport, unit: Unit, path: str | Path) -> None:
    """Draw the report.

    Args:
        report: what to show; values that are not known or not finite are left out.
        unit: what it is shown by.
        path: of the picture; its suffix says the format.
    """
    rows = report.rows if len(report.rows) > 2 else report.rows[:1]
    num_rows, num_checkpoints = len(rows), len(report.results)
    width = max(5.0, 1.6 + num_rows * (0.5 + 0.25 * num_checkpoints))
    figure = Figure(figsize=(min(width, 30.0), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    step = 0.7 / num_checkpoints
    for c, name in enumerate(report.names):
        offset = step * (c - (num_checkpoints - 1) / 2)
        _draw_checkpoint(axes, [row[c] for row in report.estimates[unit][:num_rows]], c, offset, name)
    if num_rows > 1:
        axes.axvline(num_rows - 1.5, color="#bbbbbb", linewidth=0.8)  # before the average
    axes.set_xticks(range(num_rows), rows, rotation=20 if num_rows > 6 else 0)
    axes.set_xlim(-0.6, num_rows - 0.4)
    estimates = [estimate for row in report.estimates[unit] for estimate in row if estimate is not None]
    values = [estimate.value for estimate in estimates if 0.0 < estimate.value < float("inf")]
    if values and max(values) / min(values) >= _WIDE_RANGE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    intervals = any(estimate.interval is not None for estimate in estimates)
    axes.set_ylabel(QUANTITY[unit] + (" (95 % interval)" if intervals else ""))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    columns = min(num_checkpoints, 4)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=140)


def _draw_checkpoint(
    axes: Axes, estimates: Sequence[Estimate | None], c: int, offset: float, name: str
) -> None:
    """The points of checkpoint ``c``, with bars where there are intervals."""
    places, values, below, above = [], [], [], []
    for row, estimate in enumerate(estimates):
        if estimate is None or estimate.value == float("inf"):
            continue
        low, high = estimate.interval or (estimate.value, estimate.value)
        places.append(row + offset)
        values.append(estimate.value)
        below.append(max(0.0, estimate.value - low))
        above.append(max(0.0, high - estimate.value))
    axes.errorbar(
        places,
        values,
        yerr=(below, above),
        fmt=_MARKERS[c % len(_MARKERS)],
        color=_COLOURS[c % len(_COLOURS)],
        capsize=3,
        label=name,
    )
