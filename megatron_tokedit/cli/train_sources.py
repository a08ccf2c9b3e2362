"""Datasets of a training run that have to be made from raw text first.

Invariant: all ranks take part in the edit, rank 0 merges, and a failure on any rank ends all of them, as does
a signal; nothing of the preprocessing (its models, its process groups) is left when training starts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_tokedit.cli.train_report import known_sources, look_at_units
from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.config.raw_sources import preprocessing_of, with_prefixes
from megatron_tokedit.config.record import differences
from megatron_tokedit.config.sections import RunConfig, SourceConfig
from megatron_tokedit.dataset.sources import all_sources, dataset_exists, missing_sources
from megatron_tokedit.errors import PlanError, TokeditError
from megatron_tokedit.log import get_logger
from megatron_tokedit.pipeline.placement import WHOLE, Share, array_expression
from megatron_tokedit.pipeline.prepared import place_output
from megatron_tokedit.training.signals import StopNow

if TYPE_CHECKING:
    from megatron_tokedit.dataset.manifest import Manifest

logger = get_logger(__name__)

_PATIENCE = timedelta(days=14)
"""Ranks may finish their units hours apart; the launcher ends the others where a rank dies."""
_FAREWELL = timedelta(seconds=20)
_SHORT_PAUSE_SECONDS, _LONG_PAUSE_SECONDS = 0.01, 1.0
_STOPPED = "told to stop by "
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


def prepare_sources(
    config: RunConfig, stage: Literal["all", "edit", "merge"] = "all", share: Share = WHOLE
) -> RunConfig:
    """Look for all datasets and make the missing ones. Collective over the ranks of the launcher.

    Args:
        config: the run's.
        stage: ``edit`` does these ranks' work units and merges nothing, ``merge`` joins units that are done.
        share: of an edit that other jobs have shares of, too.

    Returns:
        The configuration with the prefix of every source; after ``merge`` of every source that is begun.

    Raises:
        TokeditError: preprocessing failed here or on another rank, or there are units missing to merge.
        StopNow: another rank was told to stop.
    """
    with Ranks("prepare") as ranks:
        config = known_sources(config) if stage == "merge" else _located(config, ranks)
        missing = _missing(config, ranks)
        if not missing:
            logger.info("all data sources are there, nothing to prepare")
        if stage == "merge":
            ranks.together("units", partial(refuse_missing_units, config, missing))
        for number, source in enumerate(missing):
            job = preprocessing_of(source, config.tokenizer)
            verb = "merging" if stage == "merge" else "preparing"
            whose = f" (share {share})" if share != WHOLE else ""
            logger.info(
                "%s source %s%s: %s from %s", verb, source.name, whose, source.prefix, ", ".join(job.input)
            )
            if stage != "merge":
                ranks.together(f"edit-{number}", partial(_edit, job, ranks, share))
            if stage != "edit":
                ranks.together(f"merge-{number}", partial(_merge, job, ranks))
    return config


def refuse_missing_units(config: RunConfig, sources: Sequence[SourceConfig]) -> None:
    """Refuse to merge while a source has work units that are not done; changes nothing.

    Raises:
        PlanError: names all of them, and the array tasks that owe the units, where their number is known.
    """
    faults, tasks = [], set[int]()
    num_tasks = config.slurm.preprocess.tasks
    for source in sources:
        units = look_at_units(config, source)
        if units is None:
            faults.append(f"{source.name}: not begun, or its input has changed since")
            tasks |= set(range(num_tasks or 0))
            continue
        if units.undone and not dataset_exists(source.prefix):  # another job may have merged it meanwhile
            num_units = len(units.done) + len(units.undone)
            faults.append(f"{source.name}: {len(units.undone)} of {num_units} work units are not done")
            tasks |= {unit_id % num_tasks for unit_id in units.undone} if num_tasks else set()
    if faults:
        owed = (
            f" (of slurm.preprocess.tasks={num_tasks}: --array={array_expression(sorted(tasks))})"
            if tasks
            else ""
        )
        listed = "\n  - ".join(["cannot merge yet:", *faults])
        raise PlanError(
            f"{listed}\nrun the edit again for what is missing{owed}; what is done is not done again"
        )


def _missing(config: RunConfig, ranks: Ranks) -> list[SourceConfig]:
    """The sources to make, as rank 0 sees them: another job may finish one between two ranks' looks."""

    def look() -> dict[str, str]:
        missing = missing_sources(config)
        return {where: "" for where, source in all_sources(config.data) if any(source is m for m in missing)}

    places = ranks.from_rank_zero("missing", look)
    return [source for where, source in all_sources(config.data) if where in places]


def _located(config: RunConfig, ranks: Ranks) -> RunConfig:
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


def _edit(job: PreprocessConfig, ranks: Ranks, share: Share) -> None:
    """One rank's units."""
    from megatron_tokedit.pipeline import run

    rank, world_size = share.placement(ranks.rank, ranks.world_size)
    # a prior works in child processes: it leaves no trace in the process that goes on to train
    run(job, rank=rank, world_size=world_size, stage="edit", isolate=job.edits)


def _merge(job: PreprocessConfig, ranks: Ranks) -> None:
    """Rank 0's part."""
    from megatron_tokedit.pipeline import run

    if ranks.rank == 0:
        run(job, stage="merge")


class Ranks:
    """The launcher's ranks before there is a process group: they meet at its key-value store.

    Without torchrun's agent rank 0 is the store's host. Invariant: it stays until every other rank has read
    all that it waits for, on failure too, so that each says what went wrong and not that a host was lost.

    Args:
        name: of this meeting.
    """

    def __init__(self, name: str) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._store: Any = None
        if self.world_size > 1:
            store, _, _ = next(rendezvous("env://", timeout=_PATIENCE))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = dist.PrefixStore(f"{name}-{attempt}", store)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if self._store is None or (failure is not None and issubclass(failure, StopNow)):
            return  # told to stop, as all others are: there is no time to wait
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
        return cast("dict[str, str]", json.loads(self._hear(f"{name}/result")))

    def word_of_rank_zero(self, name: str, text: str) -> str:
        """What rank 0 gives as ``text``. Collective; costs one question a rank."""
        if self._store is None:
            return text
        if self.rank == 0:
            self._say(name, text)
        return self._hear(name)

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
        except StopNow as reason:
            self._end(name, f"{_STOPPED}{reason}")
            raise
        except BaseException as error:
            self._end(name, f"{type(error).__name__}: {error}")
            raise
        verdict = self._end(name, "")
        if verdict.startswith(_STOPPED):
            raise StopNow(verdict.removeprefix(_STOPPED))
        if verdict:
            raise TokeditError(f"preparing the data failed on {verdict}")

    def _end(self, name: str, message: str) -> str:
        """Tell what an action came to on this rank; without a failure here, hear what it came to on all.

        Rank 0 alone listens to every rank and says what it heard: the work of the store's host grows with the
        number of ranks, not with its square.
        """
        verdict = f"{name}/verdict"
        if self.rank > 0:
            self._say(f"{name}/{self.rank}", message)
            return message or self._hear(verdict)
        heard, rank = message, 0
        while not heard and rank + 1 < self.world_size:
            rank += 1
            heard = self._hear(f"{name}/{rank}")
        if heard and not heard.startswith(_STOPPED):
            heard = f"rank {rank}: {heard}"
        self._say(verdict, heard)
        return heard

    def _say(self, key: str, text: str) -> None:
        """Leave word for the other ranks; there may be nobody left to read it."""
        with suppress(dist.DistError):
            self._store.set(key, text)

    def _hear(self, key: str) -> str:
        """Another rank's word, whenever it comes. Waits in Python, where signals are heard.

        Raises:
            TokeditError: the host of the store is gone.
        """
        pause = _SHORT_PAUSE_SECONDS
        try:
            while not self._store.check([key]):
                time.sleep(pause)
                pause = min(2 * pause, _LONG_PAUSE_SECONDS)
            return cast("str", self._store.get(key).decode())
        except dist.DistError as error:
            raise TokeditError(
                f"preparing the data: rank 0 or its node ended before all ranks were ready ({error})"
            ) from error


@contextmanager
def _as_single_process() -> Iterator[None]:
    """Hide the launcher's variables: a Megatron checkpoint as prior starts parallel state of its own."""
    hidden = {name: os.environ.pop(name) for name in _LAUNCHER_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
