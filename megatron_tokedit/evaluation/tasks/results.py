"""Scores of tasks, of checkpoints side by side, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_LARGE = 1e6
"""Perplexities of a word by a model that knows nothing."""


@dataclass(frozen=True, slots=True)
class Score:
    """One number.

    Attributes:
        metric: lm-eval's name of it.
        filter: by which answers were prepared; ``none``: not at all.
        value: the number.
        stderr: its standard error; None: not known.
        higher_is_better: None: neither.
    """

    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True, slots=True)
class TaskScores:
    """What a model reached in a task or a group.

    Attributes:
        task: its name.
        subtasks: of a group.
        scores: its metrics.
        num_documents: that were evaluated.
        num_fewshot: examples before each question; None: they differ within a group.
        version: as the task says.
        config_sha256: of its configuration; None for a group.
    """

    task: str
    subtasks: tuple[str, ...]
    scores: tuple[Score, ...]
    num_documents: int | None
    num_fewshot: int | None
    version: str | None
    config_sha256: str | None


@dataclass(frozen=True, slots=True)
class CheckpointScores:
    """What a model reached, and how it was evaluated.

    Attributes:
        checkpoint: its folder.
        backend: who scored: ``megatron``, ``hf`` or ``lm-eval``.
        fingerprint: SHA-256 (hex) of weights, precision and context.
        seconds: that the evaluation took, loading apart.
        tasks: in the same order for every model.
    """

    checkpoint: str
    backend: str
    fingerprint: str
    seconds: float
    tasks: tuple[TaskScores, ...]


def as_json(results: Sequence[CheckpointScores], **more: Any) -> dict[str, Any]:
    """Everything measured, and the table: a row a metric, a value and a standard error a checkpoint.

    Args:
        results: one or more, of the same tasks.
        more: further entries: settings, versions, configurations.
    """
    table = [
        {
            "task": task,
            "metric": score.metric,
            "filter": score.filter,
            "value": [None if s is None else s.value for s in row],
            "stderr": [None if s is None else s.stderr for s in row],
        }
        for task, score, row in _rows(results)
    ]
    return {**more, "checkpoints": [asdict(result) for result in results], "table": table}


def as_table(results: Sequence[CheckpointScores], names: Sequence[str]) -> str:
    """The table as text; ``names`` head the columns; ``*`` marks the best of a row of several."""
    num_documents = {task.task: task.num_documents for result in results for task in result.tasks}
    head = ["task", "metric", "documents", *(f"{name} " for name in names)]  # room for the mark
    lines = [head]
    for task, score, row in _rows(results):
        values = [s.value for s in row if s is not None]
        best = None
        if len(set(values)) > 1 and score.higher_is_better is not None:
            best = max(values) if score.higher_is_better else min(values)
        metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        cells = [_cell(s, best) for s in row]
        documents = num_documents[task]
        lines.append([task, metric, "" if documents is None else f"{documents:,d}", *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _rows(
    results: Sequence[CheckpointScores],
) -> list[tuple[str, Score, list[Score | None]]]:
    """(task, its score of the first checkpoint, those of all checkpoints)."""
    found = [
        {(task.task, score.metric, score.filter): score for task in result.tasks for score in task.scores}
        for result in results
    ]
    keys = dict.fromkeys(key for scores in found for key in scores)
    return [
        (key[0], next(s[key] for s in found if key in s), [scores.get(key) for scores in found])
        for key in keys
    ]


def _cell(score: Score | None, best: float | None) -> str:
    """A value, its standard error, and room for the mark."""
    if score is None:
        return "- "
    stderr = "" if score.stderr is None else f" +- {score.stderr:.4f}"
    value = f"{score.value:.4f}" if abs(score.value) < _LARGE else f"{score.value:.4e}"
    return f"{value}{stderr}{'*' if score.value == best else ' '}"
