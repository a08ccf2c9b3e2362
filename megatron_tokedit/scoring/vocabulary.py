"""The part of the vocabulary whose output rows this process holds, where several hold one model.

Invariant: the parts are consecutive, in the order of the group's ranks, and cover the real vocabulary; a part
may be empty (a rank that holds padding alone).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """A part of the vocabulary, and who has the others.

    Attributes:
        first_id: id of the part's first row.
        vocab_size: real vocabulary, all parts together.
        group: the processes that have a part each.
    """

    first_id: int
    vocab_size: int
    group: dist.ProcessGroup

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Everybody's tensor, stacked: ``[R, ...]`` of the group's R ranks. Collective; of equal shapes."""
        parts = [torch.empty_like(tensor) for _ in range(self.group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.stack(parts)
