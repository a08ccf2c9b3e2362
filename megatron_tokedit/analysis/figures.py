"""The pictures of a report, drawn from what ``analysis.json`` holds.

Invariant: a corpus has one colour in all pictures, the reference is dark, and every axis says what it shows.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

COLOURS = ("#2e3440", "#bf616a", "#5e81ac", "#a3be8c", "#d08770", "#b48ead", "#88c0d0", "#8f6f4e", "#ebcb8b")
_DPI = 130
_BINS = 40
_LABEL_LIMIT = 26
_MOST_FILLED = 4
"""Curves up to which the area below them is tinted."""


def draw_all(found: dict[str, Any]) -> dict[str, bytes]:
    """PNG files by name; only those that the results have something for."""
    corpora = found["corpora"]
    pictures = {"rank_mass": _rank_mass(corpora), "diversity": _diversity(corpora)}
    if len(corpora) > 1:
        pictures["divergence"] = _divergence(corpora, found["divergence"]["js_bits"])
    if any((corpus.get("perplexity") or {}).get("by_document") for corpus in corpora):
        pictures["perplexity"] = _perplexity(corpora)
        pictures["token_probability"] = _token_probability(corpora)
    if "embedding" in found:
        pictures["embedding"] = _embedding(found["embedding"], corpora)
    if any(_survivals(pair) for pair in found["pairs"]):
        pictures["survival"] = _survival(found["pairs"], [corpus["name"] for corpus in corpora])
    return pictures


def colour_of(index: int) -> str:
    """The colour of a corpus."""
    return COLOURS[index % len(COLOURS)]


def _padded() -> Any:
    """A layout with room at the edges."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)


def _new(width: float = 7.6, height: float = 3.9) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout=_padded())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Any) -> bytes:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DPI, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def _label(name: str) -> str:
    """A name that a picture has room for; ``$`` would start a formula."""
    short = name if len(name) <= _LABEL_LIMIT else name[: _LABEL_LIMIT - 1] + "..."
    return short.replace("$", r"\$").lstrip("_") or "_"


def _rank_mass(corpora: list[dict[str, Any]]) -> bytes:
    figure, axes = _new()
    for index, corpus in enumerate(corpora):
        ranks, mass = zip(*corpus["at_budget"]["rank_mass"], strict=True)
        axes.plot(
            ranks, mass, color=colour_of(index), label=_label(corpus["name"]), lw=2.2 if not index else 1.6
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(0, 1.01)
    axes.set_xlabel("so many of the commonest bi-gram features (of 10,000)")
    axes.set_ylabel("share of all bi-grams")
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _diversity(corpora: list[dict[str, Any]]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: tuple[tuple[str, Callable[[dict[str, Any]], float], str], ...] = (
        ("distinct-3\n(higher: more varied)", lambda d: d["distinct"]["3"], "{:.0%}"),
        (
            "compression, plain : packed\n(higher: more repetitive)",
            lambda d: d["compression_ratio"],
            "{:.2f}",
        ),
        ("8-grams that come again\n(higher: more copied)", lambda d: d["repeated"]["8"], "{:.1%}"),
    )
    height = 1.2 + 0.34 * len(corpora)
    figure, axes = pyplot.subplots(1, 3, figsize=(9.4, height), layout=_padded(), sharey=True)
    places = np.arange(len(corpora))
    for axis, (title, pick, form) in zip(axes, panels, strict=True):
        values = [pick(corpus["at_budget"]["diversity"]) for corpus in corpora]
        axis.barh(places, values, color=[colour_of(i) for i in range(len(corpora))], height=0.66)
        axis.axvline(values[0], color=COLOURS[0], lw=0.9, ls=":", zorder=0)
        for place, value in zip(places, values, strict=True):
            axis.annotate(
                form.format(value),
                (value, place),
                (3, 0),
                textcoords="offset points",
                va="center",
                size=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )
        axis.set_title(title, fontsize=9)
        axis.set_xlim(0, max(values) * 1.25 or 1)
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0].set_yticks(places, [_label(corpus["name"]) for corpus in corpora])
    axes[0].invert_yaxis()
    return _png(figure)


def _divergence(corpora: list[dict[str, Any]], js_bits: list[list[float]]) -> bytes:
    size = 2.2 + 0.62 * len(corpora)
    figure, axes = _new(size + 1.2, size)
    values = np.array(js_bits)
    axes.grid(visible=False)
    image = axes.imshow(values, cmap="YlGnBu", vmin=0, vmax=max(0.05, float(values.max())))
    names = [_label(corpus["name"]) for corpus in corpora]
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    middle = max(0.05, float(values.max())) / 2
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        shade = "white" if value > middle else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=8)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.8, label="Jensen-Shannon divergence, bits")
    return _png(figure)


def _perplexity(corpora: list[dict[str, Any]]) -> bytes:
    figure, axes = _new()
    known = [(i, np.array(c["perplexity"]["by_document"])) for i, c in enumerate(corpora)]
    known = [(i, values) for i, values in known if len(values)]
    low = min(np.quantile(values, 0.005) for _, values in known)
    high = max(np.quantile(values, 0.995) for _, values in known)
    edges = np.geomspace(low, max(high, low * 1.5), _BINS + 1)
    for index, values in known:
        shares = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)
        label = _label(corpora[index]["name"])
        axes.stairs(shares, edges, color=colour_of(index), lw=2.2 if not index else 1.6, label=label)
        if len(known) <= _MOST_FILLED:
            axes.stairs(shares, edges, color=colour_of(index), fill=True, alpha=0.12)
    quantiles = corpora[0]["perplexity"]["quantiles"]
    if quantiles:
        quarter = quantiles["0.05"] + (quantiles["0.95"] - quantiles["0.05"]) / 4
        axes.axvline(quarter, color=COLOURS[0], ls="--", lw=0.9, label="reference: lowest quarter ends")
        axes.axvline(quantiles["0.9"], color=COLOURS[0], ls=":", lw=0.9, label="reference: tail begins")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(_minor_label if edges[-1] < 30 * edges[0] else "")
    axes.set_xlabel("perplexity of a document under the prior (ends gather what lies beyond)")
    axes.set_ylabel("share of documents")
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _minor_label(value: float, _: int) -> str:
    """A number at 2, 3 and 5 of each decade."""
    return f"{value:g}" if f"{value:e}"[0] in "235" else ""


def _token_probability(corpora: list[dict[str, Any]]) -> bytes:
    figure, axes = _new(height=3.5)
    width = 0.84 / len(corpora)
    for index, corpus in enumerate(corpora):
        shares = corpus["perplexity"]["token_probability_shares"]
        places = np.arange(len(shares)) + (index - (len(corpora) - 1) / 2) * width
        axes.bar(places, shares, width * 0.95, color=colour_of(index), label=_label(corpus["name"]))
    axes.set_xticks(range(10), [f"{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10)], fontsize=8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("probability that the prior gave the token")
    axes.set_ylabel("share of tokens")
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _embedding(embedding: dict[str, Any], corpora: list[dict[str, Any]]) -> bytes:
    figure, axes = _new(7.6, 5.6)
    points = [np.array(entry["points"]) for entry in embedding["corpora"]]
    size = float(np.clip(16000 / sum(map(len, points)), 6, 30))
    for index, (mine, corpus) in enumerate(zip(points, corpora, strict=True)):
        label = _label(corpus["name"])
        axes.scatter(*mine.T, s=size, color=colour_of(index), alpha=0.55, lw=0, label=label)
    axes.set_xlabel(f"first axis ({embedding['variance_shares'][0]:.0%} of the variance)")
    axes.set_ylabel(f"second axis ({embedding['variance_shares'][1]:.0%})")
    axes.set_aspect("equal", adjustable="datalim")
    legend = axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=5)
    for handle in legend.legend_handles:
        handle.set(alpha=1.0, sizes=[26])
    return _png(figure)


def _survivals(pair: dict[str, Any]) -> list[tuple[str, float]]:
    rare = pair["survival_of_hapaxes"]
    return [(n, entry["share"]) for n, entry in rare.items() if entry["share"] is not None]


def _survival(pairs: list[dict[str, Any]], names: list[str]) -> bytes:
    figure, axes = _new(height=3.0)
    shown = [pair for pair in pairs if _survivals(pair)]
    width = 0.8 / len(shown)
    for index, pair in enumerate(shown):
        for n, share in _survivals(pair):
            place = int(n) - 1 + (index - (len(shown) - 1) / 2) * width
            label = _label(pair["edited"]) if n == _survivals(pair)[0][0] else None
            axes.bar(place, share, width * 0.92, color=colour_of(names.index(pair["edited"])), label=label)
            axes.annotate(
                f"{share:.1%}", (place, share), (0, 2), textcoords="offset points", ha="center", size=8
            )
    axes.set_xticks(range(3), ["tokens", "bi-grams", "tri-grams"])
    axes.set_ylim(0, 1.12)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("of those that occur once:\nstill there after the edit")
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4)
    return _png(figure)
