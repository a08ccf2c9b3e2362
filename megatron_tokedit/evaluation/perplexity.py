"""Held-out perplexity of a checkpoint over named domains: what was measured, document by document.

Invariant: a document is scored exactly as a prior scores it (``scoring``): every token once, on real context,
in overlapping windows where it is longer than the model's context; the end-of-document token is a token like
any other. All that is kept of a document is its sums, so memory grows by 24 bytes a document and not with
their length. ``perplexity_statistics`` makes perplexities, intervals and differences of them.

Legend: ``D`` documents of a domain, empty ones included, in the order of the data.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_tokedit.dataset import IndexedDataset
from megatron_tokedit.errors import DataFormatError, PriorError
from megatron_tokedit.evaluation.text_counts import TextCounts
from megatron_tokedit.scoring import Scorer

DOCUMENTS_PER_CALL = 64


@dataclass(frozen=True, slots=True, eq=False)
class DocumentSums:
    """What one checkpoint made of each document of a domain.

    Attributes:
        nll_nats_D: float64; summed negative log-likelihood of the scored tokens, in nats.
        num_tokens_D: int64; tokens.
        num_scored_tokens_D: int64; tokens that count: all that have a probability (all, or all but the first
            where the model was given no token to start from), of conversations those of responses.
    """

    nll_nats_D: npt.NDArray[np.float64]
    num_tokens_D: npt.NDArray[np.int64]
    num_scored_tokens_D: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class DomainPerplexity:
    """What one checkpoint reached on one domain.

    Attributes:
        domain: its name.
        documents: the sums of each document.
        text: words and bytes of each document; None where they are not known.
    """

    domain: str
    documents: DocumentSums
    text: TextCounts | None = None

    @property
    def num_documents(self) -> int:
        """Documents with at least one scored token."""
        return int(np.count_nonzero(self.documents.num_scored_tokens_D))

    @property
    def num_tokens(self) -> int:
        """Tokens of the domain."""
        return int(self.documents.num_tokens_D.sum())

    @property
    def num_scored_tokens(self) -> int:
        """Tokens that count."""
        return int(self.documents.num_scored_tokens_D.sum())

    @property
    def nll_nats(self) -> float:
        """Summed negative log-likelihood of the scored tokens, in nats."""
        return float(self.documents.nll_nats_D.sum())


@dataclass(frozen=True, slots=True, eq=False)
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


def dataset_documents(dataset: IndexedDataset) -> Iterator[npt.NDArray[np.int32]]:
    """The ids of every document, its sequences one after another; an empty document has none."""
    for sequences in dataset.iter_documents():
        yield np.concatenate(sequences).astype(np.int32) if sequences else np.zeros(0, np.int32)


def dataset_responses(
    dataset: IndexedDataset, mask: IndexedDataset
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
    """The ids of every conversation and which of them are a response's, by the dataset's loss mask."""
    for ids, flags in zip(dataset_documents(dataset), dataset_documents(mask), strict=True):
        yield ids, flags != 0


def measure_perplexity(
    scorer: Scorer,
    documents: Iterable[npt.NDArray[np.int32] | tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]],
    domain: str,
    text: TextCounts | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> DomainPerplexity:
    """Score every document of a domain.

    Args:
        scorer: the model.
        documents: ids of each, below ``scorer.vocab_size``, or ids and which of them count; read once, a few
            at a time.
        domain: the name of the result.
        text: words and bytes of the documents, where they are known.
        on_tokens: called with the number of tokens that a batch scored, for a progress bar.

    Raises:
        DataFormatError: the documents have no token that can be scored.
        PriorError: the model's numbers are unusable, or an id is out of its vocabulary.
    """
    nll_nats, num_tokens, num_scored = array("d"), array("q"), array("q")
    remaining = iter(documents)
    while batch := list(itertools.islice(remaining, DOCUMENTS_PER_CALL)):
        pairs = [given if isinstance(given, tuple) else (given, np.True_) for given in batch]
        results = scorer.score([ids for ids, _ in pairs], on_batch=on_tokens)
        for (ids, counts_T), scores in zip(pairs, results, strict=True):
            logprobs_T = scores.logprobs_T
            is_counted_T = np.broadcast_to(counts_T, logprobs_T.shape).copy()
            if len(ids) and np.isnan(logprobs_T[0]):  # nothing stands before it
                is_counted_T[0] = False
            logprobs_T = logprobs_T[is_counted_T]
            nll = -float(logprobs_T.sum(dtype=np.float64))
            if not np.isfinite(nll):
                raise PriorError(
                    f"domain {domain}, document {len(nll_nats)}: the model returned a log-probability that "
                    "is not a finite number; its weights are damaged, or its precision does not suffice "
                    "(try float32)"
                )
            nll_nats.append(nll)
            num_tokens.append(len(ids))
            num_scored.append(len(logprobs_T))
    sums = DocumentSums(
        np.frombuffer(nll_nats, np.float64) if nll_nats else np.zeros(0),
        np.frombuffer(num_tokens, np.int64) if num_tokens else np.zeros(0, np.int64),
        np.frombuffer(num_scored, np.int64) if num_scored else np.zeros(0, np.int64),
    )
    if not sums.num_scored_tokens_D.any():
        raise DataFormatError(f"domain {domain}: its data has no token that can be scored")
    return DomainPerplexity(domain, sums, text)
