"""Importance weights and resampling of DSIR: which documents of B make a corpus like A.

Xie et al. 2023, "Data Selection for Language Models via Importance Resampling" (arXiv 2302.03169): with
p and q the distributions of hashed n-gram features in the target A and in the raw corpus B, a document with
feature counts c has the log importance weight ``sum_j c_j (log p_j - log q_j)``; k documents are drawn
without replacement with probability proportional to the weight, by taking the k largest of
``log weight + Gumbel noise``.

Invariant: a document's weight and noise depend on its own tokens, the two distributions, the seed and its
ordinal; nothing on the order of reading.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_tokedit.analysis.blocks import Ints, TokenBlock
from megatron_tokedit.analysis.concentration import shares
from megatron_tokedit.analysis.hashing import bigram_keys, buckets_of, mix64, priorities, token_hashes

Floats = npt.NDArray[np.float64]
PROBABILITY_FLOOR = 1e-8
"""Added to every probability before the logarithm, as in the authors' implementation."""
_PURPOSE = 2


def log_ratios(target_F: Ints, raw_F: Ints) -> Floats:
    """``log p_j - log q_j`` of every feature."""
    ratios: Floats = np.log(shares(target_F) + PROBABILITY_FLOOR) - np.log(shares(raw_F) + PROBABILITY_FLOOR)
    return ratios


def log_weights(block: TokenBlock, ratios_F: Floats) -> Floats:
    """Log importance weight of every document of a block, ``[D]``; 0 for an empty one."""
    count = len(block.ids_T)
    values_T = ratios_F[buckets_of(token_hashes(block.ids_T))]
    if count > 1:
        inside = block.remaining_T[:-1] >= 2
        pairs = ratios_F[buckets_of(mix64(bigram_keys(block.ids_T)))]
        values_T[:-1] += np.where(inside, pairs, 0.0)
    # a sum a document, not differences of one running sum: a document's weight is its own, to the last bit
    found: Floats = np.zeros(len(block.ends_D))
    has_tokens = block.lengths_D > 0
    if count:
        found[has_tokens] = np.add.reduceat(values_T, block.starts_D[has_tokens])
    return found


def gumbel(ordinals: Ints, seed: int) -> Floats:
    """Standard Gumbel noise of each document: ``-log(-log u)``, u uniform in (0, 1)."""
    bits = priorities(ordinals, seed, _PURPOSE) >> np.uint64(11)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53
    noise: Floats = -np.log(-np.log(uniform))
    return noise


def resample(ordinals: Ints, weights: Floats, count: int, seed: int) -> Ints:
    """Ordinals of the ``count`` documents that are drawn, ascending; ties by rising ordinal."""
    keys = weights + gumbel(ordinals, seed)
    order = np.lexsort((ordinals, -keys))
    return np.sort(ordinals[order[:count]])
