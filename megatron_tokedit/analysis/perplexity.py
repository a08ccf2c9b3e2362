"""How predictable documents are to a prior: perplexity by document, and the probabilities of their tokens.

Perplexity of a document is ``exp`` of the mean negative log-likelihood of its scored tokens; a corpus's is
that of all its tokens. Sources: arXiv 2412.14689, section 3 (synthetic text lies inside the lowest quarter of
the range of human text and lacks its long tail) and its table of token probabilities in ten bins.

Invariant: results of parts, merged in the order of the corpus, are those of the whole; a document's numbers
do not depend on who scored it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron_tokedit.analysis.blocks import Ints, TokenBlock
from megatron_tokedit.scoring import Scorer

Floats = npt.NDArray[np.float64]
NUM_BINS = 10
MIN_DOCUMENT_TOKENS = 16
"""A perplexity of fewer tokens says more about the few than about the document: left out by document."""
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
TAIL_QUANTILE = 0.9
RANGE_QUANTILES = (0.05, 0.95)
_DOCUMENTS_PER_CALL = 64


@dataclass(slots=True)
class PriorScores:
    """What a prior said of documents.

    Attributes:
        ordinals_D: int64 ``[D]``.
        tokens_D: int64 ``[D]``, scored tokens.
        nll_D: float64 ``[D]``, summed negative log-likelihood in nats.
        histogram: int64 ``[10]``, tokens by probability, 0.0-0.1 ... 0.9-1.0.
    """

    ordinals_D: Ints
    tokens_D: Ints
    nll_D: Floats
    histogram: Ints

    @classmethod
    def empty(cls) -> Self:
        """Nothing scored yet."""
        ints = np.empty(0, np.int64)
        return cls(ints, ints, np.empty(0), np.zeros(NUM_BINS, np.int64))

    def merge(self, other: PriorScores) -> None:
        """Append the documents of another."""
        self.ordinals_D = np.concatenate((self.ordinals_D, other.ordinals_D))
        self.tokens_D = np.concatenate((self.tokens_D, other.tokens_D))
        self.nll_D = np.concatenate((self.nll_D, other.nll_D))
        self.histogram = self.histogram + other.histogram

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything, as arrays for ``numpy.savez``."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """What :meth:`to_arrays` gave."""
        return cls(*(arrays[name] for name in cls.__slots__))

    @property
    def perplexities(self) -> Floats:
        """Of every document of at least :data:`MIN_DOCUMENT_TOKENS` scored tokens."""
        is_long = self.tokens_D >= MIN_DOCUMENT_TOKENS
        found: Floats = np.exp(np.minimum(self.nll_D[is_long] / self.tokens_D[is_long], 700.0))
        return found


def score_blocks(scorer: Scorer, blocks: Sequence[TokenBlock]) -> PriorScores:
    """Score the documents of some blocks."""
    found = PriorScores.empty()
    for block in blocks:
        documents = block.documents()
        for start in range(0, len(documents), _DOCUMENTS_PER_CALL):
            chosen = slice(start, start + _DOCUMENTS_PER_CALL)
            scores = [score.logprobs_T for score in scorer.score(documents[chosen])]
            scored = [logprobs[~np.isnan(logprobs)].astype(np.float64) for logprobs in scores]
            everything = np.concatenate([np.empty(0), *scored])
            found.merge(
                PriorScores(
                    block.ordinals_D[chosen],
                    np.array([len(logprobs) for logprobs in scored], np.int64),
                    np.array([-logprobs.sum() for logprobs in scored]),
                    probability_histogram(everything),
                )
            )
    return found


def probability_histogram(logprobs: Floats) -> Ints:
    """Tokens by probability in ten equal bins; 1.0 belongs to the last."""
    bins = np.minimum((np.exp(logprobs) * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    return np.bincount(bins, minlength=NUM_BINS)


def lowest_quarter(perplexities: Floats) -> float:
    """Where the lowest quarter of a corpus's range ends: from its 5th to its 95th percentile, so that odd
    documents (a table, another language) do not set the range.
    """
    low, high = np.quantile(perplexities, RANGE_QUANTILES)
    return float(low + (high - low) / 4)


def describe(scores: PriorScores, reference: PriorScores) -> dict[str, Any]:
    """All measures of one corpus, beside the reference's.

    Returns:
        A dictionary; ``None`` for what no document is long enough for.
    """
    values, of_reference = scores.perplexities, reference.perplexities
    num_tokens = int(scores.tokens_D.sum())
    total = float(scores.nll_D.sum())
    found: dict[str, Any] = {
        "num_documents_scored": len(scores.tokens_D),
        "num_documents_too_short": len(scores.tokens_D) - len(values),
        "num_tokens_scored": num_tokens,
        "corpus_perplexity": math.exp(min(total / num_tokens, 700.0)) if num_tokens else None,
        "token_probability_shares": (scores.histogram / max(1, scores.histogram.sum())).tolist(),
        "quantiles": None,
        "share_in_lowest_quarter": None,
        "tail_share": None,
    }
    if len(values):
        quantiles = np.quantile(values, QUANTILES).tolist()
        found["quantiles"] = dict(zip(map(str, QUANTILES), quantiles, strict=True))
    if len(values) and len(of_reference):
        found["share_in_lowest_quarter"] = float((values <= lowest_quarter(of_reference)).mean())
        found["tail_share"] = float((values > np.quantile(of_reference, TAIL_QUANTILE)).mean())
    return found
