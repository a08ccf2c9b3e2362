"""The end of a study: what the edits changed, what the models reached, and where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLUMNS = ("base", "original", "edited")


def edit_table(out: Path, domains: list[str]) -> list[str]:
    """A row a domain, from the statistics beside its edited dataset."""
    lines = [
        "| domain | tokens | p >= threshold | drawn again as another | perplexity under the prior |",
        "|---|---|---|---|---|",
    ]
    for domain in domains:
        edit = json.loads((out / domain / "edited_text_document.stats.json").read_text())["edit"]
        shares = [f"{edit[name] / edit['scored']:.2%}" for name in ("eligible", "changed")]
        lines.append(
            f"| {domain} | {edit['tokens']:,d} | {shares[0]} | {shares[1]} | {edit['perplexity']:.2f} |"
        )
    return lines


def perplexity_table(out: Path, domains: list[str]) -> list[str]:
    """A row a domain: base, continued on the original and on the edited text; the two compared."""
    lines = [
        "| domain | documents | base | continued, original | continued, edited | edited against original |",
        "|---|---|---|---|---|---|",
    ]
    for domain in domains:
        found = json.loads((out / domain / "perplexity.json").read_text())
        original, base, edited = (checkpoint["domains"][0] for checkpoint in found["checkpoints"])
        cells = [_with_interval(checkpoint) for checkpoint in (base, original, edited)]
        change = found["comparisons"][-1]["rows"][0]["token"]
        lines.append(
            f"| {domain} | {original['num_documents']} | {' | '.join(cells)} | {_in_words(change)} |"
        )
    return lines


def task_table(path: Path) -> list[str]:
    """What tools/evaluate.py tasks wrote, as it wrote it."""
    return [f"Scores of the tasks: {path}"] if path.exists() else []


def _with_interval(figures: dict[str, Any]) -> str:
    interval = figures["intervals"]["perplexity"]
    text = f"{figures['perplexity']:.3f}"
    return text if interval is None else f"{text} ({interval[0]:.3f} to {interval[1]:.3f})"


def _in_words(change: dict[str, Any]) -> str:
    interval = change["change_percent_interval"]
    text = f"{change['change_percent']:+.2f} %"
    if interval is None:
        return text
    verdict = "" if change["excludes_zero"] else ", no difference to be seen"
    return f"{text} ({interval[0]:+.2f} to {interval[1]:+.2f}{verdict})"


def write_report(out: Path, domains: list[str], folders: list[Path]) -> str:
    """Write ``report.md``; return its text."""
    text = "\n".join(
        [
            "",
            "What the edits changed:",
            "",
            *edit_table(out, domains),
            "",
            "Held-out perplexity a token (95 % intervals by bootstrap over documents; the last is paired):",
            "",
            *perplexity_table(out, domains),
            "",
            *task_table(out / "tasks.json"),
            "Hugging Face folders:",
            *(f"- {folder}" for folder in folders),
        ]
    )
    (out / "report.md").write_text(text.lstrip() + "\n")
    return text
