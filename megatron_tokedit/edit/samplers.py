"""How a new token is drawn from the prior's candidates: a temperature softmax and the inverse of its CDF.

The samplers are those of "How to Synthesize Text Data without Model Collapse?" (arXiv 2412.14689), table 5:

- ``top_k``: softmax(log p / temperature) over the prior's k most probable tokens;
- ``rejection``: candidates drawn uniformly from the top k, each accepted with probability
  exp((log p - max log p) / beta). The first one accepted has the law softmax(log p / beta) over the
  candidates exactly, so it is drawn in closed form, and a row costs one uniform whatever its acceptance rate;
- ``top_p``: softmax(log p / temperature) over the smallest set of tokens whose probability, at that
  temperature, reaches p.

Special tokens are left out of the candidates. The original token is always one of them for ``top_k`` and
``rejection``, as in the authors' script (their engine returns the prompt's own token beside the top k); for
``top_p`` it is a plain member of the nucleus, or is not.

Invariant: weights and their sums are float64 over float32 log-probabilities, in the candidates' order, so the
draw depends on nothing but the row and its uniform: neither on the other rows nor on padding (id -1,
log-probability -inf, weight 0) that a wider row beside it needs.

Legend: ``E`` rows, ``K`` candidates a row, ``C`` = ``K`` + 1 with the original token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_tokedit.errors import ConfigError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]


class Sampler(Protocol):
    """Says which candidates it wants, and turns them into sampling weights."""

    @property
    def num_candidates(self) -> int | None:
        """K: most probable tokens wanted from the scorer for each row; None: no bound but the nucleus's."""

    @property
    def nucleus(self) -> tuple[float, float] | None:
        """(top_p, temperature) where the candidates are a nucleus; None: the top k and the original token."""

    def weights(self, logprobs_EC: Float32) -> Float64:
        """Unnormalised sampling weights, float64 ``[E, C]``; -inf log-probabilities must get weight 0."""


@dataclass(frozen=True, slots=True)
class TopK:
    """softmax(log p / temperature) over the top k and the original token.

    Attributes:
        k: number of most probable tokens.
        temperature: above 0; 1 keeps the prior's proportions, more flattens them.
    """

    k: int = 8
    temperature: float = 1.5

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: no candidate, or a temperature that is not a positive number.
        """
        _check_k(self.k)
        _check_positive("temperature", self.temperature)

    @property
    def num_candidates(self) -> int:
        """K."""
        return self.k

    @property
    def nucleus(self) -> None:
        """There is none."""

    def weights(self, logprobs_EC: Float32) -> Float64:
        """See :class:`Sampler`."""
        return _softmax_weights(logprobs_EC, self.temperature)


@dataclass(frozen=True, slots=True)
class TopP:
    """softmax(log p / temperature) over the smallest set whose probability at that temperature reaches p.

    Attributes:
        top_p: above 0, at most 1.
        temperature: above 0.
        k: the set is sought among so many most probable tokens; None: among all.
    """

    top_p: float = 0.9
    temperature: float = 1.5
    k: int | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: a top_p that is no share, no candidate, or a temperature that is not a positive
                number.
        """
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"edit sampler top_p={self.top_p}: expected above 0 and at most 1")
        if self.k is not None:
            _check_k(self.k)
        _check_positive("temperature", self.temperature)

    @property
    def num_candidates(self) -> int | None:
        """K."""
        return self.k

    @property
    def nucleus(self) -> tuple[float, float]:
        """(top_p, temperature)."""
        return self.top_p, self.temperature

    def weights(self, logprobs_EC: Float32) -> Float64:
        """See :class:`Sampler`."""
        return _softmax_weights(logprobs_EC, self.temperature)


@dataclass(frozen=True, slots=True)
class Rejection:
    """The exact law of the authors' rejection loop over the top k and the original token.

    Attributes:
        k: number of most probable tokens.
        beta: above 0; the loop accepts a candidate with probability exp((log p - max log p) / beta).
    """

    k: int = 8
    beta: float = 1.5

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: no candidate, or a beta that is not a positive number.
        """
        _check_k(self.k)
        _check_positive("beta", self.beta)

    @property
    def num_candidates(self) -> int:
        """K."""
        return self.k

    @property
    def nucleus(self) -> None:
        """There is none."""

    def weights(self, logprobs_EC: Float32) -> Float64:
        """See :class:`Sampler`."""
        return _softmax_weights(logprobs_EC, self.beta)


def draw(
    sampler: Sampler,
    candidate_ids_EK: Int32,
    candidate_logprobs_EK: Float32,
    original_ids_E: Int32,
    original_logprobs_E: Float32,
    uniforms_E: Float64,
    *,
    exclude_original: bool = False,
) -> Int32:
    """Draw one id a row.

    Args:
        sampler: gives the weights.
        candidate_ids_EK: int32 ``[E, K]``, distinct within a row, padded with -1.
        candidate_logprobs_EK: float32 ``[E, K]``, padded with -inf.
        original_ids_E: int32 ``[E]``.
        original_logprobs_E: float32 ``[E]``.
        uniforms_E: float64 ``[E]`` in [0, 1).
        exclude_original: never draw the original token, unless there is no other candidate.

    Returns:
        int32 ``[E]``; the original id where a row has no candidate.
    """
    num_rows, num_candidates = candidate_ids_EK.shape
    is_original_EK = candidate_ids_EK == original_ids_E[:, None]
    logprobs_EC = np.empty((num_rows, num_candidates + 1), np.float32)
    logprobs_EC[:, :-1] = candidate_logprobs_EK
    logprobs_EC[:, -1] = -np.inf
    if exclude_original:
        logprobs_EC[:, :-1][is_original_EK] = -np.inf
    elif sampler.nucleus is None:  # the original joins as one more candidate where it is not among the top k
        joins_E = ~is_original_EK.any(axis=1)
        logprobs_EC[joins_E, -1] = original_logprobs_E[joins_E]
    cumulative_EC = sampler.weights(logprobs_EC).cumsum(axis=1)
    # the first candidate whose cumulative weight exceeds u * total; candidates of weight 0 are never that;
    # u <= 1 - 2**-53 keeps u * total below total in float64, so there is one wherever total is above 0
    exceeds_EC = cumulative_EC > (uniforms_E * cumulative_EC[:, -1])[:, None]
    chosen_E = exceeds_EC.argmax(axis=1)
    chosen_E[~exceeds_EC[:, -1]] = num_candidates  # no candidate: the original
    ids_EC = np.concatenate([candidate_ids_EK, original_ids_E[:, None]], axis=1)
    drawn_E: Int32 = ids_EC[np.arange(num_rows), chosen_E]
    return drawn_E


def _softmax_weights(logprobs_EC: Float32, temperature: float) -> Float64:
    """exp(log p / temperature), scaled so that the largest of a row is 1; rows of -inf alone are zero."""
    weights_EC = np.divide(logprobs_EC, temperature, dtype=np.float64)
    peak_E1 = weights_EC.max(axis=1, keepdims=True)
    peak_E1[peak_E1 == -np.inf] = 0.0
    weights_EC -= peak_E1
    return np.exp(weights_EC, out=weights_EC)


def _check_k(k: int) -> None:
    """Refuse a number of candidates below 1."""
    if k < 1:
        raise ConfigError(f"edit sampler k={k}: expected at least 1 candidate")


def _check_positive(name: str, value: float) -> None:
    """Refuse a setting that is not a positive number."""
    if not (math.isfinite(value) and value > 0.0):
        raise ConfigError(f"edit sampler {name}={value}: expected a finite number above 0")
