"""Held-out perplexity over named domains, for one or more checkpoints side by side.

Invariant: a document is scored exactly as a prior scores it (``scoring``): every token once, on real context,
in overlapping windows where it is longer than the model's context; the end-of-document token is a token like
any other. Perplexity is ``exp`` of the mean negative log-likelihood of the scored tokens; the average over
domains is the plain mean of their perplexities, as in arXiv 2412.14689.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from megatron_tokedit.dataset import IndexedDataset
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.scoring import Scorer

DOCUMENTS_PER_CALL = 64


@dataclass(frozen=True)
class DomainPerplexity:
    """What one checkpoint reached on one domain.

    Attributes:
        domain: its name.
        num_documents: documents with at least one scored token.
        num_tokens: tokens of the domain.
        num_scored_tokens: tokens that have a probability (all, or all but the first of each document where
            the model was given no token to start from).
        nll_nats: summed negative log-likelihood of the scored tokens, in nats.
    """

    domain: str
    num_documents: int
    num_tokens: int
    num_scored_tokens: int
    nll_nats: float

    @property
    def perplexity(self) -> float:
        """``exp(nll_nats / num_scored_tokens)``; infinite where that overflows."""
        mean = self.nll_nats / self.num_scored_tokens
        return math.exp(mean) if mean < 700.0 else math.inf


def measure_perplexity(
    scorer: Scorer,
    dataset: IndexedDataset,
    domain: str,
    on_tokens: Callable[[int], None] | None = None,
) -> DomainPerplexity:
    """Score every document of a dataset.

    Args:
        scorer: the model.
        dataset: its ids must be below ``scorer.vocab_size``.
        domain: the name of the result.
        on_tokens: called with the number of tokens after each batch of documents, for a progress bar.

    Raises:
        DataFormatError: the dataset has no token that can be scored.
        PriorError: the model's numbers are unusable, or an id is out of its vocabulary.
    """
    num_documents = num_tokens = num_scored_tokens = 0
    nll_nats = 0.0
    documents = (
        np.concatenate(sequences).astype(np.int32) for sequences in dataset.iter_documents() if sequences
    )
    while batch := list(itertools.islice(documents, DOCUMENTS_PER_CALL)):
        for ids, scores in zip(batch, scorer.score(batch), strict=True):
            scored = scores.logprobs_T[~np.isnan(scores.logprobs_T)]
            num_documents += bool(len(scored))
            num_tokens += len(ids)
            num_scored_tokens += len(scored)
            nll_nats -= float(scored.sum(dtype=np.float64))
        if on_tokens is not None:
            on_tokens(sum(map(len, batch)))
    if not num_scored_tokens:
        raise DataFormatError(f"domain {domain}: its dataset has no token that can be scored")
    return DomainPerplexity(domain, num_documents, num_tokens, num_scored_tokens, nll_nats)


@dataclass(frozen=True)
class CheckpointPerplexity:
    """One checkpoint's results on all domains, in the order of the domains.

    Attributes:
        checkpoint: its path, as given.
        fingerprint: of its weights and of how it was scored.
        domains: one result a domain.
    """

    checkpoint: str
    fingerprint: str
    domains: tuple[DomainPerplexity, ...]

    @property
    def average(self) -> float:
        """Plain mean of the domains' perplexities."""
        return sum(d.perplexity for d in self.domains) / len(self.domains)


def as_json(results: Sequence[CheckpointPerplexity]) -> dict[str, object]:
    """Everything measured, and the table: a row a domain and the average, a value a checkpoint."""
    rows: list[dict[str, object]] = [
        {"domain": domain.domain, "perplexity": [r.domains[i].perplexity for r in results]}
        for i, domain in enumerate(results[0].domains)
    ]
    rows.append({"domain": "average", "perplexity": [r.average for r in results]})
    return {
        "checkpoints": [
            {
                "checkpoint": r.checkpoint,
                "fingerprint": r.fingerprint,
                "average_perplexity": r.average,
                "domains": [asdict(d) | {"perplexity": d.perplexity} for d in r.domains],
            }
            for r in results
        ],
        "table": rows,
    }


def as_table(results: Sequence[CheckpointPerplexity], names: Sequence[str]) -> str:
    """The table as text; ``names`` head the columns; ``*`` marks the lowest of a row of several."""
    rows = [
        (domain.domain, f"{domain.num_scored_tokens:,d}", [r.domains[i].perplexity for r in results])
        for i, domain in enumerate(results[0].domains)
    ]
    total = sum(d.num_scored_tokens for d in results[0].domains)
    rows.append(("average", f"{total:,d}", [r.average for r in results]))
    name_width = max(len("domain"), *(len(row[0]) for row in rows))
    token_width = max(len("tokens"), *(len(row[1]) for row in rows))
    widths = [max(10, len(name)) for name in names]
    lines = [
        f"{'domain':{name_width}s}  {'tokens':>{token_width}s}  "
        + "  ".join(f"{name:>{width}s} " for name, width in zip(names, widths, strict=True)).rstrip()
    ]
    for name, tokens, values in rows:
        best = min(values) if len(values) > 1 else None
        cells = (
            f"{value:{width}.3f}{'*' if value == best else ' '}"
            for value, width in zip(values, widths, strict=True)
        )
        lines.append(f"{name:{name_width}s}  {tokens:>{token_width}s}  {'  '.join(cells).rstrip()}")
    return "\n".join(lines)
