"""A prior whose probabilities are known exactly: a table of bigrams.

``P(x_t | x_<t)`` depends on ``x_{t-1}`` alone, so any window with one token of context gives the exact answer
and an obvious loop can say what it is. :class:`BigramScorer` is that loop behind the scoring contract;
:class:`BigramBackbone` is the same table as a "model", for the real scorer with its windows, batches and
head.

Invariant: the two agree to float32 rounding; the loop is written to be read, not to be fast.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from megatron_tokedit.scoring.base import CandidateRequest, TokenScores
from megatron_tokedit.scoring.head import OutputHead
from megatron_tokedit.scoring.scorer import ModelSize


def random_bigrams(vocab_size: int, *, seed: int, sharpness: float = 6.0) -> npt.NDArray[np.float64]:
    """A table ``[V, V]`` whose rows are distributions, some of them nearly certain."""
    logits = np.random.default_rng(seed).normal(size=(vocab_size, vocab_size)) * sharpness
    table = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: npt.NDArray[np.float64] = table / table.sum(axis=1, keepdims=True)
    return probabilities


class BigramScorer:
    """The scoring contract over a table, token by token.

    Args:
        probabilities_VV: float64 ``[V, V]``; row ``i`` is the distribution of what follows ``i``.
        bos: id before the first token; None: the first token is not scored.
    """

    max_context_tokens = 1 << 30

    def __init__(self, probabilities_VV: npt.NDArray[np.float64], bos: int | None = None) -> None:
        with np.errstate(divide="ignore"):
            self.logprobs_VV = np.log(probabilities_VV).astype(np.float32)
        self.bos = bos
        self.vocab_size = len(probabilities_VV)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the table."""
        return hashlib.sha256(self.logprobs_VV.tobytes() + str(self.bos).encode()).hexdigest()

    def score(
        self,
        documents: Sequence[npt.NDArray[np.int32]],
        candidates: CandidateRequest | None = None,
        *,
        scored_from: Sequence[int] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[TokenScores]:
        """See :class:`megatron_tokedit.scoring.base.Scorer`; a document is a batch."""
        scores = []
        for index, ids in enumerate(documents):
            first = scored_from[index] if scored_from is not None else 0
            scores.append(self._score(ids.tolist(), candidates, first))
            num_scored = int(np.count_nonzero(~np.isnan(scores[-1].logprobs_T)))
            if on_batch is not None and num_scored:
                on_batch(num_scored)
        return scores

    def _score(self, ids: list[int], request: CandidateRequest | None, first: int) -> TokenScores:
        """One document."""
        previous = [self.bos, *ids]
        logprobs = [
            float("nan") if before is None or i < first else float(self.logprobs_VV[before, token])
            for i, (before, token) in enumerate(zip(previous, ids, strict=False))
        ]
        positions, rows = [], []
        for position, logprob in enumerate(logprobs):
            if request and any(low <= logprob <= high for low, high in request.intervals):
                positions.append(position)
                rows.append(self._candidates(self.logprobs_VV[previous[position]], request))
        width = max((len(row) for row in rows), default=0)
        if request and not request.nucleus:
            width = len(self._candidates(self.logprobs_VV[0], request))
        ids_EK = np.full((len(rows), width), -1, np.int32)
        logprobs_EK = np.full((len(rows), width), -np.inf, np.float32)
        for e, (position, row) in enumerate(zip(positions, rows, strict=True)):
            ids_EK[e, : len(row)] = row
            logprobs_EK[e, : len(row)] = self.logprobs_VV[previous[position], row]
        return TokenScores(
            logprobs_T=np.array(logprobs, np.float32),
            candidate_positions_E=np.array(positions, np.int64),
            candidate_ids_EK=ids_EK,
            candidate_logprobs_EK=logprobs_EK,
        )

    def _candidates(self, logprobs_V: npt.NDArray[np.float32], request: CandidateRequest) -> list[int]:
        """Candidates of one row, by the words of :class:`megatron_tokedit.scoring.base.CandidateRequest`."""
        allowed = [i for i in range(self.vocab_size) if i not in request.excluded_ids]
        kept = sorted(allowed, key=lambda token: (-logprobs_V[token], token))[: request.num_candidates]
        if request.nucleus is None:
            return kept
        weights = [math.exp(float(logprobs_V[token]) / request.nucleus.temperature) for token in kept]
        reached, nucleus = 0.0, []
        for token, weight in zip(kept, weights, strict=True):
            if reached >= request.nucleus.top_p:
                break
            nucleus.append(token)
            reached += weight / math.fsum(weights)
        return nucleus


class BigramBackbone:
    """The table as a model: the hidden state of a token is the row of log-probabilities of what follows it.

    Args:
        probabilities_VV: as for :class:`BigramScorer`; no zeros.
        max_context_tokens: longest input it takes.
    """

    def __init__(
        self, probabilities_VV: npt.NDArray[np.float64], *, max_context_tokens: int = 1 << 20
    ) -> None:
        self._rows_VV = torch.from_numpy(np.log(probabilities_VV)).float()
        self.head = OutputHead(torch.eye(len(probabilities_VV)))
        self.device = torch.device("cpu")
        self.max_context_tokens = max_context_tokens
        self.fingerprint = hashlib.sha256(self._rows_VV.numpy().tobytes()).hexdigest()
        self.size = ModelSize(self._rows_VV.numel(), self._rows_VV.numel(), 0)
        self.forward_shapes: list[tuple[int, int]] = []

    def hidden_states(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """``[B, L, V]``; remembers the shapes it was called with."""
        assert ids_BL.shape[1] <= self.max_context_tokens
        self.forward_shapes.append((ids_BL.shape[0], ids_BL.shape[1]))
        return self._rows_VV[ids_BL]
