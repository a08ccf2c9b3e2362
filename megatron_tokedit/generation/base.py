"""What a model must do to write text, whatever it was loaded from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Decoder(Protocol):
    """Rows of ids that a model continues; there are none at first. See ``engine/decoding.py``."""

    can_join: bool
    """Rows may be added while others are there."""
    num_rows: int

    def add(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Put rows behind those that are there; logits of what follows each, float32 ``[B, V]``."""

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """Put one id behind every row; logits of what follows each, float32 ``[B, V]``."""

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, numbered anew in this order; each stays in its place or comes from behind
        all that remain.
        """
