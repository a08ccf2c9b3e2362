"""One model as tasks need it: a scorer, an encoder of texts, and a way to write, over the same weights.

Invariant: nothing is loaded twice; a model over several tensor-parallel processes does what it does in one,
with the process that leads making the calls and the others following it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_tokedit.errors import ConfigError
from megatron_tokedit.evaluation.tasks.encoding import DocumentStart, TextEncoder
from megatron_tokedit.generation import (
    Completion,
    GenerationSettings,
    Prompt,
    TextModel,
    from_language_model,
    generate,
)
from megatron_tokedit.generation.load import find_tokenizer, from_huggingface_model
from megatron_tokedit.scoring import Scorer
from megatron_tokedit.scoring.huggingface import HuggingFaceBackbone
from megatron_tokedit.scoring.identity import UNLIMITED_TOKENS, PriorIdentity
from megatron_tokedit.scoring.load import DEFAULT_CONTEXT_TOKENS, identify_prior, load_scorer
from megatron_tokedit.scoring.megatron import MegatronBackbone
from megatron_tokedit.scoring.replica import follow
from megatron_tokedit.scoring.replica import load_scorer as load_scorer_in_replica
from megatron_tokedit.scoring.replica_group import Replica
from megatron_tokedit.scoring.scorer import CausalScorer, ScoringOptions
from megatron_tokedit.tokenizers import Tokenizer

_GENERATION_FILE = "generation_config.json"
Write = Callable[[Sequence[Prompt], GenerationSettings], Iterator[Completion]]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How a model is loaded and used.

    Attributes:
        dtype: as for ``scoring.load.load_scorer``.
        device: ``auto``, ``cpu`` or ``cuda``.
        context: positions the model is given; None: its limit, 2048 where it states none.
        document_start: see :class:`TextEncoder`.
        batch_tokens: positions a forward.
        logits_bytes: memory of the head.
        tokenizer_type: instead of what the folder says.
        tokenizer_model: likewise.
        threads: torch threads of each process of a tensor-parallel model on a CPU.
    """

    dtype: str = "float32"
    device: str = "auto"
    context: int | None = None
    document_start: DocumentStart = "auto"
    batch_tokens: int = 8192
    logits_bytes: int = 128 << 20
    tokenizer_type: str | None = None
    tokenizer_model: str | None = None
    threads: int = 1


@dataclass(frozen=True, slots=True)
class TaskModel:
    """A loaded model.

    Attributes:
        path: the step folder or model folder.
        kind: ``megatron`` or ``hf``.
        fingerprint: SHA-256 (hex) of weights, precision and context.
        scorer: without a start id; a document has up to ``max_positions + 1`` tokens.
        encoder: of its texts.
        max_positions: ids it is given at most.
        batch_tokens: positions a forward.
        write: continues prompts, in order.
    """

    path: str
    kind: Literal["hf", "megatron"]
    fingerprint: str
    scorer: Scorer
    encoder: TextEncoder
    max_positions: int
    batch_tokens: int
    write: Write


@dataclass(frozen=True, slots=True)
class _WriteTexts:
    """What the leader says before it writes."""

    path: str
    options: ModelOptions
    prompts: list[Prompt]
    settings: GenerationSettings


def load_task_model(path: str, options: ModelOptions, replica: Replica | None = None) -> TaskModel:
    """Load a checkpoint or a Hugging Face folder.

    Args:
        path: a run folder, a step folder, or a model folder.
        options: how.
        replica: the processes that are to share a checkpoint, of which this one leads; the others are in
            :func:`follow_tasks`.

    Raises:
        TokeditError: the model, its tokenizer or the options cannot be used; see ``scoring.load``.
    """
    identity = identify_prior(path)
    tokenizer, start_id = find_tokenizer(path, options.tokenizer_type, options.tokenizer_model)
    scoring = _scoring_options(identity, options)
    scorer: CausalScorer
    if replica is None:
        scorer = load_scorer(identity, scoring, dtype=options.dtype, device=options.device)
    else:
        if identity.backend != "megatron":
            raise ConfigError(
                f"--tensor-parallel: the Hugging Face folder {path} runs in one process; make a checkpoint "
                "of it with tools/convert_checkpoint.py, or leave the option out"
            )
        scorer = load_scorer_in_replica(
            replica, identity, scoring, dtype=options.dtype, threads=options.threads
        )
    text_model = _text_model(scorer, tokenizer, start_id, identity.path)

    def write(prompts: Sequence[Prompt], settings: GenerationSettings) -> Iterator[Completion]:
        if replica is None:
            yield from generate(text_model, prompts, settings)
            return
        with replica.together():
            replica.announce(_WriteTexts(path, options, list(prompts), settings))
            yield from generate(text_model, prompts, settings)

    return TaskModel(
        path=identity.path,
        kind=identity.backend,
        fingerprint=scorer.fingerprint,
        scorer=scorer,
        encoder=TextEncoder(tokenizer, start_id, options.document_start),
        max_positions=scoring.context_tokens - 1,
        batch_tokens=options.batch_tokens,
        write=write,
    )


def follow_tasks(replica: Replica) -> None:
    """Do what the process that leads a replica has to do, until it leaves. By all others.

    Raises:
        PriorError: the leader or another process failed.
    """

    def write(command: object, model: Any) -> None:
        assert isinstance(command, _WriteTexts), f"the leader said {command!r}"
        options = command.options
        tokenizer, start_id = find_tokenizer(command.path, options.tokenizer_type, options.tokenizer_model)
        text_model = _ending_as_in_lm_eval(from_language_model(model, tokenizer, start_id=start_id))
        for _ in generate(text_model, command.prompts, command.settings):
            pass

    follow(replica, write)


def _scoring_options(identity: PriorIdentity, options: ModelOptions) -> ScoringOptions:
    """Windows in which whole documents stand: the last token of one is no input.

    Raises:
        ConfigError: more context than the model has, or hardly any.
    """
    limit = identity.max_context_tokens
    context = options.context or (limit if limit < UNLIMITED_TOKENS else DEFAULT_CONTEXT_TOKENS)
    if not 1 < context <= limit:
        raise ConfigError(f"--context {context}: the model {identity.path} takes 2 to {limit} tokens")
    return ScoringOptions(
        context_tokens=context + 1,
        overlap_tokens=1,
        start_id=None,
        batch_tokens=options.batch_tokens,
        logits_bytes=options.logits_bytes,
    )


def _text_model(scorer: CausalScorer, tokenizer: Tokenizer, start_id: int | None, path: str) -> TextModel:
    """The scorer's model as one that writes."""
    backbone = scorer.backbone
    if isinstance(backbone, MegatronBackbone):
        return _ending_as_in_lm_eval(from_language_model(backbone.model, tokenizer, start_id=start_id))
    assert isinstance(backbone, HuggingFaceBackbone)
    return _ending_as_in_lm_eval(from_huggingface_model(backbone.model, Path(path), tokenizer))


def _ending_as_in_lm_eval(model: TextModel) -> TextModel:
    """The model with texts that go on behind a BOS, as those of transformers do."""
    tokenizer = model.tokenizer
    ends = model.stop_ids - {model.start_id, tokenizer.bos} | {tokenizer.eod}
    published = Path(tokenizer.tokenizer_model) / _GENERATION_FILE  # kept there by conversion
    if published.is_file():
        ids = json.loads(published.read_bytes()).get("eos_token_id")
        ends |= {i for i in (ids if isinstance(ids, list) else [ids]) if i is not None}
    return dataclasses.replace(model, stop_ids=frozenset(ends))
