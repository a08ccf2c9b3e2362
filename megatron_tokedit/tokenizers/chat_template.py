"""Chat templates: from the messages of a conversation to its text, and where in it the responses stand.

The rendering is transformers' own, so the text is that of ``tokenizer.apply_chat_template``. Which characters
a model writes itself (the response and what ends it) is what the template marks with ``{% generation %}``;
where it marks nothing, a turn of the assistant is what is there with it and not before it, which must be a
continuation of what was there before.

Invariant: every message is in the text, or there is an error that names the template and the role; a template
that rewrites earlier turns is refused, since what a model would have to write is then not what stands there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_tokedit.tokenizers.chat_spelled import find_spelled

Span = tuple[int, int]
"""First character, and one past the last."""
TEMPLATE_NAMES = ("alpaca", "chatml", "llama3", "tulu")
"""Templates that are shipped."""
ASSISTANT = "assistant"
_MARKS = 0xF0000
"""First of the private-use characters that mark where a message begins and ends; two a message."""
_MAX_MARKED = 0x7FFE
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateError(Exception):
    """A template cannot show a conversation; the message says why."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: all of it.
        contents: for every message the place of its content, without white space at its ends; None where that
            is empty or the template writes it in another form.
        turns: for every message of the assistant, by its index, the characters that the model writes itself:
            the response and what ends it.
        spelled: control tokens that the data spells elsewhere than in ``contents``: in tool calls, tools,
            names.
    """

    text: str
    contents: list[Span | None]
    turns: dict[int, Span]
    spelled: list[Span]


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and the special tokens that it can refer to.

    Attributes:
        name: ``tokenizer``, that of a shipped one, or a file.
        source: Jinja text.
        special_tokens: ``bos_token``, ... -> text.
    """

    name: str
    source: str
    special_tokens: Mapping[str, str]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        control: re.Pattern[str] | None = None,
    ) -> Rendered:
        """The text of a conversation, and where its contents and the assistant's turns are.

        Args:
            messages: ``role``, ``content`` and what else the template knows.
            tools: JSON schemas.
            control: the control tokens, to find those that the data spells outside of contents.

        Raises:
            TemplateError: the template refuses or drops a role, or rewrites a turn when another follows; or
                its control tokens cannot be told from those that the data spells.
        """
        text, blocks = self._text(messages, tools, tracks=self.marks_generation)
        contents = self._contents(messages, tools, text)
        self._refuse_dropped(messages, tools, text, contents)
        if self.marks_generation:
            turns = self._marked_turns(messages, contents, blocks)
        else:
            turns = {
                index: self._turn(messages, tools, index, text, contents[index])
                for index, message in enumerate(messages)
                if message["role"] == ASSISTANT
            }
        for index, (start, stop) in turns.items():
            place = contents[index]
            if messages[index]["content"].strip() and place is None:
                place = _found(text, messages[index]["content"].strip(), start, stop)
                contents[index] = place
            if place is not None and not (start <= place[0] and place[1] <= stop):
                raise self._error(f"the turn {index} of the assistant is not where its text is")
            if messages[index]["content"].strip() and place is None:
                raise self._error(f"changes the text of the assistant's turn {index}")
        return Rendered(text, contents, turns, self._spelled(messages, tools, text, contents, control))

    def render_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        control: re.Pattern[str] | None = None,
    ) -> Rendered:
        """The text of a conversation up to where the assistant is to write; the turns are not looked for.

        Args:
            messages: as in :meth:`render`.
            tools: JSON schemas.
            control: as in :meth:`render`.

        Raises:
            TemplateError: as in :meth:`render`, or the template writes the conversation differently where a
                response is to follow.
        """
        before, text = self.text(messages, tools), self.text(messages, tools, prompts=True)
        if not text.startswith(before):
            raise self._error("writes a conversation differently where a response is to follow")
        contents = self._contents(messages, tools, before)
        self._refuse_dropped(messages, tools, before, contents)
        return Rendered(text, contents, {}, self._spelled(messages, tools, before, contents, control))

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        prompts: bool = False,
    ) -> str:
        """What the template makes of messages; with ``prompts`` up to where a response begins.

        Raises:
            TemplateError: the template raises.
        """
        return self._text(messages, tools, prompts=prompts)[0]

    def generation_blocks(self, messages: Sequence[Mapping[str, Any]]) -> list[Span]:
        """The places that the template marks as generated.

        Raises:
            TemplateError: the template raises.
        """
        return self._text(messages, None, tracks=True)[1]

    @cached_property
    def marks_generation(self) -> bool:
        """Whether the template itself says what the model writes."""
        return _GENERATION.search(self.source) is not None

    def _text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        prompts: bool = False,
        tracks: bool = False,
    ) -> tuple[str, list[Span]]:
        """What transformers makes of messages; with ``tracks`` also the places of generation blocks.

        Raises:
            TemplateError: the template raises.
        """
        from transformers.utils.chat_template_utils import render_jinja_template  # takes a second

        try:
            texts, blocks = render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=tracks,
                add_generation_prompt=prompts,
                **self.special_tokens,
            )
        except Exception as error:  # whatever a template does: raise_exception, a missing field, a wrong type
            raise self._error(
                f"refuses a conversation of {', '.join(str(each['role']) for each in messages[:6])}"
                f"{', ...' if len(messages) > 6 else ''}: {error}"
            ) from error
        return texts[0], [(int(start), int(stop)) for start, stop in blocks[0]] if blocks else []

    def _error(self, what: str) -> TemplateError:
        return TemplateError(f"the chat template {self.name} {what}")

    def _contents(
        self, messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]] | None, text: str
    ) -> list[Span | None]:
        """Where the contents are, found by marking them; None where marks would change the rest."""
        places: list[Span | None] = [None] * len(messages)
        joined = "".join(str(message["content"]) for message in messages)
        if len(messages) > _MAX_MARKED or re.search("[\U000f0000-\U000ffffd]", joined):
            return places
        marked = [
            {**message, "content": _marked(message["content"], index)}
            for index, message in enumerate(messages)
        ]
        try:
            marked_text, _ = self._text(marked, tools)
        except TemplateError:
            return places
        pieces = re.split("([\U000f0000-\U000ffffd])", marked_text)
        if "".join(pieces[::2]) != text:
            return places
        position, begins = 0, dict[int, int]()
        for piece, mark in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
            position += len(piece)
            index, is_end = divmod(ord(mark) - _MARKS, 2) if mark else (-1, 0)
            if mark and not is_end:
                begins[index] = position
            elif mark and index in begins:
                places[index] = (begins.pop(index), position)
        return places

    def _spelled(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None,
        text: str,
        contents: Sequence[Span | None],
        control: re.Pattern[str] | None,
    ) -> list[Span]:
        """Where control tokens are that the data spells outside of ``contents``.

        Raises:
            TemplateError: they cannot be told from the template's own.
        """
        if control is None:
            return []

        def render(marked: list[dict[str, Any]], marked_tools: list[dict[str, Any]] | None) -> str | None:
            try:
                return self._text(marked, marked_tools)[0]
            except TemplateError:
                return None

        is_placed = [place is not None for place in contents]
        nowhere = [False] * len(messages)  # a template may write a content twice, and one place is known
        found = find_spelled(render, messages, tools, text, nowhere, control)
        if found is None:
            found = find_spelled(render, messages, tools, text, is_placed, control)
        if found is None:
            raise self._error(
                "writes control tokens that the conversation spells (in a tool call, a tool, a name, ...) in "
                "such a form that they cannot be told from its own; take them out of the conversation"
            )
        places = [place for place in contents if place]
        return [(i, j) for i, j in found if not any(start <= i and j <= stop for start, stop in places)]

    def _refuse_dropped(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None,
        text: str,
        contents: Sequence[Span | None],
    ) -> None:
        """Refuse a template that leaves out a message, a tool call or the tools.

        Raises:
            TemplateError: it does.
        """
        for index, message in enumerate(messages):
            if message["content"].strip() and contents[index] is None:  # its text may stand elsewhere
                self._refuse_without_effect(messages, tools, text, index, "content")
            if message.get("tool_calls"):
                self._refuse_without_effect(messages, tools, text, index, "tool_calls")
        if tools and self._text(messages, None)[0] == text:
            raise self._error("does not show the tools of the conversation")

    def _refuse_without_effect(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None,
        text: str,
        index: int,
        name: str,
    ) -> None:
        """Refuse a template that writes the same whatever a field of a message holds."""
        other = dict(messages[index])
        if name == "content":
            other[name] = other[name] + " x"
        else:
            del other[name]
        changed = [*messages[:index], other, *messages[index + 1 :]]
        if self._text(changed, tools)[0] == text:
            role = messages[index]["role"]
            what = "tool calls" if name == "tool_calls" else "messages"
            raise self._error(f"does not show {what} of the role {role} (message {index})")

    def _marked_turns(
        self,
        messages: Sequence[Mapping[str, Any]],
        contents: Sequence[Span | None],
        blocks: Sequence[Span],
    ) -> dict[int, Span]:
        """The turns that the template marks as generated."""
        asked = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
        if len(blocks) != len(asked):
            raise self._error(f"marks {len(blocks)} generations in {len(asked)} turns of the assistant")
        return dict(zip(asked, blocks, strict=True))

    def _turn(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None,
        index: int,
        text: str,
        content: Span | None,
    ) -> Span:
        """The turn of the assistant at ``index``: what it adds to the conversation before it.

        Raises:
            TemplateError: the conversation before it, or with it, is not how the whole one begins.
        """
        before, prompt = self._before(messages[:index], tools)
        after = text if index + 1 == len(messages) else self._text(messages[: index + 1], tools)[0]
        if not (text.startswith(before) and text.startswith(after)):
            raise self._error(
                f"writes earlier turns differently when more follow (turn {index}, of the assistant), so "
                "what the model learns to write there is not what it is given later; take another template"
            )
        if prompt != before and text.startswith(prompt):
            start = len(prompt)
        elif content is not None and not messages[index].get("tool_calls"):
            start = content[0]  # no prompt for a response: what stands before it is the template's
        else:
            start = len(before)
        return start, len(after)

    def _before(
        self, messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[str, str]:
        """The conversation before a turn, without and with the prompt for a response."""
        try:
            return self._text(messages, tools)[0], self._text(messages, tools, prompts=True)[0]
        except TemplateError:
            if messages:
                raise
            return "", ""


def _marked(content: str, index: int) -> str:
    """A content with a mark before and after its text; white space at its ends stays outside."""
    core = content.strip()
    if not core:
        return content
    start = content.index(core)
    begin, end = chr(_MARKS + 2 * index), chr(_MARKS + 2 * index + 1)
    return f"{content[:start]}{begin}{core}{end}{content[start + len(core) :]}"


def _found(text: str, core: str, start: int, stop: int) -> Span | None:
    """The last place of a text between two bounds."""
    place = text.rfind(core, start, stop)
    return None if place < 0 else (place, place + len(core))
