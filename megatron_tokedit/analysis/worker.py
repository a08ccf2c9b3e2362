"""What one process does with one part of a corpus: count it, tally it, score it, weigh it.

Invariant: a result depends on the part and the arguments alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from megatron_tokedit.analysis import dsir, perplexity
from megatron_tokedit.analysis.blocks import Ints
from megatron_tokedit.analysis.embedding import Embeddings
from megatron_tokedit.analysis.embedding_model import EmbeddingChoice, EmbeddingModel
from megatron_tokedit.analysis.ngrams import FINE_BUCKETS, BigramTally
from megatron_tokedit.analysis.sources import Corpus, Reader
from megatron_tokedit.analysis.statistics import CorpusStatistics
from megatron_tokedit.corpus import BadLine
from megatron_tokedit.scoring import Scorer
from megatron_tokedit.tokenizers import Tokenizer, load_tokenizer

if TYPE_CHECKING:  # these import torch, which an analysis without a prior does not need
    from megatron_tokedit.scoring.identity import PriorIdentity
    from megatron_tokedit.scoring.scorer import ScoringOptions

MAX_BAD_SHOWN = 5


@dataclass(frozen=True, slots=True)
class TokenizerChoice:
    """A tokenizer by Megatron-LM's names."""

    type: str
    model: str

    def load(self) -> Tokenizer:
        """The tokenizer itself.

        Raises:
            TokenizerError: it cannot be loaded.
        """
        return load_tokenizer(self.type, self.model)


@dataclass(frozen=True, slots=True)
class PriorChoice:
    """A prior and how it is used; picklable.

    Attributes:
        identity: which model.
        options: windows and batches.
        tokenizer: whose ids it takes.
        dtype: precision.
        device: ``cpu`` or ``cuda``.
    """

    identity: PriorIdentity
    options: ScoringOptions
    tokenizer: TokenizerChoice
    dtype: str
    device: str


@dataclass(frozen=True, slots=True)
class Setup:
    """What every worker has to know.

    Attributes:
        corpora: all of them; tasks name one by its number.
        tokenizer: in whose ids all corpora are counted.
        prior: to score with.
        budget_tokens: tokens of each corpus to compare on.
        seed: of every draw.
        embedding: model that makes vectors of documents.
    """

    corpora: tuple[Corpus, ...]
    tokenizer: TokenizerChoice
    prior: PriorChoice | None
    budget_tokens: int
    seed: int
    embedding: EmbeddingChoice | None = None


class PartWorker:
    """Does tasks; models and tokenizers are loaded when they are first needed."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._corpora = setup.corpora

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self._setup.tokenizer.load()

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self._tokenizer)

    @cached_property
    def _prior_reader(self) -> Reader:
        assert self._setup.prior is not None
        if self._setup.prior.tokenizer == self._setup.tokenizer:
            return Reader(self._tokenizer, keeps_prefix=True)
        return Reader(self._setup.prior.tokenizer.load(), self._tokenizer, keeps_prefix=True)

    @cached_property
    def _scorer(self) -> Scorer:
        import torch

        from megatron_tokedit.scoring.load import load_scorer

        prior = self._setup.prior
        assert prior is not None
        if prior.device == "cpu":
            torch.set_num_threads(1)  # workers are processes, and the last bits must not depend on them
        scorer = load_scorer(prior.identity, prior.options, dtype=prior.dtype, device=prior.device)
        if prior.device == "cpu":
            torch.set_num_threads(1)  # megatron's initialisation may have chosen its own
        return scorer

    def count(self, corpus: int, part: int, ordinals: Ints | None) -> tuple[CorpusStatistics, list[str]]:
        """Count a part; also the first lines that are no document."""
        setup, bad = self._setup, list[BadLine]()
        found = CorpusStatistics(self._tokenizer.vocab_size, setup.budget_tokens, setup.seed)
        for block in self._reader.read(self._corpora[corpus], part, ordinals, bad.append):
            found.add(block)
        found.num_bad = len(bad)
        found.settle()
        return found, [str(line) for line in bad[:MAX_BAD_SHOWN]]

    def tally(self, corpus: int, part: int, ordinals: Ints | None, buckets: Ints) -> BigramTally:
        """Count exactly the bi-grams of some fine buckets."""
        is_candidate = np.zeros(FINE_BUCKETS, bool)
        is_candidate[buckets] = True
        found = BigramTally.empty(buckets)
        for block in self._reader.read(self._corpora[corpus], part, ordinals, lambda line: None):
            found.add(block, is_candidate)
        return found

    def score(self, corpus: int, part: int, ordinals: Ints | None) -> perplexity.PriorScores:
        """Score documents with the prior."""
        read = self._prior_reader.read(self._corpora[corpus], part, ordinals, lambda line: None)
        found = perplexity.PriorScores.empty()
        for block in read:
            found.merge(perplexity.score_blocks(self._scorer, [block]))
        return found

    @cached_property
    def _embedding_model(self) -> EmbeddingModel:
        assert self._setup.embedding is not None
        return EmbeddingModel(self._setup.embedding)

    def embed(self, corpus: int, part: int, ordinals: Ints | None) -> tuple[Embeddings, int]:
        """Vectors of documents, without those that hold no text; also how many were looked at."""
        found, num_seen = Embeddings.empty(), 0
        for numbered in self._reader.read_texts(self._corpora[corpus], part, ordinals):
            num_seen += len(numbered)
            if with_text := [(number, text) for number, text in numbered if text.strip()]:
                numbers, texts = zip(*with_text, strict=True)
                found.merge(Embeddings(np.array(numbers, np.int64), self._embedding_model.encode(texts)))
        return found, num_seen

    def weigh(self, corpus: int, part: int, ratios_F: dsir.Floats) -> tuple[Ints, dsir.Floats, Ints]:
        """Ordinals, log importance weights and tokens of a part's documents."""
        ordinals, weights, tokens = [np.empty(0, np.int64)], [np.empty(0)], [np.empty(0, np.int64)]
        for block in self._reader.read(self._corpora[corpus], part, None, lambda line: None):
            ordinals.append(block.ordinals_D)
            weights.append(dsir.log_weights(block, ratios_F))
            tokens.append(block.lengths_D)
        return np.concatenate(ordinals), np.concatenate(weights), np.concatenate(tokens)
