"""``tools/evaluate.py tasks``: model after model through the tasks, then the table, the files, TensorBoard.

Invariant: tasks and their data are loaded, and every fault of theirs is said, before any model; what was
measured is printed before anything is written; kept answers go when the file that they lead to is there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

from megatron_tokedit import __version__, log
from megatron_tokedit.cli.evaluate_board import append_to_board
from megatron_tokedit.dataset import atomic_write_bytes
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.evaluation.tasks.adapter import ProjectLM
from megatron_tokedit.evaluation.tasks.answers import AnswerLog
from megatron_tokedit.evaluation.tasks.catalog import LoadedTasks, load_tasks
from megatron_tokedit.evaluation.tasks.harness import Outcome, prepare, run_tasks, silence
from megatron_tokedit.evaluation.tasks.huggingface import load_lm_eval_model
from megatron_tokedit.evaluation.tasks.model import ModelOptions, load_task_model
from megatron_tokedit.evaluation.tasks.results import CheckpointScores, as_json, as_table
from megatron_tokedit.evaluation.tasks.settings import TaskSettings
from megatron_tokedit.evaluation.tasks.shares import Shares, join_shares
from megatron_tokedit.scoring.load import detect_backend, identify_prior
from megatron_tokedit.scoring.replica_group import Replica

logger = log.get_logger(__name__)

_OF_TASKS = ("num_fewshot", "limit", "seed", "bootstrap_iters")
_OF_MODELS = ("dtype", "context", "document_start", "batch_tokens", "logits_bytes", "tokenizer_type",
              "tokenizer_model")  # fmt: skip
_DEFAULT_SEED = 1234


def evaluate_all(arguments: argparse.Namespace, replica: Replica | None) -> None:
    """Do all that the arguments say, in a process that has results, or a share of the documents.

    Raises:
        TokeditError: tasks, models or arguments that cannot be used.
    """
    names = _names(arguments.checkpoints)
    for path in arguments.checkpoints:
        if detect_backend(path) != "hf" and arguments.backend == "lm-eval":
            raise ConfigError(
                f"--backend lm-eval: {path} is no Hugging Face folder; leave the option out for it"
            )
    settings = TaskSettings(**{name: getattr(arguments, name) for name in _OF_TASKS})
    shares = join_shares() if replica is None else Shares(0, 1)
    if shares.count > 1 and arguments.backend == "lm-eval":
        raise ConfigError("--backend lm-eval: runs in one process; start it without torchrun")
    with silence():
        loaded = load_tasks(arguments.tasks, arguments.include_path)
    prepare(loaded, settings, shares.count)
    results, outcomes = [], []
    for path, name in zip(arguments.checkpoints, names, strict=True):
        found = _evaluate(path, name, loaded, settings, arguments, replica, shares)
        if found is not None:
            results.append(found[0])
            outcomes.append(found[1])
    if results:
        _report(results, outcomes, names, arguments)
    shares.leave()


def _names(paths: Sequence[str]) -> list[str]:
    """Short names of the checkpoints; whole paths where those are not different."""
    names = [Path(path).resolve().name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def _evaluate(
    path: str,
    name: str,
    loaded: LoadedTasks,
    settings: TaskSettings,
    arguments: argparse.Namespace,
    replica: Replica | None,
    shares: Shares,
) -> tuple[CheckpointScores, Outcome] | None:
    """One checkpoint through all tasks."""
    options = ModelOptions(
        **{option: getattr(arguments, option) for option in _OF_MODELS},
        device=arguments.device or "auto",
        threads=_threads(replica),
    )
    if arguments.backend == "lm-eval":
        with silence():
            model: Any = load_lm_eval_model(path, options)
        backend, fingerprint, folder = "lm-eval", identify_prior(path).fingerprint, path
        answers, bar = AnswerLog(None, fingerprint), None
    else:
        loaded_model = load_task_model(path, options, replica)
        backend, fingerprint, folder = loaded_model.kind, loaded_model.fingerprint, loaded_model.path
        partial = Path(f"{arguments.output}.partial") if arguments.output else None
        answers = AnswerLog(partial, fingerprint, shares.rank)
        if answers.num_found:
            logger.info("%s: %d answers are known from before (%s)", name, answers.num_found, partial)
        bar = Bar(name, is_shown=not arguments.quiet and shares.rank == 0)
        seed = _DEFAULT_SEED if settings.seed is None else settings.seed
        model = ProjectLM(loaded_model, answers=answers, seed=seed, shares=shares, on_requests=bar)
    begin = time.monotonic()
    try:
        outcome = run_tasks(model, loaded, settings)
    finally:
        answers.close()
        if bar is not None:
            bar.close()
    if outcome is None:
        return None
    seconds = time.monotonic() - begin
    logger.info("%s: %d tasks in %.1f s", name, len(loaded.tasks), seconds)
    return CheckpointScores(folder, backend, fingerprint, seconds, outcome.tasks), outcome


def _threads(replica: Replica | None) -> int:
    import torch

    return 1 if replica is not None else torch.get_num_threads()


def _report(
    results: Sequence[CheckpointScores],
    outcomes: Sequence[Outcome],
    names: Sequence[str],
    arguments: argparse.Namespace,
) -> None:
    """Print the table; write the samples, the file and TensorBoard."""
    print(as_table(results, names))
    print("value +- standard error" + ("; *: best of its row" if names[1:] else ""))
    if arguments.log_samples:
        for name, outcome in zip(names, outcomes, strict=True):
            _write_samples(Path(arguments.log_samples) / name.strip("/").replace("/", "_"), outcome)
        logger.info("wrote the samples to %s", arguments.log_samples)
    if arguments.output:
        path = Path(arguments.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        keys = ("tasks", *_OF_TASKS, *_OF_MODELS, "backend", "tensor_parallel")
        record = as_json(
            results,
            settings={key: getattr(arguments, key) for key in keys},
            versions={
                "megatron_tokedit": __version__,
                **{package: version(package) for package in ("lm_eval", "transformers", "torch")},
            },
            configs=outcomes[0].configs,
        )
        atomic_write_bytes(path, orjson.dumps(record, option=orjson.OPT_INDENT_2, default=str) + b"\n")
        shutil.rmtree(f"{path}.partial", ignore_errors=True)
        logger.info("wrote %s", path)
    for result in results:
        if result.backend == "megatron" and (board := append_to_board(result.checkpoint, _scalars(result))):
            logger.info("entered the numbers into %s", board)


def _scalars(result: CheckpointScores) -> dict[str, float]:
    """Tags and values for TensorBoard."""
    return {
        f"evaluation/tasks/{task.task}/{score.metric}"
        + ("" if score.filter == "none" else f"_{score.filter}"): score.value
        for task in result.tasks
        for score in task.scores
    }


def _write_samples(folder: Path, outcome: Outcome) -> None:
    """A file a task, a line a document."""
    folder.mkdir(parents=True, exist_ok=True)
    option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE
    for task, samples in outcome.samples.items():
        lines = b"".join(orjson.dumps(sample, default=str, option=option) for sample in samples)
        atomic_write_bytes(folder / f"{task.replace('/', '_')}.jsonl", lines)


class Bar:
    """A bar of answered requests on a terminal, one kind of request after another."""

    def __init__(self, name: str, *, is_shown: bool) -> None:
        self._name, self._is_shown, self._stream = name, is_shown, sys.stderr
        self._bar: tqdm[Any] | None = None

    def __call__(self, kind: str, total: int, number: int) -> None:
        """So many more of a kind are answered; 0: they begin."""
        if not number:
            self.close()
            self._bar = tqdm(
                total=total,
                unit="request",
                desc=f"{self._name} {kind}",
                file=self._stream,
                disable=None if self._is_shown else True,
            )
        elif self._bar is not None:
            self._bar.update(number)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
