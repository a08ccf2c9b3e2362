"""Checks of training runs: they learn, FP8 is at work and costs no loss, and runs resume under any recipe."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron_tokedit.cli.gpu_check.checks import Bench, Check, Verdict
from megatron_tokedit.cli.gpu_check.data_jobs import prepare_data
from megatron_tokedit.cli.gpu_check.layer_checks import FP8_RECIPES
from megatron_tokedit.cli.gpu_check.rate_jobs import train_rate
from megatron_tokedit.cli.gpu_check.runner import Numbers, job
from megatron_tokedit.cli.gpu_check.sizes import Scale
from megatron_tokedit.cli.gpu_check.training_jobs import train

_MOST_LOSS_GAP = 0.01
"""In nats a token."""
_CPU_RUN, _CPU_SAVE_STEP = "cpu", 3
_EXTRA_CPU_STEPS = 2
_SAME_RECIPE = {"first": 0.002, "mean": 0.01}
_OTHER_RECIPE = {"first": 0.03, "mean": 0.03}
"""Differences in loss, in nats, of the first step after a resumption, and of the mean over all its steps."""


def training_checks() -> list[Check]:
    """The checks of this file."""
    checks = []
    for name in ("bf16", *FP8_RECIPES):
        active = ", and FP8 is really at work" if name in FP8_RECIPES else ""
        checks.append(
            Check(
                f"train_{name}",
                f"20 steps on real text: finite, none skipped, the loss falls{active}",
                partial(_train, recipe=name),
                recipes=(name,),
            )
        )
    checks += [
        Check(
            f"loss_gap_{name}",
            "after 200 steps from the same seed the loss is that of bf16, within 0.01",
            partial(_loss_gap, recipe=name),
            recipes=("bf16", name),
        )
        for name in FP8_RECIPES
    ]
    checks += [
        Check(
            f"resume_{old}_{new}",
            f"a run saved under {old} goes on under {new} with the loss it had",
            partial(_resume, old=old, new=new),
            recipes=(old, new),
        )
        for old, new in _resumptions()
    ]
    checks += [
        Check(
            f"resume_cpu_{new}",
            f"a run saved on a CPU, with local layers, goes on here under {new}",
            partial(_resume_from_cpu, new=new),
            recipes=(new,),
            needs_gpu=True,
        )
        for new in ("bf16", "fp8_tensorwise")
    ]
    checks += [
        Check(
            f"train_rate_{name}",
            "a model of 1B parameters trains at sequence 4096; its speed and memory",
            partial(_train_rate, recipe=name),
            recipes=(name,),
            runs_alone=True,
        )
        for name in ("bf16", *FP8_RECIPES)
    ]
    return checks


def _resumptions() -> list[tuple[str, str]]:
    """(saved under, resumed under): each with itself, and the crossings."""
    same = [(name, name) for name in ("bf16", *FP8_RECIPES)]
    return [
        *same,
        ("bf16", "fp8_tensorwise"),
        ("fp8_tensorwise", "bf16"),
        ("bf16", "fp8_delayed"),
        ("fp8_delayed", "bf16"),
        ("fp8_delayed", "fp8_tensorwise"),
    ]


def whole_run(bench: Bench, recipe: str) -> Numbers:
    """The numbers of an undisturbed run under a recipe, from ``training_jobs.train``."""
    bench.runner.run(job("data", prepare_data, limit_seconds=150))
    return bench.runner.run(job(f"train_{recipe}", train, limit_seconds=200, run=recipe, recipe=recipe))


def _train(bench: Bench, recipe: str) -> Verdict:
    return judge_first_steps(whole_run(bench, recipe), bench.runner.scale)


def judge_first_steps(run: Numbers, scale: Scale) -> Verdict:
    """The verdict on the first steps of a run."""
    losses, norms = run["losses"][: scale.first_steps], run["grad_norms"][: scale.first_steps]
    faults = list(run["faults"])
    if any(value is None or not math.isfinite(value) for value in (*losses, *norms)):
        return Verdict({"losses": losses}, [*faults, "a loss or a gradient norm is not finite"])
    if run["skipped_steps"]:
        faults.append(f"{run['skipped_steps']} steps made no update")
    part = max(1, scale.first_steps // 5)
    begin, end = statistics.fmean(losses[:part]), statistics.fmean(losses[-part:])
    if not end <= begin - scale.least_fall:
        faults.append(f"the loss went from {begin:.3f} to {end:.3f}, expected {scale.least_fall} less")
    evidence = run["evidence"]
    numbers: dict[str, Any] = {"loss_from": begin, "loss_to": end}
    if evidence["num_linear"]:
        numbers |= {key: evidence[key] for key in ("num_active", "num_linear", "num_fp8_weights")}
    return Verdict(numbers | {"peak_memory_gib": run["peak_memory_gib"]}, faults)


def _loss_gap(bench: Bench, recipe: str) -> Verdict:
    scale = bench.runner.scale
    return judge_gap(whole_run(bench, "bf16"), whole_run(bench, recipe), scale)


def judge_gap(reference: Numbers, run: Numbers, scale: Scale) -> Verdict:
    """The verdict on the last steps of two runs over the same batches."""
    for numbers in (reference, run):
        if len(numbers["losses"]) != scale.train_steps:
            steps = len(numbers["losses"])
            return Verdict({}, [f"a run made {steps} of {scale.train_steps} steps"])
    last = [numbers["losses"][-scale.loss_window_steps :] for numbers in (reference, run)]
    if any(loss is None or not math.isfinite(loss) for losses in last for loss in losses):
        return Verdict({}, ["a loss is not finite"])
    means = [statistics.fmean(losses) for losses in last]
    gap = means[1] - means[0]
    faults = list(run["faults"])  # a run without FP8 would have no gap
    if not abs(gap) <= _MOST_LOSS_GAP:
        faults.append(f"the gap of {gap:+.4f} is more than {_MOST_LOSS_GAP}")
    return Verdict({"bf16": means[0], "loss": means[1], "gap": gap}, faults)


def _resume(bench: Bench, old: str, new: str) -> Verdict:
    scale = bench.runner.scale
    reference = whole_run(bench, old)
    resumed = bench.runner.run(
        job(
            f"resume_{old}_{new}",
            train,
            limit_seconds=100,
            run=f"resumed_{old}_{new}",
            recipe=new,
            start=old,
            start_step=scale.save_step,
            exit_at_step=scale.save_step + scale.resumed_steps,
        )
    )
    stop = scale.save_step + scale.resumed_steps
    expected = reference["losses"][scale.save_step : stop]
    return judge_resumption(expected, resumed, scale.save_step, same_recipe=old == new)


def _resume_from_cpu(bench: Bench, new: str) -> Verdict:
    """The steps after the saved one, on the CPU and here."""
    bench.runner.run(job("data", prepare_data, limit_seconds=150))
    stop = _CPU_SAVE_STEP + _EXTRA_CPU_STEPS
    reference = bench.runner.run(
        job(
            "train_cpu",
            train,
            limit_seconds=150,
            hides_gpu=True,
            run=_CPU_RUN,
            recipe="bf16",
            save_interval_steps=_CPU_SAVE_STEP,
            exit_at_step=stop,
        )
    )
    resumed = bench.runner.run(
        job(
            f"resume_cpu_{new}",
            train,
            limit_seconds=100,
            run=f"resumed_cpu_{new}",
            recipe=new,
            start=_CPU_RUN,
            start_step=_CPU_SAVE_STEP,
            exit_at_step=stop,
        )
    )
    return judge_resumption(reference["losses"][_CPU_SAVE_STEP:], resumed, _CPU_SAVE_STEP, same_recipe=False)


def judge_resumption(
    expected: Sequence[float], resumed: Numbers, save_step: int, *, same_recipe: bool
) -> Verdict:
    """The verdict on a resumed run.

    Args:
        expected: losses of the run that was saved, from the step after on.
        resumed: the run that went on.
        save_step: the step it went on after.
        same_recipe: under the recipe it was saved under.
    """
    losses = resumed["losses"]
    if resumed["first_step"] != save_step + 1 or len(losses) != len(expected):
        steps = f"steps {resumed['first_step']} to {resumed['first_step'] + len(losses) - 1}"
        wanted = f"{save_step + 1} to {save_step + len(expected)}"
        return Verdict({}, [f"it made {steps}, expected {wanted}"])
    faults = list(resumed["faults"])
    if resumed["skipped_steps"] or any(loss is None or not math.isfinite(loss) for loss in losses):
        return Verdict({}, [*faults, "a loss is not finite, or a step made no update"])
    gaps = [got - wanted for got, wanted in zip(losses, expected, strict=True)]
    found = {"first": abs(gaps[0]), "mean": abs(statistics.fmean(gaps))}
    limits = _SAME_RECIPE if same_recipe else _OTHER_RECIPE
    faults += [
        f"the loss of the {name} step(s) is {gap:.4f} off, more than {limits[name]}"
        for name, gap in found.items()
        if not gap <= limits[name]
    ]
    return Verdict({"first_gap": found["first"], "mean_gap": found["mean"], "steps": len(losses)}, faults)


def _train_rate(bench: Bench, recipe: str) -> Verdict:
    found = bench.runner.run(job(f"train_rate_{recipe}", train_rate, limit_seconds=150, recipe=recipe))
    faults = [] if math.isfinite(found["loss"]) else [f"the loss is {found['loss']}"]
    return Verdict(found, faults)
