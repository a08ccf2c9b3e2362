"""The prompts of ``tools/generate.py``: texts from the command line, a file or standard input, or, with
``--chat``, conversations.

Invariant: prompts are read as they are needed, and what is no prompt is named by file and line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import orjson

from megatron_tokedit.corpus import BadRecord, Conversation, Message
from megatron_tokedit.corpus.conversations import ASSISTANT, SYSTEM, USER, parse_conversation
from megatron_tokedit.errors import ConfigError, DataFormatError

if TYPE_CHECKING:
    from megatron_tokedit.generation import Chat, Prompt, TextModel


def samples_of(arguments: argparse.Namespace) -> range:
    """Numbers of every prompt's texts."""
    return range(arguments.first_sample, arguments.first_sample + arguments.num_samples)


def read_prompts(model: TextModel, chat: Chat | None, arguments: argparse.Namespace) -> Iterator[Prompt]:
    """The prompts with the numbers of all their texts.

    Args:
        model: that continues them.
        chat: that answers them; None: they are texts.
        arguments: of the command line.

    Raises:
        DataFormatError: a file that cannot be read, or a line that is no prompt.
    """
    from megatron_tokedit.generation import Prompt

    samples = samples_of(arguments)
    if chat is None:
        for text, _ in _given(arguments, _text_of):
            yield Prompt(model.prompt_ids(text, document_start=arguments.document_start), samples, text)
        return
    for conversation, place in _given(arguments, _conversation_of):
        messages = with_system([each.to_template() for each in conversation.messages], arguments.system)
        try:
            yield chat.prompt(messages, conversation.tools, samples)
        except ConfigError as error:
            raise DataFormatError(f"{place}: {error}") from error


def with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """Messages that begin with a system message: their own, or else the one of ``--system``."""
    if system is None or (messages and messages[0]["role"] == SYSTEM):
        return messages
    return [{"role": SYSTEM, "content": system}, *messages]


def _given(arguments: argparse.Namespace, read: Any) -> Iterator[tuple[Any, str]]:
    """What ``read`` makes of every text or JSON line, and where it stands."""
    if arguments.prompt is not None:
        for number, text in enumerate(arguments.prompt):
            yield read(text, None, ""), f"--prompt, text {number}"
    elif arguments.prompt_file is None:
        yield read(sys.stdin.read().removesuffix("\n"), None, ""), "standard input"
    else:
        path = arguments.prompt_file
        key = arguments.json_key if path.endswith(".jsonl") else None
        for number, line in enumerate(_lines_of(path), 1):
            place = f"{path}:{number}"
            yield read(line, key, place), place


def _lines_of(path: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            is_empty = True
            for line in file:
                is_empty = False
                yield line.removesuffix("\n").removesuffix("\r")
        if is_empty:
            raise DataFormatError(f"{path}: is empty; there are no prompts in it")
    except UnicodeDecodeError as error:
        raise DataFormatError(f"{path}: is not UTF-8 text ({error})") from error
    except OSError as error:
        raise DataFormatError(f"{path}: cannot be read: {error.strerror}") from error


def _record_of(line: str, place: str) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataFormatError(f"{place}: is not a JSON object ({error})") from error


def _text_of(given: str, key: str | None, place: str) -> str:
    """A text, or that of a JSON line."""
    if key is None:
        return given
    record = _record_of(given, place)
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str):
        raise DataFormatError(f"{place}: has no text under the key {key!r}; give --json-key")
    return value


def _conversation_of(given: str, key: str | None, place: str) -> Conversation:
    """A text as the only message of a user, or the conversation of a JSON line."""
    if key is not None:
        record = _record_of(given, place)
        if isinstance(record, dict) and ("messages" in record or "conversations" in record):
            try:
                conversation = parse_conversation(record, needs_response=False)
            except BadRecord as error:
                raise DataFormatError(f"{place}: {error}") from error
            if conversation.messages[-1].role == ASSISTANT:
                raise DataFormatError(
                    f"{place}: the last message is the assistant's, so there is nothing to answer; end the "
                    "conversation with a message of the user"
                )
            return conversation
    return Conversation((Message(USER, _text_of(given, key, place)),))
