"""Every schedule against its formula, batch sizes against megatron-core's calculator, and their faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tokedit.config.batch_sizes import batch_size_at, batch_stages, samples_before, total_samples
from megatron_tokedit.config.load import config_from_mapping
from megatron_tokedit.config.record import resolve, to_mapping
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.config.training import ScheduleConfig, TrainingConfig
from megatron_tokedit.engine.optimizer import build_scheduler, learning_rates
from megatron_tokedit.errors import ConfigError

LR, MIN_LR, WARMUP, STEPS = 1e-2, 1e-3, 5, 40


def run_config(schedule: dict[str, Any], **sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "run_dir": "run",
        "tokenizer": {"type": "SentencePieceTokenizer", "model": "m"},
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16},
        "optimizer": {"lr": LR, "min_lr": MIN_LR},
        "schedule": schedule,
        "training": {"train_steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2},
        "data": {"train": [{"name": "a", "prefix": "a"}]},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    return config_from_mapping(tree, origin="test")


def fall(share: Callable[[float], float], length: int) -> Callable[[int], float]:
    """From LR after the warm-up to MIN_LR over the last ``length`` steps."""
    start = STEPS - length

    def rate(done: int) -> float:
        ratio = max(done - start, 0) / length
        return MIN_LR + (LR - MIN_LR) * share(ratio)

    return rate


FORMULAS: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "constant": ({}, lambda done: LR),
    "linear": ({}, fall(lambda r: 1 - r, STEPS - WARMUP)),
    "cosine": ({}, fall(lambda r: (1 + math.cos(math.pi * r)) / 2, STEPS - WARMUP)),
    "inverse-square-root": ({}, lambda done: max(MIN_LR, LR * math.sqrt(WARMUP / done))),
    "WSD linear": ({}, fall(lambda r: 1 - r, 10)),
    "WSD cosine": ({}, fall(lambda r: (1 + math.cos(math.pi * r)) / 2, 10)),
    "WSD exponential": ({}, fall(lambda r: 2 * 0.5**r - 1, 10)),
    "WSD minus_sqrt": ({}, fall(lambda r: 1 - math.sqrt(r), 10)),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_every_schedule_is_its_formula(name: str, unit: str) -> None:
    style, _, wsd_style = name.partition(" ")
    tokens = 8 * 16 if unit == "tokens" else 1
    schedule = {
        "lr_decay_style": style,
        f"lr_warmup_{unit}": WARMUP * tokens,
        "lr_warmup_init": 1e-4,
        **({"lr_wsd_decay_style": wsd_style, f"lr_wsd_decay_{unit}": 10 * tokens} if wsd_style else {}),
    }
    formula = FORMULAS[name][1]
    expected = [
        1e-4 + (LR - 1e-4) * done / WARMUP if done <= WARMUP else formula(done) for done in range(STEPS)
    ]
    assert learning_rates(run_config(schedule), range(1, STEPS + 1)) == pytest.approx(expected, rel=1e-12)


def test_after_the_decay_it_stays_at_the_minimum() -> None:
    rates = learning_rates(run_config({"lr_decay_steps": 20, "lr_decay_style": "linear"}), (21, 22, 40))
    assert rates == pytest.approx([MIN_LR] * 3)


def test_tokens_and_steps_part_ways_under_a_ramp_up() -> None:
    """Eight tokens-counted warm-up batches take more steps while the batches are small."""
    config = run_config(
        {"lr_warmup_tokens": 8 * 8 * 16, "lr_decay_style": "constant"},
        training={"rampup_batch_size": [2, 2, 24]},
    )
    rates = learning_rates(config, range(1, 20))
    consumed, expected = 0, []
    for _ in range(19):
        expected.append(LR * min(consumed / 64, 1))
        consumed += batch_size_at(config.training, consumed)
    assert rates == pytest.approx(expected)
    assert rates[9] < LR


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_weight_decay_grows(style: str) -> None:
    groups: list[dict[str, Any]] = [{}, {"wd_mult": 0.0}]
    schedule = run_config(
        {"start_weight_decay": 0.1, "end_weight_decay": 0.3, "weight_decay_incr_style": style}
    ).schedule
    config = run_config({})
    scheduler = build_scheduler(
        config.optimizer, schedule, SimpleNamespace(param_groups=groups), train_steps=STEPS
    )
    for done in range(STEPS + 5):
        ratio = min(done / STEPS, 1.0)
        share = ratio if style == "linear" else (1 + math.cos(math.pi * (1 - ratio))) / 2
        assert groups[0]["weight_decay"] == pytest.approx(0.1 + 0.2 * share)
        assert groups[1]["weight_decay"] == 0.0
        scheduler.step(1)


@pytest.mark.parametrize("ramp", [[2, 2, 24], [4, 2, 10], [2, 6, 5], [6, 2, 1]])
def test_batch_sizes_are_those_of_megatron_core(ramp: list[int]) -> None:
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    training = TrainingConfig(train_steps=30, global_batch_size=8, micro_batch_size=2, rampup_batch_size=ramp)
    theirs = RampupBatchsizeNumMicroBatchesCalculator(8, 2, 1, False, 0, *ramp)
    stages = batch_stages(training)
    consumed = 0
    for step in range(30):
        theirs.update(consumed, True)
        stage = next(stage for stage in stages if step < stage.end_step)
        assert stage.batch_size == theirs.get_current_global_batch_size() == batch_size_at(training, consumed)
        assert samples_before(stages, step) == consumed
        assert total_samples(training, step=step, consumed_samples=consumed) == stages[-1].end_sample
        consumed += stage.batch_size
    assert stages[-1].end_sample == consumed


def test_resolved_schedule_is_recorded_and_read_back() -> None:
    config = resolve(run_config({"lr_warmup_tokens": 100}), vocab_size=100)
    assert config.schedule.lr_decay_tokens == STEPS * 8 * 16
    assert config.schedule.lr_decay_steps is None
    assert config_from_mapping(to_mapping(config), origin="record") == config
    assert resolve(run_config({}), vocab_size=100).schedule.lr_decay_steps == STEPS


@pytest.mark.parametrize(
    ("schedule", "sections", "expected"),
    [
        (
            {"lr_warmup_steps": 50},
            {},
            "50 must be smaller than lr_decay_steps = 40 (training.train_steps)",
        ),
        (
            {"lr_warmup_tokens": 5120},
            {},
            "5120 must be smaller than lr_decay_tokens = 5120 (training.train_steps in tokens)",
        ),
        ({"lr_warmup_tokens": 1, "lr_decay_steps": 9}, {}, "lr_decay_steps: 9 steps beside fields in tokens"),
        ({"lr_decay_style": "WSD"}, {}, "lr_wsd_decay_steps: missing: lr_decay_style WSD needs"),
        ({"lr_wsd_decay_steps": 3}, {}, "lr_wsd_decay_steps: 3 is for lr_decay_style WSD, not cosine"),
        (
            {"lr_decay_style": "WSD", "lr_warmup_steps": 10, "lr_wsd_decay_steps": 31},
            {},
            "lr_wsd_decay_steps: 31 does not fit between the warm-up of 10 and lr_decay_steps = 40",
        ),
        (
            {"lr_warmup_init": 1.0, "lr_warmup_steps": 2},
            {},
            "1.0 is larger than optimizer.lr",
        ),
        ({"lr_warmup_init": 1e-5}, {}, "has no warm-up to start; set lr_warmup_steps"),
        ({"start_weight_decay": 0.1}, {}, "end_weight_decay: missing"),
        ({"start_weight_decay": 0.2, "end_weight_decay": 0.1}, {}, "end_weight_decay: 0.1 is smaller"),
        ({}, {"training": {"rampup_batch_size": [8, 2, 9]}}, "starts at 8, not below global_batch_size = 8"),
        ({}, {"training": {"rampup_batch_size": [2, 4, 9]}}, "6 is not a multiple of 4"),
        ({}, {"training": {"rampup_batch_size": [3, 5, 9]}}, "start 3 is not a multiple of micro_batch_size"),
        ({}, {"checkpoint": {"keep_every_steps": 4}}, "keep_every_steps: 4 goes with keep_last"),
        (
            {},
            {"checkpoint": {"keep_every_steps": 5, "keep_last": 1, "save_interval_steps": 2}},
            "5 is not a multiple of save_interval_steps = 2; try 4 or 6",
        ),
        ({}, {"stage": "continue"}, "init_from: missing"),
        ({}, {"init_from": {"checkpoint": "x"}}, "stage pretrain starts from fresh weights"),
    ],
)
def test_faults(schedule: dict[str, Any], sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        run_config(schedule, **sections)
    assert expected in str(error.value)


def test_rampup_must_fit_the_ranks() -> None:
    from megatron_tokedit.config.validate import validate

    config = run_config({}, training={"rampup_batch_size": [2, 2, 24]})
    validate(config, 1)
    with pytest.raises(ConfigError, match=r"start 2 is not a multiple of micro_batch_size x data-parallel"):
        validate(config, 2)


def test_unit_of_an_empty_schedule() -> None:
    assert (ScheduleConfig().unit, ScheduleConfig(lr_warmup_tokens=0).unit) == ("steps", "tokens")
