"""64-bit hashes of n-grams, vectorised, the same on every machine and in every run.

DSIR hashes the SHA-256 of a lower-cased word, or of two with a space between them, modulo 10,000
(github p-lambda/dsir). Here an n-gram is one of token ids, and a cryptographic hash buys nothing: the hash
is the finaliser of MurmurHash3 (x64), a bijection of 64 bits, over ``a + 1`` for a token ``a`` and over
``(a + 1) * 2^32 + (b + 1)`` for a bi-gram ``a b``; the bucket is ``floor(h / 2^32 * 10,000 / 2^32)``. Longer
n-grams: a polynomial over mixed ids modulo 2^64 (Rabin-Karp), mixed once more.

Invariant: a bi-gram's 64 bits tell it from every other bi-gram; longer n-grams collide with a probability of
2^-64 a pair.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_tokedit.analysis.blocks import Hashes, Ids, Ints, TokenBlock

NUM_BUCKETS = 10_000
"""DSIR's number of features, for uni- and bi-grams together."""
_BASE = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def mix64(values: Hashes) -> Hashes:
    """MurmurHash3's 64-bit finaliser of each value."""
    shift = np.uint64(33)
    shifted = values >> shift
    mixed = values ^ shifted
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed *= np.uint64(factor)
        np.right_shift(mixed, shift, out=shifted)
        mixed ^= shifted
    return mixed


def token_hashes(ids_T: Ids) -> Hashes:
    """Hash of every token as a uni-gram."""
    return mix64(ids_T.astype(np.uint64) + np.uint64(1))


def bigram_keys(ids_T: Ids) -> Hashes:
    """``(a + 1) * 2^32 + (b + 1)`` for every neighbouring pair, ``[T - 1]``, document borders crossed."""
    shifted = ids_T.astype(np.uint64) + np.uint64(1)
    return (shifted[:-1] << np.uint64(32)) | shifted[1:]


def split_keys(keys: Hashes) -> tuple[Ints, Ints]:
    """The two ids of every bi-gram key."""
    low = np.uint64(0xFFFFFFFF)
    return (keys >> np.uint64(32)).astype(np.int64) - 1, (keys & low).astype(np.int64) - 1


def buckets_of(hashes: Hashes, num_buckets: int = NUM_BUCKETS) -> Ints:
    """The feature of every hash, from its upper 32 bits."""
    scaled = (hashes >> np.uint64(32)) * np.uint64(num_buckets)
    scaled >>= np.uint64(32)
    return scaled.view(np.int64)


def block_bigrams(block: TokenBlock, remaining_T: Ints | None = None) -> Hashes:
    """Keys of a block's bi-grams that cross no border."""
    remaining = block.remaining_T if remaining_T is None else remaining_T
    return bigram_keys(block.ids_T)[remaining[:-1] >= 2]


def ngram_hashes(block: TokenBlock, sizes: tuple[int, ...]) -> dict[int, Hashes]:
    """Size -> hashes of the block's n-grams of this size, in order, those across a border left out.

    The polynomial of size n is put together from those of the powers of two in n, each made of two of half
    its size, so that all sizes together cost a few passes.
    """
    remaining_T = block.remaining_T
    power, doubled = 1, {1: token_hashes(block.ids_T)}
    while power * 2 <= max(sizes):
        half = doubled[power]
        whole = half[: max(0, len(half) - power)] * np.uint64(pow(_BASE, power, 1 << 64))
        whole += half[power:]
        power *= 2
        doubled[power] = whole
    found = {}
    for size in sizes:
        count = max(0, len(block.ids_T) - size + 1)
        hashes: Hashes = np.zeros(count, np.uint64)
        done = 0
        for part in sorted(doubled, reverse=True):
            if size & part:
                hashes *= np.uint64(pow(_BASE, part, 1 << 64))
                hashes += doubled[part][done : done + count]
                done += part
        found[size] = mix64(hashes[remaining_T[:count] >= size] + np.uint64(size * _BASE & _WORD))
    return found


def priorities(ordinals: npt.NDArray[np.int64], seed: int, purpose: int) -> Hashes:
    """A random 64-bit number for each document of a corpus, keyed by seed, purpose and ordinal alone."""
    key = mix64(np.array([seed & _WORD], np.uint64) + np.uint64((purpose + 1) * _BASE & _WORD))
    return mix64(mix64(ordinals.astype(np.uint64) + np.uint64(1)) ^ key)
