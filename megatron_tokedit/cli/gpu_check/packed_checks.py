"""The check of fine-tuning's packed rows: no conversation of a row sees another."""

from __future__ import annotations

from functools import partial

from megatron_tokedit.cli.gpu_check.checks import Bench, Check, Verdict
from megatron_tokedit.cli.gpu_check.packed_jobs import pack_rows
from megatron_tokedit.cli.gpu_check.runner import Numbers, job

_MOST = {"mean": 0.02, "worst": 0.2, "gradient": 0.05}
"""Rounding in bfloat16: differences of a token's loss, in nats, and of the gradients, as a share."""
_MOST_NEIGHBOURS = 1e-3
"""In nats. The shapes are the same, so that not even the rounding should be another."""
_LEAST_SEEN = 0.05
"""By how much losses have to change, in nats, where the check changes what they depend on."""


def packed_checks() -> list[Check]:
    """The checks of this file."""
    return [
        Check(
            "packed_rows",
            "conversations in one row have losses and gradients as if each were alone, whatever the others",
            partial(_packed_rows, recipe="bf16"),
            recipes=("bf16",),
            packs_rows=True,
        )
    ]


def _packed_rows(bench: Bench, recipe: str) -> Verdict:
    return judge_packing(bench.runner.run(job("packed_rows", pack_rows, limit_seconds=150, recipe=recipe)))


def judge_packing(found: Numbers) -> Verdict:
    """The verdict on ``packed_jobs.pack_rows``."""
    faults = []
    for name, what in (
        ("mean", "tokens' losses are {} nats off those of the conversations alone"),
        ("worst", "a token's loss is {} nats off that of the conversation alone"),
        ("gradient", "the gradient is {} of its norm off that of the conversations alone"),
    ):
        if not found[name] <= _MOST[name]:
            faults.append(f"{what.format(f'{found[name]:.4f}')}, more than {_MOST[name]}")
    if not found["neighbours"] <= _MOST_NEIGHBOURS:
        faults.append(
            f"a loss changes by {found['neighbours']:.4f} nats with another conversation of the microbatch: "
            "they see each other"
        )
    for name, where in (("own", "of the changed conversation"), ("without_borders", "without borders")):
        if not found[name] >= _LEAST_SEEN:
            faults.append(
                f"losses {where} change by {found[name]:.4f} nats only: the check would see nothing"
            )
    return Verdict(found, faults)
