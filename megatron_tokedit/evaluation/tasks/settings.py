"""What is evaluated, and how; the same for every checkpoint of a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """Settings of an evaluation.

    Attributes:
        num_fewshot: examples before a question; None: as each task says.
        limit: documents a task: a number, or below 1 a share; None: all.
        seed: of few-shot examples and of drawn texts; None: lm-eval's own, which it has several of.
        bootstrap_iters: resamplings for standard errors of metrics that are no means.
    """

    num_fewshot: int | None = None
    limit: float | None = None
    seed: int | None = None
    bootstrap_iters: int = 100_000
