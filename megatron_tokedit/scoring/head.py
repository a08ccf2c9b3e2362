"""The output head in chunks: hidden states in, log-probabilities and candidates out, within a byte budget.

Invariant: a [tokens, vocabulary] matrix never exists; a chunk's logits and their copies stay within
``logits_bytes`` (one row at least). Log-softmax is float32 over the real vocabulary. Candidates are looked
for only in the rows whose log-probability lies in a requested interval.

Legend: ``N`` rows of a batch, ``n`` rows of a chunk, ``H`` hidden size, ``V`` vocabulary, ``E`` rows with
candidates, ``K`` candidates a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_tokedit.scoring.base import CandidateRequest

_COPIES = 3
"""float32 [n, V] buffers alive at once: the logits, logsumexp's temporary, the candidate rows."""


@dataclass(frozen=True, slots=True)
class OutputHead:
    """From the final hidden state to logits.

    Attributes:
        weight_VH: ``[V, H]``, real vocabulary only.
        bias_V: ``[V]`` or None.
        scale: the logits are multiplied by this.
        softcap: the logits become ``softcap * tanh(logits / softcap)``, after the scale; None: no.
    """

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight_VH.shape[0]

    @property
    def row_bytes(self) -> int:
        """Peak bytes that one row of logits takes in :func:`score_rows`."""
        low_precision = self.weight_VH.element_size() if self.weight_VH.dtype != torch.float32 else 0
        return self.vocab_size * (_COPIES * 4 + low_precision)

    def logits(self, hidden_nH: torch.Tensor) -> torch.Tensor:
        """float32 logits ``[n, V]``; the product is done in the weights' precision."""
        hidden_nH = hidden_nH.to(self.weight_VH.dtype)
        logits_nV = torch.nn.functional.linear(hidden_nH, self.weight_VH, self.bias_V).float()
        if self.scale != 1.0:
            logits_nV = logits_nV.mul_(self.scale)
        if self.softcap is not None:
            logits_nV = logits_nV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_nV


@dataclass(frozen=True, slots=True)
class RowScores:
    """Scores of ``N`` rows, on the head's device.

    Attributes:
        logprobs_N: float32 ``[N]`` of the targets.
        rows_E: int64 ``[E]``, ascending: rows that lie in a requested interval.
        candidate_ids_EK: int32 ``[E, K]``, by falling log-probability, ties by rising id.
        candidate_logprobs_EK: float32 ``[E, K]``.
    """

    logprobs_N: torch.Tensor
    rows_E: torch.Tensor
    candidate_ids_EK: torch.Tensor
    candidate_logprobs_EK: torch.Tensor


def num_candidates(request: CandidateRequest | None, vocab_size: int) -> int:
    """K of a request: what is asked for, or all that the vocabulary has."""
    if request is None:
        return 0
    return min(request.num_candidates, vocab_size - len(set(request.excluded_ids)))


def score_rows(
    head: OutputHead,
    hidden_NH: torch.Tensor,
    targets_N: torch.Tensor,
    request: CandidateRequest | None,
    *,
    logits_bytes: int,
) -> RowScores:
    """Log-probability of each row's target, and candidates where the request wants them.

    Args:
        head: the output head.
        hidden_NH: ``[N, H]`` final hidden states.
        targets_N: int64 ``[N]``.
        request: rows and number of candidates; None for log-probabilities alone.
        logits_bytes: bound on the chunks' memory.
    """
    device = hidden_NH.device
    chunk_rows = max(1, logits_bytes // head.row_bytes)
    width = num_candidates(request, head.vocab_size)
    excluded = torch.tensor(
        sorted(set(request.excluded_ids)) if request else [], dtype=torch.int64, device=device
    )
    logprobs = [torch.empty(0, device=device)]
    rows = [torch.empty(0, dtype=torch.int64, device=device)]
    ids = [torch.empty(0, width, dtype=torch.int32, device=device)]
    candidate_logprobs = [torch.empty(0, width, device=device)]
    for start in range(0, len(targets_N), chunk_rows):
        logits_nV = head.logits(hidden_NH[start : start + chunk_rows])
        targets_n = targets_N[start : start + chunk_rows]
        normaliser_n = torch.logsumexp(logits_nV, dim=1)
        logprobs_n = logits_nV.gather(1, targets_n[:, None])[:, 0] - normaliser_n
        logprobs.append(logprobs_n)
        if request is None or width <= 0:
            continue
        rows_E = _rows_in_intervals(logprobs_n, request.intervals)
        if len(rows_E):
            logits_EV = logits_nV[rows_E]
            if len(excluded):
                logits_EV[:, excluded] = -torch.inf
            rows.append(rows_E + start)
            top_ids_EK, top_logprobs_EK = top_candidates(logits_EV, normaliser_n[rows_E], width)
            ids.append(top_ids_EK)
            candidate_logprobs.append(top_logprobs_EK)
    return RowScores(torch.cat(logprobs), torch.cat(rows), torch.cat(ids), torch.cat(candidate_logprobs))


def top_candidates(
    logits_EV: torch.Tensor, normaliser_E: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``width`` most probable ids of each row, and their log-probabilities.

    Ties are resolved by rising id, also the tie at the last place (``torch.topk`` promises nothing about
    either): a row whose next logit equals its last chosen one is sorted in full, which is rare.

    Returns:
        int32 ``[E, K]`` and float32 ``[E, K]``.
    """
    values_EK, ids_EK = torch.topk(logits_EV, min(width + 1, logits_EV.shape[1]), dim=1)
    if values_EK.shape[1] > width:
        tied_rows = (values_EK[:, width] == values_EK[:, width - 1]).nonzero()[:, 0]
        values_EK, ids_EK = values_EK[:, :width], ids_EK[:, :width]
        if len(tied_rows):
            values, ids = torch.sort(logits_EV[tied_rows], dim=1, descending=True, stable=True)
            values_EK = values_EK.index_copy(0, tied_rows, values[:, :width])
            ids_EK = ids_EK.index_copy(0, tied_rows, ids[:, :width])
    logprobs_EK = values_EK - normaliser_E[:, None]
    ids_EK, order_EK = torch.sort(ids_EK, dim=1)
    logprobs_EK, order_EK = torch.sort(logprobs_EK.gather(1, order_EK), dim=1, descending=True, stable=True)
    return ids_EK.gather(1, order_EK).int(), logprobs_EK


def _rows_in_intervals(logprobs_n: torch.Tensor, intervals: tuple[tuple[float, float], ...]) -> torch.Tensor:
    """Rows whose log-probability lies in any of the closed intervals: int64, ascending."""
    wanted_n = torch.zeros_like(logprobs_n, dtype=torch.bool)
    for low, high in intervals:
        wanted_n |= (logprobs_n >= low) & (logprobs_n <= high)
    return wanted_n.nonzero()[:, 0]
