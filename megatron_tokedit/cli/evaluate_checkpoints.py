"""Checkpoints on the way from a folder to their sums of each document.

Invariant: a checkpoint is checked against all data without being loaded, so what does not fit is said before
anything has been scored.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from megatron_tokedit.cli.evaluate_domains import Domain, TextDomain
from megatron_tokedit.errors import ConfigError

if TYPE_CHECKING:
    from megatron_tokedit.evaluation import CheckpointPerplexity
    from megatron_tokedit.scoring.identity import PriorIdentity
    from megatron_tokedit.scoring.scorer import ScoringOptions
    from megatron_tokedit.tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class PreparedCheckpoint:
    """A checkpoint that can be scored on all domains.

    Attributes:
        path: as given.
        identity: what is there.
        options: how it is scored on documents.
        tokenizers: of the ids that it gets, one a domain; None where not known.
        are_conversations: which domains are conversations.
    """

    path: str
    identity: PriorIdentity
    options: ScoringOptions
    tokenizers: tuple[Tokenizer | None, ...]
    are_conversations: tuple[bool, ...]

    @property
    def conversation_options(self) -> ScoringOptions:
        """How it is scored on conversations, before which nothing stands in fine-tuning: the same positions
        hold one token more, as the last of them is no input.
        """
        options = self.options
        return replace(
            options,
            start_id=None,
            context_tokens=options.context_tokens + 1,
            overlap_tokens=options.overlap_tokens + 1,
        )

    def to_json(self, dtype: str) -> dict[str, Any]:
        """How it is scored, for the report."""
        options = self.options
        return {
            "dtype": dtype,
            "context_tokens": options.context_tokens,
            "stride_tokens": options.context_tokens - options.overlap_tokens,
            "start_ids": [None if is_one else options.start_id for is_one in self.are_conversations],
            "tokenizers": [tokenizer and tokenizer.fingerprint for tokenizer in self.tokenizers],
        }


def prepare(path: str, domains: Sequence[Domain], arguments: argparse.Namespace) -> PreparedCheckpoint:
    """Check a checkpoint against all domains, without loading it.

    Args:
        path: its folder.
        domains: what it is to be scored on.
        arguments: of the command line.

    Raises:
        TokeditError: it cannot be scored on one of them, or not as asked.
    """
    from megatron_tokedit.generation.load import find_tokenizer
    from megatron_tokedit.scoring.load import identify_prior, scoring_options

    identity = identify_prior(path)
    own = None
    if any(isinstance(domain, TextDomain) for domain in domains):
        own, _ = find_tokenizer(path, arguments.tokenizer_type, arguments.tokenizer_model)
    tokenizers = tuple(domain.tokenizer_of(identity, own) for domain in domains)
    are_conversations = tuple(domain.is_conversations for domain in domains)
    start_ids = {
        _start_id(identity, tokenizer)
        for tokenizer, is_one in zip(tokenizers, are_conversations, strict=True)
        if tokenizer is not None and not is_one
    }
    if len(start_ids) > 1:
        raise ConfigError(
            f"--data: the tokenizers of the data begin a document with different ids ({path}: "
            f"{', '.join(map(str, start_ids))}); evaluate them apart"
        )
    options = scoring_options(
        identity,
        start_id=next(iter(start_ids), identity.start_id),
        context_tokens=arguments.context,
        batch_tokens=arguments.batch_tokens,
        logits_bytes=arguments.logits_bytes,
    )
    if arguments.stride is not None:
        if not 1 <= arguments.stride < options.context_tokens:
            raise ConfigError(
                f"--stride {arguments.stride}: expected at least 1 and less than the context of "
                f"{options.context_tokens} tokens ({path})"
            )
        options = replace(options, overlap_tokens=options.context_tokens - arguments.stride)
    return PreparedCheckpoint(path, identity, options, tokenizers, are_conversations)


def _start_id(identity: PriorIdentity, tokenizer: Tokenizer) -> int | None:
    """The id that is put before a document: what stood there in training, as far as that is known.

    A model without a beginning-of-sequence id has seen the end of the document before, as in lm-eval.
    None where the tokenizer itself begins a text with the id.
    """
    start_id = identity.start_id
    if start_id is None:
        start_id = tokenizer.bos if tokenizer.prepends_bos else tokenizer.eod
    return None if start_id in tokenizer.prefix_ids else start_id


def measure(
    checkpoint: PreparedCheckpoint, domains: Sequence[Domain], arguments: argparse.Namespace
) -> CheckpointPerplexity:
    """Load a checkpoint and score all domains with it.

    Raises:
        TokeditError: it cannot be loaded, or its numbers are unusable.
    """
    from megatron_tokedit.evaluation import CheckpointPerplexity, measure_perplexity
    from megatron_tokedit.scoring.load import load_scorer
    from megatron_tokedit.scoring.scorer import CausalScorer

    scorer = load_scorer(
        checkpoint.identity,
        checkpoint.options,
        dtype=arguments.dtype,
        device=arguments.device or "auto",
    )
    talker = CausalScorer(scorer.backbone, checkpoint.conversation_options)
    sizes = [domain.num_tokens for domain in domains]
    total = sum(size for size in sizes if size is not None) if None not in sizes else None
    name = Path(checkpoint.path).name
    with tqdm(total=total, unit="tok", unit_scale=True, desc=name, disable=arguments.quiet or None) as bar:
        results = tuple(
            measure_perplexity(
                talker if domain.is_conversations else scorer,
                domain.documents(tokenizer),
                domain.name,
                domain.text,
                on_tokens=bar.update,
            )
            for domain, tokenizer in zip(domains, checkpoint.tokenizers, strict=True)
        )
    return CheckpointPerplexity(checkpoint.path, scorer.fingerprint, results)
