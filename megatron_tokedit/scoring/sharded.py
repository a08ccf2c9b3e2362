"""Head and candidates where every process of a group holds a part of the vocabulary.

Each process reduces its own part, within its own byte budget and in as many chunks as that takes; then one
exchange a batch joins the parts: two numbers a row for log-probabilities (log-sum-exp, the target's logit),
K candidates a row and process for candidates. Logits never leave a process.

Invariant: every process of the group makes the same calls with the same rows and gets the same results, bit
for bit, so all of them decide alike what comes next; how often they meet does not depend on the memory that
one of them has.

Legend: as in ``head`` and ``candidates``; ``R`` processes of the group, ``k`` candidates of one of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_tokedit.scoring.base import CandidateRequest
from megatron_tokedit.scoring.candidates import CandidateSearch, FoundRows, top_candidates
from megatron_tokedit.scoring.head import OutputHead, TiledHead
from megatron_tokedit.scoring.vocabulary import VocabularyShard

_MERGE_BYTES = 48
"""Of a candidate while candidates are merged: int64 and float32, sorted and unsorted."""


class ShardedHead(TiledHead):
    """A :class:`TiledHead` over a part of the vocabulary. Its calls are collective over the shard's group."""

    def reduce(
        self, hidden_NH: torch.Tensor, targets_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :class:`TiledHead`: of the whole vocabulary, but for the maxima of this part's blocks."""
        shard, num_own = _shard_of(self.head), self.head.vocab_size
        own_2N = hidden_NH.new_full((2, len(targets_N)), -torch.inf, dtype=torch.float32)
        maxima_CN = own_2N[:0]
        if num_own:
            places_N = targets_N - shard.first_id
            is_own_N = (places_N >= 0) & (places_N < num_own)
            logits_N, own_2N[0], maxima_CN = super().reduce(hidden_NH, places_N.clamp_(0, num_own - 1))
            own_2N[1] = logits_N.masked_fill_(~is_own_N, -torch.inf)
        sums_RN, logits_RN = shard.gather(own_2N).unbind(1)
        return logits_RN.amax(dim=0), torch.logsumexp(sums_RN, dim=0), maxima_CN


class ShardedSearch(CandidateSearch):
    """A :class:`CandidateSearch` over a :class:`ShardedHead`. Its calls are collective over the group."""

    def __init__(self, head: ShardedHead, request: CandidateRequest, *, asynchronous: bool) -> None:
        shard = _shard_of(head.head)
        own_excluded = tuple(i - shard.first_id for i in request.excluded_ids)
        super().__init__(head, replace(request, excluded_ids=own_excluded), asynchronous=asynchronous)
        self._shard, self._own_limit = shard, self.limit
        self.num_allowed = shard.vocab_size - len(
            {i for i in request.excluded_ids if 0 <= i < shard.vocab_size}
        )
        wanted = self.num_allowed if request.num_candidates is None else request.num_candidates
        self.limit = max(0, min(wanted, self.num_allowed))
        if not self._is_open:
            self.first_width = self.limit

    def find(
        self, hidden_EH: torch.Tensor, normalisers_E: torch.Tensor, maxima_CE: torch.Tensor, width: int
    ) -> FoundRows:
        """See :class:`CandidateSearch`."""
        width, num_rows = min(width, self.limit), len(hidden_EH)
        own_width = min(width, self._own_limit)
        hidden_EH = hidden_EH.to(self._head.head.weight_VH.dtype)
        ids_Ek = torch.full((num_rows, width), -1, dtype=torch.int32, device=hidden_EH.device)
        logprobs_Ek = torch.full((num_rows, width), -torch.inf, device=hidden_EH.device)
        tempered_E = torch.full_like(normalisers_E, -torch.inf)

        def find_rows(start: int, stop: int) -> bool:
            rows = slice(start, stop)
            found = self._top_rows(hidden_EH[rows], normalisers_E[rows], maxima_CE[:, rows], own_width)
            ids_Ek[rows, :own_width] = torch.where(found[0] < 0, -1, found[0] + self._shard.first_id)
            logprobs_Ek[rows, :own_width] = found[1]
            if found[2] is not None:
                tempered_E[rows] = found[2]
            return True

        if own_width:
            self._rows.run(num_rows, find_rows)
        rows_at_once = max(1, self._head.logits_bytes // (self._shard.group.size() * width * _MERGE_BYTES))
        parts = [
            self._merged(*tensors)
            for tensors in zip(
                *(tensor.split(rows_at_once) for tensor in (ids_Ek, logprobs_Ek, tempered_E)), strict=True
            )
        ]
        covered = [part.covered_E for part in parts if part.covered_E is not None]
        return FoundRows(
            torch.cat([part.ids_EK for part in parts]),
            torch.cat([part.logprobs_EK for part in parts]),
            torch.cat(covered) if covered else None,
        )

    def _merged(self, ids_ek: torch.Tensor, logprobs_ek: torch.Tensor, tempered_e: torch.Tensor) -> FoundRows:
        """The most probable of everybody's candidates of some rows."""
        width = ids_ek.shape[1]
        own = torch.cat([ids_ek, logprobs_ek.view(torch.int32), tempered_e.view(torch.int32)[:, None]], dim=1)
        all_Rew = self._shard.gather(own)
        ids_eW = all_Rew[:, :, :width].transpose(0, 1).flatten(1)
        logprobs_eW = all_Rew[:, :, width:-1].view(torch.float32).transpose(0, 1).flatten(1)
        ids_eW, order_eW = torch.sort(ids_eW, dim=1)  # so that ties go to the lowest id
        places_eK, logprobs_eK = top_candidates(
            logprobs_eW.gather(1, order_eW),
            torch.zeros_like(tempered_e),
            width,
            asynchronous=self._asynchronous,
        )
        ids_eK = ids_eW.gather(1, places_eK.long().clamp_(min=0)).masked_fill_(places_eK < 0, -1)
        if not self._is_open:
            return self._nucleus(ids_eK, logprobs_eK, None)
        tempered_Re = all_Rew[:, :, -1].contiguous().view(torch.float32)
        return self._nucleus(ids_eK, logprobs_eK, torch.logsumexp(tempered_Re, dim=0))


def make_head(head: OutputHead, *, logits_bytes: int) -> TiledHead:
    """The head in tiles, of all or of a part of the vocabulary."""
    kind = TiledHead if head.shard is None else ShardedHead
    return kind(head, logits_bytes=logits_bytes)


def make_search(head: TiledHead, request: CandidateRequest, *, asynchronous: bool) -> CandidateSearch:
    """The search for candidates that fits a head."""
    if isinstance(head, ShardedHead):
        return ShardedSearch(head, request, asynchronous=asynchronous)
    return CandidateSearch(head, request, asynchronous=asynchronous)


def _shard_of(head: OutputHead) -> VocabularyShard:
    assert head.shard is not None, "this head holds the whole vocabulary"
    return head.shard
