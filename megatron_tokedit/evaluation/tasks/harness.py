"""One evaluation by lm-eval: seeds, few-shot examples, then its ``evaluate``; what came of it as records.

lm-eval's ``simple_evaluate`` does the same and more, among it a survey of the machine that takes seconds a
model. Invariant: the settings of tasks, the order of documents and the metrics are lm-eval's; nothing of what
it prints reaches the user.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

from megatron_tokedit.errors import ConfigError
from megatron_tokedit.evaluation.tasks.catalog import LoadedTasks
from megatron_tokedit.evaluation.tasks.results import Score, TaskScores
from megatron_tokedit.evaluation.tasks.settings import TaskSettings
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)

_STDERR = "_stderr"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one model reached.

    Attributes:
        tasks: scores of tasks and groups, in the order in which they were asked for.
        configs: task -> its configuration, as far as JSON has it.
        samples: task -> a record a document, with the model's answers.
    """

    tasks: tuple[TaskScores, ...]
    configs: dict[str, Any]
    samples: dict[str, list[Any]]


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep lm-eval and what it uses from writing to the terminal; the adapter writes past it."""
    known, sink = logging.getLogger("lm_eval"), io.StringIO()
    level, had_bars = known.level, not datasets.are_progress_bars_disabled()
    known.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield
    finally:
        known.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


def prepare(loaded: LoadedTasks, settings: TaskSettings, num_shares: int = 1) -> None:
    """Give tasks their settings.

    Raises:
        ConfigError: a task has fewer documents than there are processes to share them.
    """
    for name, task in loaded.tasks.items():
        own = task.get_config("num_fewshot")
        if settings.num_fewshot is None:
            task.set_config(key="num_fewshot", value=own or 0)
        elif own == 0 and settings.num_fewshot:
            logger.warning("task %s: says num_fewshot 0 itself, which --num-fewshot does not change", name)
        else:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        num_documents = _num_documents(task, settings.limit)
        if num_documents < num_shares:
            raise ConfigError(
                f"task {name}: has {num_documents} documents to share among {num_shares} processes; start "
                "fewer (torchrun --nproc-per-node), or raise --limit"
            )


def run_tasks(model: Any, loaded: LoadedTasks, settings: TaskSettings) -> Outcome | None:
    """Evaluate one model.

    Args:
        model: an lm-eval model.
        loaded: the tasks, after :func:`prepare`.
        settings: how.

    Returns:
        None in processes that only had a share of the documents.

    Raises:
        TokeditError: what the model refused.
    """
    other = DEFAULT_OTHER_SEED if settings.seed is None else settings.seed
    random.seed(DEFAULT_RANDOM_SEED if settings.seed is None else settings.seed)
    np.random.seed(other)
    torch.manual_seed(other)
    for task in loaded.tasks.values():
        task.set_fewshot_seed(seed=other)
    with silence():
        found = evaluator.evaluate(
            lm=model,
            task_dict=loaded.content,
            limit=_lm_eval_limit(settings.limit),
            bootstrap_iters=settings.bootstrap_iters,
            log_samples=True,
        )
    return None if found is None else _outcome(found, loaded)


def _lm_eval_limit(limit: float | None) -> float | None:
    """A whole number as such."""
    return int(limit) if limit is not None and limit >= 1 else limit


def _num_documents(task: Any, limit: float | None) -> int:
    num_documents = len(task.eval_docs)
    if limit is None:
        return num_documents
    return min(num_documents, int(limit) if limit >= 1 else int(np.ceil(num_documents * limit)))


def _outcome(found: Any, loaded: LoadedTasks) -> Outcome:
    """lm-eval's results as records: tasks in the order in which they were asked for, groups behind them."""
    results: dict[str, Any] = found["results"]
    configs = {name: _plain(config) for name, config in found["configs"].items()}
    names = [*loaded.tasks, *(name for name in results if name not in loaded.tasks)]
    tasks = []
    for name in names:
        config, metrics = configs.get(name), results[name]
        scores = _scores(metrics, found["higher_is_better"].get(name) or {})
        if name not in loaded.tasks and not scores:
            continue  # a group without numbers of its own
        version = found["versions"].get(name)
        tasks.append(
            TaskScores(
                task=name,
                subtasks=tuple(found["group_subtasks"].get(name, ())),
                scores=scores,
                num_documents=metrics.get("sample_len"),
                num_fewshot=found["n-shot"].get(name),
                version=None if version is None else str(version),
                config_sha256=None if config is None else _digest(config),
            )
        )
    return Outcome(tuple(tasks), configs, found.get("samples") or {})


def _scores(metrics: dict[str, Any], better: dict[str, Any]) -> tuple[Score, ...]:
    """The metrics of one task, from lm-eval's ``metric,filter`` keys."""
    scores = []
    for key, value in metrics.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith(_STDERR) or isinstance(value, bool):
            continue
        if not isinstance(value, int | float | np.number):
            continue
        stderr = metrics.get(f"{metric}{_STDERR},{filter_name}")
        scores.append(
            Score(
                metric=metric,
                filter=filter_name,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float | np.number) else None,
                higher_is_better=better.get(metric),
            )
        )
    return tuple(scores)


def _plain(config: Any) -> Any:
    """A configuration as JSON has it; functions by their names."""
    return json.loads(
        json.dumps(config, default=lambda thing: getattr(thing, "__name__", None) or str(thing))
    )


def _digest(config: Any) -> str:
    """SHA-256 (hex) of a task's configuration, wherever its file lies."""
    metadata = {key: value for key, value in (config.get("metadata") or {}).items() if key != "config_source"}
    text = json.dumps(config | {"metadata": metadata}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
