"""The part of ``tools/train.py --dry-run`` about the data: what has to be made, what is drawn, problems."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_tokedit.config.batch_sizes import batch_stages
from megatron_tokedit.config.raw_sources import preprocessing_of
from megatron_tokedit.config.sections import RunConfig, SourceConfig
from megatron_tokedit.corpus import expand_inputs
from megatron_tokedit.dataset.sources import missing_sources
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.errors import TokeditError


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
    from megatron_tokedit.dataset.sources import format_shares, inspect_sources, source_shares

    infos = inspect_sources(
        config.data, tokenizer_spec=spec, seq_length=config.model.seq_length, require_all=False
    )
    begun = _Begun(config)
    state = None
    if all(source.prefix in infos for source in config.data.train):
        state, changes = resume_blend(
            begun.blend, begun.consumed_samples, config.data, infos, drawn=begun.drawn
        )
        for change in changes:
            yield f"changed since step {begun.step}: {change}"
        by_name = {source.name: infos[source.prefix or ""] for source in config.data.train}
        plan = ExpectedBlend(state, begun.num_samples)
        problems += beyond_cap(config.data, by_name, plan, config.training)
    shares = source_shares(
        config.data,
        infos,
        num_train_samples=begun.num_samples,
        seq_length=config.model.seq_length,
        state=state,
        start_sample=begun.consumed_samples,
    )
    if shares:
        yield from format_shares(shares)


class _Begun:
    """How far the run is: its newest complete checkpoint, or its beginning."""

    def __init__(self, config: RunConfig) -> None:
        from megatron_tokedit.dataset.blend_state import STATE_KEY, BlendState

        state: dict[str, Any] = {}
        if latest := checkpoint_folder.find_latest(Path(config.run_dir) / "checkpoints"):
            state = checkpoint_folder.read_json(latest, checkpoint_folder.STATE_FILE)
        self.step: int = state.get("step", 0)
        self.consumed_samples: int = state.get("consumed_samples", 0)
        self.blend = BlendState.from_mapping(state[STATE_KEY]) if STATE_KEY in state else None
        self.drawn: dict[str, int] | None = state.get("drawn_samples") if self.blend else None
        stages = batch_stages(config.training, step=self.step, consumed_samples=self.consumed_samples)
        self.num_samples = stages[-1].end_sample if stages else self.consumed_samples


def _build_index(config: RunConfig, spec: Mapping[str, Any]) -> str:
    """Build the indexes that the run will read; returns what to say of it."""
    from megatron_tokedit.dataset.blend import build_datasets, resume_blend
    from megatron_tokedit.dataset.sources import inspect_sources

    begun = _Begun(config)
    infos = inspect_sources(config.data, tokenizer_spec=spec, seq_length=config.model.seq_length)
    state, _ = resume_blend(begun.blend, begun.consumed_samples, config.data, infos, drawn=begun.drawn)
    cache_dir = config.data.cache_dir or f"{config.run_dir}/index_cache"
    started = time.perf_counter()
    build_datasets(
        config.data,
        infos,
        num_train_samples=begun.num_samples,
        seq_length=config.model.seq_length,
        seed=config.seed,
        tokenizer_spec=spec,
        cache_dir=cache_dir,
        blend_state=state,
        start_sample=begun.consumed_samples,
        training=config.training,
    )
    return f"index cache: {cache_dir} is complete for this run, after {time.perf_counter() - started:.1f} s"
