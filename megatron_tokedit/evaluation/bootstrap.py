"""The document bootstrap: what a sum over documents would be, had other documents of their kind been drawn.

A resample draws as many documents as there are, with replacement (Efron, Annals of Statistics 7, 1979).
Tokens of a document depend on one another, documents do not, so whole documents are what is drawn.

Invariant: the documents of resample ``r`` depend on the seed, the name and the number of documents alone:
every column of one call gets the same ones, and so does another call with the same three, and a column's sums
depend on no other column. Memory: a few arrays of ``_BLOCK_DOCUMENTS``, beside the columns.

The sums are einsum's rather than BLAS's, whose threads wait for one another on a busy machine.

Legend: ``D`` documents, ``M`` columns, ``R`` resamples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_BLOCK_DOCUMENTS = 1 << 18

FloatArray = npt.NDArray[np.float64]


def resampled_sums(
    columns_MD: Sequence[npt.NDArray[np.float64]], num_resamples: int, *, seed: int, name: str
) -> FloatArray:
    """Sums of each column over resampled documents.

    Args:
        columns_MD: a number a document each, all of the same length, at least 1.
        num_resamples: R.
        seed: of the draws.
        name: of the documents, such as their domain; other names give other draws.

    Returns:
        float64 ``[R, M]``.
    """
    digest = hashlib.sha256(name.encode()).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
    columns_MD = [np.ascontiguousarray(column_D, np.float64) for column_D in columns_MD]
    num_documents = len(columns_MD[0])
    sums_RM = np.zeros((num_resamples, len(columns_MD)))
    if num_documents > _BLOCK_DOCUMENTS:
        for sums_M in sums_RM:
            _add_blocks(sums_M, columns_MD, rng)
        return sums_RM
    rows = _BLOCK_DOCUMENTS // num_documents
    for start in range(0, num_resamples, rows):
        part_RM = sums_RM[start : start + rows]
        draws_RD = rng.integers(0, num_documents, (len(part_RM), num_documents))
        draws_RD += num_documents * np.arange(len(part_RM))[:, None]
        times_RD = np.bincount(draws_RD.ravel(), minlength=draws_RD.size).reshape(draws_RD.shape)
        times_RD = times_RD.astype(np.float64)
        for m, column_D in enumerate(columns_MD):
            part_RM[:, m] = np.einsum("rd,d->r", times_RD, column_D)
    return sums_RM


def _add_blocks(sums_M: FloatArray, columns_MD: Sequence[FloatArray], rng: np.random.Generator) -> None:
    """One resample of many documents: how many fall into each block of them, then which ones of the block."""
    num_documents = len(columns_MD[0])
    starts = np.arange(0, num_documents, _BLOCK_DOCUMENTS)
    sizes = np.minimum(num_documents - starts, _BLOCK_DOCUMENTS)
    num_draws = rng.multinomial(num_documents, sizes / num_documents)
    for start, size, draws in zip(starts, sizes, num_draws, strict=True):
        times_D = np.bincount(rng.integers(0, size, draws), minlength=size).astype(np.float64)
        for m, column_D in enumerate(columns_MD):
            sums_M[m] += np.einsum("d,d->", times_D, column_D[start : start + size])


def percentile_interval(values_R: FloatArray, confidence: float) -> tuple[float, float] | None:
    """The middle part of resampled values that holds a share of ``confidence``.

    NaN (a resample without anything to measure) is left out; None where nothing else is there, or a value is
    infinite.
    """
    defined_R = values_R[~np.isnan(values_R)]
    if not len(defined_R) or np.isinf(defined_R).any():
        return None
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(defined_R, [tail, 1.0 - tail])
    return float(low), float(high)
