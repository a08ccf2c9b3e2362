"""Checks of priors: Hugging Face and Megatron give the same edits, FP8 nearly the same, and their speed."""

from __future__ import annotations

import math
from functools import partial

from megatron_tokedit.cli.gpu_check.checks import Bench, Check, Verdict
from megatron_tokedit.cli.gpu_check.prior_jobs import HF_PRIOR, edit, write_twin
from megatron_tokedit.cli.gpu_check.rate_jobs import score_rate, write_rate_prior
from megatron_tokedit.cli.gpu_check.runner import Numbers, job
from megatron_tokedit.cli.gpu_check.training_checks import whole_run

_RUN = "bf16"
_MARGINS = {"float32": (0.10, 0.001), "bfloat16": (0.25, 0.01), "fp8": (0.50, 0.05)}
"""Tokens that may be edited otherwise for each that was changed, and the perplexities' gap, by precision.
Scores differ by rounding, and so do edits whose p is next to the threshold or whose draw is next to a
candidate's edge: 6% in bfloat16 on a CPU, 24% with simulated FP8. Transformer Engine multiplies float32
matrices in TF32, which rounds them to 11 bits; torch does not. Of the changed tokens, not of all: two edits
of 0.3% of a text that have nothing in common differ in 0.6% of it."""
_LEAST_CHANGED = 20


def prior_checks() -> list[Check]:
    """The checks of this file."""
    return [
        Check(
            "priors_agree_float32",
            "the same weights edit alike as a Hugging Face and as a Megatron prior",
            partial(_agree, first=("hf", "float32"), second=("megatron", "float32"), margin="float32"),
            recipes=("bf16", "fp32"),
        ),
        Check(
            "priors_agree_bfloat16",
            "and in bfloat16 within its rounding",
            partial(_agree, first=("hf", "bfloat16"), second=("megatron", "bfloat16"), margin="bfloat16"),
            recipes=("bf16",),
        ),
        Check(
            "priors_agree_fp8",
            "a Megatron prior in FP8 edits nearly as in bfloat16",
            partial(_agree, first=("megatron", "bfloat16"), second=("megatron", "fp8"), margin="fp8"),
            recipes=("bf16", "fp8_tensorwise"),
        ),
        *(
            Check(
                f"score_rate_{dtype}",
                "a prior of 1B parameters scores windows of 4096 tokens; its speed and memory",
                partial(_score_rate, dtype=dtype),
                recipes=recipes,
                runs_alone=True,
            )
            for dtype, recipes in (("bfloat16", ("bf16",)), ("fp8", ("bf16", "fp8_tensorwise")))
        ),
    ]


def _edited(bench: Bench, backend: str, dtype: str) -> Numbers:
    """The held-out text, edited by the prior that was trained in the check of the same recipe."""
    whole_run(bench, _RUN)
    if backend == "hf":
        bench.runner.run(job("twin", write_twin, limit_seconds=100, run=_RUN))
    name = f"edit_{backend}_{dtype}"
    prior = HF_PRIOR if backend == "hf" else _RUN
    return bench.runner.run(job(name, edit, limit_seconds=120, name=name, prior=prior, dtype=dtype))


def _agree(bench: Bench, first: tuple[str, str], second: tuple[str, str], margin: str) -> Verdict:
    edits = [_edited(bench, *which) for which in (first, second)]
    return judge_edits(edits[0], edits[1], margin)


def judge_edits(first: Numbers, second: Numbers, margin: str) -> Verdict:
    """The verdict on two edited corpora.

    Args:
        first: from ``prior_jobs.edit``.
        second: likewise, over the same text.
        margin: precision whose margins count.
    """
    import numpy as np

    from megatron_tokedit.dataset import IndexedDataset

    tokens = [np.asarray(IndexedDataset(numbers["prefix"]).tokens) for numbers in (first, second)]
    if len(tokens[0]) != len(tokens[1]):
        return Verdict({}, [f"one has {len(tokens[0])} tokens, the other {len(tokens[1])}"])
    if min(first["changed"], second["changed"]) < _LEAST_CHANGED:
        changed = [first["changed"], second["changed"]]
        return Verdict({}, [f"{changed} tokens were changed, too few to compare"])
    most_edits, most_perplexity = _MARGINS[margin]
    otherwise = int(np.count_nonzero(tokens[0] != tokens[1]))
    share = 2 * otherwise / (first["changed"] + second["changed"])
    perplexity = abs(math.log(second["perplexity"] / first["perplexity"]))
    faults = []
    if not share <= most_edits:
        faults.append(
            f"{otherwise} tokens were edited otherwise, {share:.1%} of those changed, "
            f"more than {most_edits:.0%}"
        )
    if not perplexity <= most_perplexity:
        faults.append(f"the perplexities are {perplexity:.4%} apart, more than {most_perplexity:.2%}")
    numbers = {
        "tokens": len(tokens[0]),
        "changed": first["changed"],
        "edited_otherwise": otherwise,
        "share_of_changed": share,
        "perplexity": first["perplexity"],
        "perplexity_gap": perplexity,
    }
    return Verdict(numbers, faults)


def _score_rate(bench: Bench, dtype: str) -> Verdict:
    bench.runner.run(job("rate_prior", write_rate_prior, limit_seconds=120))
    found = bench.runner.run(job(f"score_rate_{dtype}", score_rate, limit_seconds=150, dtype=dtype))
    return Verdict(found, [] if found["finite"] else ["a log-probability is not finite"])
