"""What can be found wrong with a run before its jobs wait in a queue for days.

Invariant: needs no GPU and no Slurm, and changes nothing on disk. As in ``config/validate.py`` a check is a
generator of faults over the sections it names as parameters, so that all faults are in one message.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tokedit.config.faults import Fault, KeyPath
from megatron_tokedit.config.parallel_checks import smallest_world
from megatron_tokedit.config.raw_sources import preprocessing_of, with_prefixes
from megatron_tokedit.config.sections import (
    DataConfig,
    InitFromConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TokenizerConfig,
)
from megatron_tokedit.config.slurm import SlurmConfig
from megatron_tokedit.config.validate import cross_section_faults
from megatron_tokedit.corpus import expand_inputs
from megatron_tokedit.dataset.sources import all_sources, dataset_exists
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.errors import ConfigError, TokeditError
from megatron_tokedit.pipeline.prepared import placed_output_prefix


def submission_faults(sections: Mapping[str, Any], *, stages: Collection[str]) -> list[Fault]:
    """The faults of the sections that are sound, beyond those that ``load_config`` finds itself.

    Args:
        sections: by name.
        stages: that may be submitted.
    """
    found = list(_world(sections)) if "train" in stages else []
    known = {**sections, "stages": stages}
    for check in _CHECKS:
        needed = inspect.signature(check).parameters
        if needed.keys() <= known.keys():
            found += check(**{name: known[name] for name in needed})
    return found


def _world(sections: Mapping[str, Any]) -> Iterator[Fault]:
    """What only shows with the number of ranks that the training job has."""
    if not {"slurm", "parallel"} <= sections.keys():
        return
    world = sections["slurm"].train.world_size
    if world is None or world % smallest_world(sections["parallel"]):  # the latter is a fault already
        return
    known = cross_section_faults(sections)
    found = cross_section_faults(sections, world_size=world)
    yield from (fault for fault in found if fault not in known)


def _run_dir(run_dir: str) -> Iterator[Fault]:
    path = Path(run_dir).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        yield Fault(("run_dir",), f"{existing} is not a folder")
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Fault(("run_dir",), f"{existing} cannot be written")


def _tokenizer(tokenizer: TokenizerConfig, model: ModelConfig) -> Iterator[Fault]:
    """It can be loaded, and the model has room for its ids."""
    from megatron_tokedit.tokenizers import load_tokenizer

    try:
        size = load_tokenizer(tokenizer.type, tokenizer.model).vocab_size
    except TokeditError as error:
        yield Fault(("tokenizer", "model"), str(error))
        return
    if model.vocab_size is not None and model.vocab_size < size:
        yield Fault(("model", "vocab_size"), f"{model.vocab_size} ids cannot hold the tokenizer's {size}")


def _sources(data: DataConfig, tokenizer: TokenizerConfig, stages: Collection[str]) -> Iterator[Fault]:
    """Datasets are there and made as configured, or there is what they are made from."""
    made = []
    for place, source in all_sources(data):
        path: KeyPath = tuple(int(key) if key.isdecimal() else key for key in place.split("."))
        try:
            located = _located(source, data, tokenizer)
        except ConfigError:  # of `edit`, which is a fault already
            continue
        if dataset_exists(located.prefix):
            made.append(located)
        elif source.input is not None:
            yield from _origin(path, source, tokenizer)
        elif source.prefix is not None and not {"train", "evaluate"}.isdisjoint(stages):
            yield Fault(
                (*path, "prefix"),
                f"{source.prefix}.bin and .idx are not there; make them with tools/preprocess_edit.py, or "
                f"give the source its raw text as `input`",
            )
    if "train" in stages and any(source.input is not None for source in made):
        from megatron_tokedit.cli.train_sources import outdated_sources  # imports torch

        with suppress(ConfigError):
            yield from [Fault((), problem) for problem in outdated_sources(_only(data, tokenizer))]


def _only(data: DataConfig, tokenizer: TokenizerConfig) -> RunConfig:
    """A configuration of which only this is known."""
    return RunConfig.model_construct(data=data, tokenizer=tokenizer)


def _located(source: SourceConfig, data: DataConfig, tokenizer: TokenizerConfig) -> SourceConfig:
    """The source with its prefix, where that is known."""
    alone = data.model_copy(update={"train": [source], "validation": []})
    place = partial(placed_output_prefix, prepared_dir=data.prepared_dir)
    return with_prefixes(_only(alone, tokenizer), place).data.train[0]


def _origin(path: KeyPath, source: SourceConfig, tokenizer: TokenizerConfig) -> Iterator[Fault]:
    """The raw text and the prior of a dataset that has to be made."""
    try:
        expand_inputs(source.input or [])
    except TokeditError as error:
        yield Fault((*path, "input"), str(error))
    try:
        job = preprocessing_of(source, tokenizer)
    except ConfigError:
        return
    if job.edits and job.prior is not None and not os.path.exists(job.prior):
        yield Fault((*path, "edit", "prior"), f"{job.prior} does not exist")


def _init_from(init_from: InitFromConfig | None, run_dir: str, stages: Collection[str]) -> Iterator[Fault]:
    """A continuation that has not begun finds the weights that it starts from."""
    if init_from is None or "train" not in stages:
        return
    if checkpoint_folder.find_latest(Path(run_dir) / "checkpoints") is None:
        try:
            checkpoint_folder.require(init_from.checkpoint)
        except TokeditError as error:
            yield Fault(("init_from", "checkpoint"), str(error))


def _evaluation(slurm: SlurmConfig, data: DataConfig, stages: Collection[str]) -> Iterator[Fault]:
    """``--stages evaluate`` without data; with ``slurm.evaluate`` it is a fault already."""
    if "evaluate" in stages and slurm.evaluate is None and not data.validation:
        yield Fault(("data", "validation"), "there is nothing to evaluate on: it is empty")


_CHECKS: tuple[Callable[..., Iterator[Fault]], ...] = (
    _run_dir,
    _tokenizer,
    _sources,
    _init_from,
    _evaluation,
)
