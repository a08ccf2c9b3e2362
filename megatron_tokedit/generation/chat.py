"""Talking to a model: a conversation as a prompt, and the model's reply as a message of it.

Invariant: the ids of a prompt are those with which a conversation begins that a model is fine-tuned on: what
the chat template writes and nothing before it; a reply ends where the template ends one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_tokedit.errors import ConfigError, TokenizerError
from megatron_tokedit.generation.generate import Completion, Prompt
from megatron_tokedit.generation.load import TextModel
from megatron_tokedit.generation.settings import GenerationSettings
from megatron_tokedit.log import get_logger
from megatron_tokedit.tokenizers import (
    ChatTemplate,
    TemplateError,
    control_pattern,
    encode_rendered,
    load_chat_template,
    turn_end,
)
from megatron_tokedit.tokenizers.chat_template import TEMPLATE_NAMES

logger = get_logger(__name__)

Message = dict[str, Any]
"""``role``, ``content`` and what else a template knows."""


@dataclass(frozen=True, slots=True)
class ChatPrompt(Prompt):
    """A conversation that is to be answered; ``text`` is what the template makes of it.

    Attributes:
        messages: all of them.
        tools: JSON schemas.
    """

    messages: Sequence[Message] = ()
    tools: list[dict[str, Any]] | None = None


class Chat:
    """A model and the template in which it is talked to.

    Args:
        model: the model.
        template: in which it was taught to answer.

    Attributes:
        model: the same, ending a text where the template ends a reply.
        template: as given.

    Raises:
        TokenizerError: the template cannot show a question with a reply.
    """

    def __init__(self, model: TextModel, template: ChatTemplate) -> None:
        try:
            self._end = turn_end(template, model.tokenizer)
        except TemplateError as error:
            raise TokenizerError(str(error)) from error
        ends = set() if self._end.id is None else {self._end.id}
        self.model = replace(model, stop_ids=model.stop_ids | ends)
        self.template = template
        self._control = control_pattern(model.tokenizer)

    def prompt(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        samples: range = range(1),
    ) -> ChatPrompt:
        """A conversation as a prompt.

        Args:
            messages: the last one is not the assistant's.
            tools: JSON schemas.
            samples: numbers of the replies.

        Raises:
            ConfigError: the template cannot show it, or it is not Unicode.
        """
        try:
            rendered = self.template.render_prompt(messages, tools, self._control)
        except TemplateError as error:
            raise ConfigError(f"{error}; take another --chat-template") from error
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:  # Python keeps such bytes of its arguments as lone surrogates
            raise ConfigError(f"the conversation is not UTF-8 text ({error.reason})") from error
        placed, _ = encode_rendered(self.model.tokenizer, rendered, self._control)
        return ChatPrompt(placed.ids_T.tolist(), samples, rendered.text, tuple(messages), tools)

    def settings(self, settings: GenerationSettings) -> GenerationSettings:
        """The settings with what ends a reply where no token does."""
        return replace(settings, stop_texts=(*settings.stop_texts, *self._end.texts))

    def reply(self, completion: Completion) -> Message:
        """A completion as a message of the assistant."""
        text = completion.text
        if completion.finish == "eod":
            text = text.removesuffix(self._end.before_id)
        return {"role": "assistant", "content": text}

    def shortened(self, messages: Sequence[Message], max_new_tokens: int) -> tuple[ChatPrompt, int]:
        """A conversation as a prompt that leaves room for a reply, without as many of its oldest exchanges as
        must go.

        System messages at the beginning stay, and so does the last exchange whatever its length. Half of the
        model's context is always room enough.

        Args:
            messages: the last one is the user's.
            max_new_tokens: that a reply may have.

        Returns:
            The prompt, and how many messages are left out.

        Raises:
            ConfigError: the template cannot show it.
        """
        limit = self.model.max_positions - min(max_new_tokens, self.model.max_positions // 2)
        head = next((i for i, each in enumerate(messages) if each["role"] != "system"), len(messages))
        begins = [head, *(i for i in range(head + 1, len(messages)) if messages[i]["role"] == "user")]
        for begin in begins:
            prompt = self.prompt([*messages[:head], *messages[begin:]])
            if len(prompt.ids) <= limit or begin == begins[-1]:
                return prompt, begin - head
        raise AssertionError("a conversation has a last exchange")


def open_chat(model: TextModel, chat_template: str | None = None) -> Chat:
    """A model with the chat template that it was taught, or another one.

    Args:
        model: from :func:`~megatron_tokedit.generation.load.load_text_model`.
        chat_template: name of a shipped one, or a file; None: the model's.

    Raises:
        TokenizerError: the model has none, or it cannot be used.
    """
    if chat_template is None and model.chat_template is None:
        raise TokenizerError(
            f"{model.path}: records no chat template and its tokenizer has none, as the model was not "
            "fine-tuned on conversations (stage sft); to talk to it all the same, give --chat-template with "
            f"one of {', '.join(TEMPLATE_NAMES)}, or with a Jinja file"
        )
    tokenizer = model.tokenizer
    template = load_chat_template(
        chat_template,
        model.chat_template,
        tokenizer.special_tokens,
        tokenizer.tokenizer_model,
        flag="--chat-template",
    )
    if chat_template is None:
        return Chat(model, replace(template, name=model.chat_template_name))
    if model.chat_template not in (None, template.source):
        logger.warning(
            "%s was taught another chat template (%s) than --chat-template %s",
            model.path, model.chat_template_name, chat_template,
        )  # fmt: skip
    return Chat(model, template)
