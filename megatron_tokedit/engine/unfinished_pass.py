"""A forward pass that one rank cannot finish, for want of memory, while the others wait for it.

Ranks that share a model meet many times in a pass: tensor-parallel ones add up their parts of the embedding,
of every attention and of every feed-forward block, stages send each other what they have. Here a rank counts
the meetings that it has been at, so that it can take part in the others with zeros: nobody waits, and what
comes out is of no use to anybody.

Invariant: with or without a failure every rank is at the same meetings in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_tokedit.engine.inference import LanguageModel


class PassMeetings:
    """The meetings of a rank in the passes of a model. To be made when its layers are what they will be.

    Args:
        model: this rank's part.

    Attributes:
        can_finish: whether :meth:`finish` can take part in what is left. Not where sequences are cut among
            the ranks, as experts need it: what they exchange depends on the tokens.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.can_finish = not model.gpt.config.sequence_parallel
        self._num_sums = 0
        self._modules: list[Any] = []
        if self.can_finish and model.ctx.tp_size > 1:
            if model.ctx.is_first_stage:
                self._modules.append(model.gpt.embedding.word_embeddings)
            for layer in model.layers:
                self._modules += [layer.self_attention.linear_proj, layer.mlp]
        for module in self._modules:  # each ends with a sum over the ranks
            module.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._num_sums += 1

    def begin(self) -> None:
        """A pass begins."""
        self._num_sums = 0
        if self._model.stages is not None:
            self._model.stages.begin()

    def finish(self, ids_BT: torch.Tensor) -> None:
        """Take part in what is left of a pass that ran out of memory. Collective with the pass of the others.

        Args:
            ids_BT: what the pass was over, on any device.

        Raises:
            RuntimeError: there is not even memory for one message.
        """
        model = self._model
        rows, length = model.filled(ids_BT).shape
        zeros = torch.zeros(
            length, rows, model.gpt.config.hidden_size, dtype=model.dtype, device=model.device
        )
        if model.stages is not None:
            model.stages.receive(zeros.shape)
        for _ in range(len(self._modules) - self._num_sums):
            dist.all_reduce(zeros, group=model.tensor_parallel_group)
        if model.stages is not None:
            model.stages.send(zeros)
