"""Control tokens that the data of a conversation spells where its contents are not: tool calls, tools, names.

A template writes such strings in its own way (most as JSON), so where they end up is found by marking what
spells a control token and rendering once more. Invariant: marks change nothing but themselves, or the places
are not known; a control token of the template is never taken for one of the data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

_MARKS = 0xF0000
"""First of the private-use characters that mark where a control token begins and ends; two each."""
_MARK = re.compile("[\U000f0000-\U000ffffd]")
_MAX_MARKED = 0x7FFE
Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str | None]


def control_tokens_in(value: Any, control: re.Pattern[str]) -> Iterator[str]:
    """The control tokens that the strings of a value spell, in whatever lists and objects they are."""
    for text in _strings(value):
        yield from control.findall(text)


def find_spelled(
    render: Render,
    messages: Sequence[Mapping[str, Any]],
    tools: list[dict[str, Any]] | None,
    text: str,
    is_placed: Sequence[bool],
    control: re.Pattern[str],
) -> list[tuple[int, int]] | None:
    """Where a rendered conversation has control tokens that are the data's.

    Args:
        render: messages and tools as text; None: they cannot be shown.
        messages: of the conversation.
        tools: of it.
        text: what they are rendered as.
        is_placed: whether it is known where a message's content is; what that spells is left out.
        control: the control tokens.

    Returns:
        Places in ascending order; None where they cannot be found.
    """
    looked_at = [_without_placed(*pair) for pair in zip(messages, is_placed, strict=True)]
    if next(control_tokens_in([looked_at, tools], control), None) is None:
        return []
    if any(map(_MARK.search, _strings([*messages, tools]))):
        return None
    numbers = count()
    marked = [
        {**message, **_marked(part, control, numbers)}
        for message, part in zip(messages, looked_at, strict=True)
    ]
    marked_tools = _marked(tools, control, numbers)
    if next(numbers) > _MAX_MARKED:
        return None
    marked_text = render(marked, marked_tools)
    return None if marked_text is None else _places(marked_text, text, control)


def _without_placed(message: Mapping[str, Any], is_placed: bool) -> dict[str, Any]:
    """What of a message is to be looked at."""
    names = {"role", "content"} if is_placed else {"role"}
    return {name: value for name, value in message.items() if name not in names}


def _places(marked_text: str, text: str, control: re.Pattern[str]) -> list[tuple[int, int]] | None:
    """The places of whole control tokens between their marks; None where marks changed more."""
    pieces = _MARK.split(marked_text)
    marks = [*map(ord, _MARK.findall(marked_text)), 0]
    if "".join(pieces) != text:
        return None
    places = []
    position, begun = 0, 0
    for piece, mark in zip(pieces, marks, strict=True):
        is_whole = begun and mark == begun + 1 and control.fullmatch(piece)
        if is_whole:
            places.append((position, position + len(piece)))
        position += len(piece)
        begun = mark if mark and (mark - _MARKS) % 2 == 0 else 0
    return places


def _strings(value: Any) -> Iterator[str]:
    """All strings of a value, the names of an object's fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _strings(name)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _marked(value: Any, control: re.Pattern[str], numbers: Iterator[int]) -> Any:
    """A value with marks around each control token that it spells."""

    def mark(match: re.Match[str]) -> str:
        number = _MARKS + 2 * min(next(numbers), _MAX_MARKED)
        return f"{chr(number)}{match[0]}{chr(number + 1)}"

    if isinstance(value, str):
        return control.sub(mark, value)
    if isinstance(value, Mapping):
        return {
            _marked(name, control, numbers): _marked(inner, control, numbers) for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_marked(inner, control, numbers) for inner in value]
    return value
