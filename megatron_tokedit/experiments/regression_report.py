"""What the regression simulation found: a table, a picture, and where each closed form and bound holds.

Invariant: a verdict compares the measured mean with its own standard error, and says no
more than the trials show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tokedit.experiments.regression import (
    Curve,
    Floats,
    Regression,
    accumulated_error,
    iterated_error,
    shrinking_bound,
    uniform_bound,
)

SIGNIFICANT = 3.0
"""Standard errors beyond which a difference counts."""
COLOURS = ("#bf616a", "#4c566a", "#d08770", "#a3be8c", "#5e81ac", "#b48ead", "#88c0d0")


@dataclass(frozen=True)
class Verdict:
    """One statement of the theory, held against one curve.

    Attributes:
        statement: the formula.
        is_exact: it gives the error itself; else it bounds it from above.
        value_N: of every generation.
        holds: no generation contradicts it by more than :data:`SIGNIFICANT` standard errors.
        first_violated: the first generation (from 1) that does; ``None``: none.
        remark: whether its assumptions are met by this arm.
    """

    statement: str
    is_exact: bool
    value_N: Floats
    holds: bool
    first_violated: int | None
    remark: str


def verdicts(problem: Regression, curve: Curve) -> list[Verdict]:
    """Everything the theory says of one arm."""
    selection = curve.arm.selection
    if curve.arm.accumulates:
        statement = "error = sigma^2 d / (T - d - 1) * sum_{i <= n} 1 / i^2"
        return [_verdict(curve, statement, accumulated_error(problem), True, "exact for one design X")]
    if selection is None:
        statement = "error = n sigma^2 d / (T - d - 1)"
        return [_verdict(curve, statement, iterated_error(problem), True, "exact")]
    shrinks = selection.shrink < 1.0
    depends = selection.kind == "predictable"
    remark = (
        "the edits shrink" if shrinks else "the edits do not shrink (with M = I this is the iterated arm)"
    )
    remark += "; M depends on the noise, which the proof does not allow for" if depends else ""
    everywhere = np.full(problem.generations, uniform_bound(problem))
    found = [_verdict(curve, "error <= 2 sigma^2 d / (T - d - 1)", everywhere, False, remark)]
    bound = shrinking_bound(problem, selection)
    if math.isfinite(bound):
        statement = "error <= sigma^2 d / (T - d - 1) + sigma^2 sqrt(E tr (X'X)^-2 E tr M_1) / (1 - eta)"
        found.append(_verdict(curve, statement, np.full(problem.generations, bound), False, remark))
    return found


def _verdict(curve: Curve, statement: str, value_N: Floats, is_exact: bool, remark: str) -> Verdict:
    excess_N = curve.mean_N - value_N
    against_N = (np.abs(excess_N) if is_exact else excess_N) > SIGNIFICANT * curve.standard_error_N
    first = int(against_N.argmax()) + 1 if against_N.any() else None
    return Verdict(statement, is_exact, value_N, first is None, first, remark)


def as_json(problem: Regression, curves: Sequence[Curve]) -> dict[str, Any]:
    """Everything that was set and measured."""
    return {
        "problem": asdict(problem),
        "significant_standard_errors": SIGNIFICANT,
        "arms": [
            {
                "arm": asdict(curve.arm),
                "mean_error": curve.mean_N.tolist(),
                "standard_error": curve.standard_error_N.tolist(),
                "theory": [
                    asdict(verdict) | {"value_N": verdict.value_N.tolist()}
                    for verdict in verdicts(problem, curve)
                ],
            }
            for curve in curves
        ],
    }


def as_table(problem: Regression, curves: Sequence[Curve]) -> str:
    """Errors of a few generations, an arm a row, and what became of each statement."""
    count = problem.generations
    shown = sorted({n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if n <= count} | {count})
    width = max(len(curve.arm.name) for curve in curves)
    heading = "  ".join(f"{f'n = {n}':>15s}" for n in shown)
    lines = ["test error |w - w*|^2 after n generations, mean and standard error", ""]
    lines.append(f"{'arm':{width}s}  {heading}")
    for curve in curves:
        cells = (f"{curve.mean_N[n - 1]:8.4f} +-{curve.standard_error_N[n - 1]:.4f}" for n in shown)
        lines.append(f"{curve.arm.name:{width}s}  {'  '.join(f'{cell:>15s}' for cell in cells)}")
    lines += ["", f"what the theory says (contradicted: by more than {SIGNIFICANT:g} standard errors)"]
    for curve in curves:
        lines.append(f"  {curve.arm.name}")
        for verdict in verdicts(problem, curve):
            state = "holds" if verdict.holds else f"CONTRADICTED from generation {verdict.first_violated} on"
            lines.append(f"    {verdict.statement} = {verdict.value_N[-1]:.4f} at n = {count}")
            lines.append(f"      {state}; {verdict.remark}")
    return "\n".join(lines)


def plot(problem: Regression, curves: Sequence[Curve], path: Path) -> None:
    """Error by generation with bands of three standard errors, and the bounds, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(8, 5.2), layout="constrained")
    generations = np.arange(1, problem.generations + 1)
    for curve, colour in zip(curves, (COLOURS * len(curves))[: len(curves)], strict=True):
        band = SIGNIFICANT * curve.standard_error_N
        axes.plot(generations, curve.mean_N, color=colour, label=curve.arm.name, linewidth=1.6)
        axes.fill_between(generations, curve.mean_N - band, curve.mean_N + band, color=colour, alpha=0.2)
        for verdict in verdicts(problem, curve):
            if verdict.is_exact:
                axes.plot(generations, verdict.value_N, color="black", linewidth=0.8, linestyle=":")
    axes.plot([], [], color="black", linewidth=0.8, linestyle=":", label="closed form")
    axes.axhline(
        uniform_bound(problem), color="black", linewidth=0.9, linestyle="--", label="2 s^2 d/(T-d-1)"
    )
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("generation (1: fitted to human labels)")
    axes.set_ylabel("test error |w - w*|^2")
    axes.set_title(
        f"Linear regression, T = {problem.num_samples}, d = {problem.num_features}, "
        f"sigma = {problem.noise:g}, {problem.trials:,d} trials",
        fontsize=10,
    )
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
