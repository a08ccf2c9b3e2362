"""Documents as points: how far a corpus spreads by meaning, and a map of all corpora.

A document is the unit vector that a sentence-embedding model makes of its text; distances are cosine
distances. The map is a principal component analysis of all corpora together, so it is the same every time.

Invariant: the measures (not the map) are of equally many documents of each corpus and may be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron_tokedit.analysis.blocks import Ints

Vectors = npt.NDArray[np.float32]
_ROWS_PER_CALL = 512
_NUM_AXES = 2


@dataclass(slots=True)
class Embeddings:
    """Documents of a corpus as points.

    Attributes:
        ordinals_D: int64 ``[D]``.
        vectors_DH: float32 ``[D, H]``, of length 1.
    """

    ordinals_D: Ints
    vectors_DH: Vectors

    @classmethod
    def empty(cls) -> Self:
        """No document yet."""
        return cls(np.empty(0, np.int64), np.empty((0, 0), np.float32))

    def merge(self, other: Embeddings) -> None:
        """Append the documents of another."""
        if not len(self.ordinals_D):
            self.ordinals_D, self.vectors_DH = other.ordinals_D, other.vectors_DH
        elif len(other.ordinals_D):
            self.ordinals_D = np.concatenate((self.ordinals_D, other.ordinals_D))
            self.vectors_DH = np.concatenate((self.vectors_DH, other.vectors_DH))

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything, as arrays for ``numpy.savez``."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """What :meth:`to_arrays` gave."""
        return cls(*(arrays[name] for name in cls.__slots__))


def describe(corpora: Sequence[Embeddings]) -> dict[str, Any]:
    """The map, and the measures of every corpus.

    Args:
        corpora: in the order of the report.

    Returns:
        ``num_documents`` of each corpus that were compared; the share of the variance, of all corpora, that
        each of the two axes shows; and for every corpus all its points on the map; its spread, the mean
        cosine distance of two of its documents; its median nearest similarity, the cosine to the nearest
        other document of the same corpus; the share of its documents whose nearest of all documents is of the
        same corpus. None for what a single document has not.
    """
    count = min(len(known.ordinals_D) for known in corpora)
    chosen = [_evenly(known.vectors_DH, count) for known in corpora]
    vectors_NH = np.concatenate(chosen)
    points_A2, shares = principal_axes(np.concatenate([known.vectors_DH for known in corpora]))
    points = np.split(points_A2, np.cumsum([len(known.ordinals_D) for known in corpora])[:-1])
    own_N, any_is_own_N = _nearest(vectors_NH, count)
    entries = []
    for number, mine_DH in enumerate(chosen):
        rows = slice(number * count, (number + 1) * count)
        has_others = count > 1
        entries.append(
            {
                "points": [[float(f"{value:.5g}") for value in point] for point in points[number]],
                "spread": spread(mine_DH) if has_others else None,
                "median_nearest_similarity": float(np.median(own_N[rows])) if has_others else None,
                "share_nearest_is_own": float(any_is_own_N[rows].mean()) if has_others else None,
            }
        )
    return {"num_documents": count, "variance_shares": shares, "corpora": entries}


def principal_axes(vectors_NH: Vectors) -> tuple[npt.NDArray[np.float64], list[float]]:
    """The two directions of most variance.

    Args:
        vectors_NH: float32 ``[N, H]``.

    Returns:
        Coordinates, float64 ``[N, 2]``, and the share of the variance along each. The largest coordinate of
        each axis is positive, so that the map is not mirrored from run to run.
    """
    centred_NH = vectors_NH.astype(np.float64)
    centred_NH -= centred_NH.mean(axis=0)
    left_NR, lengths_R, _ = np.linalg.svd(centred_NH, full_matrices=False)
    points_N2 = np.zeros((len(vectors_NH), _NUM_AXES))
    number = min(_NUM_AXES, len(lengths_R))
    points_N2[:, :number] = left_NR[:, :number] * lengths_R[:number]
    largest = points_N2[np.abs(points_N2).argmax(axis=0), range(_NUM_AXES)]
    points_N2 *= np.where(largest < 0, -1.0, 1.0)
    total = float((lengths_R**2).sum())
    shares = [float(length**2) / total if total else 0.0 for length in lengths_R[:number]]
    return points_N2, shares + [0.0] * (_NUM_AXES - number)


def spread(vectors_DH: Vectors) -> float:
    """Mean cosine distance of two different documents, from 0 (all the same); ``D`` must be 2 or more."""
    count = len(vectors_DH)
    total_H = vectors_DH.sum(axis=0, dtype=np.float64)
    squares = float((vectors_DH.astype(np.float64) ** 2).sum())
    return 1.0 - (float(total_H @ total_H) - squares) / (count * (count - 1))


def _nearest(vectors_NH: Vectors, count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Of every document: the similarity of the nearest other of its corpus, and whether none is nearer.

    Args:
        vectors_NH: float32 ``[N, H]``, ``count`` documents of each corpus one after the other.
        count: documents of a corpus.
    """
    own_N = np.empty(len(vectors_NH), np.float32)
    any_is_own_N = np.empty(len(vectors_NH), bool)
    corpus_N = np.arange(len(vectors_NH)) // count
    for start in range(0, len(vectors_NH), _ROWS_PER_CALL):
        rows = np.arange(start, min(start + _ROWS_PER_CALL, len(vectors_NH)))
        similar_RN = vectors_NH[rows] @ vectors_NH.T
        similar_RN[np.arange(len(rows)), rows] = -2.0
        is_own_RN = corpus_N[rows, None] == corpus_N[None, :]
        own_N[rows] = np.where(is_own_RN, similar_RN, -2.0).max(axis=1)
        others_R = np.where(is_own_RN, -2.0, similar_RN).max(axis=1)
        any_is_own_N[rows] = own_N[rows] > others_R
    return own_N, any_is_own_N


def _evenly(vectors_DH: Vectors, count: int) -> Vectors:
    """So many of the documents, evenly from the first to the last."""
    chosen: Vectors = vectors_DH[np.linspace(0, len(vectors_DH) - 1, count).round().astype(int)]
    return chosen
