"""Datasets of a training run that have to be made from raw text first.

Invariant: all ranks take part in the edit, rank 0 merges, and a failure on any rank ends all of them; nothing
of the preprocessing (its models, its process groups) is left when training starts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.config.raw_sources import preprocessing_of, with_prefixes
from megatron_tokedit.config.record import differences
from megatron_tokedit.config.sections import RunConfig, SourceConfig
from megatron_tokedit.dataset.sources import all_sources, dataset_exists, missing_sources
from megatron_tokedit.errors import TokeditError
from megatron_tokedit.log import get_logger
from megatron_tokedit.pipeline.prepared import place_output

if TYPE_CHECKING:
    from megatron_tokedit.dataset.manifest import Manifest

logger = get_logger(__name__)

_PATIENCE = timedelta(days=14)
"""Ranks may finish their units hours apart; the launcher ends the others where a rank dies."""
_FAREWELL = timedelta(seconds=20)
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def outdated_sources(config: RunConfig) -> list[str]:
    """Datasets that were not made as their source's ``input`` and ``edit`` now say, one line each.

    Compares with the manifest; input files by number and size, as far as they are still there.
    """
    from megatron_tokedit.dataset.manifest import read_manifest

    found = []
    for place, source in all_sources(config.data):
        if source.input is None or source.prefix is None or not dataset_exists(source.prefix):
            continue
        manifest = read_manifest(source.prefix)
        changes = (
            differences(*_origins(manifest, preprocessing_of(source, config.tokenizer))) if manifest else []
        )
        if changes:
            found.append(
                f"{place} ({source.name}): {source.prefix} was made with other settings: "
                f"{'; '.join(changes)}; put them back, give another prefix, or remove the dataset to have it "
                f"made anew"
            )
    return found


def _origins(manifest: Manifest, job: PreprocessConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the dataset was made from, as recorded and as configured."""
    from megatron_tokedit.corpus import expand_inputs
    from megatron_tokedit.pipeline.method import edit_settings

    names = ("append_eod", "special_tokens_in_text")
    recorded: dict[str, Any] = {name: getattr(manifest, name) for name in names} | {"edit": manifest.edit}
    wanted: dict[str, Any] = {name: getattr(job, name) for name in names}
    wanted["edit"] = edit_settings(job) if job.edits else None
    with suppress(TokeditError):  # the raw text may be gone, the dataset is what counts
        paths = expand_inputs(job.input)
        wanted |= {"input files": len(paths), "input bytes": sum(map(os.path.getsize, paths))}
        recorded |= {"input files": manifest.num_input_files, "input bytes": manifest.num_input_bytes}
    if manifest.prior is not None and job.edits:
        recorded["prior"], wanted["prior"] = _priors(manifest.prior, job)
    return recorded, wanted


def _priors(recorded: dict[str, Any], job: PreprocessConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recorded prior and the configured one, as far as both are known.

    The weights of a folder are read only where it is another than the recorded one; one that is gone is
    taken for the recorded one, the dataset is what counts.
    """
    old: dict[str, Any] = {"dtype": recorded.get("dtype")}
    new: dict[str, Any] = {"dtype": job.prior_dtype}
    if job.prior is None or os.path.realpath(job.prior) == os.path.realpath(str(recorded.get("path"))):
        return old, new
    from megatron_tokedit.scoring.load import identify_prior

    with suppress(TokeditError):
        if identify_prior(job.prior, job.prior_backend).fingerprint != recorded.get("fingerprint"):
            old["path"], new["path"] = recorded.get("path"), job.prior
    return old, new


def prepare_sources(config: RunConfig) -> RunConfig:
    """Look for all datasets and make the missing ones. Collective over the ranks of the launcher.

    Returns:
        The configuration with the prefix of every source.

    Raises:
        TokeditError: preprocessing failed here or on another rank.
    """
    with _Ranks() as ranks:
        config = _located(config, ranks)
        missing = _missing(config, ranks)
        if not missing:
            logger.info("all data sources are there, nothing to prepare")
        for number, source in enumerate(missing):
            job = preprocessing_of(source, config.tokenizer)
            logger.info("preparing source %s: %s from %s", source.name, source.prefix, ", ".join(job.input))
            ranks.together(f"edit-{number}", partial(_run_stage, job, "edit", ranks))
            ranks.together(f"merge-{number}", partial(_run_stage, job, "merge", ranks))
    return config


def _missing(config: RunConfig, ranks: _Ranks) -> list[SourceConfig]:
    """The sources to make, as rank 0 sees them: another job may finish one between two ranks' looks."""

    def look() -> dict[str, str]:
        missing = missing_sources(config)
        return {where: "" for where, source in all_sources(config.data) if any(source is m for m in missing)}

    places = ranks.from_rank_zero("missing", look)
    return [source for where, source in all_sources(config.data) if where in places]


def _located(config: RunConfig, ranks: _Ranks) -> RunConfig:
    """The configuration with every prefix; rank 0 reads what has to be read."""
    if all(source.prefix is not None for _, source in all_sources(config.data)):
        return config

    def place() -> dict[str, str]:
        found: dict[str, str] = {}
        for where, source in all_sources(config.data):
            if source.prefix is None:
                job = preprocessing_of(source, config.tokenizer)
                try:
                    found[job.model_dump_json()] = place_output(job, config.data.prepared_dir)
                except TokeditError as error:
                    raise type(error)(f"{where} ({source.name}): {error}") from error
        return found

    places = ranks.from_rank_zero("place", place)
    return with_prefixes(config, lambda job: places[job.model_dump_json()])


def _run_stage(job: PreprocessConfig, stage: Literal["edit", "merge"], ranks: _Ranks) -> None:
    """One rank's part: its units of the edit, or rank 0's merge."""
    from megatron_tokedit.pipeline import run

    if stage == "edit" or ranks.rank == 0:
        # a prior works in child processes: it leaves no trace in the process that goes on to train
        run(job, rank=ranks.rank, world_size=ranks.world_size, stage=stage, isolate=job.edits)


class _Ranks:
    """The launcher's ranks before there is a process group: they meet at its key-value store.

    Without torchrun's agent rank 0 is the store's host. Invariant: it stays until every other rank has read
    all that it waits for, on failure too, so that each says what went wrong and not that a host was lost.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._store: Any = None
        if self.world_size > 1:
            store, _, _ = next(rendezvous("env://", timeout=_PATIENCE))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = dist.PrefixStore(f"prepare-{attempt}", store)

    def __enter__(self) -> _Ranks:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if self._store is None:
            return
        others = [f"left/{rank}" for rank in range(1, self.world_size)]
        with suppress(dist.DistError):  # the host is gone, or a rank is: each has its message by now
            if self.rank == 0:
                self._store.wait(others, _FAREWELL)
                self._store.set("closing", "")
            else:
                self._store.set(f"left/{self.rank}", "")
                if failure is None:  # training will want a new host at the same address
                    self._store.wait(["closing"], _FAREWELL)

    def from_rank_zero(self, name: str, action: Callable[[], dict[str, str]]) -> dict[str, str]:
        """What ``action`` returns on rank 0. Collective.

        Raises:
            TokeditError: it failed on rank 0.
        """
        found: dict[str, str] = {}
        self.together(name, lambda: found.update(action()) if self.rank == 0 else None)
        if self._store is None:
            return found
        if self.rank == 0:
            self._store.set(f"{name}/result", json.dumps(found))
        return cast("dict[str, str]", json.loads(self._store.get(f"{name}/result").decode()))

    def together(self, name: str, action: Callable[[], None]) -> None:
        """Run ``action`` on this rank as if it were alone, then wait for all ranks. Collective.

        Raises:
            TokeditError: it failed on another rank; what it raised on this one goes through.
        """
        if self._store is None:
            action()
            return
        try:
            with _as_single_process():
                action()
        except BaseException as error:
            self._store.set(f"{name}/{self.rank}", f"{type(error).__name__}: {error}")
            raise
        self._store.set(f"{name}/{self.rank}", "")
        for rank in range(self.world_size):
            if message := self._store.get(f"{name}/{rank}").decode():
                raise TokeditError(f"preparing the data failed on rank {rank}: {message}")


@contextmanager
def _as_single_process() -> Iterator[None]:
    """Hide the launcher's variables: a Megatron checkpoint as prior starts parallel state of its own."""
    hidden = {name: os.environ.pop(name) for name in _LAUNCHER_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
