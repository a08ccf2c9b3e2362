"""megatron-core's ``GPTModel`` whose loss never sees the padding of the vocabulary.

The embedding is padded so that it divides among tensor-parallel ranks; in Megatron-LM the padding rows take
part in the softmax of the training loss. Here their logits count for nothing, so that the loss is the
negative log-likelihood over the real vocabulary: the same number under every layout, and the one that
scoring and evaluation report.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_tokedit.engine.cpu_kernels import BlockedCrossEntropy


class VocabMaskedGPTModel(GPTModel):
    """A ``GPTModel`` with ``real_vocab_size <= vocab_size`` meaningful rows in its output layer."""

    def __init__(self, *args: Any, real_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Negative log-likelihood of every label.

        Args:
            labels: int64 ``[b, s]``.
            logits: ``[s, b, v]``, this tensor-parallel rank's part of the padded vocabulary; may be
                overwritten.

        Returns:
            float32 ``[b, s]``.
        """
        first_id = self.tp_group.rank() * logits.size(-1)
        real_columns = min(max(0, self.real_vocab_size - first_id), logits.size(-1))
        if logits.device.type == "cpu":
            flat_labels = labels.transpose(0, 1).reshape(-1)
            loss = BlockedCrossEntropy.apply(
                logits.flatten(0, 1), flat_labels, first_id, real_columns, self.tp_group
            )
            return loss.view(logits.shape[:2]).transpose(0, 1).contiguous()
        if real_columns < logits.size(-1):
            with torch.no_grad():  # no gradient flows through padding: its softmax is zero
                # the least number, not -inf, of which Transformer Engine's kernel makes NaN where a rank
                # holds padding alone
                logits[..., real_columns:] = torch.finfo(logits.dtype).min
        return super().compute_language_model_loss(labels, logits)
