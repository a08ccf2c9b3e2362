"""From the counts of several corpora to the numbers that compare them: what ``analysis.json`` holds.

Invariant: numbers under ``at_budget`` are of the same number of tokens of every corpus and may be compared;
those under ``whole`` are of everything that was counted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_tokedit.analysis import concentration, diversity, perplexity
from megatron_tokedit.analysis.blocks import Ints, TokenBlock
from megatron_tokedit.analysis.ngrams import BigramTally, NgramCounts
from megatron_tokedit.analysis.sketch import survival
from megatron_tokedit.analysis.sources import JOURNAL_SUFFIX, Corpus
from megatron_tokedit.analysis.statistics import RARE_SIZES, CorpusStatistics
from megatron_tokedit.dataset import CHANGED, DROPPED, INSERTED, Journal
from megatron_tokedit.tokenizers import Tokenizer

if TYPE_CHECKING:
    from megatron_tokedit.analysis.run import Settings

FORMAT_VERSION = 1
NUM_TOP_BIGRAMS = 40
CURVE_POINTS = 60


def results(
    settings: Settings,
    tokenizer: Tokenizer,
    statistics: Sequence[CorpusStatistics],
    tallies: Sequence[tuple[BigramTally, int]],
    scores: Sequence[perplexity.PriorScores] | None,
) -> dict[str, Any]:
    """Everything but the selection."""
    budget = min(settings.budget_tokens, *(known.reservoir.num_tokens for known in statistics))
    blocks = [known.reservoir.block(budget) for known in statistics]
    at_budget = [_counts_of(block, tokenizer) for block in blocks]
    corpora = []
    for number, (corpus, known) in enumerate(zip(settings.corpora, statistics, strict=True)):
        entry = _corpus_entry(corpus, known)
        entry["at_budget"] = {
            "concentration": _concentration(at_budget[number]),
            "rank_mass": _curve(at_budget[number].bigrams_F),
            "diversity": diversity.describe(blocks[number], tokenizer),
        }
        entry["whole"] = {
            "concentration": _concentration(known.ngrams),
            "repeated": {
                str(n): {
                    "share": known.samples[n].repeated_share,
                    "sampled_one_in": 1 << known.samples[n].level,
                }
                for n in diversity.LONG_SIZES
            },
        }
        entry["top_bigrams"] = _top_bigrams(tallies[number], known, tokenizer)
        if scores is not None:
            entry["perplexity"] = perplexity.describe(scores[number], scores[0])
            entry["perplexity"]["by_document"] = _thinned(scores[number].perplexities)
        corpora.append(entry)
    return {
        "format_version": FORMAT_VERSION,
        "settings": _settings_entry(settings, tokenizer),
        "reference": settings.corpora[0].name,
        "budget_tokens": budget,
        "corpora": corpora,
        "divergence": _divergence(at_budget, blocks[0], tokenizer),
        "pairs": _pairs(settings, statistics),
    }


def _settings_entry(settings: Settings, tokenizer: Tokenizer) -> dict[str, Any]:
    prior = settings.prior
    return {
        "tokenizer": {
            "type": tokenizer.tokenizer_type,
            "model": tokenizer.tokenizer_model,
            "fingerprint": tokenizer.fingerprint,
        },
        "prior": prior
        and {
            "path": prior.identity.path,
            "fingerprint": prior.identity.fingerprint,
            "dtype": prior.dtype,
            "tokenizer": prior.tokenizer.model,
            "context_tokens": prior.options.context_tokens,
            "overlap_tokens": prior.options.overlap_tokens,
        },
        "sample_documents": settings.sample_documents,
        "sample_share": settings.sample_share,
        "prior_documents": settings.prior_documents,
        "budget_tokens": settings.budget_tokens,
        "seed": settings.seed,
        "kl_smoothing": concentration.SMOOTHING,
    }


def _corpus_entry(corpus: Corpus, known: CorpusStatistics) -> dict[str, Any]:
    return {
        "name": corpus.name,
        "kind": corpus.kind,
        "paths": list(corpus.paths),
        "json_key": corpus.json_key or None,
        "original_of": corpus.original_of,
        "num_documents": corpus.num_documents,
        "num_documents_counted": known.num_documents,
        "num_tokens_counted": known.num_tokens,
        "num_bad_lines": known.num_bad,
    }


def _counts_of(block: TokenBlock, tokenizer: Tokenizer) -> NgramCounts:
    counts = NgramCounts.empty(tokenizer.vocab_size)
    counts.add(block)
    return counts


def _concentration(counts: NgramCounts) -> dict[str, Any]:
    return {
        "tokens": concentration.describe(counts.unigrams_V),
        "bigram_features": concentration.describe(counts.bigrams_F),
        "features": concentration.describe(counts.features_F),
    }


def _curve(counts_F: Ints) -> list[list[float]]:
    """Points (rank, share of the commonest features up to it), evenly spaced in the logarithm of the rank."""
    mass = concentration.rank_mass(counts_F)
    ranks = np.unique(np.geomspace(1, len(mass), CURVE_POINTS).round().astype(int))
    return [[int(rank), float(mass[rank - 1])] for rank in ranks]


def _top_bigrams(
    tally_and_bound: tuple[BigramTally, int], known: CorpusStatistics, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The commonest bi-grams with their exact counts, spelled out."""
    tally, bound = tally_and_bound
    top = tally.top(NUM_TOP_BIGRAMS)
    total = max(1, int(known.ngrams.bigrams_F.sum()))
    return {
        "is_complete": (len(top) == NUM_TOP_BIGRAMS and top[-1][2] >= bound) or not bound,
        "num_bigrams": total,
        "bigrams": [
            {
                "ids": [first, second],
                "text": tokenizer.decode([first, second]),
                "count": count,
                "share": count / total,
            }
            for first, second, count in top
        ],
    }


def _divergence(counts: Sequence[NgramCounts], reference: TokenBlock, tokenizer: Tokenizer) -> dict[str, Any]:
    """KL and JS of every pair, over DSIR's features at the budget, and what chance alone gives."""
    features = [known.features_F for known in counts]
    documents = reference.documents()
    halves = [_counts_of(TokenBlock.of(documents[start::2]), tokenizer).features_F for start in (0, 1)]
    return {
        "js_bits": [[concentration.js_bits(p, q) for q in features] for p in features],
        "kl_bits": [[concentration.kl_bits(p, q) for q in features] for p in features],
        "js_bits_of_reference_halves": concentration.js_bits(*halves) if len(documents) > 1 else None,
    }


def _pairs(settings: Settings, statistics: Sequence[CorpusStatistics]) -> list[dict[str, Any]]:
    """What became of the rare n-grams of every original."""
    names = [corpus.name for corpus in settings.corpora]
    found = []
    for edited, original in settings.pairs:
        after, before = statistics[names.index(edited)], statistics[names.index(original)]
        once_V = before.ngrams.unigrams_V == 1
        kept = float((after.ngrams.unigrams_V[once_V] > 0).mean()) if once_V.any() else float("nan")
        found_of = {1: (kept, int(once_V.sum()))}
        found_of |= {size: survival(before.samples[size], after.samples[size]) for size in RARE_SIZES}
        rare = {
            str(size): {"share": share if num_looked_at else None, "num_looked_at": num_looked_at}
            for size, (share, num_looked_at) in found_of.items()
        }
        entry = {"edited": edited, "original": original, "survival_of_hapaxes": rare}
        path = settings.corpora[names.index(edited)].paths[0] + JOURNAL_SUFFIX
        if os.path.isfile(path):
            kinds = np.bincount(Journal(path).column("kinds"), minlength=4)
            entry["journal"] = {
                name: int(kinds[kind])
                for name, kind in (("changed", CHANGED), ("dropped", DROPPED), ("inserted", INSERTED))
            }
        found.append(entry)
    return found


def _thinned(values: perplexity.Floats, limit: int = 2000) -> list[float]:
    """Values in rising order, evenly thinned, for drawing."""
    ordered = np.sort(values)
    if len(ordered) > limit:
        ordered = ordered[np.linspace(0, len(ordered) - 1, limit).round().astype(int)]
    return [float(f"{value:.6g}") for value in ordered]
