"""A Hugging Face causal language model as a decoder: transformers' own model and its key/value cache.

transformers' caches have one length for all rows, so prompts are padded in front, and rows join only where
no others are. Invariant: logits are the model's own ``forward``'s, for the positions that a row would have
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_tokedit.errors import CheckpointError, first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(folder: Path, device_type: str, dtype: str) -> Any:
    """The model of a folder, with every weight taken from it.

    Raises:
        CheckpointError: it cannot be loaded, or lacks weights.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises bare Exceptions of many kinds for damaged folders
        raise CheckpointError(f"{folder}: the model cannot be loaded: {first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}; they would be random"
        )
    return model.to(device_type).eval().requires_grad_(False)


class HuggingFaceDecoder:
    """Rows that a transformers model continues; see :class:`~megatron_tokedit.generation.base.Decoder`."""

    can_join = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None
        self._mask_BT = torch.zeros(0, 0, dtype=torch.int64, device=model.device)
        self.num_rows = 0

    @torch.inference_mode()
    def add(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """See the protocol; there must be no rows."""
        assert not self.num_rows
        longest = max(len(prompt) for prompt in prompts)
        device = self._model.device
        ids_BT = torch.tensor([[*[p[0]] * (longest - len(p)), *p] for p in prompts], device=device)
        missing_B = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
        self._mask_BT = (torch.arange(longest, device=device) >= missing_B[:, None]).long()
        self.num_rows, self._cache = len(prompts), None
        return self._forward(ids_BT)

    @torch.inference_mode()
    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """See the protocol."""
        ids_B1 = torch.tensor(ids, device=self._model.device)[:, None]
        self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(ids_B1)], dim=1)
        return self._forward(ids_B1)

    def keep(self, rows: Sequence[int]) -> None:
        """See the protocol."""
        self.num_rows = len(rows)
        if rows:
            kept_B = torch.tensor(rows, device=self._model.device)
            self._cache.batch_select_indices(kept_B)
            self._mask_BT = self._mask_BT[kept_B]

    def _forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        positions_BT = (self._mask_BT.cumsum(dim=1) - 1).clamp(min=0)[:, -ids_BT.size(1) :]
        output = self._model(
            input_ids=ids_BT,
            attention_mask=self._mask_BT,
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = output.past_key_values
        logits_BV: torch.Tensor = output.logits[:, -1].float()
        return logits_BV
