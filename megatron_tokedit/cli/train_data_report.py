"""The part of ``tools/train.py --dry-run`` about the data: what has to be made, what is drawn, problems."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron_tokedit.config.raw_sources import preprocessing_of
from megatron_tokedit.config.sections import RunConfig, SourceConfig
from megatron_tokedit.corpus import expand_inputs
from megatron_tokedit.dataset.sources import missing_sources
from megatron_tokedit.errors import TokeditError
from megatron_tokedit.training.length import Begun, last_sample, sft_of

if TYPE_CHECKING:
    from megatron_tokedit.dataset.blend_state import BlendState


def data_lines(
    config: RunConfig, spec: Mapping[str, Any] | None, problems: list[str], *, build_index: bool
) -> Iterator[str]:
    """The table of sources, and what has to be made first.

    Args:
        config: with the prefixes that are known.
        spec: of the tokenizer; None where it cannot be loaded.
        problems: is added to.
        build_index: build the index cache too, if there are no problems.
    """
    from megatron_tokedit.cli.train_sources import outdated_sources

    missing = missing_sources(config)
    for source in missing:
        place = source.prefix or f"a dataset in {config.data.prepared_dir}"
        yield f"to be made first: {source.name}, {place}, from {', '.join(source.input or [])}"
        problems += _origin_problems(source, config)
    problems += outdated_sources(config)
    if spec is None:
        yield "the sources cannot be checked without the tokenizer"
        return
    try:
        yield from _table(config, spec, problems)
        if build_index and missing:
            problems.append("--build-index: datasets have to be made first (tools/train.py --prepare)")
        elif build_index and not problems:
            yield _build_index(config, spec)
    except TokeditError as error:
        problems.append(str(error))


def _origin_problems(source: SourceConfig, config: RunConfig) -> Iterator[str]:
    """What is wrong with the raw text and the prior of a source that has to be made."""
    try:
        expand_inputs(source.input or [])
        job = preprocessing_of(source, config.tokenizer)
        if job.edits and job.prior is not None:
            from megatron_tokedit.scoring.load import identify_prior  # imports torch

            identify_prior(job.prior, job.prior_backend)
    except TokeditError as error:
        yield f"source {source.name}: {error}"


def _table(config: RunConfig, spec: Mapping[str, Any], problems: list[str]) -> Iterator[str]:
    from megatron_tokedit.dataset.blend_plan import ExpectedBlend, beyond_cap
    from megatron_tokedit.dataset.blend_state import resume_blend
    from megatron_tokedit.dataset.source_table import validation_table
    from megatron_tokedit.dataset.sources import format_shares, inspect_sources, source_shares

    infos = inspect_sources(
        config.data,
        tokenizer_spec=spec,
        seq_length=config.model.seq_length,
        require_all=False,
        sft=sft_of(config),
    )
    begun, train_epochs = Begun(config), config.training.train_epochs
    num_samples, state = begun.num_samples, None
    if all(source.prefix in infos for source in config.data.train):
        state, changes = resume_blend(
            begun.blend,
            begun.consumed_samples,
            config.data,
            infos,
            drawn=begun.drawn,
            train_epochs=train_epochs,
        )
        num_samples = last_sample(config, infos, state, num_samples)
        for change in changes:
            yield f"changed since step {begun.step}: {change}"
        by_name = {source.name: infos[source.prefix or ""] for source in config.data.train}
        plan = ExpectedBlend(state, num_samples)
        problems += beyond_cap(config.data, by_name, plan, config.training)
    shares = source_shares(
        config.data,
        infos,
        num_train_samples=num_samples,
        seq_length=config.model.seq_length,
        state=state,
        start_sample=begun.consumed_samples,
        train_epochs=train_epochs,
    )
    if shares:
        yield from format_shares(shares)
    held = [(source.name, infos.get(source.prefix or "")) for source in config.data.validation]
    found = [(name, info.conversations) for name, info in held if info is not None and info.conversations]
    if found:
        yield from validation_table(found)
    if config.stage == "sft":
        yield from _conversation_lines(config, state, problems)


def _conversation_lines(config: RunConfig, blend: BlendState | None, problems: list[str]) -> Iterator[str]:
    """How long the epochs are, and what the model will be taught to be talked to in."""
    from megatron_tokedit.training.chat_template import template_warnings, training_template

    if blend is None:
        yield "steps and chat template are not known before the datasets are made"
        return
    rows = sum(blend.asked[name] / config.model.seq_length for name in blend.shares if name in blend.asked)
    if blend.by_tokens:
        steps, batch = config.training.train_steps, config.training.global_batch_size
        yield f"the epochs come to {round(rows):,} rows = {steps:,} steps of up to {batch} rows"
    try:
        template = training_template(config.data)
    except TokeditError as error:
        problems.append(str(error))
        return
    yield f"chat template: {template.chat_template_name if template else 'not known'}"
    for warning in template_warnings(config.data, template):
        yield f"note: {warning}"


def _build_index(config: RunConfig, spec: Mapping[str, Any]) -> str:
    """Build the indexes that the run will read; returns what to say of it."""
    from megatron_tokedit.dataset.blend import build_datasets, resume_blend
    from megatron_tokedit.dataset.sources import inspect_sources

    begun, sft, train_epochs = Begun(config), sft_of(config), config.training.train_epochs
    infos = inspect_sources(config.data, tokenizer_spec=spec, seq_length=config.model.seq_length, sft=sft)
    state, _ = resume_blend(
        begun.blend,
        begun.consumed_samples,
        config.data,
        infos,
        drawn=begun.drawn,
        train_epochs=train_epochs,
    )
    cache_dir = config.data.cache_dir or f"{config.run_dir}/index_cache"
    started = time.perf_counter()
    build_datasets(
        config.data,
        infos,
        num_train_samples=last_sample(config, infos, state, begun.num_samples),
        seq_length=config.model.seq_length,
        seed=config.seed,
        tokenizer_spec=spec,
        cache_dir=cache_dir,
        blend_state=state,
        start_sample=begun.consumed_samples,
        training=config.training,
        sft=sft,
    )
    return f"index cache: {cache_dir} is complete for this run, after {time.perf_counter() - started:.1f} s"
