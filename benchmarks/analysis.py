"""Counting n-grams of an indexed dataset: tokens a second a core, against plain Python, in one run.

    python benchmarks/analysis.py
    python benchmarks/analysis.py --megatokens 50

Zipf-distributed ids in documents as long as those of web text, two bytes an id. "N-grams": uni-grams, and
bi-grams in DSIR's 10,000 features and in the fine table. "All statistics" adds the samples of n-grams of four
sizes and the reservoir: the whole first pass of tools/analyze_corpus.py. The baselines do the n-grams only: a
`Counter` over features by Python's own hash, and DSIR's own loop, which takes the SHA-256 of each n-gram;
both see a part of the tokens.

Limits: copying memory (an id is read once), and one `np.bincount` into 10,000 counters, the least work that
counts anything.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
from measuring import Report, copy_bytes_per_second, in_turns, median_ratio, parser

from megatron_tokedit.analysis.ngrams import NgramCounts
from megatron_tokedit.analysis.sources import Corpus, Reader, open_indexed
from megatron_tokedit.analysis.statistics import CorpusStatistics
from megatron_tokedit.dataset import IndexedDatasetWriter

VOCAB_SIZE = 50257
BASELINE_TOKENS = 200_000
TARGET = 5e6


class NoTokenizer:
    """As much of a tokenizer as reading ids needs."""

    fingerprint = "benchmark"
    eod = VOCAB_SIZE - 1
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()


def make_dataset(prefix: str, num_tokens: int) -> list[np.ndarray]:
    """Write the dataset; returns its documents."""
    generator = np.random.default_rng(0)
    ids = (generator.zipf(1.2, num_tokens) % (VOCAB_SIZE - 1)).astype(np.int32)
    lengths = np.exp(generator.normal(5.6, 0.9, num_tokens // 100)).astype(np.int64).clip(1)
    ends = np.cumsum(lengths)
    documents = np.split(ids, ends[ends < num_tokens])
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document([np.append(document, np.int32(NoTokenizer.eod))])
        writer.finalize()
    return documents


def first_pass(corpus: Corpus, make: Callable[[], NgramCounts | CorpusStatistics]) -> None:
    """Read and count everything."""
    reader, found = Reader(NoTokenizer()), make()  # type: ignore[arg-type]
    for part in range(len(corpus.parts)):
        for block in reader.read(corpus, part, None, lambda line: None):
            found.add(block)


def count_in_python(documents: list[list[int]]) -> None:
    """Uni- and bi-grams in a Counter."""
    found = Counter[int]()
    for document in documents:
        found.update(hash(token) % 10_000 for token in document)
        found.update(hash(pair) % 10_000 for pair in pairwise(document))


def count_as_dsir(documents: list[list[int]]) -> None:
    """The loop of DSIR's authors: SHA-256 of every n-gram's text."""
    found = np.zeros(10_000, int)
    for document in documents:
        words = [str(token) for token in document]
        for text in (*words, *(f"{a} {b}" for a, b in pairwise(words))):
            found[int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10_000] += 1


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    made = parser(__doc__)
    made.add_argument("--megatokens", type=float, default=10, metavar="N", help="default: 10")
    made.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    return made.parse_args()


def main() -> None:
    """Measure and report."""
    arguments = parse()
    num_tokens = int(arguments.megatokens * 1e6)
    with Report("analysis", arguments.json) as report, tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "corpus")
        documents = make_dataset(prefix, num_tokens)
        corpus = open_indexed("corpus", prefix)
        part: list[list[int]] = []
        while sum(map(len, part)) < min(BASELINE_TOKENS, num_tokens) and len(part) < len(documents):
            part.append(documents[len(part)].tolist())
        sizes = {"plain Python": sum(map(len, part)), "DSIR's loop": sum(map(len, part))}
        buckets = np.random.default_rng(1).integers(0, 10_000, num_tokens)
        seconds = in_turns(
            {
                "n-grams": lambda: first_pass(corpus, lambda: NgramCounts.empty(VOCAB_SIZE)),
                "all statistics": lambda: first_pass(
                    corpus, lambda: CorpusStatistics(VOCAB_SIZE, 1_000_000, 1)
                ),
                "plain Python": lambda: count_in_python(part),
                "DSIR's loop": lambda: count_as_dsir(part),
                "bincount alone": lambda: np.bincount(buckets, minlength=10_000),
            },
            rounds=arguments.rounds,
        )
        rates = {name: [sizes.get(name, num_tokens) / s for s in times] for name, times in seconds.items()}
        rows = [
            [name, max(values) / 1e6, sorted(values)[len(values) // 2] / 1e6]
            for name, values in rates.items()
        ]
        report.table("one core", ["M tokens/s, best", "median"], rows)
        inverse = {name: [1 / value for value in values] for name, values in rates.items()}
        for name in ("plain Python", "DSIR's loop"):
            report.ratio(
                f"n-grams over {name}", median_ratio(inverse[name], inverse["n-grams"]), "more is better"
            )
        report.ratio("n-grams over the target of 5 M tokens/s", max(rates["n-grams"]) / TARGET, "at least 1")
        report.ratio("all statistics over the target", max(rates["all statistics"]) / TARGET, "at least 1")
        report.limit("reading ids at the speed of memory", copy_bytes_per_second() / 2 / 1e6, "M tokens/s")
        report.limit("one bincount into 10,000 counters", max(rates["bincount alone"]) / 1e6, "M tokens/s")


if __name__ == "__main__":
    main()
