"""Which corpora look collapsed, by how much, and in words.

Synthetic text gives itself away in three ways (arXiv 2412.14689, section 3): it is predictable, with no tail
of surprising documents; a few n-gram features take most of it; and it repeats itself. Each is one sign. One
sign may be the domain's: annual reports repeat, a word list is concentrated. So one sign says *look closer*,
and two say *looks collapsed*.

The thresholds are relative to the first corpus, and wide enough that human corpora of other domains (novels,
biomedicine, finance) show at most one sign beside an encyclopaedia, while TinyStories shows all three;
docs/analysis.md has the table.

Invariant: only numbers at one size are judged, and a sign always says both numbers and the threshold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

LOW_QUANTILE = 0.1
"""Predictable: half of the documents are more predictable than nine tenths of the reference's (the median is
at most its 10th percentile), and ..."""
TAIL_SHARE = 0.02
"""... at most so many are above its 90th percentile (of text like it, 0.1): the tail is gone."""
EFFECTIVE_RATIO = 0.65
"""Concentrated: the effective number of bi-gram features falls below this part of the reference's. Human
domains reach down to 0.68 of an encyclopaedia's."""
DISTINCT_RATIO = 0.7
"""Repetitive: distinct-3 below this part of the reference's, or ..."""
COMPRESSION_RATIO = 1.3
"""... compresses so many times better, or ..."""
REPEATED_MORE = 0.05
"""... such a share of all 8-grams more comes again."""
FEW_DOCUMENTS = 50
FEW_TOKENS = 20_000

VERDICTS = ("no sign of collapse", "look closer", "looks collapsed")


def judge(found: dict[str, Any]) -> dict[str, Any]:
    """Verdicts on all corpora but the first, and what to keep in mind.

    Args:
        found: what :func:`megatron_tokedit.analysis.compare.results` gave.

    Returns:
        ``verdicts``: one a corpus, with ``corpus``, ``verdict``, ``signs`` (each ``sign`` and ``text``);
        ``cautions``: sentences; ``thresholds``.
    """
    reference, *others = found["corpora"]
    verdicts = []
    for corpus in others:
        signs = list(_signs(corpus, reference))
        verdict = VERDICTS[min(len({sign["sign"] for sign in signs}), 2)]
        verdicts.append({"corpus": corpus["name"], "verdict": verdict, "signs": signs})
    return {
        "verdicts": verdicts,
        "cautions": list(_cautions(found)),
        "thresholds": {
            "low_quantile": LOW_QUANTILE,
            "tail_share": TAIL_SHARE,
            "effective_ratio": EFFECTIVE_RATIO,
            "distinct_ratio": DISTINCT_RATIO,
            "compression_ratio": COMPRESSION_RATIO,
            "repeated_more": REPEATED_MORE,
        },
    }


def _signs(corpus: dict[str, Any], reference: dict[str, Any]) -> Iterator[dict[str, str]]:
    prior = corpus.get("perplexity")
    if prior and prior["tail_share"] is not None:
        median, tail = prior["quantiles"]["0.5"], prior["tail_share"]
        low = reference["perplexity"]["quantiles"][str(LOW_QUANTILE)]
        if median <= low and tail <= TAIL_SHARE:
            text = (
                f"half of its documents have a perplexity up to {median:.1f}, of the reference only a tenth "
                f"has up to {low:.1f}; and {tail:.1%} of them are in the reference's tail, its highest tenth "
                f"(the sign ends at {TAIL_SHARE:.0%})"
            )
            yield {"sign": "predictable", "text": text}
    here, there = corpus["at_budget"], reference["at_budget"]
    effective, expected = (
        side["concentration"]["bigram_features"]["effective_features"] for side in (here, there)
    )
    if effective < EFFECTIVE_RATIO * expected:
        text = (
            f"its bi-grams are spread as over {effective:,.0f} equal features, the reference's as over "
            f"{expected:,.0f}: {effective / expected:.3f} of them (the sign starts below {EFFECTIVE_RATIO:g})"
        )
        yield {"sign": "concentrated", "text": text}
    yield from _repetition(here["diversity"], there["diversity"])


def _repetition(here: dict[str, Any], there: dict[str, Any]) -> Iterator[dict[str, str]]:
    distinct, expected = here["distinct"]["3"], there["distinct"]["3"]
    if distinct < DISTINCT_RATIO * expected:
        text = (
            f"{distinct:.1%} of its tri-grams are distinct, of the reference's {expected:.1%}: "
            f"{distinct / expected:.3f} of it (the sign starts below {DISTINCT_RATIO:g})"
        )
        yield {"sign": "repetitive", "text": text}
    ratio = here["compression_ratio"] / there["compression_ratio"]
    if ratio > COMPRESSION_RATIO:
        text = (
            f"it compresses {here['compression_ratio']:.2f} to 1, the reference "
            f"{there['compression_ratio']:.2f} to 1: {ratio:.2f} times as well (the sign starts above "
            f"{COMPRESSION_RATIO:g})"
        )
        yield {"sign": "repetitive", "text": text}
    again, expected = here["repeated"]["8"], there["repeated"]["8"]
    if again > expected + REPEATED_MORE:
        text = (
            f"{again:.1%} of its 8-grams come again, of the reference's {expected:.1%} (the sign starts "
            f"{REPEATED_MORE:.0%} of all above it)"
        )
        yield {"sign": "repetitive", "text": text}


def _cautions(found: dict[str, Any]) -> Iterator[str]:
    """What limits what these numbers say."""
    reference = found["corpora"][0]
    if found["budget_tokens"] < FEW_TOKENS:
        smallest = min(found["corpora"], key=lambda corpus: corpus["num_tokens_counted"])
        yield (
            f"The corpora are compared on {found['budget_tokens']:,} tokens each, all that "
            f"{smallest['name']} has; differences of a few percent mean nothing at that size."
        )
    if "perplexity" not in reference:
        yield (
            "No prior was given, so nothing is said of predictability, the first sign of synthetic text; "
            "--prior adds it."
        )
        return
    scored = (
        reference["perplexity"]["num_documents_scored"] - reference["perplexity"]["num_documents_too_short"]
    )
    if scored < FEW_DOCUMENTS:
        yield (
            f"The reference {reference['name']} has {scored} documents long enough for a perplexity of their "
            "own; the ends of its range are rough guesses."
        )


def as_table(found: dict[str, Any]) -> str:
    """The main numbers and the verdicts, as text."""
    rows = [
        ("", "tokens", "effective", "distinct-3", "compression", "8-grams", "perplexity", "in lowest", "tail")
    ]
    rows.append(("", "", "bi-grams", "", "", "again", "(median)", "quarter", ""))
    for corpus in found["corpora"]:
        at = corpus["at_budget"]
        prior = corpus.get("perplexity")
        cells = ["-", "-", "-"]
        if prior and prior["quantiles"] and prior["tail_share"] is not None:
            cells = [
                f"{prior['quantiles']['0.5']:.1f}",
                f"{prior['share_in_lowest_quarter']:.0%}",
                f"{prior['tail_share']:.1%}",
            ]
        rows.append(
            (
                corpus["name"],
                f"{corpus['num_tokens_counted']:,}",
                f"{at['concentration']['bigram_features']['effective_features']:,.0f}",
                f"{at['diversity']['distinct']['3']:.1%}",
                f"{at['diversity']['compression_ratio']:.2f}",
                f"{at['diversity']['repeated']['8']:.1%}",
                *cells,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.append(f"all but the tokens: of {found['budget_tokens']:,} tokens each; tail: above the 90th")
    lines.append(f"percentile of {found['reference']}, the reference")
    for verdict in found["findings"]["verdicts"]:
        signs = ", ".join(dict.fromkeys(sign["sign"] for sign in verdict["signs"]))
        lines.append(f"{verdict['corpus']}: {verdict['verdict']}{f' ({signs})' if signs else ''}")
    lines += [f"caution: {text}" for text in found["findings"]["cautions"]]
    return "\n".join(line.rstrip() for line in lines)
