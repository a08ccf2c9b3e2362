"""The loop: rows that are done leave, others take their places, results come in the order of the prompts.

Memory does not grow with the number of prompts: at most ``batch_rows`` texts are being written, and a text is
not begun while ``8 * batch_rows`` others wait for an earlier one that is not done.

Invariant: see the package; what is computed beside a row changes nothing but float rounding, so a text can
differ between batch sizes only where a number from the seed falls within rounding of the border between two
tokens, or, greedily, where two tokens are equally probable within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from megatron_tokedit.errors import ConfigError
from megatron_tokedit.generation.base import Decoder
from megatron_tokedit.generation.load import TextModel
from megatron_tokedit.generation.sampling import choose, uniforms_of
from megatron_tokedit.generation.settings import GenerationSettings
from megatron_tokedit.generation.text import TextStream, certain_length, first_stop

Finish = Literal["eod", "length", "context", "stop"]
_PROMPT_TOKENS = 8192
"""Most ids of prompts in one pass, where there are several prompts."""
_WAITING_BATCHES = 8


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be continued.

    Attributes:
        ids: all of them, the document start included (:meth:`TextModel.prompt_ids`).
        samples: numbers of the continuations that are wanted, each with draws of its own; two prompts with
            the same ids have the same continuations.
        text: as it was given; passed on.
    """

    ids: Sequence[int]
    samples: range = range(1)
    text: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """A continuation.

    Attributes:
        prompt: what it continues.
        prompt_index: its place among the prompts.
        sample: its number among the prompt's samples.
        ids: ids that were drawn, the end of the document or those of a stop text included.
        text: what they add to the prompt's text, without the end of the document or what begins with a stop
            text.
        finish: ``eod``: the model ended the document; ``length``: ``max_new_tokens`` are there; ``context``:
            the model takes no further id; ``stop``: a stop text came.
        logprobs: of ``ids``, nats, in the model's own distribution (temperature 1, nothing left out); None:
            not asked for.
    """

    prompt: Prompt
    prompt_index: int
    sample: int
    ids: list[int]
    text: str
    finish: Finish
    logprobs: list[float] | None


OnText = Callable[[Prompt, int, int, str], None]
"""Told (prompt, its index, sample, text that was added and stays)."""


@dataclass(slots=True)
class _Row:
    """A text that is being written."""

    order: int
    prompt: Prompt
    prompt_index: int
    sample: int
    uniforms: np.random.Generator
    stream: TextStream
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    num_told: int = 0
    finish: Finish | None = None

    def completion(self, has_logprobs: bool) -> Completion:
        assert self.finish is not None
        logprobs = self.logprobs if has_logprobs else None
        return Completion(
            self.prompt, self.prompt_index, self.sample, self.ids, self.text, self.finish, logprobs
        )


def generate(
    model: TextModel,
    prompts: Iterable[Prompt],
    settings: GenerationSettings,
    *,
    on_text: OnText | None = None,
) -> Iterator[Completion]:
    """Continue prompts, each as often as it asks for.

    Args:
        model: from :func:`~megatron_tokedit.generation.load.load_text_model`. Two calls must not be under
            way with the same model at the same time under tensor parallelism, where every rank makes this
            call with the same arguments.
        prompts: read as rows become free.
        settings: how.
        on_text: told every text as it grows, those of a batch in turn.

    Yields:
        In the order of prompts and samples.

    Raises:
        ConfigError: a prompt without ids, or with more than the model takes.
        CheckpointError: logits that are no numbers.
    """
    decoder = model.make_decoder()
    waiting = _Waiting(model, prompts, settings)
    rows: list[_Row] = []
    done: dict[int, Completion] = {}
    next_order = 0
    while True:
        parts = [decoder.step([row.ids[-1] for row in rows])] if rows else []
        if decoder.can_join or not rows:
            limit = next_order + _WAITING_BATCHES * settings.batch_rows
            if new := waiting.take(settings.batch_rows - len(rows), limit):
                parts.append(decoder.add([row.prompt.ids for row in new]))
                rows += new
        if not rows:
            return
        _extend(model, rows, torch.cat(parts), settings, on_text)
        for row in rows:
            if row.finish is not None:
                done[row.order] = row.completion(settings.logprobs)
        rows = _drop_finished(decoder, rows)
        while next_order in done:
            yield done.pop(next_order)
            next_order += 1


class _Waiting:
    """Texts that are not begun, in order; knows one ahead of what it gave."""

    def __init__(self, model: TextModel, prompts: Iterable[Prompt], settings: GenerationSettings) -> None:
        self._model, self._settings = model, settings
        self._rows = self._all_rows(prompts)
        self._next: _Row | None = next(self._rows, None)

    def take(self, num_rows: int, order_limit: int) -> list[_Row]:
        """At most so many, with few enough ids to go into the model together, and none at the limit."""
        taken: list[_Row] = []
        longest = 0
        while self._next is not None and len(taken) < num_rows and self._next.order < order_limit:
            longest = max(longest, len(self._next.prompt.ids))
            if taken and longest * (len(taken) + 1) > _PROMPT_TOKENS:
                break
            taken.append(self._next)
            self._next = next(self._rows, None)
        return taken

    def _all_rows(self, prompts: Iterable[Prompt]) -> Iterator[_Row]:
        order = 0
        for index, prompt in enumerate(prompts):
            self._check(index, prompt)
            for sample in prompt.samples:
                yield _Row(
                    order=order,
                    prompt=prompt,
                    prompt_index=index,
                    sample=sample,
                    uniforms=uniforms_of(prompt.ids, sample, self._settings.seed),
                    stream=TextStream(self._model.tokenizer, prompt.ids),
                )
                order += 1

    def _check(self, index: int, prompt: Prompt) -> None:
        limit, length = self._model.max_positions, len(prompt.ids)
        if not length:
            raise ConfigError(
                f"prompt {index}: there is nothing to continue: the text is empty and no document start "
                f"stands before it ({self._model.path}); give a prompt, or the document start"
            )
        if length > limit:
            raise ConfigError(
                f"prompt {index}: has {length} tokens with its document start, and {self._model.path} takes "
                f"at most {limit}; shorten it (nothing is cut off silently)"
            )


def _extend(
    model: TextModel,
    rows: Sequence[_Row],
    logits_BV: torch.Tensor,
    settings: GenerationSettings,
    on_text: OnText | None,
) -> None:
    """Give every row its next id, and end those that are done."""
    logits_BV = logits_BV[:, : model.vocab_size]
    numbers = [] if settings.is_greedy else [row.uniforms.random() for row in rows]
    chosen = choose(logits_BV, numbers, settings)
    if settings.logprobs:
        ids_B1 = torch.tensor(chosen, device=logits_BV.device)[:, None]
        own_B = logits_BV.log_softmax(dim=-1).gather(1, ids_B1)[:, 0].tolist()
        for row, logprob in zip(rows, own_B, strict=True):
            row.logprobs.append(logprob)
    for row, id_ in zip(rows, chosen, strict=True):
        row.ids.append(id_)
        is_eod = settings.stop_at_eod and id_ in model.stop_ids
        if is_eod:
            row.finish = "eod"
        elif len(row.ids) == settings.max_new_tokens:
            row.finish = "length"
        elif len(row.prompt.ids) + len(row.ids) > model.max_positions:
            row.finish = "context"
        _extend_text(row, id_, is_eod, settings, on_text)


def _extend_text(
    row: _Row, id_: int, is_eod: bool, settings: GenerationSettings, on_text: OnText | None
) -> None:
    length = len(row.text)
    row.text += "" if is_eod else row.stream.push(id_)
    if row.finish is not None:
        row.text += row.stream.flush()
    place = first_stop(row.text, length, settings.stop_texts)
    if place is not None:
        row.text, row.finish = row.text[:place], "stop"
    if on_text is not None:
        certain = len(row.text) if row.finish else certain_length(row.text, settings.stop_texts)
        if certain > row.num_told:
            on_text(row.prompt, row.prompt_index, row.sample, row.text[row.num_told : certain])
            row.num_told = certain


def _drop_finished(decoder: Decoder, rows: list[_Row]) -> list[_Row]:
    """The rows that go on, gaps filled from behind, in the decoder as here."""
    going_on = [place for place, row in enumerate(rows) if row.finish is None]
    if len(going_on) == len(rows):
        return rows
    behind = [place for place in going_on if place >= len(going_on)]
    order = [place if rows[place].finish is None else behind.pop() for place in range(len(going_on))]
    decoder.keep(order)
    return [rows[place] for place in order]
