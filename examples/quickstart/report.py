"""The end of the quickstart: a table, the edit statistics, and a picture of both loss curves."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"original": "#4c566a", "edited": "#d08770"}


def read_losses(run_dir: Path) -> tuple[list[int], list[float]]:
    """(steps, training losses) of a run from its metrics.jsonl."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    points = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
    return [p[0] for p in points], [p[1] for p in points]


def plot_losses(out: Path, arms: tuple[str, ...]) -> Path:
    """Loss curves of all arms and their difference, as a PNG."""
    curves = {arm: read_losses(out / f"model-{arm}") for arm in arms}
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(7.5, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    for arm, (steps, losses) in curves.items():
        upper.plot(steps, losses, label=f"{arm} corpus", color=COLOURS[arm])
    upper.set_ylabel("training loss (nats a token)")
    upper.set_title("The same model on the original and on the edited corpus (TP2)")
    upper.legend(frameon=False)
    (steps, first), (_, second) = (curves[arm] for arm in arms)
    lower.axhline(0.0, color="#999999", linewidth=0.8)
    lower.plot(steps, [b - a for a, b in zip(first, second, strict=True)], color=COLOURS[arms[1]])
    lower.set_ylabel(f"{arms[1]} - {arms[0]}")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = out / "loss_curves.png"
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path


def perplexity_table(out: Path) -> str:
    """Held-out perplexity, a row a domain, from the file that tools/evaluate.py wrote."""
    results = json.loads((out / "perplexity.json").read_text())
    names = [Path(c["checkpoint"]).name for c in results["checkpoints"]]
    lines = ["  held-out perplexity   " + "".join(f"{name:>16s}" for name in names)]
    for row in results["table"]:
        lines.append(f"  {row['domain']:22s}" + "".join(f"{value:16.2f}" for value in row["perplexity"]))
    return "\n".join(lines)


def edit_summary(out: Path) -> str:
    """What the prior changed, from the stats beside the edited dataset."""
    stats = json.loads((out / "edited" / "edited_text_document.stats.json").read_text())
    edit = stats["edit"]
    scored = edit["scored"]
    shares = [f"{100 * count / scored:.1f}" for count in edit["p_histogram_10"]]
    notes = {
        "eligible": "have p >= 0.99 under the prior",
        "resampled": "were drawn again from the prior's 8 best candidates",
        "changed": "became another token",
    }
    return "\n".join(
        [
            f"  {'scored':10s} {scored:10,d} tokens",
            *(
                f"  {n:10s} {edit[n]:10,d}   {100 * edit[n] / scored:5.2f} %  {text}"
                for n, text in notes.items()
            ),
            f"  p of a token in ten bins (0.0-0.1 ... 0.9-1.0), %: {' '.join(shares)}",
            f"  perplexity of the corpus under the prior: {edit['perplexity']:.2f}",
        ]
    )


def write_report(out: Path, arms: tuple[str, ...], seconds: dict[str, float]) -> str:
    """Write ``report.txt`` and ``loss_curves.png``; return the report's text."""
    picture = plot_losses(out, arms)
    total = sum(seconds.values())
    text = "\n".join(
        [
            "",
            "=== What the edit did",
            edit_summary(out),
            "",
            "=== What the models learned",
            perplexity_table(out),
            "  (At this size expect about equal values: an edited corpus is still a corpus of human text.)",
            "",
            f"=== Loss curves: {picture}",
            "",
            "=== Time a stage, seconds",
            *(f"  {name:20s} {value:6.0f}" for name, value in seconds.items()),
            f"  {'all':20s} {total:6.0f}",
        ]
    )
    (out / "report.txt").write_text(text + "\n")
    return text
