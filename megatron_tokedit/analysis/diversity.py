"""How much a fixed number of tokens says: distinct n-grams, compressibility, long n-grams that come again.

Invariant: everything here is measured on one :class:`TokenBlock` of a size that the caller makes the same for
all corpora, since every one of these numbers changes with the amount of text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import zstandard

from megatron_tokedit.analysis.blocks import TokenBlock
from megatron_tokedit.analysis.hashing import ngram_hashes
from megatron_tokedit.tokenizers import Tokenizer

DISTINCT_SIZES = (1, 2, 3, 4)
LONG_SIZES = (8, 13)
"""8: a phrase that is hardly ever said twice by chance; 13: the length that GPT-3's authors took for a
copy."""
ZSTD_LEVEL = 10
_ZSTD_WINDOW_LOG = 27
"""128 MiB: repetition is found however far apart it is."""


def distinct_shares(block: TokenBlock) -> dict[str, float]:
    """distinct-n (Li et al. 2016): different n-grams over n-grams, for n from 1 to 4."""
    found = ngram_hashes(block, DISTINCT_SIZES)
    return {
        str(n): len(np.unique(hashes)) / len(hashes) if len(hashes) else 0.0 for n, hashes in found.items()
    }


def repeated_shares(block: TokenBlock) -> dict[str, float]:
    """Share of the long n-grams whose like occurs again in the block."""
    shares = {}
    for n, hashes in ngram_hashes(block, LONG_SIZES).items():
        counts = np.unique(hashes, return_counts=True)[1]
        shares[str(n)] = float(counts[counts > 1].sum() / len(hashes)) if len(hashes) else 0.0
    return shares


def compression_ratio(block: TokenBlock, tokenizer: Tokenizer) -> float:
    """Bytes of the decoded text over bytes of it compressed by zstd, documents ended by a line feed."""
    parameters = zstandard.ZstdCompressionParameters.from_level(ZSTD_LEVEL, window_log=_ZSTD_WINDOW_LOG)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    plain = compressed = 0
    for ids in block.documents():
        text = tokenizer.decode(ids).encode() + b"\n"
        plain += len(text)
        compressed += len(compressor.compress(text))
    compressed += len(compressor.flush())
    return plain / compressed


def describe(block: TokenBlock, tokenizer: Tokenizer) -> dict[str, Any]:
    """All measures of one block."""
    return {
        "num_tokens": len(block.ids_T),
        "num_documents": len(block.ends_D),
        "distinct": distinct_shares(block),
        "repeated": repeated_shares(block),
        "compression_ratio": compression_ratio(block, tokenizer) if len(block.ids_T) else 1.0,
    }
