"""What ``tools/train.py --dry-run`` and ``--progress`` print.

Invariant: needs no GPU and no process group, changes nothing on disk (but the index cache, where
``--build-index`` asks for it), and goes on past a problem to find the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tokedit.cli.train_data_report import data_lines
from megatron_tokedit.config.batch_sizes import batch_stages, total_samples
from megatron_tokedit.config.parallel_checks import layout_in_words, model_ranks, smallest_world
from megatron_tokedit.config.raw_sources import preprocessing_of, with_prefixes
from megatron_tokedit.config.record import resolve, to_yaml
from megatron_tokedit.config.sections import RunConfig, SourceConfig
from megatron_tokedit.config.validate import num_microbatches, validate
from megatron_tokedit.dataset.sources import all_sources, dataset_exists, missing_sources
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.errors import DataFormatError, TokeditError
from megatron_tokedit.pipeline.placement import WHOLE, Share
from megatron_tokedit.pipeline.plan import load_plan
from megatron_tokedit.pipeline.prepared import placed_output_prefix
from megatron_tokedit.pipeline.workdir import WorkDir
from megatron_tokedit.training.trackers import missing_packages

if TYPE_CHECKING:
    from megatron_tokedit.engine.preflight import Probe

GIB = 1024**3
REQUEUE_FILE = "requeue"
"""In the run folder of a run that was stopped by a signal or its time limit, until it is started again."""


def known_sources(config: RunConfig) -> RunConfig:
    """The configuration with the prefixes that are known without reading any input; changes nothing."""
    return with_prefixes(config, partial(placed_output_prefix, prepared_dir=config.data.prepared_dir))


@dataclass(frozen=True, slots=True)
class RunProgress:
    """How far a run is.

    Attributes:
        step: of the newest complete checkpoint.
        train_steps: where it ends; 0 where it is given in epochs and has no checkpoint yet.
        units: work units that are done, of all sources or of one share.
        missing: ``NAME: 3 of 11 units`` for every source that has to be made first.
    """

    step: int
    train_steps: int
    units: int
    missing: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to train."""
        return 0 < self.train_steps <= self.step

    def __str__(self) -> str:
        return "; ".join(
            [
                f"step {self.step} of {self.train_steps or 'its epochs'}",
                *(f"preparing {source}" for source in self.missing),
            ]
        )


def find_progress(config: RunConfig, share: Share = WHOLE) -> RunProgress:
    """Look how far a run is, without torch and without reading any input.

    Args:
        config: the run's.
        share: count its work units only.
    """
    config = known_sources(config)
    latest = checkpoint_folder.find_latest(Path(config.run_dir) / "checkpoints")
    step = checkpoint_folder.read_json(latest, checkpoint_folder.STATE_FILE)["step"] if latest else 0
    train_steps = config.training.train_steps
    if not train_steps and latest is not None:
        train_steps = _recorded_steps(config, latest)
    units, missing = 0, []
    for source in missing_sources(config):
        done, planned = _count_units(config, source, share)
        units += done
        missing.append(
            f"{source.name}: not begun" if planned is None else f"{source.name}: {done} of {planned} units"
        )
    return RunProgress(step, train_steps, units, tuple(missing))


def _recorded_steps(config: RunConfig, checkpoint: Path) -> int:
    """The steps that a run's epochs came to when it was last started; 0 if its epochs are others now."""
    recorded = checkpoint_folder.read_json(checkpoint, checkpoint_folder.RUN_CONFIG_FILE)

    def epochs(mapping: dict[str, Any]) -> list[Any]:
        sources = mapping["data"]["train"]
        return [mapping["training"].get("train_epochs"), *((s["name"], s.get("epochs")) for s in sources)]

    is_same = epochs(recorded) == epochs(config.model_dump(mode="json"))
    return int(recorded["training"]["train_steps"]) if is_same else 0


def count_made_units(config: RunConfig, share: Share = WHOLE) -> int:
    """Work units of the sources that are made, as far as their plans are still there.

    Together with :attr:`RunProgress.units` a number that does not fall when units are merged.
    """
    config = known_sources(config)
    raw = (source for _, source in all_sources(config.data) if source.input is not None)
    made = {source.prefix: source for source in raw if dataset_exists(source.prefix)}
    return sum(_count_units(config, source, share)[1] or 0 for source in made.values())


@dataclass(frozen=True, slots=True)
class Units:
    """Ids of a source's planned work units, by whether they are done."""

    done: frozenset[int]
    undone: frozenset[int]


def look_at_units(config: RunConfig, source: SourceConfig) -> Units | None:
    """A source's work units; None where it has no plan yet.

    Args:
        config: the run's.
        source: with the prefix that is known, if any.
    """
    workdir = WorkDir(preprocessing_of(source, config.tokenizer).output_prefix)
    plan = load_plan(workdir.plan) if source.prefix is not None else None
    if plan is None:
        return None
    planned = frozenset(unit.unit_id for unit in plan.units)
    done = planned.intersection(workdir.done_units())
    return Units(done, planned - done)


def _count_units(config: RunConfig, source: SourceConfig, share: Share) -> tuple[int, int | None]:
    """A share's finished and planned units of a source; None where it has no plan yet."""
    units = look_at_units(config, source)
    if units is None:
        return 0, None
    return sum(map(share.has, units.done)), sum(map(share.has, units.done | units.undone))


def print_progress(config: RunConfig) -> int:
    """Print how far the run is on one line, without torch; returns the exit code.

    The newest complete checkpoint's step, while sources have yet to be made their finished work units, and
    ``to be continued`` after a stop that asks for a requeue.
    """
    parts = [f"{config.run_dir}: {find_progress(config)}"]
    stopped = Path(config.run_dir) / REQUEUE_FILE
    if stopped.exists():
        parts.append(f"stopped by {stopped.read_text(encoding='utf-8').strip()}, to be continued")
    print("; ".join(parts))
    return 0


def print_report(
    config: RunConfig, world_size: int | None, *, machine: Probe, build_index: bool = False
) -> int:
    """Print everything that is known before a run starts.

    Args:
        config: sound.
        world_size: number of ranks; None: as few as the model needs, said so.
        machine: that the run is checked for.
        build_index: build the index cache too, if no problem was found.

    Returns:
        0, or 1 if a problem was found.
    """
    problems = missing_packages(config.logging)
    config = known_sources(config)
    parallel = config.parallel
    assumed = " (assumed: as few as the layout needs; give --world-size)" if world_size is None else ""
    ranks = world_size or smallest_world(parallel)
    spec = _tokenizer(config, problems)
    config = _with_steps(config, spec, world_size, problems)
    vocab_size = spec["vocab_size"] if spec else config.model.vocab_size
    if vocab_size is not None:
        config = resolve(config, vocab_size=vocab_size)
    print("# resolved configuration")
    print(to_yaml(config))
    print(f"# sizes on {ranks} rank(s){assumed}")
    for line in _sizes(config, ranks // model_ranks(parallel), vocab_size):
        print(line)
    print("\n# machine")
    for line in _machine(config, machine, problems):
        print(line)
    print("\n# start")
    print(_start(config, spec, problems))
    print("\n# schedule")
    for line in _schedule(config):
        print(line)
    print("\n# data")
    for line in data_lines(config, spec, problems, build_index=build_index):
        print(line)
    if problems:
        print(f"\n# {len(problems)} problem(s)")
        for problem in problems:
            print(f"- {problem}")
        return 1
    print("\nno problems found")
    return 0


def _with_steps(
    config: RunConfig, spec: dict[str, Any] | None, world_size: int | None, problems: list[str]
) -> RunConfig:
    """With the steps that epochs come to, where the data are there; and whether the schedule fits them."""
    from megatron_tokedit.training.length import is_in_epochs, with_train_steps

    if spec is None or not is_in_epochs(config) or missing_sources(config):
        return config
    try:
        config = with_train_steps(config, spec)
        validate(config, world_size)
    except TokeditError as error:
        if not isinstance(error, DataFormatError):  # the data's own problems are told with the data
            problems.append(str(error))
    return config


def _machine(config: RunConfig, machine: Probe, problems: list[str]) -> Iterator[str]:
    """What the run would find here, or on the machine that it is checked for."""
    from megatron_tokedit.engine.preflight import describe, section_faults

    faults = section_faults({name: getattr(config, name) for name in RunConfig.model_fields}, machine)
    problems += map(str, faults)
    yield describe(machine)
    recipe = config.precision.traits
    yield f"recipe {recipe.name}: {recipe.description}" + (", which this machine cannot do" if faults else "")


def _tokenizer(config: RunConfig, problems: list[str]) -> dict[str, Any] | None:
    from megatron_tokedit.tokenizers import load_tokenizer, tokenizer_spec

    try:
        spec = tokenizer_spec(load_tokenizer(config.tokenizer.type, config.tokenizer.model))
    except TokeditError as error:
        problems.append(f"tokenizer: {error}")
        return None
    vocab_size = config.model.vocab_size
    if vocab_size is not None and vocab_size < spec["vocab_size"]:
        problems.append(
            f"model.vocab_size: {vocab_size} ids cannot hold the tokenizer's {spec['vocab_size']}"
        )
    return spec


def _sizes(config: RunConfig, data_parallel: int, vocab_size: int | None) -> Iterator[str]:
    """Batch arithmetic, parameters and memory."""
    from megatron_tokedit.engine.model import flops_per_token, num_parameters
    from megatron_tokedit.training.estimate import estimate_memory

    training, model, parallel = config.training, config.model, config.parallel
    tokens = training.global_batch_size * model.seq_length
    run_tokens = total_samples(training) * model.seq_length
    in_all = (
        f"{run_tokens:,} in {training.train_steps:,} steps"
        if run_tokens
        else "as many steps as the epochs come to"
    )
    yield f"layout: {layout_in_words(parallel, data_parallel)}"
    yield (
        f"batch: {training.global_batch_size} sequences a step = {training.micro_batch_size} a microbatch x "
        f"{num_microbatches(training, data_parallel)} microbatches x {data_parallel} data-parallel rank(s); "
        f"{tokens:,} tokens a step, {in_all}"
    )
    if vocab_size is None:
        yield "parameters: not known without the vocabulary size"
        return
    flops = flops_per_token(model, vocab_size)
    yield f"parameters: {num_parameters(model, vocab_size):,}"
    run_flops = flops * run_tokens
    in_all = f", {run_flops / 1e15:.4g} PFLOP in all" if run_flops else ""
    yield f"compute: {flops / 1e9:.4g} GFLOP a token{in_all}"
    memory = estimate_memory(config, data_parallel_size=data_parallel)
    parts = ("parameters", "gradients", "optimizer", "activations", "logits")
    shown = " + ".join(f"{part} {getattr(memory, part) / GIB:.3g}" for part in parts)
    yield f"memory a rank (estimate): {memory.total / GIB:.3g} GiB = {shown}"


def _start(config: RunConfig, spec: dict[str, Any] | None, problems: list[str]) -> str:
    """What the first step goes on from."""
    from megatron_tokedit.training.origin import find_origin

    if spec is None:
        return "checkpoints cannot be checked without the tokenizer"
    try:
        origin = find_origin(config, spec, Path(config.run_dir) / "checkpoints", speaks=False)
    except TokeditError as error:
        problems.append(str(error))
        return "from a checkpoint that cannot be used"
    if origin.folder is None:
        return "from scratch"
    if origin.is_own:
        steps = config.training.train_steps or "its epochs"
        return f"goes on after step {origin.state['step']} of {steps}: {origin.folder}"
    return f"step 0 with the weights of {origin.folder}"


def _schedule(config: RunConfig) -> Iterator[str]:
    """The learning rate at the schedule's corners and in between."""
    from megatron_tokedit.engine.optimizer import learning_rates

    steps = config.training.train_steps
    if not steps:
        yield "not known before the epochs of the data are"
        return
    shown = {1, steps, *(max(1, steps * part // 8) for part in range(1, 8))}
    for corner in _corners(config):
        shown |= {step for step in (corner, corner + 1) if 0 < step <= steps}
    chosen = sorted(shown)
    for step, rate in zip(chosen, learning_rates(config, chosen), strict=True):
        yield f"step {step:>{len(str(steps))}}: learning rate {rate:.6g}"


def _corners(config: RunConfig) -> Iterator[int]:
    """Steps after which the warm-up ends, and a WSD schedule's decay begins; and the decay's last step."""
    schedule = config.schedule
    stages = batch_stages(config.training)
    seq_length = config.model.seq_length
    length = stages[-1].end_sample * seq_length if schedule.in_tokens else config.training.train_steps
    end = schedule.decay or length
    start_of_fall = end - schedule.wsd_decay if schedule.wsd_decay else 0
    for corner in (schedule.warmup, start_of_fall, end):
        if not schedule.in_tokens:
            yield corner
            continue
        for stage in stages:
            if stage.end_sample * seq_length >= corner:
                samples = -(-corner // seq_length) - stage.first_sample
                yield stage.first_step + max(0, -(-samples // stage.batch_size))
                break
