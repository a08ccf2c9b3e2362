"""How text is written: what may be drawn, when to stop, how many rows at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_tokedit.errors import ConfigError

_LEAST_TEMPERATURE = 1e-6
"""Logits divided by less are not finite in float32."""


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """Settings of one call of :func:`~megatron_tokedit.generation.generate`.

    Temperature, top-k and top-p apply in this order, as in transformers.

    Attributes:
        max_new_tokens: most tokens a continuation gets.
        temperature: divides the logits; 0: always the most probable token.
        top_k: draw from so many most probable tokens (and those that are as probable as the last of them);
            None: from all.
        top_p: draw from the smallest set of most probable tokens whose probability reaches this; None: all.
        seed: of the draws.
        stop_at_eod: end a text at the model's end-of-document id.
        stop_texts: end a text before any of these.
        batch_rows: texts that are written at the same time.
        logprobs: report log-probabilities.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1234
    stop_at_eod: bool = True
    stop_texts: tuple[str, ...] = ()
    batch_rows: int = 8
    logprobs: bool = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: lists all that cannot be honoured.
        """
        faults = []
        for name in ("max_new_tokens", "batch_rows", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                faults.append(f"{name}: {value}, expected at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            faults.append(f"temperature: {self.temperature}, expected 0 (greedy) or a finite number above it")
        elif 0.0 < self.temperature < _LEAST_TEMPERATURE:
            faults.append(
                f"temperature: {self.temperature}, expected 0 (greedy) or at least {_LEAST_TEMPERATURE:g}"
            )
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            faults.append(f"top_p: {self.top_p}, expected a share above 0 and at most 1")
        if not 0 <= self.seed < 2**64:
            faults.append(f"seed: {self.seed}, expected 0 to 2**64 - 1")
        if "" in self.stop_texts:
            faults.append("stop_texts: an empty text would end every continuation before it begins")
        if faults:
            raise ConfigError("\n  - ".join(["generation settings:", *faults]) if faults[1:] else faults[0])

    @property
    def is_greedy(self) -> bool:
        """Always the most probable token."""
        return self.temperature == 0.0
