"""A perplexity report as JSON, and as tables to read.

Invariant: the JSON holds every figure of the tables at full precision; a figure that does not exist is null
there, and ``n/a`` in a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_tokedit.evaluation.perplexity import DomainPerplexity
from megatron_tokedit.evaluation.perplexity_statistics import (
    CONFIDENCE,
    FEW_DOCUMENTS,
    UNITS,
    Difference,
    Estimate,
    PerplexityReport,
    Unit,
)

QUANTITY: dict[Unit, str] = {"token": "perplexity", "word": "word perplexity", "byte": "bits/byte"}
"""Unit -> what is shown of it."""
_KEY: dict[Unit, str] = {"token": "perplexity", "word": "word_perplexity", "byte": "bits_per_byte"}
_DIGITS: dict[Unit, int] = {"token": 3, "word": 3, "byte": 4}


def as_json(report: PerplexityReport) -> dict[str, Any]:
    """Everything measured, and the table: a row a domain and the average, a value a checkpoint."""
    return {
        "checkpoints": [_checkpoint_json(report, c) for c in range(len(report.results))],
        "table": [
            {"domain": row, "perplexity": [_value(estimate) for estimate in estimates]}
            for row, estimates in zip(report.rows, report.estimates["token"], strict=True)
        ],
        "baseline": report.names[report.baseline],
        "same_tokens": report.same_tokens,
        "comparisons": [
            _comparison_json(report, c) for c in range(len(report.results)) if c != report.baseline
        ],
        "bootstrap": {
            "resampled": "documents",
            "num_resamples": report.bootstrap.num_resamples,
            "seed": report.bootstrap.seed,
            "confidence": CONFIDENCE,
            "interval": "percentile",
        },
    }


def _checkpoint_json(report: PerplexityReport, c: int) -> dict[str, Any]:
    result = report.results[c]
    figures = [
        _figures({unit: report.estimates[unit][row][c] for unit in UNITS}) for row in range(len(report.rows))
    ]
    return {
        "checkpoint": result.checkpoint,
        "name": report.names[c],
        "fingerprint": result.fingerprint,
        "average_perplexity": figures[-1]["perplexity"],
        "average": figures[-1],
        "domains": [_sizes(domain) | row for domain, row in zip(result.domains, figures[:-1], strict=True)],
    }


def _sizes(domain: DomainPerplexity) -> dict[str, Any]:
    text = domain.text
    return {
        "domain": domain.domain,
        "num_documents": domain.num_documents,
        "num_tokens": domain.num_tokens,
        "num_scored_tokens": domain.num_scored_tokens,
        "num_words": None if text is None else int(text.num_words_D.sum()),
        "num_bytes": None if text is None else int(text.num_bytes_D.sum()),
        "nll_nats": domain.nll_nats,
    }


def _figures(estimates: dict[Unit, Estimate | None]) -> dict[str, Any]:
    """The numbers of a row and a checkpoint, and their intervals."""
    values = {_KEY[unit]: _value(estimate) for unit, estimate in estimates.items()}
    intervals = {_KEY[unit]: estimate and estimate.interval for unit, estimate in estimates.items()}
    return {**values, "intervals": intervals}


def _comparison_json(report: PerplexityReport, c: int) -> dict[str, Any]:
    return {
        "checkpoint": report.names[c],
        "baseline": report.names[report.baseline],
        "rows": [
            {"domain": row} | {unit: _difference_json(report.differences[unit][i][c]) for unit in UNITS}
            for i, row in enumerate(report.rows)
        ],
    }


def _difference_json(found: Difference | None) -> dict[str, Any] | None:
    if found is None:
        return None
    change = found.change.interval
    return {
        "difference": found.difference.value,
        "difference_interval": found.difference.interval,
        "change_percent": 100.0 * found.change.value,
        "change_percent_interval": None if change is None else [100.0 * end for end in change],
        "excludes_zero": found.excludes_zero,
    }


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def document_lines(report: PerplexityReport) -> Iterator[dict[str, Any]]:
    """The sums of every document: a record each, in the order of the data."""
    for i, first in enumerate(report.results[0].domains):
        pairs = zip(report.names, report.results, strict=True)
        sums = {name: result.domains[i].documents for name, result in pairs}
        for document in range(len(first.documents.nll_nats_D)):
            yield {
                "domain": first.domain,
                "document": document,
                "num_words": None if first.text is None else int(first.text.num_words_D[document]),
                "num_bytes": None if first.text is None else int(first.text.num_bytes_D[document]),
                "nll_nats": {name: float(s.nll_nats_D[document]) for name, s in sums.items()},
                "num_scored_tokens": {name: int(s.num_scored_tokens_D[document]) for name, s in sums.items()},
            }


def as_tables(report: PerplexityReport, unit: Unit = "token") -> str:
    """The tables as text: a row a domain; of several checkpoints also each against the baseline.

    Args:
        report: what to show.
        unit: that the numbers are shown by; of a single checkpoint bits a byte are shown, too.
    """
    blocks = [_table(report, unit)]
    if len(report.results) > 1:
        blocks.append(_comparison_table(report, unit))
    few = [d.domain for d in report.results[0].domains if d.num_documents < FEW_DOCUMENTS]
    if report.bootstrap.num_resamples and few:
        blocks.append(
            f"Too few documents for intervals to be trusted (under {FEW_DOCUMENTS}, they are too narrow; of "
            f"one document there is none): {', '.join(few)}"
        )
    return "\n\n".join(blocks)


def _table(report: PerplexityReport, unit: Unit) -> str:
    """A row a domain; a column a checkpoint, or, of a single one, a column a unit."""
    several = len(report.results) > 1
    if several:
        columns = [(name, unit, c) for c, name in enumerate(report.names)]
    else:
        columns = [(QUANTITY[u], u, 0) for u in UNITS if u == unit or (u == "byte" and report.knows(u))]
    sizes, size_name = _size_column(report, unit)
    lines = [["domain", "documents", size_name, *(f"{heading} " for heading, _, _ in columns)]]
    documents = [domain.num_documents for domain in report.results[0].domains]
    for row, name in enumerate(report.rows):
        estimates = [report.estimates[u][row][c] for _, u, c in columns]
        lowest = min((e.value for e in estimates if e is not None), default=None) if several else None
        cells = [
            _cell(estimate, _DIGITS[u]) + ("*" if estimate is not None and estimate.value == lowest else " ")
            for estimate, (_, u, _) in zip(estimates, columns, strict=True)
        ]
        lines.append([name, f"{[*documents, sum(documents)][row]:,d}", sizes[row], *cells])
    quantity = "perplexity a token" if unit == "token" else QUANTITY[unit]
    notes = [quantity if several else report.names[0], "average: mean of the rows"]
    if report.bootstrap.num_resamples:
        notes.append(f"+-: half the 95 % interval ({report.bootstrap.num_resamples:,d} bootstrap resamples)")
    if several:
        notes.append("*: lowest of its row")
    return _aligned(lines, left=1) + "\n" + "; ".join(notes)


def _size_column(report: PerplexityReport, unit: Unit) -> tuple[list[str], str]:
    """The size of each row, and what it counts: scored tokens, where all checkpoints have the same."""
    name = "tokens" if report.same_tokens else "words" if unit == "word" else "bytes"
    sizes = [_size(domain, name) for domain in report.results[0].domains]
    known = [size for size in sizes if size is not None]
    sizes.append(sum(known) if len(known) == len(sizes) else None)
    return ["n/a" if size is None else f"{size:,d}" for size in sizes], name


def _size(domain: DomainPerplexity, name: str) -> int | None:
    """Tokens, words or bytes of a domain; None where they are not known."""
    if name == "tokens":
        return domain.num_scored_tokens
    if domain.text is None:
        return None
    return int((domain.text.num_words_D if name == "words" else domain.text.num_bytes_D).sum())


def _comparison_table(report: PerplexityReport, unit: Unit) -> str:
    """A row a checkpoint and domain: its difference from the baseline, and whether 0 is in the interval."""
    measure = "bits a byte" if unit == "byte" else f"ln of the ratio of perplexities, nats a {unit}"
    lines = [["checkpoint", "domain", "difference", "95 % interval", "change", ""]]
    for c, name in enumerate(report.names):
        if c == report.baseline:
            continue
        for row, domain in enumerate(report.rows):
            found = report.differences[unit][row][c]
            lines.append([name if row == 0 else "", domain, *_difference_cells(found)])
    return f"against {report.names[report.baseline]} ({measure}):\n" + _aligned(lines, left=2)


def _difference_cells(found: Difference | None) -> list[str]:
    if found is None:
        return ["n/a", "n/a", "n/a", ""]
    interval, verdict = found.difference.interval, ""
    if interval is not None:
        verdict = "0 is in it" if not found.excludes_zero else "lower" if interval[1] < 0.0 else "higher"
    return [
        f"{found.difference.value:+.4f}",
        "n/a" if interval is None else f"{interval[0]:+.4f} .. {interval[1]:+.4f}",
        f"{100.0 * found.change.value:+.2f} %",
        verdict,
    ]


def _cell(estimate: Estimate | None, digits: int) -> str:
    """``28.113 +-0.742``."""
    if estimate is None:
        return "n/a"
    value = f"{estimate.value:.{digits}f}" if estimate.value < 1e5 else f"{estimate.value:.4g}"
    if estimate.interval is None:
        return value
    return f"{value} +-{(estimate.interval[1] - estimate.interval[0]) / 2:#.3g}"


def _aligned(lines: Sequence[Sequence[str]], *, left: int) -> str:
    """Columns of equal width; the first ``left`` and a last column of remarks begin at their left edge."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}s}" if place < left else f"{cell:>{width}s}"
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
