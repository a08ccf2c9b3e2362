"""The report: one HTML file that opens anywhere, with its pictures inside, and says what each number means.

Invariant: no request leaves the page, there is no script, everything that comes from a corpus is escaped, and
a sentence never says more than the numbers beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from megatron_tokedit.analysis import figures, findings, report_sections
from megatron_tokedit.analysis.report_html import dot, table
from megatron_tokedit.analysis.report_style import STYLE
from megatron_tokedit.dataset import atomic_write_bytes

REPORT_FILE = "report.html"
_VERDICT_CLASSES = dict(zip(findings.VERDICTS, ("good", "watch", "bad"), strict=True))
_MAX_PATHS = 3


def write_report(found: dict[str, Any], folder: Path) -> None:
    """Write the pictures as ``NAME.png`` and ``report.html``.

    Args:
        found: what ``analysis.json`` holds, findings included.
        folder: where to.
    """
    pictures = figures.draw_all(found)
    for name, data in pictures.items():
        atomic_write_bytes(folder / f"{name}.png", data)
    atomic_write_bytes(folder / REPORT_FILE, as_page(found, pictures).encode())


def as_page(found: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The page."""
    sections: tuple[Callable[[dict[str, Any], dict[str, bytes]], Iterator[str]], ...] = (
        _opening,
        report_sections.perplexity,
        report_sections.concentration,
        report_sections.diversity,
        report_sections.divergence,
        report_sections.embedding,
        report_sections.bigrams,
        report_sections.pairs,
        report_sections.selection,
        report_sections.method,
    )
    body = "\n".join(part for section in sections for part in section(found, pictures))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Corpus analysis</title>\n<style>\n{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def _opening(found: dict[str, Any], pictures: dict[str, bytes]) -> Iterator[str]:
    """Verdicts first, then what was looked at."""
    del pictures
    corpora = found["corpora"]
    reference = escape(found["reference"])
    yield "<h1>Corpus analysis</h1>"
    yield (
        f'<p class="lead">{len(corpora)} corpora in the tokens of '
        f"<code>{escape(Path(found['settings']['tokenizer']['model']).name)}</code>, held against "
        f"<b>{reference}</b>, the reference. What depends on the amount of text is measured on "
        f"<b>{found['budget_tokens']:,}</b> tokens of each, whole documents drawn at random.</p>"
    )
    names = [corpus["name"] for corpus in corpora]
    cards = []
    for verdict in found["findings"]["verdicts"]:
        signs = "".join(
            f"<li><b>{escape(sign['sign'])}</b>: {escape(sign['text'])}.</li>" for sign in verdict["signs"]
        )
        kind = _VERDICT_CLASSES[verdict["verdict"]]
        said = f"<ul>{signs}</ul>" if signs else "<p>No measure differs enough to count.</p>"
        name = dot(names.index(verdict["corpus"]), verdict["corpus"])
        cards.append(
            f'<article class="{kind}"><h3>{name}</h3><p '
            f'class="verdict">{escape(verdict["verdict"])}</p>{said}'
            "</article>"
        )
    if cards:
        yield f'<section class="cards">{"".join(cards)}</section>'
        yield (
            '<p class="note">A sign says how a corpus differs from the reference, not why: a narrow domain, '
            "boilerplate and duplicates look like collapse too. One sign asks for a closer look; two kinds "
            "of signs together are what synthetic text shows.</p>"
        )
    for caution in found["findings"]["cautions"]:
        yield f'<p class="caution">{escape(caution)}</p>'
    yield "<h2>What was looked at</h2>"
    rows = []
    for index, corpus in enumerate(corpora):
        counted = f"{corpus['num_documents_counted']:,}"
        if corpus["num_documents_counted"] < corpus["num_documents"]:
            counted += f" of {corpus['num_documents']:,}, drawn at random"
        files = [escape(Path(path).name) for path in corpus["paths"][:_MAX_PATHS]]
        more = len(corpus["paths"]) - len(files)
        files += [f"and {more} more"] if more > 0 else []
        what = {"raw": "text", "indexed": "dataset", "undone": "rebuilt from the journal of"}[corpus["kind"]]
        tokens = f"{corpus['num_tokens_counted']:,}"
        rows.append([dot(index, corpus["name"]), what, ", ".join(files), counted, tokens])
    yield table(["corpus", "kind", "from", "documents", "tokens"], rows)
