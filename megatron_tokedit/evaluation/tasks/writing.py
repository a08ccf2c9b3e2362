"""What a task wants written, as settings of ``generation``; and what was written, as a task's answer.

Invariant: as lm-eval's model ``hf``: a context that leaves no room for ``max_gen_toks`` ids loses its
beginning; a text ends at EOD, or before any of the task's ``until`` texts; control tokens are no part of it.
A setting that cannot be honoured is refused, not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tokedit.errors import ConfigError
from megatron_tokedit.evaluation.tasks.encoding import TextEncoder
from megatron_tokedit.generation import Completion, GenerationSettings

_DEFAULT_MAX_TOKENS = 256
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the same setting, the first one given counts, as in lm-eval."""
_NEUTRAL: Mapping[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "use_cache": True,
}
"""Settings that may be given with these values, which change nothing."""
_MOST_ROWS = 64


@dataclass(frozen=True, slots=True)
class WriteRequest:
    """A text that a task wants.

    Attributes:
        context: ids to continue.
        settings: how.
        sample: number of this one among those with the same context and settings.
    """

    context: tuple[int, ...]
    settings: GenerationSettings
    sample: int


def settings_of(
    wanted: Mapping[str, Any], *, max_positions: int, batch_tokens: int, seed: int, task: str
) -> GenerationSettings:
    """Settings of a task's ``generation_kwargs``.

    Args:
        wanted: the task's.
        max_positions: ids that the model takes.
        batch_tokens: positions that may be kept at a time, about.
        seed: of draws.
        task: its name, for messages.

    Raises:
        ConfigError: what is not honoured here, or leaves no room for a context.
    """
    given = {key: value for key, value in wanted.items() if value is not None}
    until = given.pop("until", [])
    lengths = [given.pop(name, None) for name in _LENGTHS]
    max_tokens = int(next((length for length in lengths if length is not None), _DEFAULT_MAX_TOKENS))
    temperature = float(given.pop("temperature", 0.0))
    if not given.pop("do_sample", temperature > 0.0):
        temperature = 0.0
    top_k, top_p = given.pop("top_k", None), given.pop("top_p", None)
    surplus = {key: value for key, value in given.items() if _NEUTRAL.get(key) != value}
    if surplus:
        raise ConfigError(
            f"task {task}: generation_kwargs: {surplus} cannot be honoured; expected until, max_gen_toks, "
            "do_sample, temperature, top_k and top_p; write a task file without it"
        )
    if max_tokens >= max_positions:
        raise ConfigError(
            f"task {task}: generation_kwargs: max_gen_toks {max_tokens} (default: {_DEFAULT_MAX_TOKENS}) "
            f"leaves no room for a context: the model takes {max_positions} tokens in all; give less in a "
            "task file"
        )
    return GenerationSettings(
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_k=int(top_k) if top_k and temperature else None,
        top_p=float(top_p) if top_p and temperature else None,
        seed=seed,
        stop_texts=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        batch_rows=min(max(1, batch_tokens // max_positions), _MOST_ROWS),
    )


def answer_of(completion: Completion, encoder: TextEncoder, settings: GenerationSettings) -> tuple[str, bool]:
    """The text that a task is given, of the new ids alone, and whether a stop text was cut off it."""
    whole = text = encoder.decode(completion.ids)
    for stop in settings.stop_texts:
        text = text.split(stop)[0]
    return text, text != whole
