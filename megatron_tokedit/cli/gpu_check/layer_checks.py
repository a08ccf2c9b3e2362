"""Checks of the machine, of single layers, and of sizes at the edges."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from megatron_tokedit.cli.gpu_check.checks import Bench, Check, Verdict
from megatron_tokedit.cli.gpu_check.edge_cases import EDGE_CASES
from megatron_tokedit.cli.gpu_check.layer_jobs import compare_linear, mask_documents, train_at_edges
from megatron_tokedit.cli.gpu_check.runner import job
from megatron_tokedit.config.recipes import RECIPES

FP8_RECIPES = tuple(name for name, recipe in RECIPES.items() if recipe.is_fp8)
_MOST_BF16_ERROR = 0.006
"""Rounding of the result alone: 2^-9 / sqrt(3) = 0.11% of a value, and some for the accumulation."""
_LEAST_FP8_ERROR = 0.01
"""Less than this is no FP8: e4m3 rounds each operand by 2.5% (root mean square)."""
_MOST_FP8_ERROR = {"output": 0.06, "input_grad": 0.10, "weight_grad": 0.10}
"""Two operands of e4m3 give 3.6%, one of e4m3 and one of e5m2 (gradients of a hybrid recipe) 5.6%."""
_MOST_MASK_ERROR = 0.05
_LEAST_UNMASKED = 5.0


def layer_checks() -> list[Check]:
    """The checks of this file."""
    return [
        Check("machine", "what is installed is whole, and what it is", _machine),
        *(
            Check(
                f"linear_{name}",
                "a linear layer of Transformer Engine in FP8 is as near to the exact product as FP8 can be",
                partial(_linear, recipe=name),
                recipes=(name,),
                needs_gpu=True,
            )
            for name in FP8_RECIPES
        ),
        Check(
            "edges_refused",
            "sizes that FP8 products do not take are refused before a run, by field; others are not",
            _edges_refused,
        ),
        *(
            Check(
                f"edges_{name}",
                "every sequence length and vocabulary size that is not refused trains",
                partial(_edges, recipe=name),
                recipes=(name,),
            )
            for name in ("bf16", *FP8_RECIPES)
        ),
        Check(
            "masked_documents",
            "documents in one sequence do not see each other where data.reset_attention_mask says so",
            _masked_documents,
            recipes=("bf16",),
        ),
    ]


def _machine(bench: Bench) -> Verdict:
    machine = bench.machine
    probe = machine["probe"]
    numbers = {key: value for key, value in probe.items() if key != "faults"} | machine["versions"]
    return Verdict(numbers, list(probe["faults"]))


def _linear(bench: Bench, recipe: str) -> Verdict:
    errors = bench.runner.run(job(f"linear_{recipe}", compare_linear, limit_seconds=120, recipe=recipe))
    return judge_linear(errors)


def judge_linear(errors: dict[str, Any]) -> Verdict:
    """The verdict on ``engine.fp8_evidence.linear_errors``."""
    faults = [
        f"bfloat16 {part} is {error:.2%} off, more than {_MOST_BF16_ERROR:.2%}"
        for part, error in errors["bf16"].items()
        if not error <= _MOST_BF16_ERROR
    ]
    for part, error in errors["fp8"].items():
        if not error <= _MOST_FP8_ERROR[part]:
            faults.append(f"FP8 {part} is {error:.2%} off, more than {_MOST_FP8_ERROR[part]:.0%}")
        elif error < _LEAST_FP8_ERROR:
            faults.append(f"FP8 {part} is only {error:.2%} off: that was not computed in FP8")
    return Verdict(errors, faults)


def _edges_refused(bench: Bench) -> Verdict:
    faults, refused = [], 0
    for recipe in FP8_RECIPES:
        for case in EDGE_CASES:
            found = case.faults(recipe)
            refused += bool(found)
            if case.in_fp8 == "refused" and not found:
                faults.append(f"{recipe}: {case.name} is not refused")
            if case.in_fp8 == "runs" and found:
                faults.append(f"{recipe}: {case.name} is refused: {found[0].problem}")
    cases = len(FP8_RECIPES) * len(EDGE_CASES)
    return Verdict({"recipes": len(FP8_RECIPES), "sizes": cases, "refused": refused}, faults)


def _edges(bench: Bench, recipe: str) -> Verdict:
    """Train at every size that the configuration's checks let through."""
    allowed = [case for case in EDGE_CASES if not case.faults(recipe)]
    result = bench.runner.run(
        job(
            f"edges_{recipe}",
            train_at_edges,
            limit_seconds=150,
            recipe=recipe,
            cases=[case.for_job() for case in allowed],
        )
    )
    faults = []
    for name, losses in result["cases"].items():
        if isinstance(losses, str):
            faults.append(f"{name}: {losses}")
        elif not all(map(math.isfinite, losses)):
            faults.append(f"{name}: losses {losses} are not finite")
    return Verdict({"trained": len(allowed) - len(faults), "refused": len(EDGE_CASES) - len(allowed)}, faults)


def _masked_documents(bench: Bench) -> Verdict:
    recipe = "bf16" if bench.has_gpu else "fp32"
    found = bench.runner.run(job("masked_documents", mask_documents, limit_seconds=120, recipe=recipe))
    return judge_masking(found)


def judge_masking(found: dict[str, float]) -> Verdict:
    """The verdict on ``layer_jobs.mask_documents``: differences as shares of the largest logit."""
    masked, unmasked = found["masked"] / found["logit"], found["unmasked"] / found["logit"]
    faults = []
    if not masked <= _MOST_MASK_ERROR:
        faults.append(f"a masked document's logits are {masked:.1%} off those it has alone")
    if not unmasked >= _LEAST_UNMASKED * max(masked, 1e-3):
        faults.append(f"without the mask they differ by {unmasked:.1%} only: the check would see nothing")
    return Verdict({"masked": masked, "unmasked": unmasked}, faults)
