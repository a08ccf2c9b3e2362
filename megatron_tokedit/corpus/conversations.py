"""From a record to a conversation: the layouts in which people keep instruction data.

    messages         {"messages": [{"role": "user", "content": "..."}, ...]}, also with tools and tool calls
    sharegpt         {"conversations": [{"from": "human", "value": "..."}, ...]}
    alpaca           {"instruction": "...", "input": "...", "output": "..."}
    self_instruct    {"instruction": "...", "instances": [{"input": "...", "output": "..."}]}
    prompt_response  {"prompt": "...", "response": "..."}, and the names in ``_PAIRS``

Invariant: a record is a whole conversation with at least one message of the assistant, or a
:class:`BadRecord` that says why not; no message is left out, and no text is changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_tokedit.corpus.records import BadRecord, json_type

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
ROLES = (SYSTEM, USER, ASSISTANT, TOOL)
LAYOUTS = ("messages", "sharegpt", "alpaca", "self_instruct", "prompt_response")
PARTS = ("messages", "tools", "system", "prompt", "input", "response")
"""Parts of a conversation that can be given a key."""
_ROLE_OF_NAME = {
    **{role: role for role in ROLES},
    "human": USER,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "model": ASSISTANT,
    "developer": SYSTEM,
    "function": TOOL,
    "observation": TOOL,
}
_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("instruction", "response"),
)
_KEPT_FIELDS = ("name", "tool_calls", "tool_call_id", "reasoning_content")
"""Fields of a message besides role and content that chat templates know."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: one of :data:`ROLES`.
        content: its text; empty where the turn is a tool call only.
        fields: what else chat templates know of: ``tool_calls``, ``name``, ...
    """

    role: str
    content: str
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def says_something(self) -> bool:
        """Whether there is text or a tool call."""
        return bool(self.content.strip() or self.fields.get("tool_calls"))

    def to_template(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        return {"role": self.role, "content": self.content, **self.fields}


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of a conversation.

    Attributes:
        messages: at least one, of which one is the assistant's unless it is to be answered.
        tools: descriptions of the tools, as JSON schemas; None where there are none.
    """

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None = None


def parse_conversation(
    record: Mapping[str, Any],
    layout: str = "auto",
    keys: Mapping[str, str] | None = None,
    *,
    needs_response: bool = True,
) -> Conversation:
    """The conversation of a record.

    Args:
        record: a JSON object, or a row of a table.
        layout: one of :data:`LAYOUTS`; ``auto``: told by the record's keys.
        keys: part of a conversation (:data:`PARTS`) -> the key that holds it, instead of a layout.
        needs_response: refuse one without a message of the assistant; False: for one that is to be answered.

    Raises:
        BadRecord: it is none of the layout, a role is unknown, a text is no string, or nobody responds.
    """
    if keys:
        read: Callable[[Mapping[str, Any]], list[Message]] = _KeyReader(keys)
    else:
        read = _READERS[_layout_of(record) if layout == "auto" else layout]
    messages = read(record)
    if needs_response and all(message.role != ASSISTANT for message in messages):
        raise BadRecord("the conversation has no message of the assistant, so there is nothing to learn")
    return Conversation(tuple(messages), _tools(record, (keys or {}).get("tools", "tools")))


def num_utf8_bytes(conversation: Conversation) -> int:
    """UTF-8 bytes of all contents.

    Raises:
        BadRecord: a text holds half of a surrogate pair, be it in a content, a tool call or a tool.
    """
    try:
        others = [message.fields for message in conversation.messages if message.fields]
        if others or conversation.tools:
            json.dumps([others, conversation.tools], ensure_ascii=False, default=str).encode()
        return sum(len(message.content.encode()) for message in conversation.messages)
    except UnicodeEncodeError as error:
        raise BadRecord(f"the text holds half of a surrogate pair (character {error.start})") from error


def wanted_keys(keys: Mapping[str, str] | None) -> frozenset[str]:
    """Keys that a reader may look at: the columns to read of a table."""
    if keys:
        return frozenset({"tools", *keys.values()})
    pairs = {key for pair in _PAIRS for key in pair}
    fields = ("messages", "conversations", "instruction", "input", "output", "instances", "history")
    return frozenset({*fields, *pairs, "system", "tools"})


def _layout_of(record: Mapping[str, Any]) -> str:
    """Which layout a record's keys are of."""
    has = {key for key, value in record.items() if value is not None}
    if "messages" in has:
        return "messages"
    if "conversations" in has:
        return "sharegpt"
    if {"instruction", "output"} <= has:
        return "alpaca"
    if {"instruction", "instances"} <= has:
        return "self_instruct"
    if any({prompt, response} <= has for prompt, response in _PAIRS):
        return "prompt_response"
    present = ", ".join(repr(name) for name in list(record)[:8]) or "none"
    raise BadRecord(
        f"no known layout of a conversation; keys of this line: {present}; name them, for example "
        "--sft-keys prompt=KEY response=KEY"
    )


def _messages(record: Mapping[str, Any]) -> list[Message]:
    return _system(record, "system") + _turns(record, "messages")


def _sharegpt(record: Mapping[str, Any]) -> list[Message]:
    return _system(record, "system") + _turns(record, "conversations")


def _alpaca(record: Mapping[str, Any]) -> list[Message]:
    before = [message for pair in _history(record) for message in pair]
    prompt = _joined(_text(record, "instruction"), _optional(record, "input"))
    exchange = [Message(USER, prompt), Message(ASSISTANT, _text(record, "output"))]
    return _system(record, "system") + before + exchange


def _self_instruct(record: Mapping[str, Any]) -> list[Message]:
    instances = record.get("instances")
    if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
        number = len(instances) if isinstance(instances, list) else json_type(instances)
        raise BadRecord(f"'instances' must be a list of one object, got {number}; write a line for each")
    prompt = _joined(_text(record, "instruction"), _optional(instances[0], "input"))
    return [Message(USER, prompt), Message(ASSISTANT, _text(instances[0], "output"))]


def _prompt_response(record: Mapping[str, Any]) -> list[Message]:
    prompt, response = next(
        (pair for pair in _PAIRS if all(record.get(key) is not None for key in pair)), _PAIRS[0]
    )
    exchange = [Message(USER, _text(record, prompt)), Message(ASSISTANT, _text(record, response))]
    return _system(record, "system") + exchange


_READERS: dict[str, Callable[[Mapping[str, Any]], list[Message]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "self_instruct": _self_instruct,
    "prompt_response": _prompt_response,
}


@dataclass(frozen=True, slots=True)
class _KeyReader:
    """Reads a record by the keys that the user named."""

    keys: Mapping[str, str]

    def __call__(self, record: Mapping[str, Any]) -> list[Message]:
        keys = self.keys
        system = _system(record, keys["system"]) if "system" in keys else []
        if "messages" in keys:
            return system + _turns(record, keys["messages"])
        prompt = _text(record, keys["prompt"])
        if "input" in keys:
            prompt = _joined(prompt, _optional(record, keys["input"]))
        return [*system, Message(USER, prompt), Message(ASSISTANT, _text(record, keys["response"]))]


def _turns(record: Mapping[str, Any], key: str) -> list[Message]:
    """A list of turns, each with ``role`` and ``content`` or with ``from`` and ``value``."""
    turns = record.get(key)
    if key not in record:
        present = ", ".join(repr(name) for name in list(record)[:8]) or "none"
        raise BadRecord(f"key {key!r} is missing; keys of this line: {present}")
    if not isinstance(turns, list):
        raise BadRecord(f"{key!r} must be a list of messages, got {json_type(turns)}")
    if not turns:
        raise BadRecord(f"{key!r} is empty")
    return [_turn(turn, f"{key}[{index}]") for index, turn in enumerate(turns)]


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRecord(f"{where} must be an object, got {json_type(turn)}")
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    name = turn.get(role_key)
    role = _ROLE_OF_NAME.get(name) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(_ROLE_OF_NAME)
        raise BadRecord(f"{where}: {role_key!r} is {name!r}; known roles are {known}")
    fields = {key: turn[key] for key in _KEPT_FIELDS if turn.get(key) is not None}
    content = turn.get(text_key)
    if content is None and fields.get("tool_calls"):
        return Message(role, "", fields)
    return Message(role, _content(content, f"{where}: {text_key!r}"), fields)


def _content(value: Any, where: str) -> str:
    """A text, or the texts of a list of parts one after the other."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRecord(f"{where} must be a string, got {json_type(value)}")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, dict) else json_type(part)
            raise BadRecord(f"{where} has a part of type {kind!r}; only text can be learned from")
        texts.append(_text(part, "text"))
    return "".join(texts)


def _history(record: Mapping[str, Any]) -> list[tuple[Message, Message]]:
    """Earlier exchanges of an Alpaca record: pairs of prompt and response."""
    history = record.get("history") or []
    if not isinstance(history, list):
        raise BadRecord(f"'history' must be a list of pairs, got {json_type(history)}")
    for pair in history:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRecord("'history' must be a list of pairs of strings")
    return [(Message(USER, prompt), Message(ASSISTANT, response)) for prompt, response in history]


def _system(record: Mapping[str, Any], key: str) -> list[Message]:
    text = _optional(record, key)
    return [Message(SYSTEM, text)] if text else []


def _text(record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        present = ", ".join(repr(name) for name in list(record)[:8]) or "none"
        raise BadRecord(f"key {key!r} is missing; keys of this line: {present}")
    value = record[key]
    if not isinstance(value, str):
        raise BadRecord(f"{key!r} must be a string, got {json_type(value)}")
    return value


def _optional(record: Mapping[str, Any], key: str) -> str:
    return _text(record, key) if record.get(key) is not None else ""


def _joined(instruction: str, given: str) -> str:
    """An instruction and its input, as a user would write them: with an empty line between."""
    return f"{instruction}\n\n{given}" if given.strip() else instruction


def _tools(record: Mapping[str, Any], key: str) -> list[dict[str, Any]] | None:
    """Descriptions of the tools: a list of objects, or such a list as JSON in a string."""
    tools: Any = record.get(key)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRecord(f"{key!r} is a string that is not valid JSON: {error}") from error
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord(f"{key!r} must be a list of objects, got {json_type(tools)}")
    return list(tools)
