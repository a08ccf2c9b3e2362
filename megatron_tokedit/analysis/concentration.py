"""How unequal a distribution of counts is, and how far two distributions are apart. Pure functions of counts.

Formulas, with p = counts / sum:

- entropy H = - sum p log2 p, in bits (Shannon 1948); 2^H is the effective number of features;
- Gini = sum_i (2 i - n - 1) c_i / (n sum c), counts ascending, i from 1: 0 where all are equal, near 1 where
  one has everything;
- KL(P || Q) = sum p log2 (p / q), with ``smoothing`` added to every count of both, since a feature that Q
  lacks would make it infinite;
- JS(P, Q) = H((P + Q) / 2) - (H(P) + H(Q)) / 2, in [0, 1] bits, without smoothing (Lin 1991).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[Any]
SMOOTHING = 0.5
"""Added to every count for KL: Jeffreys' prior of a multinomial."""
TOP_SIZES = (10, 100, 1000)


def shares(counts_F: Counts) -> Floats:
    """Counts as probabilities; all zero where there is nothing."""
    total = float(counts_F.sum())
    result: Floats = np.asarray(counts_F, np.float64) / (total or 1.0)
    return result


def entropy_bits(counts_F: Counts) -> float:
    """Shannon's entropy."""
    p = shares(counts_F)
    p = p[p > 0]
    return max(0.0, float(-(p * np.log2(p)).sum()))


def gini(counts_F: Counts) -> float:
    """Gini's coefficient over all features, those that never occur included."""
    ordered = np.sort(np.asarray(counts_F, np.float64))
    total, n = ordered.sum(), len(ordered)
    if not total:
        return 0.0
    return float(((2 * np.arange(1, n + 1) - n - 1) * ordered).sum() / (n * total))


def top_mass(counts_F: Counts, count: int) -> float:
    """Share of all occurrences that the ``count`` commonest features have."""
    total = counts_F.sum()
    return float(np.sort(counts_F)[::-1][:count].sum() / total) if total else 0.0


def rank_mass(counts_F: Counts) -> Floats:
    """Share of the 1, 2, 3 ... commonest features, ``[F]``: the curve that concentration bends upwards."""
    mass: Floats = np.cumsum(np.sort(shares(counts_F))[::-1])
    return mass


def kl_bits(counts_P: Counts, counts_Q: Counts, smoothing: float = SMOOTHING) -> float:
    """KL(P || Q) of smoothed counts."""
    p = shares(np.asarray(counts_P, np.float64) + smoothing)
    q = shares(np.asarray(counts_Q, np.float64) + smoothing)
    return max(0.0, float((p * np.log2(p / q)).sum()))


def js_bits(counts_P: Counts, counts_Q: Counts) -> float:
    """Jensen-Shannon divergence, 0 (the same) to 1 (nothing in common)."""
    p, q = shares(counts_P), shares(counts_Q)
    return max(0.0, entropy_bits((p + q) / 2) - (entropy_bits(p) + entropy_bits(q)) / 2)


def describe(counts_F: Counts) -> dict[str, Any]:
    """All measures of one distribution."""
    entropy = entropy_bits(counts_F)
    return {
        "num_occurrences": int(counts_F.sum()),
        "num_features_seen": int((counts_F > 0).sum()),
        "entropy_bits": entropy,
        "effective_features": 2.0**entropy,
        "gini": gini(counts_F),
        "top_mass": {str(size): top_mass(counts_F, size) for size in TOP_SIZES},
    }
