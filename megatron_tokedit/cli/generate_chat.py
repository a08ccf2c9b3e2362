"""``tools/generate.py --chat`` on a terminal: a conversation in the model's own chat template.

Invariant: the conversation that the model sees is the one on the screen: a reply that was not finished, or
messages that no longer fit, are out of it, and that is said.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_tokedit.cli.generate_prompts import with_system
from megatron_tokedit.cli.generate_screen import ENDS, Screen
from megatron_tokedit.cli.generate_talk import ask, obey
from megatron_tokedit.errors import TokeditError

if TYPE_CHECKING:
    from megatron_tokedit.generation import Chat, Completion, GenerationSettings

_HELP = """\
A line is a message; \\n in it is a line break.
  :reset            begin a new conversation
  :again            another reply to the last message
  :system TEXT      the system message from now on; without TEXT: none
  :set NAME VALUE   max_new_tokens, temperature, top_k, top_p or seed; VALUE none: no top_k, top_p
  :show             the settings
  :help             this
  :quit             or Ctrl-D; Ctrl-C ends a reply
"""
_ENDS = {finish: text for finish, text in ENDS.items() if finish in ("length", "context")}


def converse(chat: Chat, settings: GenerationSettings, *, system: str | None = None) -> None:
    """Answer messages until there are no more.

    Args:
        chat: who answers.
        settings: how.
        system: the system message.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() a line that can be edited, and a history

    sys.stderr.write(_HELP)
    conversation = _Conversation(chat, system)
    while (line := ask()) is not None and line != ":quit":
        word, _, rest = line.partition(" ")
        if word == ":reset":
            conversation.messages.clear()
            sys.stderr.write("(a new conversation)\n")
        elif word == ":system":
            conversation.system = rest.replace("\\n", "\n") or None
        elif word == ":again":
            conversation.answer_again(settings)
        elif line.startswith(":"):
            settings = obey(line, settings, _HELP)
        elif line.strip():
            conversation.answer(line.replace("\\n", "\n"), settings)


class _Conversation:
    """What was said so far; every reply is a sample of its own."""

    def __init__(self, chat: Chat, system: str | None) -> None:
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self._chat = chat
        self._next_sample = 0

    def answer(self, text: str, settings: GenerationSettings) -> None:
        """Add a message of the user and the model's reply, or neither where there is none."""
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            reply, num_left_out = self._reply(asked, settings)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            sys.stderr.write("(the message and what there is of a reply are left out)\n")
        except TokeditError as error:
            sys.stderr.write(f"{error}\n")
        else:
            self.messages = [*asked[num_left_out:], reply]

    def answer_again(self, settings: GenerationSettings) -> None:
        """Replace the last reply by another one."""
        if not self.messages:
            sys.stderr.write("there is no message to answer yet\n")
            return
        before = self.messages
        self.messages = before[:-2]
        self.answer(before[-2]["content"], settings)
        if len(self.messages) < 2:
            self.messages = before

    def _reply(self, asked: list[dict[str, Any]], settings: GenerationSettings) -> tuple[dict[str, Any], int]:
        """The model's reply, shown while it is written, and how many of the oldest messages are left out."""
        from megatron_tokedit.generation import generate

        chat = self._chat
        prompt, num_left_out = chat.shortened(with_system(asked, self.system), settings.max_new_tokens)
        if num_left_out:
            sys.stderr.write(
                f"(the oldest {num_left_out} messages are left out: the model takes "
                f"{chat.model.max_positions} tokens)\n"
            )
        samples = range(self._next_sample, self._next_sample + 1)
        self._next_sample += 1
        screen = Screen(chat.model, samples, has_headings=False, shows_prompts=False, ends=_ENDS)
        on_text = screen.add if sys.stdout.isatty() else None
        written: list[Completion] = list(
            screen.show(
                generate(
                    chat.model, [replace(prompt, samples=samples)], chat.settings(settings), on_text=on_text
                )
            )
        )
        return chat.reply(written[0]), num_left_out
