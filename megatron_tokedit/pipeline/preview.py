"""One conversation as a model will see it, for a person to look at before anything is spent.

Invariant: what is shown went the same way as in the job; characters that count in the loss are between
``>>>`` and ``<<<``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise

import numpy as np

from megatron_tokedit.config.preprocess import SFT_KEY, PreprocessConfig
from megatron_tokedit.pipeline.conversations import EncodedConversation, end_warning
from megatron_tokedit.pipeline.groups import GroupReader
from megatron_tokedit.pipeline.plan import Plan
from megatron_tokedit.pipeline.resources import JobTokenizers, PriorPlan, conversation_limit
from megatron_tokedit.pipeline.results import Stopwatch, UnitResult
from megatron_tokedit.tokenizers import Tokenizer

_MAX_CHARACTERS = 1500


def preview(
    config: PreprocessConfig, tokenizers: JobTokenizers, prior: PriorPlan | None, plan: Plan
) -> list[str]:
    """Lines that show the template and the first conversation.

    Raises:
        DataFormatError: a file cannot be read, or has too many bad lines.
    """
    template = tokenizers.template
    assert template is not None
    limit = conversation_limit(config, prior)
    lines = [
        f"template    {template.name}; "
        + ("it marks what the model writes" if template.marks_generation else "turns found by rendering"),
        f"conversation up to {limit:,} tokens, a longer one is "
        + ("cut from the left by whole turns" if config.sft_too_long == "truncate" else "dropped")
        if limit
        else "conversation of any length",
    ]
    if warning := end_warning(config, tokenizers.text, template):
        lines.append(f"warning     {warning}")
    conversation = _first(config, tokenizers, prior, plan)
    if conversation is None:
        return [*lines, "warning     none of the first conversations can be used"]
    lines.append("the first conversation; what counts in the loss is between >>> and <<<:")
    text = _marked(tokenizers.text, conversation)
    if len(text) > _MAX_CHARACTERS:
        text = f"{text[: _MAX_CHARACTERS // 2]}\n[...]\n{text[-_MAX_CHARACTERS // 2 :]}"
    return [*lines, *(f"    | {line}" for line in text.split("\n"))]


def _first(
    config: PreprocessConfig, tokenizers: JobTokenizers, prior: PriorPlan | None, plan: Plan
) -> EncodedConversation | None:
    """The first conversation of the input that is not dropped, if it is in the first group of the unit."""
    reader = GroupReader(config, tokenizers, prior)
    unit = plan.units[0]
    with closing(reader.groups(unit, UnitResult(unit.unit_id), Stopwatch())) as groups:
        group = next(groups, None)
    if group is None:
        return None
    return next(filter(None, group.keys[SFT_KEY].conversations_of(slice(None))), None)


def _marked(tokenizer: Tokenizer, conversation: EncodedConversation) -> str:
    """The text with marks around what counts in the loss."""
    return "".join(_pieces(tokenizer, conversation))


def _pieces(tokenizer: Tokenizer, conversation: EncodedConversation) -> Iterator[str]:
    ids_T, loss_T = conversation.ids_T, conversation.loss_T
    cuts = [0, *(np.flatnonzero(np.diff(loss_T)) + 1).tolist(), len(ids_T)]
    done = ""
    for start, stop in pairwise(cuts):
        text = tokenizer.decode(ids_T[:stop])
        piece = text[len(done) :] if text.startswith(done) else tokenizer.decode(ids_T[start:stop])
        yield f">>>{piece}<<<" if loss_T[start] else piece
        done = text
