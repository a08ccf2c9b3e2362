"""What a collapse experiment found: tables, JSON, the paper's figure 2 and the iterated curves.

Invariant: a mean is over seeds with its standard deviation; what has one seed has no error bar and says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tokedit.experiments.cells import Store
from megatron_tokedit.experiments.collapse import Measurement

AVERAGE = "average"
CHAINS = ("synthetic", "accumulate", "edited")
_COLOURS = {"synthetic": "#bf616a", "accumulate": "#4c566a", "edited": "#5e81ac", "mix": "#d08770"}


@dataclass(frozen=True)
class Point:
    """One arm at one point, over seeds.

    Attributes:
        arm: as in :class:`Measurement`.
        point: as there.
        perplexities: domain, and ``average``, -> one value a seed.
        corpus: what is known of each seed's newest corpus.
    """

    arm: str
    point: int | float | str
    perplexities: dict[str, list[float]]
    corpus: list[dict[str, Any]]

    def mean(self, domain: str = AVERAGE) -> float:
        """Over seeds."""
        return float(np.mean(self.perplexities[domain]))

    def deviation(self, domain: str = AVERAGE) -> float:
        """Sample standard deviation over seeds; NaN where there is one."""
        values = self.perplexities[domain]
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def collect(measurements: Sequence[Measurement], store: Store) -> list[Point]:
    """Read what every cell found; all of them must be made."""
    points: dict[tuple[str, int | float | str], Point] = {}
    for measurement in measurements:
        point = points.setdefault(
            (measurement.arm, measurement.point), Point(measurement.arm, measurement.point, {}, [])
        )
        result = store.result(measurement.perplexity)
        corpus = store.result(measurement.corpus)
        assert result is not None
        assert corpus is not None
        for domain, value in result["perplexity"].items():
            point.perplexities.setdefault(domain, []).append(value)
        point.corpus.append(corpus)
    return list(points.values())


def as_json(points: Sequence[Point], config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was set and measured."""
    return {
        "config": dict(config),
        "points": [
            {
                "arm": point.arm,
                "point": point.point,
                "perplexity": point.perplexities,
                "mean": point.mean(),
                "standard_deviation": None if math.isnan(point.deviation()) else point.deviation(),
                "corpus": [_slim(corpus) for corpus in point.corpus],
            }
            for point in points
        ],
    }


def _slim(corpus: Mapping[str, Any]) -> dict[str, Any]:
    """A corpus in a few numbers."""
    slim = {"num_tokens": corpus["num_tokens"]}
    if edit := corpus.get("statistics", {}).get("edit"):
        slim |= {name: edit[name] for name in ("scored", "eligible", "resampled", "changed", "dropped")}
        slim["perplexity_under_the_prior"] = edit["perplexity"]
    return slim


def as_table(points: Sequence[Point]) -> str:
    """A row a point, a column a domain, as Markdown."""
    domains = list(points[0].perplexities)
    lines = []
    for title, arms, what in (
        ("Generations", CHAINS, "generation"),
        ("One round, human and synthetic text mixed", ("mix",), "synthetic share"),
        ("Edits of the human text by the first model", ("ablation",), "edit"),
    ):
        rows = [point for point in points if point.arm in arms]
        if not rows:
            continue
        lines += [f"### {title}", ""]
        heads = ("arm", what, "newest text, tokens", "eligible", "changed", *domains)
        lines.append(f"| {' | '.join(heads)} |")
        lines.append("|---|---|---|---|---" + "|---" * len(domains) + "|")
        for point in rows:
            tokens = np.mean([corpus["num_tokens"] for corpus in point.corpus])
            shown = f"{point.point:.0%}" if point.arm == "mix" else str(point.point)
            cells = [_edit_share(point, "eligible"), _edit_share(point, "changed")]
            cells += [_cell(point, domain) for domain in domains]
            lines.append(f"| {point.arm} | {shown} | {tokens:,.0f} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _edit_share(point: Point, what: str) -> str:
    """Mean share of the scored tokens; empty where the newest corpus was not edited."""
    edits = [corpus.get("statistics", {}).get("edit") for corpus in point.corpus]
    if not all(edits):
        return ""
    return f"{np.mean([edit[what] / max(edit['scored'], 1) for edit in edits]):.2%}"


def _cell(point: Point, domain: str) -> str:
    deviation = point.deviation(domain)
    return f"{point.mean(domain):.2f}" + ("" if math.isnan(deviation) else f" +-{deviation:.2f}")


def findings(points: Sequence[Point]) -> list[str]:
    """What the curves say, in words: how the last generation stands to the first."""
    said = []
    for arm in CHAINS:
        chain = [point for point in points if point.arm == arm]
        if len(chain) > 1:
            said.append(
                _change(f"{arm}: generation {chain[-1].point} against the first", chain[0], chain[-1])
            )
    mix = sorted((p for p in points if p.arm == "mix"), key=lambda p: float(p.point))
    if len(mix) > 1:
        said.append(
            _change(f"mix: {mix[-1].point:.0%} synthetic text against {mix[0].point:.0%}", mix[0], mix[-1])
        )
    return said


def _change(what: str, before: Point, after: Point) -> str:
    """The change of the average perplexity, seed by seed."""
    ratios = np.array(after.perplexities[AVERAGE]) / np.array(before.perplexities[AVERAGE])
    change = f"{what}: perplexity {ratios.mean() - 1:+.1%}"
    if len(ratios) == 1:
        return f"{change} (one seed: no error bar)"
    return f"{change} (seeds: {', '.join(f'{ratio - 1:+.1%}' for ratio in ratios)})"


def plot(points: Sequence[Point], folder: Path) -> list[Path]:
    """``generations.png``, ``mix.png``, ``ablations.png``, where asked for; bars are standard deviations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    written = []
    domains = list(points[0].perplexities)
    if chains := [arm for arm in CHAINS if any(point.arm == arm for point in points)]:
        figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        for arm in chains:
            rows = [point for point in points if point.arm == arm]
            _line(axes, [float(p.point) for p in rows], rows, AVERAGE, arm, _COLOURS[arm])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("generation (1: trained on human text)")
        axes.set_title("Generations, each trained on what the last one left", fontsize=10)
        _finish(axes)
        written.append(_save(figure, folder / "generations.png"))
    if mix := sorted((p for p in points if p.arm == "mix"), key=lambda p: float(p.point)):
        figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        palette = pyplot.get_cmap("viridis")(np.linspace(0.1, 0.8, len(domains)))
        for domain, colour in zip(domains, palette, strict=True):
            shade = "#bf616a" if domain == AVERAGE else colour
            _line(axes, [100 * float(p.point) for p in mix], mix, domain, domain, shade)
        axes.set_xlabel("share of synthetic text (%)")
        axes.set_title("One round, human and synthetic text mixed", fontsize=10)
        _finish(axes)
        written.append(_save(figure, folder / "mix.png"))
    if ablations := [point for point in points if point.arm == "ablation"]:
        figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.35 * len(ablations)), layout="constrained")
        _ablations(axes, ablations)
        written.append(_save(figure, folder / "ablations.png"))
    return written


def _ablations(axes: Any, points: Sequence[Point]) -> None:
    """A row an edit: perplexity with its bar, and the shares of eligible and changed tokens beside it."""
    for place, point in enumerate(reversed(points)):
        bar = 0.0 if math.isnan(point.deviation()) else point.deviation()
        axes.errorbar([point.mean()], [place], xerr=[bar], marker="o", capsize=3, color=_COLOURS["edited"])
        shares = [_edit_share(point, what) for what in ("eligible", "changed")]
        note = f"  {shares[0]} eligible, {shares[1]} changed" if all(shares) else ""
        axes.annotate(note, (1.0, place), xycoords=("axes fraction", "data"), fontsize=8, va="center")
    axes.axvline(points[0].mean(), color="#999999", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(points)), [str(point.point) for point in reversed(points)])
    axes.set_xlabel("held-out perplexity, average over domains")
    axes.set_title("Edits of the human text by the first model", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _line(
    axes: Any, xs: Sequence[float], rows: Sequence[Point], domain: str, label: str, colour: Any
) -> None:
    deviations = [point.deviation(domain) for point in rows]
    bars = None if any(map(math.isnan, deviations)) else deviations
    axes.errorbar(
        xs, [p.mean(domain) for p in rows], yerr=bars, label=label, color=colour, marker="o", capsize=3
    )


def _finish(axes: Any) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.set_ylabel("held-out perplexity (log)")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path
