"""An analysis from corpora to one dictionary of results: count, tally, score, select, compare.

Invariant: the results depend on the corpora and the settings alone, not on the number of processes or on what
an earlier run left in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_tokedit import log
from megatron_tokedit.analysis import compare, dsir, embedding
from megatron_tokedit.analysis.blocks import Ints
from megatron_tokedit.analysis.cache import ResultCache
from megatron_tokedit.analysis.embedding import Embeddings
from megatron_tokedit.analysis.embedding_model import EmbeddingChoice
from megatron_tokedit.analysis.ngrams import BigramTally, candidates
from megatron_tokedit.analysis.parallel import OrderedWorkers, Task
from megatron_tokedit.analysis.perplexity import PriorScores
from megatron_tokedit.analysis.selection import check_output, write_selection
from megatron_tokedit.analysis.sources import Corpus, draw_documents, of_part
from megatron_tokedit.analysis.statistics import CorpusStatistics
from megatron_tokedit.analysis.worker import PartWorker, PriorChoice, Setup, TokenizerChoice
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.tokenizers import Tokenizer

logger = log.get_logger(__name__)
MIN_EMBEDDED = 30
"""Documents of a corpus below which the measures of the map say little."""


class Progress(Protocol):
    """Told how far a stage of the analysis is."""

    def start(self, stage: str, total: int, unit: str) -> None:
        """A stage begins."""

    def advance(self, count: int) -> None:
        """So many more are done."""

    def close(self) -> None:
        """The stage is over."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Documents of ``source`` that make a corpus like ``target``; ``count`` or ``share`` says how many."""

    source: str
    target: str
    count: int | None
    share: float | None
    prefix: str


@dataclass(frozen=True, slots=True)
class Settings:
    """What is to be done.

    Attributes:
        corpora: in the order of the report; the first is what the others are compared with.
        tokenizer: in whose ids all are counted.
        prior: to score with, where given.
        pairs: (edited, original) by name.
        selection: what to select, where asked for.
        sample_documents: documents of each corpus that are counted; None: all.
        sample_share: the same as a share.
        prior_documents: documents of each corpus that are scored; None: all that are counted.
        embedding: model that makes vectors of documents, where given.
        embedding_documents: documents of each corpus that it reads.
        budget_tokens: tokens of each corpus to compare on, fewer where a corpus has fewer.
        seed: of every draw.
        workers: processes.
        max_bad_lines: lines of a corpus that may be no document.
    """

    corpora: tuple[Corpus, ...]
    tokenizer: TokenizerChoice
    prior: PriorChoice | None = None
    pairs: tuple[tuple[str, str], ...] = ()
    selection: Selection | None = None
    sample_documents: int | None = None
    sample_share: float | None = None
    prior_documents: int | None = 1000
    embedding: EmbeddingChoice | None = None
    embedding_documents: int = 300
    budget_tokens: int = 1_000_000
    seed: int = 1234
    workers: int = 1
    max_bad_lines: int = 0

    def sample_of(self, corpus: Corpus) -> Ints | None:
        """Ordinals of the documents that are counted; None: all."""
        count = self.sample_documents
        if self.sample_share is not None:
            count = max(1, round(self.sample_share * corpus.num_documents))
        return draw_documents(corpus.num_documents, count, self.seed)


class Analysis:
    """One run.

    Args:
        settings: what is to be done.
        tokenizer: that of the settings, loaded.
        cache_folder: where results of corpora are kept.
        progress: told how far it is.
    """

    def __init__(
        self, settings: Settings, tokenizer: Tokenizer, cache_folder: Path, progress: Progress
    ) -> None:
        self._settings, self._tokenizer, self._progress = settings, tokenizer, progress
        self._cache = ResultCache(cache_folder)
        self._samples = [settings.sample_of(corpus) for corpus in settings.corpora]
        self._setup = Setup(
            settings.corpora,
            settings.tokenizer,
            settings.prior,
            settings.budget_tokens,
            settings.seed,
            settings.embedding,
        )

    def run(self) -> dict[str, Any]:
        """Do everything; returns what ``analysis.json`` holds.

        Raises:
            TokeditError: a corpus cannot be read, has too many bad lines, or does not fit tokenizer or prior.
        """
        settings = self._settings
        names = [corpus.name for corpus in settings.corpora]
        if settings.selection is not None:
            check_output(settings.corpora[names.index(settings.selection.source)], settings.selection.prefix)
        with OrderedWorkers(PartWorker, (self._setup,), settings.workers) as workers:
            statistics = self._count(workers)
            tallies = self._tally(workers, statistics)
            scores = self._score(workers) if settings.prior else None
            found = compare.results(settings, self._tokenizer, statistics, tallies, scores)
            if settings.embedding is not None:
                found["embedding"] = self._embed(workers, settings.embedding)
            if settings.selection is not None:
                found["selection"] = self._select(workers, settings.selection, statistics)
        return found

    def _depends_on(self, number: int) -> dict[str, Any]:
        settings, corpus = self._settings, self._settings.corpora[number]
        return {
            "kind": corpus.kind,
            "identity": corpus.identity,
            "tokenizer": self._tokenizer.fingerprint,
            "sample": [settings.sample_documents, settings.sample_share],
            "seed": settings.seed,
            "budget": settings.budget_tokens,
        }

    def _count(self, workers: OrderedWorkers) -> list[CorpusStatistics]:
        """One pass over every corpus that the cache does not know."""
        corpora = self._settings.corpora
        paths = [self._cache.path("counts", self._depends_on(i)) for i in range(len(corpora))]
        stored = [self._cache.load(path) for path in paths]
        found = [CorpusStatistics.from_arrays(arrays) if arrays else None for arrays in stored]
        self._progress.start(
            "count", sum(len(c.parts) for c, s in zip(corpora, found, strict=True) if not s), "part"
        )
        tasks, places = self._tasks("count", [i for i, known in enumerate(found) if known is None])
        for (number, is_last), (part, bad) in zip(places, workers.run(tasks), strict=True):
            known = found[number]
            if known is None:
                found[number] = known = part
            else:
                known.merge(part)
            self._refuse_bad(corpora[number], known.num_bad, bad)
            if is_last:
                self._cache.store(paths[number], known.to_arrays())
            self._progress.advance(1)
        self._progress.close()
        whole = [known for known in found if known is not None]
        for corpus, known in zip(corpora, whole, strict=True):
            self._refuse_bad(corpus, known.num_bad, [])
            if not known.num_tokens:
                raise DataFormatError(f"{corpus.name}: {', '.join(corpus.paths[:3])}: holds no token of text")
        return whole

    def _refuse_bad(self, corpus: Corpus, num_bad: int, shown: Sequence[str]) -> None:
        if num_bad > self._settings.max_bad_lines:
            lines = "".join(f"\n  {line}" for line in shown)
            raise DataFormatError(
                f"{corpus.name}: {num_bad} lines are no document, --max-bad-lines allows "
                f"{self._settings.max_bad_lines}{lines}"
            )

    def _tasks(
        self, method: str, numbers: Sequence[int], samples: Sequence[Ints | None] | None = None, *extra: Any
    ) -> tuple[list[Task], list[tuple[int, bool]]]:
        """A task for every part of some corpora; parts without a drawn document have none but the first."""
        tasks: list[Task] = []
        places: list[tuple[int, bool]] = []
        drawn = self._samples if samples is None else samples
        for number in numbers:
            parts = self._settings.corpora[number].parts
            chosen = [(part, of_part(drawn[number], bounds)) for part, bounds in enumerate(parts)]
            chosen = [c for c in chosen if c[1] is None or len(c[1])]
            for part, ordinals in chosen:
                mine = [argument[number] for argument in extra]
                tasks.append((method, (number, part, ordinals, *mine)))
                places.append((number, part == chosen[-1][0]))
        return tasks, places

    def _tally(
        self, workers: OrderedWorkers, statistics: Sequence[CorpusStatistics]
    ) -> list[tuple[BigramTally, int]]:
        """A second pass: the commonest bi-grams exactly, and the bound that proves the list complete."""
        corpora = self._settings.corpora
        wanted = [candidates(known.ngrams.fine) for known in statistics]
        paths = [self._cache.path("bigrams", self._depends_on(i)) for i in range(len(corpora))]
        tallies = [BigramTally.empty(buckets) for buckets, _ in wanted]
        missing = []
        for number, path in enumerate(paths):
            if (arrays := self._cache.load(path)) is None:
                missing.append(number)
            else:
                tallies[number].merge(BigramTally(arrays["buckets"], arrays["keys"], arrays["counts"]))
        tasks, places = self._tasks("tally", missing, None, [buckets for buckets, _ in wanted])
        self._progress.start("commonest bi-grams", len(tasks), "part")
        for (number, is_last), part in zip(places, workers.run(tasks), strict=True):
            tally = tallies[number]
            tally.merge(part)
            if is_last:
                arrays = {"buckets": tally.buckets, "keys": tally.keys, "counts": tally.counts}
                self._cache.store(paths[number], arrays)
            self._progress.advance(1)
        self._progress.close()
        return [(tally, bound) for tally, (_, bound) in zip(tallies, wanted, strict=True)]

    def _score(self, workers: OrderedWorkers) -> list[PriorScores]:
        """Documents of every corpus through the prior."""
        settings, prior = self._settings, self._settings.prior
        assert prior is not None
        samples = self._samples_of(settings.prior_documents, settings.seed + 1)
        uses = {
            "prior": prior.identity.fingerprint,
            "options": repr(prior.options),
            "dtype": prior.dtype,
            "device": prior.device,
            "documents": settings.prior_documents,
            "prior_tokenizer": prior.tokenizer.load().fingerprint,
        }
        paths = [self._cache.path("scores", self._depends_on(i) | uses) for i in range(len(settings.corpora))]
        stored = [self._cache.load(path) for path in paths]
        found = [PriorScores.from_arrays(a) if a else PriorScores.empty() for a in stored]
        tasks, places = self._tasks("score", [i for i, a in enumerate(stored) if a is None], samples)
        total = sum(self._num_documents(task, settings.corpora) for task in tasks)
        self._progress.start("perplexity", total, "doc")
        results = workers.run(tasks, here=prior.device != "cpu")
        for (number, is_last), part in zip(places, results, strict=True):
            found[number].merge(part)
            if is_last:
                self._cache.store(paths[number], found[number].to_arrays())
            self._progress.advance(len(part.tokens_D))
        self._progress.close()
        return found

    @staticmethod
    def _num_documents(task: Task, corpora: Sequence[Corpus]) -> int:
        number, part, ordinals = task[1][:3]
        first, stop = corpora[number].parts[part]
        return stop - first if ordinals is None else len(ordinals)

    def _samples_of(self, num_documents: int | None, seed: int) -> list[Ints | None]:
        """Of the documents of each corpus that are counted, so many drawn."""
        found: list[Ints | None] = []
        for counted, corpus in zip(self._samples, self._settings.corpora, strict=True):
            size = corpus.num_documents if counted is None else len(counted)
            drawn = draw_documents(size, num_documents, seed)
            found.append(counted if drawn is None else drawn if counted is None else counted[drawn])
        return found

    def _embed(self, workers: OrderedWorkers, model: EmbeddingChoice) -> dict[str, Any]:
        """Documents of every corpus as vectors, and what they say."""
        settings = self._settings
        samples = self._samples_of(settings.embedding_documents, settings.seed + 2)
        uses = {
            "embedding": model.fingerprint,
            "max_tokens": model.max_tokens,
            "device": model.device,
            "documents": settings.embedding_documents,
        }
        numbers = range(len(settings.corpora))
        paths = [self._cache.path("embeddings", self._depends_on(i) | uses) for i in numbers]
        stored = [self._cache.load(path) for path in paths]
        found = [Embeddings.from_arrays(a) if a else Embeddings.empty() for a in stored]
        tasks, places = self._tasks("embed", [i for i, a in enumerate(stored) if a is None], samples)
        self._progress.start("embed", sum(self._num_documents(t, settings.corpora) for t in tasks), "doc")
        results = workers.run(tasks, here=model.device != "cpu")
        for (number, is_last), (part, num_seen) in zip(places, results, strict=True):
            found[number].merge(part)
            if is_last:
                self._cache.store(paths[number], found[number].to_arrays())
            self._progress.advance(num_seen)
        self._progress.close()
        for corpus, known in zip(settings.corpora, found, strict=True):
            if not len(known.ordinals_D):
                raise DataFormatError(
                    f"{corpus.name}: none of the documents drawn for the map holds text; raise "
                    "--embedding-documents"
                )
            if len(known.ordinals_D) < MIN_EMBEDDED:
                logger.warning(
                    "%s: has %d documents with text for the map, so that all corpora are compared on no more",
                    corpus.name,
                    len(known.ordinals_D),
                )
        described = embedding.describe(found)
        return {"model": model.name, "max_tokens": model.max_tokens, **described}

    def _select(
        self, workers: OrderedWorkers, wanted: Selection, statistics: Sequence[CorpusStatistics]
    ) -> dict[str, Any]:
        """Weigh every document of the source, draw, write."""
        corpora = self._settings.corpora
        names = [corpus.name for corpus in corpora]
        number, target = names.index(wanted.source), names.index(wanted.target)
        corpus = corpora[number]
        ratios_F = dsir.log_ratios(statistics[target].ngrams.features_F, statistics[number].ngrams.features_F)
        tasks: list[Task] = [("weigh", (number, part, ratios_F)) for part in range(len(corpus.parts))]
        self._progress.start(f"weigh {corpus.name}", len(tasks), "part")
        columns = []
        for result in workers.run(tasks):
            columns.append(result)
            self._progress.advance(1)
        self._progress.close()
        ordinals, weights, tokens = (np.concatenate(column) for column in zip(*columns, strict=True))
        count = (
            wanted.count if wanted.count is not None else max(1, round((wanted.share or 0) * len(ordinals)))
        )
        chosen = dsir.resample(ordinals, weights, min(count, len(ordinals)), self._settings.seed)
        places = np.searchsorted(ordinals, chosen)
        self._progress.start("write the selection", len(chosen), "doc")
        written = write_selection(
            corpus, wanted.prefix, chosen, weights[places], on_document=self._progress.advance
        )
        self._progress.close()
        per_token = weights / np.maximum(tokens, 1)
        return {
            "source": wanted.source,
            "target": wanted.target,
            "num_documents_weighed": len(ordinals),
            "num_documents_selected": len(chosen),
            "num_tokens_selected": int(tokens[places].sum()),
            "mean_log_weight_per_token_all": float(per_token[tokens > 0].mean()),
            "mean_log_weight_per_token_selected": float(per_token[places].mean()),
            "mean_tokens_all": float(tokens.mean()),
            "mean_tokens_selected": float(tokens[places].mean()) if len(places) else 0.0,
            "written_to": Path(written).name,
        }
