"""Checks of what a trained model is taken for: text that it writes, and the Hugging Face folder of it."""

from __future__ import annotations

from functools import partial

from megatron_tokedit.cli.gpu_check.checks import Bench, Check, Verdict
from megatron_tokedit.cli.gpu_check.runner import Numbers, job
from megatron_tokedit.cli.gpu_check.text_jobs import continue_texts, convert_run
from megatron_tokedit.cli.gpu_check.training_checks import whole_run

_RUN = "bf16"
_MOST_GAP = {"float32": 0.02, "bfloat16": 0.25}
"""Nats by which another token may be the more probable one without the cache. Rounding alone makes ties: a
logit of 16 has steps of 1/16 in bfloat16, and the layers' rounding comes to it. A cache that is wrong by a
position gives gaps of several nats."""
_MOST_OTHERWISE = {"float32": 0.01, "bfloat16": 0.05}
_LEAST_TOKENS = 100


def text_checks() -> list[Check]:
    """The checks of this file."""
    return [
        *(
            Check(
                f"generate_{dtype}",
                "text written with the key/value cache is what a pass over all of it would choose",
                partial(_generate, dtype=dtype),
                recipes=recipes,
            )
            for dtype, recipes in (("float32", ("bf16", "fp32")), ("bfloat16", ("bf16",)))
        ),
        Check(
            "convert_bfloat16",
            "a run becomes a Hugging Face folder that scores every token as it does",
            partial(_convert, dtype="bfloat16"),
            recipes=("bf16",),
        ),
    ]


def _generate(bench: Bench, dtype: str) -> Verdict:
    whole_run(bench, _RUN)
    written = job(f"generate_{dtype}", continue_texts, limit_seconds=120, run=_RUN, dtype=dtype)
    return judge_text(bench.runner.run(written), dtype)


def judge_text(found: Numbers, dtype: str) -> Verdict:
    """The verdict on what ``text_jobs.continue_texts`` found."""
    if found["tokens"] < _LEAST_TOKENS:
        return Verdict({}, [f"{found['tokens']} tokens were written, too few to compare"])
    share = found["otherwise"] / found["tokens"]
    faults = []
    if not share <= _MOST_OTHERWISE[dtype]:
        faults.append(
            f"without the cache {found['otherwise']} of {found['tokens']} tokens would be others, more than "
            f"{_MOST_OTHERWISE[dtype]:.0%}"
        )
    if not found["largest_gap"] <= _MOST_GAP[dtype]:
        faults.append(
            f"without the cache another token is the more probable by {found['largest_gap']:.3f} nats, more "
            f"than the {_MOST_GAP[dtype]} of a tie"
        )
    return Verdict(found, faults)


def _convert(bench: Bench, dtype: str) -> Verdict:
    whole_run(bench, _RUN)
    return Verdict(bench.runner.run(job("convert", convert_run, limit_seconds=120, run=_RUN, dtype=dtype)))
