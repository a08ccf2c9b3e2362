"""What is not finite makes no update, and its samples are found, on every rank and under every layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_services import write_fake_services
from training_cases import SPEC, load, train_on_rank, write_dataset, write_run

from megatron_tokedit.dataset import IndexedDatasetWriter, best_dtype
from megatron_tokedit.engine.checkpoint_folder import find_latest
from megatron_tokedit.errors import DivergenceError
from megatron_tokedit.testing.models import random_batches, tiny_llama
from megatron_tokedit.testing.ranks import RankFailure, RankPool
from megatron_tokedit.training.metrics import read_metrics

VOCAB_SIZE = 90
POISON = 89
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


def step_with_poison(layout: dict[str, int], poisoned_rows: list[int]) -> Any:
    """A step of 8 microbatches over all ranks whose embedding of one token is not a number."""
    import torch

    from megatron_tokedit.config.sections import (
        OptimizerConfig,
        ParallelConfig,
        PrecisionConfig,
        ScheduleConfig,
    )
    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.engine.model import build_model
    from megatron_tokedit.engine.optimizer import build_optimizer, build_scheduler
    from megatron_tokedit.engine.step import train_step

    parallel, precision, settings = ParallelConfig(**layout), PrecisionConfig(), OptimizerConfig(lr=1e-2)
    ctx = initialize(parallel, seed=7, device="cpu", cpu_threads=1)
    shape = tiny_llama()
    model = build_model(shape, precision, ctx, VOCAB_SIZE, parallel=parallel, wrap_with_ddp=True)
    poison_embedding(model, ctx, VOCAB_SIZE)
    optimizer = build_optimizer(settings, precision, parallel, model, ctx)
    scheduler = build_scheduler(settings, ScheduleConfig(), optimizer, train_steps=20)
    sizes = {"num_microbatches": 8, "micro_batch_size": 2, "seq_length": shape.seq_length}
    dealt = random_batches(POISON, dp_rank=ctx.dp_rank, dp_size=ctx.dp_size, **sizes)
    own = sizes | {"num_microbatches": 8 // ctx.dp_size}

    def batches(rows: list[int]) -> Iterator[dict[str, Any]]:
        for microbatch in range(own["num_microbatches"]):
            batch = {key: value.clone() for key, value in next(dealt).items()}
            first = (microbatch * ctx.dp_size + ctx.dp_rank) * 2
            for row in rows:
                if first <= row < first + 2:
                    batch["tokens"][row - first, 3] = POISON
            yield batch

    before = [parameter.clone() for chunk in model for parameter in chunk.parameters()]
    bad = train_step(model, optimizer, scheduler, batches(poisoned_rows), ctx, **own)
    after = [parameter.clone() for chunk in model for parameter in chunk.parameters()]
    same = all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, after, strict=True))
    good = train_step(model, optimizer, scheduler, batches([]), ctx, **own)
    return bad, same, good


def poison_embedding(model: list[Any], ctx: Any, vocab_size: int) -> None:
    """Makes the embedding of the last id of the vocabulary not a number; no gradient ever comes to it."""
    import torch

    from megatron_tokedit.engine.model import unwrap

    if ctx.is_first_stage:
        weight = unwrap(model[0]).embedding.word_embeddings.weight
        row = vocab_size - 1 - ctx.tp_rank * weight.shape[0]
        if 0 <= row < weight.shape[0]:
            with torch.no_grad():
                weight[row] = math.nan


@pytest.mark.parametrize("layout", [{}, TP2, PP2], ids=["dp2", "tp2", "pp2"])
def test_the_microbatches_with_the_poison_are_found(ranks: RankPool, layout: dict[str, int]) -> None:
    results = ranks.run(step_with_poison, layout, [5, 12, 13], world_size=2)
    good = results[0][2]
    ranks_of_data = 1 if layout else 2
    expected = {divmod(row // 2, ranks_of_data) for row in (5, 12)}
    for result, same, _ in results:
        assert result.skipped
        assert math.isnan(result.loss)
        assert set(result.bad_microbatches) == expected
        assert same
    assert not good.skipped
    assert good.bad_microbatches == ()
    assert math.isfinite(good.loss)


def infinite_loss() -> Any:
    """A loss that is infinite while its gradient is finite."""
    import torch

    from megatron_tokedit.engine import step

    honest = step._masked_loss

    def infinite(mask: torch.Tensor, loss: torch.Tensor) -> Any:
        loss_sum, num_tokens, report = honest(mask, loss)
        return loss_sum, num_tokens, report + torch.tensor([math.inf, 0.0])

    step._masked_loss = infinite
    try:
        bad, same, _ = step_with_poison({}, [])
    finally:
        step._masked_loss = honest
    return bad, same


def test_an_infinite_loss_with_a_finite_gradient_is_skipped_too(ranks: RankPool) -> None:
    for bad, same in ranks.run(infinite_loss, world_size=2):
        assert bad.skipped
        assert same
        assert bad.loss == math.inf
        assert math.isfinite(bad.grad_norm)
        assert len(bad.bad_microbatches) == 8


# -------------------------------------------------------------------------------------------- whole runs


def write_poisoned_run(folder: Path) -> Path:
    """Two sources, one of which has one token in one place whose embedding is not a number."""
    config = write_run(folder)
    write_dataset(folder / "second", seed=1, manifest=False, largest_id=POISON)
    random = np.random.default_rng(5)
    (folder / "first.manifest.json").unlink()
    with IndexedDatasetWriter(str(folder / "first"), best_dtype(97)) as writer:
        for document in range(25):
            tokens = random.integers(3, POISON, size=33)
            if document == 11:
                tokens[20] = 96
            writer.add_document([np.append(tokens, 2)])
        writer.finalize()
    return config


def train_poisoned(config: Path, *overrides: str) -> Any:
    """Train; returns the result (or what was raised), and the run's samples that hold the poison."""
    import multiprocessing

    from megatron_tokedit.engine.initialize import initialize
    from megatron_tokedit.training import start
    from megatron_tokedit.training.trainer import Trainer, resolve

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # async saves fork
    honest = start.build_model

    def build_model(*args: Any, **kwargs: Any) -> list[Any]:
        model = honest(*args, **kwargs)
        poison_embedding(model, ctx, 97)
        return model

    class Spy(Trainer):
        def _loop(self, datasets: Any, stop: Any) -> str | None:
            blend = datasets.train
            self.poisoned = [n for n in range(len(blend)) if (blend[n]["tokens"] == 96).any()]
            return super()._loop(datasets, stop)

    resolved = resolve(load(config, *overrides), vocab_size=97)
    ctx = initialize(resolved.parallel, seed=7, device="cpu", cpu_threads=1)
    trainer = Spy(resolved, ctx, SPEC, None)
    start.build_model = build_model
    try:
        return trainer.run(), trainer.poisoned
    except DivergenceError as error:
        return str(error), trainer.poisoned
    finally:
        start.build_model = honest


@pytest.mark.parametrize("layout", ["", "parallel.pipeline_model_parallel_size=2"], ids=["dp2", "pp2"])
def test_a_poisoned_sample_costs_its_step(ranks: RankPool, tmp_path: Path, layout: str) -> None:
    config = write_poisoned_run(tmp_path)
    overrides = ("training.micro_batch_size=1", *filter(None, [layout]))
    results = ranks.run(train_poisoned, config, *overrides, world_size=2)
    result, poisoned = results[0]
    assert poisoned, "the run comes to the poison"
    assert result.finished
    steps = sorted({sample // 8 + 1 for sample in poisoned})
    assert result.state.skipped_steps == len(steps)
    records = read_metrics(tmp_path / "run", "train")
    assert [record["step"] for record in records if record["skipped"]] == steps
    assert [record["loss"] for record in records if record["skipped"]] == ["nan"] * len(steps)
    events = read_metrics(tmp_path / "run", "health")
    assert [(event["step"], event["event"]) for event in events] == [(step, "not_finite") for step in steps]
    found = [sample for event in events for samples in event["samples"].values() for sample in samples]
    assert len(found) == len(poisoned), "just the samples, one a microbatch"
    assert all(name.startswith("first, epoch ") for event in events for name in event["samples"])
    interval = records[-1]
    assert 0 < interval["step_seconds_p50"] <= interval["step_seconds_p95"] <= interval["step_seconds_max"]
    assert 0 < interval["forward_seconds"] < interval["step_seconds_max"]
    assert 0 < interval["load_seconds"] < interval["step_seconds_max"]
    assert interval["slowest_rank"] in (0, 1)
    assert interval["peak_memory_bytes"] > 50_000_000


def test_a_poison_that_stays_ends_the_run_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    config = write_poisoned_run(tmp_path)
    saving = ("checkpoint.save_interval_steps=1", "checkpoint.async_save=true")
    overrides = ("training.max_skipped_steps=1", "training.micro_batch_size=1", *saving)
    for _ in range(2):  # the same command comes to the same end
        results = ranks.run(train_poisoned, config, *overrides, world_size=2)
        messages = {message for message, _ in results}
        assert len(messages) == 1
        sample = results[0][1][0]
        (message,) = messages
        assert (
            f"step {sample // 8 + 1}: the loss is nan, in 1 step(s) in a row no update could be made"
            in message
        )
        assert f"Samples of the last of them: {sample} of the run (first, epoch 0: " in message
        assert read_metrics(tmp_path / "run")[-1]["event"] == "not_finite"
        latest = find_latest(tmp_path / "run" / "checkpoints")
        assert latest is not None
        assert latest.name == f"step_{sample // 8:08}", "the one that was being written is complete"


def train_tracked(config: Path, *overrides: str) -> Any:
    """Train with the fake packages of the path; returns the calls that they received here."""
    import sys

    try:
        result, _ = train_on_rank(config, overrides)
        return result.finished, list(sys.modules["calls"].MADE) if "calls" in sys.modules else []
    finally:
        for name in ("wandb", "mlflow", "calls"):
            sys.modules.pop(name, None)


def test_a_requeued_run_is_one_tracked_run(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "packages"
    write_fake_services(packages)
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = write_run(tmp_path)
    tracked = ("logging.wandb.project=edits", "logging.mlflow.experiment_name=edits")
    first = ranks.run(train_tracked, config, *tracked, "runtime.exit_at_step=4", world_size=2)
    second = ranks.run(train_tracked, config, *tracked, world_size=2)
    assert first[1] == (False, [])
    assert second[1] == (True, []), "rank 0 alone talks to services"
    calls = first[0][1], second[0][1]
    ids = [call[-1]["id"] for made in calls for call in made if call[0] == "init"]
    assert len(ids) == 2
    assert len(set(ids)) == 1
    steps = [
        call[-1]["step"] for made in calls for call in made if call[0] == "log" and "train/loss" in call[1]
    ]
    assert steps == list(range(1, 11))
    assert [call[1] for made in calls for call in made if call[0] == "end_run"] == ["KILLED", "FINISHED"]
    validated = [call for call in calls[1] if call[0] == "log_metrics" and "validation/held/loss" in call[1]]
    assert [call[-1]["step"] for call in validated] == [5, 10]
    monkeypatch.undo()
    another = (tracked[0], f"run_dir={tmp_path}/another")
    with pytest.raises(RankFailure, match=r"the package wandb is not installed") as failure:
        ranks.run(train_tracked, config, *another, world_size=2)
    assert str(failure.value).count("ConfigError: logging.wandb") == 2, "every rank hears of it"
