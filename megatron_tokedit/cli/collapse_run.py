"""A collapse experiment from its YAML file to its report: ``tools/collapse_experiment.py --config``."""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

from megatron_tokedit import log
from megatron_tokedit.config.collapse import CollapseConfig, load_collapse_config
from megatron_tokedit.dataset import atomic_write_bytes
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.experiments import collapse_report
from megatron_tokedit.experiments.cells import Cell, Commands, Store, in_order, make_cells
from megatron_tokedit.experiments.collapse import Experiment, Measurement

logger = log.get_logger(__name__)
_SMOKE_BYTES = 40_000


def run(arguments: argparse.Namespace) -> None:
    """Make what is missing of an experiment, and report.

    Raises:
        TokeditError: the configuration is faulty, text is missing, or a cell's command failed.
    """
    config = load_collapse_config(arguments.config, arguments.overrides)
    if arguments.smoke:
        config = _small(config)
    measurements = Experiment(config).measurements()
    folder = Path(config.output_dir).resolve()
    store = Store(folder / "cells")
    cells = in_order([measurement.perplexity for measurement in measurements])
    missing = [cell for cell in cells if store.result(cell) is None]
    print(f"{len(measurements)} models' perplexities from {len(cells)} cells; {len(missing)} are to be made")
    if arguments.dry_run:
        for cell in cells:
            print(f"  {'to do' if cell in missing else 'done ':5s}  {cell.folder_name}")
        return
    with _alone(folder), _stopped_by_sigterm():
        try:
            _make(cells, missing, store, config, quiet=arguments.quiet)
        except KeyboardInterrupt as error:
            num_made = sum(store.result(cell) is not None for cell in cells)
            raise KeyboardInterrupt(
                f"interrupted; {num_made} of {len(cells)} cells are made, and the same command goes on there"
            ) from error
        _report(measurements, store, config, folder)


def _small(config: CollapseConfig) -> CollapseConfig:
    """The same experiment with little text, few steps, two generations, one seed and its own folder."""
    steps = {"training": config.run["training"] | {"train_steps": 4}, "schedule": {"lr_warmup_steps": 1}}
    return config.model_copy(
        update={
            "output_dir": f"{config.output_dir.rstrip('/')}-smoke",
            "human": config.human.model_copy(update={"max_bytes": _SMOKE_BYTES}),
            "run": config.run | steps,
            "generations": 2,
            "seeds": config.seeds[:1],
            "mix_shares": config.mix_shares[:2],
        }
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the experiment's folder.

    Raises:
        ConfigError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ConfigError(f"output_dir: {folder} is in use by another collapse_experiment.py") from error
        except OSError as error:
            logger.warning("%s: no file locks here (%s); going on without", folder, error.strerror)
        yield


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the commands too, as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _make(
    cells: list[Cell], missing: list[Cell], store: Store, config: CollapseConfig, *, quiet: bool
) -> None:
    """Make the missing cells, with a bar."""
    cores = len(os.sched_getaffinity(0))
    commands = Commands(threads=max(1, cores // (config.parallel_cells * config.processes)))
    with tqdm(total=len(cells), initial=len(cells) - len(missing), unit="cell", disable=quiet or None) as bar:

        def done(cell: Cell, seconds: float) -> None:
            bar.set_postfix_str(cell.kind, refresh=False)
            bar.update()
            logger.info("%s made in %.0f s", cell.folder_name, seconds)

        make_cells(cells, store, commands, at_once=config.parallel_cells, on_done=done)


def _report(measurements: list[Measurement], store: Store, config: CollapseConfig, folder: Path) -> None:
    """Print the tables; write ``report.md``, ``results.json`` and the pictures."""
    points = collapse_report.collect(measurements, store)
    table = collapse_report.as_table(points)
    said = "\n".join(f"- {line}" for line in collapse_report.findings(points))
    found = collapse_report.as_json(points, config.model_dump(mode="json"))
    atomic_write_bytes(folder / "results.json", orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n")
    pictures = collapse_report.plot(points, folder)
    shown = "\n".join(f"![{path.stem}]({path.name})" for path in pictures)
    command = f"python tools/collapse_experiment.py {' '.join(sys.argv[1:])}"
    text = f"# Held-out perplexity\n\n`{command}`\n\n{table}\n{said}\n\n{shown}\n"
    atomic_write_bytes(folder / "report.md", text.encode())
    print(f"{table}\n{said}")
    logger.info("wrote %s, results.json and %s", folder / "report.md", ", ".join(p.name for p in pictures))
