"""The sections of a report: what a measure is, its picture, its table, and what it means.

Invariant: a section without results yields nothing, and a sentence never says more than the numbers beside
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from megatron_tokedit.analysis import figures
from megatron_tokedit.analysis.report_html import dot, picture, table, visible


def perplexity(found: dict[str, Any], pictures: dict[str, bytes]) -> Iterator[str]:
    """Quantiles of documents, and the probabilities of tokens."""
    corpora = found["corpora"]
    if "perplexity" not in corpora[0]:
        return
    prior = escape(Path(found["settings"]["prior"]["path"]).name)
    yield f"<h2>How predictable: perplexity under {prior}</h2>"
    yield (
        "<p>The prior reads each document and says how surprised it is. Human text has a long tail of "
        "documents that no model saw coming; text that a model wrote is what models expect, so it crowds "
        "into the lower end and the tail is missing. A document far to the right may also be just in a "
        "language or a format that this prior does not know: perplexities are compared, never read "
        "alone.</p>"
    )
    yield picture(
        pictures,
        "perplexity",
        "Perplexity of documents. The dashed line ends the lowest quarter of the reference's range, the "
        "dotted line is its 90th percentile.",
    )
    yield _quantiles(corpora)
    yield (
        "<p>Below: what probability the prior gave each token. A U is healthy: some tokens are certain (the "
        "rest of a word), many are a surprise. The higher the right end, the more there is for token "
        "editing to resample (it looks at tokens of 0.99 and above); the lower the left end, the less the "
        "text has to teach.</p>"
    )
    yield picture(pictures, "token_probability", "Tokens by the probability that the prior gave them.")


def _quantiles(corpora: list[dict[str, Any]]) -> str:
    """The table below the picture of perplexities."""
    rows = []
    for index, corpus in enumerate(corpora):
        one = corpus["perplexity"]
        quantiles = one["quantiles"] or {}
        cells = [
            f"{quantiles[q]:,.1f}" if q in quantiles else "-" for q in ("0.05", "0.25", "0.5", "0.75", "0.95")
        ]
        shares = [
            "-" if one[key] is None else form.format(one[key])
            for key, form in (("share_in_lowest_quarter", "{:.0%}"), ("tail_share", "{:.1%}"))
        ]
        whole = one["corpus_perplexity"]
        rows.append(
            [
                dot(index, corpus["name"]),
                f"{one['num_documents_scored']:,}",
                "-" if whole is None else f"{whole:,.1f}",
                *cells,
                *shares,
            ]
        )
    heads = ["corpus", "scored", "all tokens", "5%", "25%", "median", "75%", "95%"]
    return table([*heads, "in lowest quarter", "in tail"], rows)


def concentration(found: dict[str, Any], pictures: dict[str, bytes]) -> Iterator[str]:
    """What a few features take."""
    yield "<h2>How concentrated: the features that take most of the text</h2>"
    yield (
        "<p>Every bi-gram of tokens falls into one of 10,000 hashed features. Collapsed text over-uses a "
        "few of them: its curve rises above the reference's. The effective number says it in one figure: "
        "the text is as spread as over so many equally common features. Gini is 0 where all are equally "
        "common, near 1 where few have everything.</p>"
    )
    yield picture(pictures, "rank_mass", "Share of all bi-grams that the commonest features have.")
    rows = []
    for index, corpus in enumerate(found["corpora"]):
        bigrams = corpus["at_budget"]["concentration"]["bigram_features"]
        tokens = corpus["at_budget"]["concentration"]["tokens"]
        top = bigrams["top_mass"]
        rows.append(
            [
                dot(index, corpus["name"]),
                f"{bigrams['effective_features']:,.0f}",
                f"{bigrams['entropy_bits']:.2f}",
                f"{bigrams['gini']:.3f}",
                *(f"{top[k]:.1%}" for k in ("10", "100", "1000")),
                f"{tokens['effective_features']:,.0f}",
            ]
        )
    heads = [
        "corpus",
        "effective features",
        "entropy, bits",
        "Gini",
        "top 10",
        "top 100",
        "top 1000",
        "effective tokens",
    ]
    yield table(heads, rows)


def diversity(found: dict[str, Any], pictures: dict[str, bytes]) -> Iterator[str]:
    """Distinct n-grams, compression, repetition."""
    yield "<h2>How repetitive</h2>"
    yield (
        f"<p>Of {found['budget_tokens']:,} tokens of each corpus: how many of its tri-grams are different "
        "ones, how far a general compressor packs its text, and how many runs of eight tokens come again "
        "word for word. Templates, duplicates and a model's pet phrases all show here.</p>"
    )
    yield picture(pictures, "diversity", "Diversity at one size; the dotted line is the reference.")
    rows = []
    for index, corpus in enumerate(found["corpora"]):
        one, whole = corpus["at_budget"]["diversity"], corpus["whole"]["repeated"]
        rows.append(
            [
                dot(index, corpus["name"]),
                *(f"{one['distinct'][n]:.1%}" for n in "1234"),
                f"{one['compression_ratio']:.2f}",
                *(f"{one['repeated'][n]:.1%}" for n in ("8", "13")),
                *(f"{whole[n]['share']:.1%}" for n in ("8", "13")),
            ]
        )
    heads = ["corpus", *(f"distinct-{n}" for n in "1234"), "compression", "8-grams again", "13-grams again"]
    yield table([*heads, "8-grams, all text", "13-grams, all text"], rows)


def divergence(found: dict[str, Any], pictures: dict[str, bytes]) -> Iterator[str]:
    """JS as a picture, KL as a table."""
    if len(found["corpora"]) < 2:
        return
    yield "<h2>How far apart</h2>"
    floor = found["divergence"]["js_bits_of_reference_halves"]
    chance = ""
    if floor is not None:
        chance = (
            f" Two random halves of {escape(found['reference'])} are {floor:.3f} apart at half the size: "
            "what is not above that says nothing."
        )
    yield (
        "<p>Jensen-Shannon divergence of uni- and bi-gram features: 0 for the same mixture of words and "
        "phrases, 1 bit for corpora without a feature in common. Subject counts as much as "
        f"style.{chance}</p>"
    )
    yield picture(pictures, "divergence", "Jensen-Shannon divergence between the corpora, in bits.")
    names = [corpus["name"] for corpus in found["corpora"]]
    rows = [
        [dot(i, name), *(f"{value:.3f}" for value in found["divergence"]["kl_bits"][i])]
        for i, name in enumerate(names)
    ]
    yield (
        "<details><summary>KL divergence: what it costs to expect the column's corpus and read the row's, "
        f"bits a feature</summary>{table(['KL(row || column)', *map(escape, names)], rows)}</details>"
    )


def embedding(found: dict[str, Any], pictures: dict[str, bytes]) -> Iterator[str]:
    """The map of documents."""
    if (one := found.get("embedding")) is None:
        return
    yield f"<h2>Map of documents: {escape(Path(one['model']).name)}</h2>"
    yield (
        "<p>A dot is a document, placed by what the embedding model makes of its text "
        f"(of its first {one['max_tokens']:,} tokens at most). Near dots are alike; the two axes show "
        f"{sum(one['variance_shares']):.0%} of all differences, so dots that look near may be apart in "
        "others. A corpus in a tight clump, with a smaller spread than the reference, says the same things "
        "again and again, or has a narrow subject.</p>"
    )
    yield picture(pictures, "embedding", "Documents of all corpora, principal components of their vectors.")
    rows = []
    for index, (corpus, entry) in enumerate(zip(found["corpora"], one["corpora"], strict=True)):
        cells = [
            "-" if entry[key] is None else form.format(entry[key])
            for key, form in (
                ("spread", "{:.3f}"),
                ("median_nearest_similarity", "{:.3f}"),
                ("share_nearest_is_own", "{:.0%}"),
            )
        ]
        rows.append([dot(index, corpus["name"]), f"{one['num_documents']:,}", *cells])
    heads = ["corpus", "documents", "spread", "nearest, similarity", "nearest is its own"]
    yield table(heads, rows)
    yield (
        '<p class="note">Spread: mean cosine distance of two documents. Nearest: median similarity to the '
        "nearest other document of the corpus. Its own: of how many documents the nearest of all is of the "
        f"same corpus; by chance {1 / len(rows):.0%}.</p>"
    )


def bigrams(found: dict[str, Any], pictures: dict[str, bytes]) -> Iterator[str]:
    """The commonest ones side by side."""
    del pictures
    corpora = found["corpora"]
    yield "<h2>The commonest pairs of tokens</h2>"
    yield (
        "<p>Exact counts over everything that was counted, side by side; the bar is the share of all "
        "bi-grams. A dot is a space, an arrow a line's end. Common grammar (of the, in the) is what human "
        "text has on top; names, stock phrases and sentence openings on top are a sign of a template.</p>"
    )
    columns = [corpus["top_bigrams"] for corpus in corpora]
    largest = max((b["share"] for c in columns for b in c["bigrams"]), default=1.0)
    rows = []
    for rank in range(max(len(column["bigrams"]) for column in columns)):
        cells = [str(rank + 1)]
        for index, column in enumerate(columns):
            if rank >= len(column["bigrams"]):
                cells.append("")
                continue
            one = column["bigrams"][rank]
            cells.append(
                f'<span class="bar" style="width:{100 * one["share"] / largest:.1f}%;'
                f'background:{figures.colour_of(index)}"></span><code>{visible(one["text"])}</code>'
                f"<small>{one['count']:,} &middot; {one['share']:.2%}</small>"
            )
        rows.append(cells)
    heads = ["", *(dot(index, corpus["name"]) for index, corpus in enumerate(corpora))]
    yield f'<div class="scroll bigrams">{table(heads, rows)}</div>'
    unsure = [corpus["name"] for corpus in corpora if not corpus["top_bigrams"]["is_complete"]]
    if unsure:
        yield (
            f'<p class="caution">Of {escape(", ".join(unsure))} the lowest places may lack a bi-gram: too '
            "many are about as common.</p>"
        )


def pairs(found: dict[str, Any], pictures: dict[str, bytes]) -> Iterator[str]:
    """Edited corpora beside their originals."""
    if not found["pairs"]:
        return
    yield "<h2>What the edit did</h2>"
    yield (
        "<p>An edit that helps resamples a few tokens that the prior was sure of, and leaves the rare ones "
        "alone. So look at what occurs just once in the original: how much of it is still there? Much less "
        "than 100% of the tokens means that the edit cuts the long tail off.</p>"
    )
    yield picture(pictures, "survival", "Survival of what occurs once in the original.")
    by_name = {corpus["name"]: corpus for corpus in found["corpora"]}
    places = list(by_name)
    rows = []
    for pair in found["pairs"]:
        edited, original = by_name[pair["edited"]], by_name[pair["original"]]
        journal = pair.get("journal")
        counts = (
            "-"
            if journal is None
            else " / ".join(f"{journal[k]:,}" for k in ("changed", "dropped", "inserted"))
        )
        rare = pair["survival_of_hapaxes"]
        i, j = places.index(pair["edited"]), places.index(pair["original"])
        cells = [dot(i, pair["edited"]), counts]
        cells += ["-" if rare[n]["share"] is None else f"{rare[n]['share']:.2%}" for n in "123"]
        cells += [f"{found['divergence']['js_bits'][i][j]:.4f}"]
        for pick in (_effective, _distinct, _median):
            cells.append(f"{pick(original)} &rarr; {pick(edited)}")
        rows.append(cells)
    heads = [
        "edited",
        "tokens changed / dropped / inserted",
        "tokens kept",
        "bi-grams kept",
        "tri-grams kept",
    ]
    yield table([*heads, "JS to original", "effective features", "distinct-3", "median perplexity"], rows)


def _effective(corpus: dict[str, Any]) -> str:
    return f"{corpus['at_budget']['concentration']['bigram_features']['effective_features']:,.0f}"


def _distinct(corpus: dict[str, Any]) -> str:
    return f"{corpus['at_budget']['diversity']['distinct']['3']:.2%}"


def _median(corpus: dict[str, Any]) -> str:
    quantiles = (corpus.get("perplexity") or {}).get("quantiles")
    return f"{quantiles['0.5']:.2f}" if quantiles else "-"


def selection(found: dict[str, Any], pictures: dict[str, bytes]) -> Iterator[str]:
    """What was drawn."""
    del pictures
    if (one := found.get("selection")) is None:
        return
    source, target = escape(one["source"]), escape(one["target"])
    yield f"<h2>Selection: {source} towards {target}</h2>"
    yield (
        f"<p>Of {one['num_documents_weighed']:,} documents of {source}, "
        f"<b>{one['num_documents_selected']:,}</b> ({one['num_tokens_selected']:,} tokens) were drawn by "
        f"importance resampling (DSIR), those whose n-grams are more like {target}'s the more often, and "
        f"written to <code>{escape(one['written_to'])}</code>. The mean log weight a token rose from "
        f"{one['mean_log_weight_per_token_all']:.3f} to {one['mean_log_weight_per_token_selected']:.3f}; the "
        f"mean length went from {one['mean_tokens_all']:,.0f} to {one['mean_tokens_selected']:,.0f} tokens "
        "(a weight is a sum over tokens, so length plays a part). In the paper this project follows, "
        "selecting synthetic documents did not repair collapse.</p>"
    )


def method(found: dict[str, Any], pictures: dict[str, bytes]) -> Iterator[str]:
    """Formulas, thresholds, settings."""
    del pictures
    limits, settings = found["findings"]["thresholds"], found["settings"]
    yield "<h2>How this was measured</h2>"
    yield (
        "<details><summary>Formulas, thresholds and settings</summary><ul><li><b>predictable</b>: the "
        f"median perplexity of documents is at most the reference's {100 * limits['low_quantile']:.0f}th "
        f"percentile, and at most {limits['tail_share']:.0%} of documents are above its 90th.</li><li>The "
        "lowest quarter of a corpus's range goes from its 5th percentile a quarter of the way to its 95th; "
        "what lies below counts as in it.</li><li><b>concentrated</b>: effective number of bi-gram features "
        f"below {limits['effective_ratio']:g} of the reference's. The effective number is 2 to the entropy "
        f"in bits.</li><li><b>repetitive</b>: distinct-3 below {limits['distinct_ratio']:g} of the "
        f"reference's, or compression more than {limits['compression_ratio']:g} times it, or "
        f"{limits['repeated_more']:.0%} of all 8-grams more that come again.</li><li>Documents shorter than "
        "16 tokens have no perplexity of their own here. Perplexity: exp of the mean negative "
        "log-likelihood a token, on real context, in overlapping windows.</li><li>KL with "
        f"{settings['kl_smoothing']:g} added to every count; JS without smoothing.</li><li>Seed "
        f"{settings['seed']}; a trailing end-of-document token is left out "
        "everywhere.</li></ul><p>analysis.json, beside this page, has every number; docs/analysis.md every "
        "source.</p></details>"
    )
