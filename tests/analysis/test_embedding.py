"""Measures of documents as points, on small cases and against plain loops and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from megatron_tokedit.analysis.embedding import Embeddings, describe, principal_axes, spread


def units(rows: list[list[float]]) -> np.ndarray:
    vectors = np.array(rows, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def corpus(vectors: np.ndarray) -> Embeddings:
    return Embeddings(np.arange(len(vectors)), vectors)


def random_units(seed: int, count: int, size: int = 7) -> np.ndarray:
    return units(np.random.default_rng(seed).standard_normal((count, size)).tolist())


def test_spread_by_hand() -> None:
    # cosine distances: 1 (right angle), 2 (opposite), 1
    assert spread(units([[1, 0], [0, 1], [-1, 0]])) == pytest.approx(4 / 3, abs=1e-6)
    assert spread(units([[1, 1]] * 5)) == pytest.approx(0, abs=1e-6)


def test_neighbours_against_a_loop() -> None:
    corpora = [random_units(seed, 30) for seed in (1, 2, 3)]
    found = describe([corpus(vectors) for vectors in corpora])
    everything = [(c, vector) for c, vectors in enumerate(corpora) for vector in vectors]
    for number, entry in enumerate(found["corpora"]):
        nearest, is_own = [], []
        for i, (c, vector) in enumerate(everything):
            if c != number:
                continue
            others = [(float(vector @ w), d) for j, (d, w) in enumerate(everything) if j != i]
            nearest.append(max(similarity for similarity, d in others if d == c))
            is_own.append(max(others)[1] == c)
        assert entry["median_nearest_similarity"] == pytest.approx(np.median(nearest), abs=1e-6)
        assert entry["share_nearest_is_own"] == pytest.approx(np.mean(is_own))


def test_axes_are_those_of_scikit_learn_whatever_the_sign() -> None:
    vectors = random_units(5, 40)
    points, shares = principal_axes(vectors)
    reference = PCA(2).fit(vectors)
    expected = reference.transform(vectors)
    assert np.allclose(np.abs(points), np.abs(expected), atol=1e-5)
    assert shares == pytest.approx(reference.explained_variance_ratio_.tolist(), abs=1e-6)
    largest = points[np.abs(points).argmax(axis=0), [0, 1]]
    assert (largest > 0).all()


def test_all_corpora_are_measured_on_equally_many_documents() -> None:
    large, small = random_units(1, 50), random_units(2, 10)
    found = describe([corpus(large), corpus(small)])
    assert found["num_documents"] == 10
    assert [len(entry["points"]) for entry in found["corpora"]] == [50, 10]
    chosen = large[np.linspace(0, 49, 10).round().astype(int)]
    assert found["corpora"][0]["spread"] == pytest.approx(spread(chosen))


def test_one_document_has_no_neighbours() -> None:
    found = describe([corpus(random_units(1, 1)), corpus(random_units(2, 4))])
    assert [entry["spread"] for entry in found["corpora"]] == [None, None]
    assert len(found["corpora"][1]["points"]) == 4
    assert describe([corpus(random_units(1, 1))])["variance_shares"] == [0.0, 0.0]


def test_parts_in_order_are_the_whole() -> None:
    vectors = random_units(4, 9)
    merged = Embeddings.empty()
    for rows in (slice(0, 0), slice(0, 4), slice(4, 4), slice(4, 9)):
        merged.merge(Embeddings(np.arange(9)[rows], vectors[rows]))
    again = Embeddings.from_arrays(merged.to_arrays())
    assert np.array_equal(again.vectors_DH, vectors)
    assert again.ordinals_D.tolist() == list(range(9))
