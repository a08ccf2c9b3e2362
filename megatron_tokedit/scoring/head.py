"""The output head in tiles: hidden states in, log-probabilities out, within a byte budget.

Invariant: a [tokens, vocabulary] matrix never exists. On a CPU a tile is some rows by some columns of the
logits, small enough that its passes (maximum, exponential, sum) find it in the second-level cache; on a GPU
it is some rows by the whole vocabulary, within ``logits_bytes``. Log-softmax is float32 over the real
vocabulary.

Legend: ``N`` rows of a batch, ``n`` rows of a tile, ``H`` hidden size, ``V`` vocabulary, ``v`` columns of a
tile, ``C`` column blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_tokedit.scoring.memory import ChunkLimit
from megatron_tokedit.scoring.packed import can_pack, pack, packed_linear
from megatron_tokedit.scoring.vocabulary import VocabularyShard

_CPU_COLUMNS = 1024
_CPU_ROWS = 512
_COPIES = 4
"""float32 [n, V] buffers alive at once where candidates are looked for in whole rows."""


@dataclass(frozen=True, slots=True)
class OutputHead:
    """From the final hidden state to logits.

    Attributes:
        weight_VH: ``[V, H]``, real vocabulary only.
        bias_V: ``[V]`` or None.
        scale: the logits are multiplied by this.
        softcap: the logits become ``softcap * tanh(logits / softcap)``, after the scale; None: no.
        shard: the part of the vocabulary that V is here; None: all of it.
    """

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    shard: VocabularyShard | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight_VH.shape[0]

    @property
    def full_vocab_size(self) -> int:
        """Real vocabulary of the model, whatever part of it is here."""
        return self.vocab_size if self.shard is None else self.shard.vocab_size

    @property
    def row_bytes(self) -> int:
        """Peak bytes that one whole row of logits takes."""
        return max(1, self.vocab_size) * (_COPIES * 4 + self.copy_bytes)

    @property
    def copy_bytes(self) -> int:
        """Bytes of a logit before it is float32; none where it is born so."""
        return self.weight_VH.element_size() if self.weight_VH.dtype != torch.float32 else 0

    def logits(self, hidden_nH: torch.Tensor) -> torch.Tensor:
        """float32 logits ``[n, V]``; the product is done in the weights' precision."""
        hidden_nH = hidden_nH.to(self.weight_VH.dtype)
        return self.finish_(torch.nn.functional.linear(hidden_nH, self.weight_VH, self.bias_V).float())

    def finish_(self, logits: torch.Tensor) -> torch.Tensor:
        """Scale and cap float32 logits, in place."""
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


@dataclass(frozen=True, slots=True)
class RowScores:
    """Scores of ``N`` rows, on the head's device.

    Attributes:
        logprobs_N: float32 ``[N]`` of the targets, at most 0.
        normalisers_N: float32 ``[N]``: log of the sum of the exponentials of a row's logits.
        maxima_CN: float32 ``[C, N]``: the largest logit of each column block.
    """

    logprobs_N: torch.Tensor
    normalisers_N: torch.Tensor
    maxima_CN: torch.Tensor


class TiledHead:
    """An :class:`OutputHead` applied tile by tile; see the module.

    Args:
        head: the output head.
        logits_bytes: bound on the memory of logits and their copies (one row at least).
    """

    def __init__(self, head: OutputHead, *, logits_bytes: int) -> None:
        self.head = head
        is_cpu = head.weight_VH.device.type == "cpu"
        width = max(1, min(_CPU_COLUMNS, head.vocab_size) if is_cpu else head.vocab_size)
        self.columns = [
            slice(start, min(start + width, head.vocab_size)) for start in range(0, head.vocab_size, width)
        ]
        self.width = width
        low_precision = head.weight_VH.dtype != torch.float32
        self._packed: list[torch.Tensor] | None = None
        if is_cpu and low_precision and can_pack(head.weight_VH.dtype):
            self._packed = [pack(head.weight_VH[block]) for block in self.columns]
        tile_rows = logits_bytes // (width * (4 + head.copy_bytes))
        self._tile_rows = ChunkLimit(min(tile_rows, _CPU_ROWS) if is_cpu else logits_bytes // head.row_bytes)
        self.whole_rows = ChunkLimit(logits_bytes // head.row_bytes)
        self.logits_bytes = logits_bytes

    def tile(self, hidden_nH: torch.Tensor, block: int, out_nv: torch.Tensor) -> None:
        """Write the float32 logits of a column block into ``out_nv``, contiguous ``[n, v]``."""
        head, columns = self.head, self.columns[block]
        bias_v = None if head.bias_V is None else head.bias_V[columns]
        if self._packed is not None:
            out_nv.copy_(packed_linear(hidden_nH, self._packed[block], bias_v))
        elif head.weight_VH.dtype == torch.float32:
            torch.mm(hidden_nH, head.weight_VH[columns].t(), out=out_nv)
            if bias_v is not None:
                out_nv.add_(bias_v)
        else:
            out_nv.copy_(torch.nn.functional.linear(hidden_nH, head.weight_VH[columns], bias_v))
        head.finish_(out_nv)

    def score(self, hidden_NH: torch.Tensor, targets_N: torch.Tensor) -> RowScores:
        """Log-probability of each row's target.

        Args:
            hidden_NH: ``[N, H]`` final hidden states.
            targets_N: int64 ``[N]``.

        Raises:
            PriorError: out of memory even with one row at a time.
        """
        logits_N, normalisers_N, maxima_CN = self.reduce(hidden_NH, targets_N)
        logprobs_N = (logits_N - normalisers_N).clamp_(max=0.0)
        return RowScores(logprobs_N, normalisers_N, maxima_CN)

    def reduce(
        self, hidden_NH: torch.Tensor, targets_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The targets' logits ``[N]``, and ``normalisers_N`` and ``maxima_CN`` of :class:`RowScores`."""
        hidden_NH = hidden_NH.to(self.head.weight_VH.dtype)
        num_rows, device = len(targets_N), hidden_NH.device
        logits_N = torch.empty(num_rows, device=device)
        maxima_CN = torch.empty(len(self.columns), num_rows, device=device)
        sums_CN = torch.empty_like(maxima_CN)

        def score_rows(start: int, stop: int) -> bool:
            rows = slice(start, stop)
            self._score_rows(
                hidden_NH[rows], targets_N[rows], logits_N[rows], maxima_CN[:, rows], sums_CN[:, rows]
            )
            return True

        self._tile_rows.run(num_rows, score_rows)
        return logits_N, torch.logsumexp(sums_CN.log_().add_(maxima_CN), dim=0), maxima_CN

    def _score_rows(
        self,
        hidden_nH: torch.Tensor,
        targets_n: torch.Tensor,
        logits_n: torch.Tensor,
        maxima_Cn: torch.Tensor,
        sums_Cn: torch.Tensor,
    ) -> None:
        """One chunk of rows, every column block; fills the last three."""
        num_rows = len(hidden_nH)
        buffer = torch.empty(num_rows * self.width, device=hidden_nH.device)
        targets_of = self._targets_by_block(targets_n)
        for block, columns in enumerate(self.columns):
            width = columns.stop - columns.start
            tile_nv = buffer[: num_rows * width].view(num_rows, width)
            self.tile(hidden_nH, block, tile_nv)
            if len(self.columns) == 1:
                torch.gather(tile_nv, 1, targets_n[:, None], out=logits_n[:, None])
            elif len(rows := targets_of[block]):
                logits_n[rows] = tile_nv[rows, targets_n[rows] - columns.start]
            maxima_n = maxima_Cn[block]
            torch.amax(tile_nv, 1, out=maxima_n)
            maxima_n.clamp_(min=torch.finfo(torch.float32).min)  # a block of minus infinities: no NaN
            torch.sum(tile_nv.sub_(maxima_n[:, None]).exp_(), 1, out=sums_Cn[block])

    def _targets_by_block(self, targets_n: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows whose target lies in each column block; empty where there is one block only."""
        if len(self.columns) == 1:
            return []
        sorted_n, order_n = torch.sort(targets_n)
        stops = torch.tensor([columns.stop for columns in self.columns])
        return torch.tensor_split(order_n, torch.searchsorted(sorted_n, stops)[:-1])
