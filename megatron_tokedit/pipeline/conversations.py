"""From a conversation to ids, and to what each of them is: response or not, counting in the loss or not.

A conversation that is too long is dropped, or loses its oldest exchanges. Turns after the last response teach
nothing and are cut. Invariant: the ids are those of the rendered text, encoded in one go; a token is part of
a response only where all of its characters are the response's own text, and counts in the loss where it ends
in what the model writes itself.

Legend: ``T`` tokens of a conversation, ``M`` of it after edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.corpus import BadRecord, Conversation, Message
from megatron_tokedit.corpus.conversations import ASSISTANT, ROLES, SYSTEM, USER
from megatron_tokedit.edit.lineage import Lineage
from megatron_tokedit.tokenizers import (
    ChatTemplate,
    PlacedIds,
    TemplateError,
    Tokenizer,
    control_pattern,
    encode_rendered,
)
from megatron_tokedit.tokenizers.chat_template import Span

TEMPLATE = "template"
TOKEN_ROLES = (TEMPLATE, *ROLES)
"""What a token can be part of; its number is its place here."""
NO_RESPONSE, TOO_LONG, TOO_LONG_CUT = "no_response", "too_long", "too_long_even_truncated"
"""Why a conversation is dropped."""
_NO_RESPONSE_INDEX = -1


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """A conversation as it is written when it is not edited.

    Attributes:
        text: as rendered.
        ids_T: int32.
        responses_T: int32: the number of the response that a token is of and may be edited in; -1: of none.
        loss_T: bool: whether a token counts in the loss.
        roles_T: uint8: what it is part of, in :data:`TOKEN_ROLES`.
        spelled: control id -> how often a message spelled it, so that it became that token.
        num_responses: turns of the assistant that say something.
        num_cut_before: messages left out at the beginning, as the conversation was too long.
        num_cut_after: messages left out after the last response.
        num_silent: turns of the assistant that say nothing; they do not count in the loss.
        num_empty_prompts: messages of the user that say nothing.
    """

    text: str
    ids_T: npt.NDArray[np.int32]
    responses_T: npt.NDArray[np.int32]
    loss_T: npt.NDArray[np.bool_]
    roles_T: npt.NDArray[np.uint8]
    spelled: dict[int, int] = field(default_factory=dict)
    num_responses: int = 0
    num_cut_before: int = 0
    num_cut_after: int = 0
    num_silent: int = 0
    num_empty_prompts: int = 0

    def responses_of(self, lineage: Lineage) -> npt.NDArray[np.int32]:
        """``responses_T`` of the conversation after edits, int32 ``[M]``."""
        return self.responses_T if lineage.positions_M is None else self.responses_T[lineage.positions_M]

    def roles_of(self, lineage: Lineage) -> npt.NDArray[np.uint8]:
        """``roles_T`` of the conversation after edits, uint8 ``[M]``."""
        return self.roles_T if lineage.positions_M is None else self.roles_T[lineage.positions_M]

    def loss_of(self, lineage: Lineage | None) -> npt.NDArray[np.bool_]:
        """``loss_T`` of the conversation after edits, bool ``[M]``."""
        if lineage is None or lineage.positions_M is None:
            return self.loss_T
        return self.loss_T[lineage.positions_M]


class ConversationEncoder:
    """Renders and encodes conversations.

    Args:
        config: the job.
        tokenizer: its only tokenizer.
        template: its chat template.
        max_tokens: longest conversation; None: no bound.
    """

    def __init__(
        self,
        config: PreprocessConfig,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        max_tokens: int | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._max_tokens = max_tokens
        self._truncates = config.sft_too_long == "truncate"
        self._refuses_spelled = config.special_tokens_in_text == "error"
        self._splits = config.special_tokens_in_text == "split"
        self._control = control_pattern(tokenizer)
        self._is_control_V = np.zeros(tokenizer.vocab_size, bool)
        self._is_control_V[[i for i in tokenizer.special_ids if 0 <= i < tokenizer.vocab_size]] = True

    def encode(self, conversation: Conversation) -> EncodedConversation | str:
        """A conversation as ids, or the reason why it is dropped.

        Raises:
            BadRecord: the template cannot show it, or a message spells a control token where that is an
                error.
        """
        messages = conversation.messages
        spoken = [i for i, each in enumerate(messages) if each.role == ASSISTANT and each.says_something]
        if not spoken:
            return NO_RESPONSE
        if self._refuses_spelled:
            self._refuse_control_tokens(messages)
        kept = messages[: spoken[-1] + 1]
        tools = conversation.tools
        encoded = self._encode(kept, tools)
        num_cut_before = 0
        if self._max_tokens is not None and len(encoded.ids_T) > self._max_tokens:
            if not self._truncates:
                return TOO_LONG
            shorter = self._truncated(kept, tools)
            if shorter is None:
                return TOO_LONG_CUT
            encoded, num_cut_before = shorter
        return replace(encoded, num_cut_before=num_cut_before, num_cut_after=len(messages) - len(kept))

    def _truncated(
        self, messages: Sequence[Message], tools: list[dict[str, object]] | None
    ) -> tuple[EncodedConversation, int] | None:
        """The conversation without as many of its oldest exchanges as must go, and how many messages these
        are; None where the last exchange alone is too long.

        System messages at the beginning stay; what is left begins with a turn of the user.
        """
        assert self._max_tokens is not None
        head = next((i for i, each in enumerate(messages) if each.role != SYSTEM), len(messages))
        last = max(i for i, each in enumerate(messages) if each.role == ASSISTANT and each.says_something)
        begins = [i for i in range(head + 1, last) if messages[i].role == USER]
        low, high = 0, len(begins)  # the answer is in [low, high]; high: even the last exchange is too long
        found: tuple[EncodedConversation, int] | None = None
        while low < high:
            middle = (low + high) // 2
            encoded = self._encode([*messages[:head], *messages[begins[middle] :]], tools)
            if len(encoded.ids_T) <= self._max_tokens:
                found, high = (encoded, begins[middle] - head), middle
            else:
                low = middle + 1
        return found

    def _encode(
        self, messages: Sequence[Message], tools: list[dict[str, object]] | None
    ) -> EncodedConversation:
        try:
            described = [message.to_template() for message in messages]
            rendered = self._template.render(described, tools, self._control)
        except TemplateError as error:
            raise BadRecord(str(error)) from error
        if self._refuses_spelled:
            for start, stop in rendered.spelled:
                self._refuse_control_token(rendered.text[start:stop], "a tool call, a tool or a name")
        placed, spelled = encode_rendered(self._tokenizer, rendered, self._control)
        responses_T = np.full(len(placed.ids_T), _NO_RESPONSE_INDEX, np.int32)
        roles_T = np.zeros(len(placed.ids_T), np.uint8)
        loss_T = np.zeros(len(placed.ids_T), bool)
        is_control_T = self._is_control_V[placed.ids_T]
        is_own_T = is_control_T & ~np.isin(placed.starts_T, [start for start, _ in rendered.spelled])
        num_responses = num_silent = 0
        for index, message in enumerate(messages):
            place = rendered.contents[index]
            inside_T = _inside(placed, place) if place else np.zeros(len(placed.ids_T), bool)
            roles_T[inside_T] = TOKEN_ROLES.index(message.role)
            if message.role != ASSISTANT:
                continue
            if not message.says_something:
                num_silent += 1
                continue
            loss_T |= self._written(placed, rendered.turns[index], place, is_own_T)
            responses_T[inside_T & ~is_control_T] = num_responses
            num_responses += 1
        counts: dict[int, int] = {}
        for id_ in spelled:
            if id_ in self._tokenizer.spellable_ids:
                counts[id_] = counts.get(id_, 0) + 1
        return EncodedConversation(
            rendered.text,
            placed.ids_T,
            responses_T,
            loss_T,
            roles_T,
            counts,
            num_responses=num_responses,
            num_silent=num_silent,
            num_empty_prompts=sum(each.role == USER and not each.says_something for each in messages),
        )

    def _written(
        self, placed: PlacedIds, turn: Span, place: Span | None, is_own_T: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        """The tokens that the model writes itself in a turn: those that end in it.

        Where the template does not say so itself, a turn ends with the template's last control token in it
        (``is_own_T``): the line end that templates put behind it is the beginning of what comes next.
        """
        start, stop = turn
        if not self._template.marks_generation:
            behind_T = is_own_T & (placed.starts_T >= (place[1] if place else start))
            ends = placed.ends_T[behind_T & (placed.ends_T <= stop)]
            stop = int(ends.max()) if len(ends) else stop
        written_T: npt.NDArray[np.bool_] = (placed.ends_T > start) & (placed.ends_T <= stop)
        return written_T

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        for message in messages:
            for match in self._control.finditer(message.content):
                self._refuse_control_token(match[0], f"a message of the role {message.role}")

    def _refuse_control_token(self, token: str, what: str) -> None:
        if self._tokenizer.control_tokens[token] in self._tokenizer.spellable_ids:
            raise BadRecord(
                f"{what} spells the control token {token}; mend it, or give --special-tokens-in-text split "
                "(it becomes ordinary text) or encode (it becomes that token)"
            )


def _inside(placed: PlacedIds, place: Span) -> npt.NDArray[np.bool_]:
    """Tokens all of whose characters are in a place, bool ``[T]``."""
    start, stop = place
    inside_T: npt.NDArray[np.bool_] = (
        (placed.starts_T >= start) & (placed.ends_T <= stop) & (placed.ends_T > placed.starts_T)
    )
    return inside_T


def end_warning(config: PreprocessConfig, tokenizer: Tokenizer, template: ChatTemplate) -> str | None:
    """What to say of a template that ends no response with a control token that counts in the loss."""
    asked, said = Message(USER, "Some question"), Message(ASSISTANT, "Some response")
    encoder = ConversationEncoder(config, tokenizer, template, None)
    for messages in ((asked, said, asked, said), (asked, said)):
        try:
            encoded = encoder.encode(Conversation(messages))
        except BadRecord:  # it takes one exchange only, or none so small
            continue
        assert isinstance(encoded, EncodedConversation)
        learned = encoded.ids_T[encoded.loss_T]
        if np.isin(learned, list(tokenizer.special_ids)).any():
            return None
        text = tokenizer.decode(learned).rpartition(said.content)[2].strip()
        learns = (
            f"learns to write {text!r} there, at which only programs stop that look for it"
            if text
            else "does not learn to stop"
        )
        return (
            f"the chat template {template.name} ends a response with no control token of this tokenizer "
            f"that counts in the loss, so a model trained on it {learns}; take --sft-chat-template tulu or "
            "alpaca, which end it with the tokenizer's own, or give a copy of the template with eos_token "
            "behind the response (inside {% generation %}, where it has that)"
        )
    return None


def first_id(tokenizer: Tokenizer, template: ChatTemplate) -> int | None:
    """The id with which a conversation begins; None where the template does not take a small one."""
    messages = [Message(USER, "a"), Message(ASSISTANT, "b")]
    try:
        rendered = template.render([message.to_template() for message in messages])
    except TemplateError:
        return None
    return int(tokenizer.encode_chat(rendered.text, []).ids_T[0])
