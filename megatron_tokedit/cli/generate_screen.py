"""Continuations as a person reads them: the first unfinished one grows on the terminal, the others wait.

Invariant: texts appear whole, in the order of prompts and samples, and with the same characters whether they
were streamed or not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_tokedit.generation import Completion, Prompt, TextModel

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
ENDS = {
    "eod": "end of document",
    "length": "--max-new-tokens",
    "context": "the model takes no more tokens",
    "stop": "stop text",
}


class Screen:
    """Writes continuations to standard output, which may be a terminal.

    Args:
        model: of the continuations.
        samples: numbers of every prompt's continuations.
        has_headings: say above each which it is.
        shows_prompts: write the prompt in front.
        ends: reason of an end -> what a terminal is told of it; nothing of those that are not there.
    """

    def __init__(
        self,
        model: TextModel,
        samples: range,
        *,
        has_headings: bool,
        shows_prompts: bool = True,
        ends: Mapping[str, str] = ENDS,
    ) -> None:
        self._model = model
        self._samples = samples
        self._has_headings = has_headings
        self._shows_prompts = shows_prompts
        self._ends = ends
        self._is_terminal = sys.stdout.isatty()
        self._head = (0, samples.start)
        self._has_begun = False
        self._num_shown = 0
        self._waiting: dict[tuple[int, int], tuple[Prompt, str]] = {}

    def add(self, prompt: Prompt, prompt_index: int, sample: int, text: str) -> None:
        """Take a part of a continuation, and show it when its turn comes; for ``on_text``."""
        key = (prompt_index, sample)
        _, before = self._waiting.get(key, (prompt, ""))
        self._waiting[key] = (prompt, before + text)
        self._show_head()

    def show(self, completions: Iterable[Completion]) -> Iterator[Completion]:
        """Show what passes through."""
        for completion in completions:
            index, sample = completion.prompt_index, completion.sample
            assert (index, sample) == self._head
            self.add(completion.prompt, index, sample, completion.text[self._num_shown :])
            self._end(completion)
            is_last = sample == self._samples[-1]
            self._head = (index + 1, self._samples.start) if is_last else (index, sample + 1)
            self._has_begun, self._num_shown = False, 0
            self._show_head()
            yield completion

    def _show_head(self) -> None:
        if (found := self._waiting.pop(self._head, None)) is None:
            return
        prompt, text = found
        if not self._has_begun:
            self._has_begun = True
            if self._has_headings:
                self._write(f"=== prompt {self._head[0]}, sample {self._head[1]} ===\n", dim=True)
            if self._shows_prompts:
                self._write(prompt.text, dim=True)
        self._write(text)
        self._num_shown += len(text)

    def _end(self, completion: Completion) -> None:
        if self._is_terminal and completion.finish in self._ends:
            self._write(f" [{self._ends[completion.finish]}]", dim=True)
        self._write("\n")
        if completion.logprobs is not None:
            from megatron_tokedit.generation.text import token_texts

            texts = token_texts(self._model.tokenizer, completion.prompt.ids, completion.ids)
            for id_, token, logprob in zip(completion.ids, texts, completion.logprobs, strict=True):
                self._write(f"{logprob:10.4f} {math.exp(logprob):8.4f} {id_:8d}  {token!r}\n")

    def _write(self, text: str, *, dim: bool = False) -> None:
        is_dim = dim and self._is_terminal and text
        sys.stdout.write(f"{_DIM}{text}{_PLAIN}" if is_dim else text)
        sys.stdout.flush()
