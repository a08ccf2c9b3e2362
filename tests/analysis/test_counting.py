"""n-grams, samples, reservoirs and their sums, against counts by hand and by plain Python."""

from __future__ import annotations

import importlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.analysis import hashing
from megatron_tokedit.analysis.blocks import TokenBlock
from megatron_tokedit.analysis.ngrams import FINE_BUCKETS, BigramTally, NgramCounts, candidates
from megatron_tokedit.analysis.parallel import OrderedWorkers
from megatron_tokedit.analysis.reservoir import TokenReservoir
from megatron_tokedit.analysis.sketch import NgramSample, survival
from megatron_tokedit.analysis.statistics import CorpusStatistics
from megatron_tokedit.errors import DataFormatError

VOCAB = 12
QUICK = settings(deadline=None, max_examples=30)
SLOW = settings(deadline=None, max_examples=12)
"""For tables of 2^20 counters."""
DOCUMENTS = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=30), max_size=12)


def block_of(documents: list[list[int]], first: int = 0) -> TokenBlock:
    ids = [np.array(document, np.int32) for document in documents]
    return TokenBlock.of(ids, range(first, first + len(ids)))


def mixed(value: int) -> int:
    """MurmurHash3's finaliser, in plain integers."""
    word = (1 << 64) - 1
    value ^= value >> 33
    value = value * 0xFF51AFD7ED558CCD & word
    value ^= value >> 33
    value = value * 0xC4CEB9FE1A85EC53 & word
    return value ^ value >> 33


def ngrams(documents: list[list[int]], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(d[i : i + n]) for d in documents for i in range(len(d) - n + 1))


def test_three_documents_by_hand() -> None:
    block = block_of([[1, 2, 1, 2], [], [2, 1], [3]])
    counts = NgramCounts.empty(5)
    counts.add(block)
    assert counts.unigrams_V.tolist() == [0, 3, 3, 1, 0]
    expected = Counter({(1, 2): 2, (2, 1): 2})  # not (2, 2) or (1, 3), which cross a border
    by_bucket = Counter[int]()
    for (a, b), count in expected.items():
        by_bucket[(mixed((a + 1) << 32 | (b + 1)) >> 32) * 10_000 >> 32] += count
    assert {int(i): int(counts.bigrams_F[i]) for i in np.flatnonzero(counts.bigrams_F)} == by_bucket
    for a, count in ((1, 3), (2, 3), (3, 1)):
        by_bucket[(mixed(a + 1) >> 32) * 10_000 >> 32] += count
    assert {int(i): int(counts.features_F[i]) for i in np.flatnonzero(counts.features_F)} == by_bucket


def test_hash_is_pinned() -> None:
    """Features of stored results must mean the same in years."""
    assert hashing.mix64(np.array([1, 2**64 - 1], np.uint64)).tolist() == [mixed(1), mixed(2**64 - 1)]
    assert hashing.token_hashes(np.array([0, 50256], np.int32)).tolist() == [mixed(1), mixed(50257)]
    assert hashing.mix64(np.array([1], np.uint64)).tolist() == [0xB456BCFC34C2CB2C]


@QUICK
@given(DOCUMENTS, st.sampled_from([1, 2, 3, 4, 7, 8, 13]))
def test_ngram_hashes_tell_ngrams_apart(documents: list[list[int]], n: int) -> None:
    found = Counter(hashing.ngram_hashes(block_of(documents), (n,))[n].tolist())
    assert sorted(found.values()) == sorted(ngrams(documents, n).values())


@QUICK
@given(DOCUMENTS)
def test_one_size_hashes_as_among_others(documents: list[list[int]]) -> None:
    block = block_of(documents)
    together = hashing.ngram_hashes(block, (2, 8, 13))
    for n, hashes in together.items():
        assert np.array_equal(hashing.ngram_hashes(block, (n,))[n], hashes)


@SLOW
@given(DOCUMENTS, st.integers(0, 12))
def test_halves_make_the_whole(documents: list[list[int]], middle: int) -> None:
    def counted(part: list[list[int]], first: int) -> CorpusStatistics:
        found = CorpusStatistics(VOCAB, 20, 7)
        for index, document in enumerate(part):  # one block a document: blocks must not matter either
            found.add(block_of([document], first + index))
        return found

    whole = CorpusStatistics(VOCAB, 20, 7)
    whole.add(block_of(documents))
    middle = min(middle, len(documents))
    merged = counted(documents[middle:], middle)
    merged.merge(counted(documents[:middle], 0))  # in the other order
    expected = whole.to_arrays()
    for stored in (merged.to_arrays(), CorpusStatistics.from_arrays(merged.to_arrays()).to_arrays()):
        assert stored.keys() == expected.keys()
        for name, values in expected.items():
            assert np.array_equal(stored[name], values), name


@SLOW
@given(DOCUMENTS)
def test_commonest_bigrams_are_exact(documents: list[list[int]]) -> None:
    block = block_of(documents)
    counts = NgramCounts.empty(VOCAB)
    counts.add(block)
    buckets, bound = candidates(counts.fine)
    is_candidate = np.zeros(FINE_BUCKETS, bool)
    is_candidate[buckets] = True
    tally = BigramTally.empty(buckets)
    for document in documents:
        tally.add(block_of([document]), is_candidate)
    expected = sorted(((*pair, n) for pair, n in ngrams(documents, 2).items()), key=lambda x: (-x[2], x[:2]))
    assert bound == 0
    assert tally.top(5) == expected[:5]


def test_the_bound_proves_completeness() -> None:
    """With too few candidate buckets the bound says so: what was left out is no commoner than it says."""
    generator = np.random.default_rng(0)
    block = TokenBlock.of([generator.integers(0, 2000, 50_000).astype(np.int32)])
    counts = NgramCounts.empty(2000)
    counts.add(block)
    buckets, bound = candidates(counts.fine, count=3)
    is_candidate = np.zeros(FINE_BUCKETS, bool)
    is_candidate[buckets] = True
    tally = BigramTally.empty(buckets)
    tally.add(block, is_candidate)
    everything = Counter(hashing.block_bigrams(block).tolist())
    left_out = [count for key, count in everything.items() if key not in set(tally.keys.tolist())]
    assert max(left_out) <= bound
    assert all(
        everything[key] == n for key, n in zip(tally.keys.tolist(), tally.counts.tolist(), strict=True)
    )


@pytest.mark.parametrize("capacity", [16, 100])
def test_sample_is_the_same_in_any_order_and_bounded(capacity: int) -> None:
    hashes = hashing.mix64(np.random.default_rng(1).integers(0, 700, 4000).astype(np.uint64))
    whole = NgramSample(capacity)
    whole.add(hashes)
    parts = [NgramSample(capacity) for _ in range(3)]
    for index, piece in enumerate(np.array_split(hashes[::-1], 9)):
        parts[index % 3].add(piece)
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    whole.settle()
    assert whole.level > 0
    assert len(whole.hashes) <= capacity
    assert (parts[2].level, parts[2].num_ngrams) == (whole.level, 4000)
    assert np.array_equal(parts[2].hashes, whole.hashes)
    assert np.array_equal(parts[2].counts, whole.counts)
    exact = Counter(hashes.tolist())
    assert all(exact[h] == n for h, n in zip(whole.hashes.tolist(), whole.counts.tolist(), strict=True))


def test_repeated_share_and_survival() -> None:
    original, edited = NgramSample(), NgramSample()
    original.add(np.array([1, 1, 2, 3, 4, 5, 5], np.uint64))
    edited.add(np.array([1, 2, 3, 9], np.uint64))
    assert original.repeated_share == pytest.approx(4 / 7)
    assert survival(original, edited) == (pytest.approx(2 / 3), 3)  # once: 2, 3, 4; there: 2, 3
    assert survival(NgramSample(), edited)[1] == 0


def test_sampled_share_estimates_the_exact_one() -> None:
    values = np.random.default_rng(2).zipf(1.3, 60_000).astype(np.uint64)
    hashes = hashing.mix64(values)
    exact, sampled = NgramSample(), NgramSample(capacity=400)
    exact.add(hashes)
    sampled.add(hashes)
    for sample in (exact, sampled):
        sample.settle()
    rare = [sample.hashes[sample.counts == 1] for sample in (exact, sampled)]
    assert len(rare[1]) << sampled.level == pytest.approx(len(rare[0]), rel=0.2)


@QUICK
@given(DOCUMENTS, st.integers(1, 60))
def test_reservoir_gives_whole_documents_and_then_the_budget(documents: list[list[int]], budget: int) -> None:
    reservoir = TokenReservoir(budget, 3)
    reservoir.add(block_of(documents))
    block = reservoir.block(budget)
    total = sum(map(len, documents))
    assert len(block.ids_T) == min(budget, total)
    for index, ids in enumerate(block.documents()):
        document = documents[int(block.ordinals_D[index])]
        assert ids.tolist() == document[: len(ids)]
        assert len(ids) == len(document) or index == len(block.ends_D) - 1
    assert reservoir.num_tokens <= max(2 * budget, budget + 30)


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(DataFormatError, match="token id 99 is outside the tokenizer's vocabulary of 5"):
        NgramCounts.empty(5).add(block_of([[1, 99]]))


def test_workers_answer_in_order_and_their_errors_arrive() -> None:
    """The worker is the module `os`, which a fresh process has too."""
    with OrderedWorkers(importlib.import_module, ("os",), 2) as workers:
        tasks = [("fspath", (str(number),)) for number in range(9)]
        assert list(workers.run(tasks)) == [str(number) for number in range(9)]
        with pytest.raises(FileNotFoundError):
            list(workers.run([("listdir", ("/no/such/folder",))]))


def test_a_worker_that_dies_is_told() -> None:
    with (
        pytest.raises(DataFormatError, match="a worker process died"),
        OrderedWorkers(importlib.import_module, ("os",), 2) as workers,
    ):
        list(workers.run([("_exit", (3,)), ("getpid", ())]))
