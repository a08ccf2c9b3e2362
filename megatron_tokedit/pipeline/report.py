"""The statistics of a finished dataset: the content of ``.stats.json``, and what deserves a word to the user.

Invariant: documents and bytes in = out + dropped, by reason; counts are those of the units, added up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.edit.statistics import MARGIN, EditStatistics
from megatron_tokedit.pipeline.conversations import NO_RESPONSE, TOKEN_ROLES, TOO_LONG, TOO_LONG_CUT
from megatron_tokedit.pipeline.groups import spelled_in_words, spelling
from megatron_tokedit.pipeline.resources import JobTokenizers
from megatron_tokedit.pipeline.responses import LOGPROB_UNITS_PER_NAT
from megatron_tokedit.pipeline.results import NOT_WRITABLE, ROUND_TRIP, KeyCounts, Totals

_MANY_DRAWS = 100
"""Draws of which at least one is expected to change something."""


def dataset_statistics(
    config: PreprocessConfig, tokenizers: JobTokenizers, totals: Totals, name: str
) -> dict[str, Any]:
    """The content of the ``.stats.json`` of the dataset ``name``.

    Times are of the whole job: the steps of a unit overlap, so their shares are of the time that the steps
    took together, and ``tokens_per_worker_second`` is of the time that the units took.
    """
    counts = totals.keys[name]
    dropped_bytes = {"bad_line": totals.bad_bytes, **counts.dropped_bytes}
    bytes_in = totals.bytes_in + totals.bad_bytes
    busy = sum(totals.seconds.values())
    tokens = sum(counts.edit.tokens if counts.edit else counts.tokens for counts in totals.keys.values())
    statistics: dict[str, Any] = {
        "documents": {
            "in": totals.documents_in,
            "out": counts.documents,
            "dropped": {"bad_line": totals.bad_lines, **counts.dropped},
            "unedited": counts.unedited,
        },
        "bytes": {"in": bytes_in, "out": bytes_in - sum(dropped_bytes.values()), "dropped": dropped_bytes},
        "sequences": counts.sequences,
        "tokens": counts.tokens,
        "special_tokens_in_text": {
            spelling(tokenizers.written, int(id_)): number for id_, number in counts.spelled.items()
        },
        "bad_lines": totals.bad_examples,
        "worker_seconds": {step: round(value, 3) for step, value in totals.seconds.items()}
        | {"wall": round(totals.wall_seconds, 3)},
        "time_shares": {step: round(value / max(busy, 1e-9), 4) for step, value in totals.seconds.items()},
        "tokens_per_worker_second": round(tokens / max(totals.wall_seconds, 1e-9), 1),
        "peak_memory_bytes_a_worker": totals.peak_bytes,
        "encoder": tokenizers.text.encoder,
    }
    if counts.conversations:
        statistics["conversations"] = conversation_statistics(counts.conversations)
    if counts.edit is not None:
        statistics["edit"] = edit_statistics(counts.edit)
        statistics["environments"] = sorted(totals.environments)
    return statistics


def conversation_statistics(counts: Mapping[str, int]) -> dict[str, Any]:
    """What was counted of conversations: by role the tokens, and the prior's perplexity of them.

    The perplexity is that of the tokens as they came in, each given the conversation before it; of responses
    only where they were scored by themselves.
    """
    roles: dict[str, Any] = {}
    for role in TOKEN_ROLES:
        scored = counts.get(f"scored.{role}", 0)
        nats = counts.get(f"logprob_units.{role}", 0) / LOGPROB_UNITS_PER_NAT
        roles[role] = {
            "tokens": counts.get(f"tokens.{role}", 0),
            "scored": scored,
            "perplexity": math.exp(-nats / scored) if scored else None,
        }
    names = (
        "loss_tokens",
        "responses",
        "silent_responses",
        "empty_prompts",
        "truncated",
        "messages_cut_before",
        "messages_cut_after",
    )
    return {**{name: counts.get(name, 0) for name in names}, "roles": roles, "counts": dict(counts)}


def edit_statistics(edit: EditStatistics) -> dict[str, Any]:
    """What was scored and edited, with the shares that people quote."""
    return {
        "tokens": edit.tokens,
        "scored": edit.scored,
        "eligible": edit.eligible,
        "resampled": edit.resampled,
        "changed": edit.changed,
        "dropped": edit.dropped,
        "undone_invalid_utf8": edit.undone,
        "eligible_share": edit.eligible / max(edit.tokens, 1),
        "changed_share_of_eligible": edit.changed / max(edit.eligible, 1),
        "within_margin_of_threshold": {"margin": MARGIN, "tokens": edit.margin},
        "perplexity": edit.perplexity,
        "document_perplexity_quantiles": edit.perplexity_quantiles(),
        "p_histogram_10": edit.histogram.reshape(10, -1).sum(axis=1).tolist(),
        "p_histogram_100": edit.histogram.tolist(),
        "counts": edit.to_json(),
    }


_DROPPED_IN_WORDS = {
    NO_RESPONSE: "have an empty response",
    TOO_LONG: "are longer than the limit (--sft-max-tokens; --sft-too-long truncate cuts the oldest turns)",
    TOO_LONG_CUT: "are longer than the limit (--sft-max-tokens) even without all but the last exchange",
}


def _conversation_remarks(config: PreprocessConfig, counts: KeyCounts) -> Iterator[str]:
    """What the user should be warned of in conversations."""
    for reason, words in _DROPPED_IN_WORDS.items():
        if number := counts.dropped.get(reason, 0):
            total = counts.documents + sum(counts.dropped.values())
            yield f"{number} of {total} conversations {words}; dropped"
    if number := counts.conversations.get("truncated", 0):
        turns = counts.conversations["messages_cut_before"]
        yield f"{number} conversations lost their {turns} oldest messages, as they were too long"
    if number := counts.conversations.get("messages_cut_after", 0):
        yield f"{number} messages after the last response of their conversation were left out"
    if number := counts.conversations.get("silent_responses", 0):
        yield f"{number} empty responses inside of conversations do not count in the loss"
    if number := counts.conversations.get("empty_prompts", 0):
        yield (
            f"{number} messages of the user are empty, so that their responses are learned as answers to "
            "nothing; is the prompt under another key (--sft-keys prompt=KEY)?"
        )


def remarks(config: PreprocessConfig, tokenizers: JobTokenizers, totals: Totals, name: str) -> Iterator[str]:
    """What the user should be warned of in a finished dataset."""
    counts = totals.keys[name]
    yield from _conversation_remarks(config, counts)
    if counts.spelled:
        spelled = spelled_in_words(tokenizers.written, counts.spelled)
        yield (
            f"the text itself spells control tokens ({spelled}), which became these tokens, as in "
            "Megatron-LM; --special-tokens-in-text split makes them ordinary text"
        )
    failed = counts.unedited.get(ROUND_TRIP, 0) + counts.dropped.get(ROUND_TRIP, 0)
    if failed:
        what = "dropped" if config.output_round_trip == "drop" else "written unedited"
        yield (
            f"{failed} of {totals.documents_in} documents were {what} because the prior's tokenizer does not "
            "give their text back exactly (--output-round-trip)"
        )
    if counts.edit is not None and counts.edit.resampled >= _MANY_DRAWS and not counts.edit.changed:
        yield (
            f"all {counts.edit.resampled} resampled tokens drew themselves again, so nothing was changed; "
            "raise --edit-temperature (for the sampler top_p also --edit-top-p), or give "
            "--edit-exclude-original"
        )
    if not_writable := counts.unedited.get(NOT_WRITABLE, 0):
        yield (
            f"{not_writable} documents were written unedited, though their edits are counted: encoded again, "
            "a sequence would have vanished or the text would have spelled a new control token"
        )
    if counts.edit is not None and len(totals.environments) > 1:
        yield (
            f"the prior ran in several environments ({'; '.join(sorted(totals.environments))}), whose scores "
            f"differ in rounding: {counts.edit.margin} tokens within {MARGIN} of a threshold could have gone "
            "the other way"
        )
