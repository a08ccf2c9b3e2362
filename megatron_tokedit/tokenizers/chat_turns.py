"""Where the text of a chat meets its ids: control tokens that its data spells, and what ends a response.

Invariant: a conversation that is to be answered gets the ids with which a conversation to learn from begins;
both are made by :func:`encode_rendered`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_tokedit.tokenizers.base import PlacedIds, Tokenizer
from megatron_tokedit.tokenizers.chat_template import ASSISTANT, ChatTemplate, Rendered, TemplateError

_ASKED, _SAID, _NEXT = "First question", "Some response", "Second question"


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """What a template writes behind a response.

    Attributes:
        id: the first control token there; None where there is none before the next message.
        texts: what ends a response where no control token does.
        before_id: text between a response and that control token, which is not the response's.
    """

    id: int | None
    texts: tuple[str, ...]
    before_id: str


def control_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """The control tokens as text, the longest first."""
    tokens = sorted(tokenizer.control_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def encode_rendered(
    tokenizer: Tokenizer, rendered: Rendered, control: re.Pattern[str]
) -> tuple[PlacedIds, list[int]]:
    """The ids of a conversation, and the control ids that its data, not the template, spells.

    Args:
        tokenizer: of the ids.
        rendered: by the template, with the same ``control``.
        control: :func:`control_pattern` of the tokenizer.
    """
    spans = list(rendered.spelled)
    for place in filter(None, rendered.contents):
        spans += [match.span() for match in control.finditer(rendered.text, *place)]
    spans.sort()
    spelled = [tokenizer.control_tokens[rendered.text[slice(*span)]] for span in spans]
    return tokenizer.encode_chat(rendered.text, spans), spelled


def turn_end(template: ChatTemplate, tokenizer: Tokenizer) -> TurnEnd:
    """What ends a response in a template, found by having it write one.

    Raises:
        TemplateError: the template refuses a question with a response, or does not show them.
    """
    answered = [{"role": "user", "content": _ASKED}, {"role": ASSISTANT, "content": _SAID}]
    asked = [*answered, {"role": "user", "content": _NEXT}]
    alone = template.text(answered)
    try:
        text = template.text(asked)
    except TemplateError:  # one exchange is all that it takes
        asked, text = answered, alone
    begin = text.find(_SAID)
    if begin < 0:
        raise TemplateError(f"the chat template {template.name} does not show what the assistant says")
    begin += len(_SAID)
    if template.marks_generation and (blocks := template.generation_blocks(asked)):
        written = blocks[0][1]
    else:
        written = _num_shared(alone, text)
    after = text.find(_NEXT, begin) if asked is not answered else len(text)
    placed = tokenizer.encode_chat(text, [])
    controls = [
        (int(start), int(id_))
        for start, id_ in zip(placed.starts_T, placed.ids_T, strict=True)
        if int(id_) in tokenizer.special_ids and begin <= start < after
    ]
    first, id_ = controls[0] if controls else (after, None)
    if controls and first < max(written, begin + 1):
        return TurnEnd(id_, (), text[begin:first])
    # the model learns to write text there, or what comes next, whose line ends alone say nothing
    ending = text[begin:written].rstrip() or text[begin:first].rstrip()
    return TurnEnd(id_, (ending,) if ending else (), text[begin:first])


def _num_shared(left: str, right: str) -> int:
    """Characters that two texts have in common at the beginning."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(left), len(right)))
