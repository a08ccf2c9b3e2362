"""Stage ``sft``: packed rows, the loss of responses alone, epochs, and what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fine_tuning_cases import (
    ROW,
    TEMPLATE,
    base_on_rank,
    make_conversations,
    sft_on_rank,
    weights_of,
    write_base,
    write_conversations,
    write_sft,
)
from training_cases import SPEC, write_dataset

from megatron_tokedit.config.load import load_config
from megatron_tokedit.dataset import read_manifest, sha256_of_file, write_manifest
from megatron_tokedit.dataset.sources import inspect_sources
from megatron_tokedit.errors import ConfigError, DataFormatError
from megatron_tokedit.testing.ranks import RankFailure, RankPool
from megatron_tokedit.training.length import with_train_steps
from megatron_tokedit.training.metrics import read_metrics

TP2 = ("parallel.tensor_model_parallel_size=2",)


@pytest.fixture(scope="module")
def base(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that fine-tuning starts from."""
    folder = tmp_path_factory.mktemp("base")
    ranks.run(base_on_rank, write_base(folder), world_size=1)
    return folder


@pytest.fixture(scope="module")
def tuned(ranks: RankPool, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a fine-tuning run of two epochs on one rank, and its result."""
    folder = tmp_path_factory.mktemp("tuned")
    (result,) = ranks.run(sft_on_rank, write_sft(folder, base), world_size=1)
    return folder, result


def records(folder: Path, run: str = "run") -> list[dict[str, Any]]:
    return read_metrics(folder / run, "train")


def state_of(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / "run" / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())


def test_a_run_of_epochs_draws_every_row_exactly_so_often(tuned: tuple[Path, Any]) -> None:
    folder, result = tuned
    rows = result.state.consumed_samples // 2
    assert result.finished
    assert result.state.consumed_samples == 2 * rows
    assert result.state.step == result.train_steps == -(-2 * rows // 4)
    steps = records(folder)
    masks = [mask[1:] for seed, n in ((1, 37), (2, 11)) for _, mask in make_conversations(n, seed=seed)]
    assert sum(record["response_tokens"] for record in steps) == 2 * sum(map(sum, masks))
    positions = sum(record["packing_efficiency"] * 4 * ROW for record in steps)
    assert positions == pytest.approx(2 * sum(map(len, masks)))
    drawn = state_of(folder, result.state.step)["drawn_samples"]
    assert sum(drawn.values()) == 2 * rows
    assert all(count % 2 == 0 for count in drawn.values())
    assert result.state.consumed_tokens == 2 * sum(map(sum, masks))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5


def test_a_checkpoint_names_the_chat_template(tuned: tuple[Path, Any]) -> None:
    folder, result = tuned
    state = state_of(folder, result.state.step)
    assert state["chat_template"] == TEMPLATE.chat_template
    assert state["chat_template_name"] == "plain"


def test_validation_is_the_loss_of_held_out_responses(tuned: tuple[Path, Any]) -> None:
    _, result = tuned
    responses = sum(sum(mask[1:]) for _, mask in make_conversations(9, seed=3))
    assert result.validation["held"]["num_tokens"] == responses


LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp2": (2, ()),
    "two rows a microbatch": (1, ("training.micro_batch_size=2",)),
    "no accumulation": (1, ("training.micro_batch_size=4",)),
    "tp2": (2, TP2),
    "tp2-sequence": (2, (*TP2, "parallel.sequence_parallel=true")),
    "pp2": (2, ("parallel.pipeline_model_parallel_size=2", "training.micro_batch_size=2")),
    "dp2 workers": (2, ("data.num_workers=1",)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_and_accumulation_change_nothing(
    ranks: RankPool, base: Path, tuned: tuple[Path, Any], tmp_path: Path, name: str
) -> None:
    world_size, overrides = LAYOUTS[name]
    results = ranks.run(sft_on_rank, write_sft(tmp_path, base), overrides, world_size=world_size)
    for metric in ("loss", "grad_norm"):
        expected = [record[metric] for record in records(tuned[0])]
        assert [record[metric] for record in records(tmp_path)] == pytest.approx(expected, rel=1e-5)
    numbers = results[0].validation["held"]
    assert numbers == pytest.approx(tuned[1].validation["held"], rel=1e-5)


def test_interleaved_stages_change_nothing(ranks: RankPool, tmp_path: Path) -> None:
    """Two stages of two chunks each: four layers, of which every chunk has one."""
    layers = ("model.num_layers=4",)
    ranks.run(base_on_rank, write_base(tmp_path), (*layers, "training.train_steps=1"), world_size=1)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    epoch = (*layers, "training.train_epochs=1")
    (expected,) = ranks.run(sft_on_rank, write_sft(one, tmp_path), epoch, world_size=1)
    interleaved = (
        *epoch,
        "parallel.pipeline_model_parallel_size=2",
        "parallel.virtual_pipeline_model_parallel_size=2",
    )
    results = ranks.run(sft_on_rank, write_sft(two, tmp_path), interleaved, world_size=2)
    assert results[0].state.consumed_samples == expected.state.consumed_samples
    for metric in ("loss", "grad_norm"):
        wanted = [record[metric] for record in records(one)]
        assert [record[metric] for record in records(two)] == pytest.approx(wanted, rel=1e-5)
    assert results[0].validation["held"] == pytest.approx(expected.validation["held"], rel=1e-5)


@pytest.mark.parametrize("how", ["recompute", "core_attn"])
def test_recomputation_changes_no_bit(
    ranks: RankPool, base: Path, tuned: tuple[Path, Any], tmp_path: Path, how: str
) -> None:
    layer = "parallel={recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 1}"
    override = layer if how == "recompute" else "parallel.recompute_granularity=selective"
    ranks.run(sft_on_rank, write_sft(tmp_path, base), (override, "data.validation=[]"), world_size=1)
    assert [r["loss"] for r in records(tmp_path)] == [r["loss"] for r in records(tuned[0])]


def test_killed_and_resumed_in_the_middle_of_an_epoch(
    ranks: RankPool, base: Path, tuned: tuple[Path, Any], tmp_path: Path
) -> None:
    config = write_sft(tmp_path, base)
    (first,) = ranks.run(sft_on_rank, config, (), 3, world_size=1)
    assert (first.stopped_by, first.state.step) == ("SIGTERM", 4)
    ranks.run(sft_on_rank, config, ("runtime.exit_at_step=11",), world_size=1)
    (last,) = ranks.run(sft_on_rank, config, world_size=1)
    assert last.finished
    assert [r["loss"] for r in records(tmp_path)] == [r["loss"] for r in records(tuned[0])]
    assert state_of(tmp_path, last.state.step)["drawn_samples"] == last_drawn(tuned)
    (again,) = ranks.run(sft_on_rank, config, world_size=1)
    assert again.finished
    assert again.state.step == last.state.step


def test_killed_between_checkpoints(
    ranks: RankPool, base: Path, tuned: tuple[Path, Any], tmp_path: Path
) -> None:
    """SIGKILL behind a checkpoint: the steps since are done again, and nothing is different in the end."""
    config = write_sft(tmp_path, base)
    with pytest.raises(RankFailure, match="the process died"):
        ranks.run(sft_on_rank, config, (), 8, signal.SIGKILL, world_size=1)
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 9))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000005"]
    (result,) = ranks.run(sft_on_rank, config, world_size=1)
    assert result.finished
    for metric in ("step", "loss", "grad_norm", "response_tokens"):
        assert [r[metric] for r in records(tmp_path)] == [r[metric] for r in records(tuned[0])]
    assert result.validation == tuned[1].validation
    assert state_of(tmp_path, result.state.step)["drawn_samples"] == last_drawn(tuned)
    ours, theirs = (ranks.run(weights_of, r.checkpoint, world_size=1)[0] for r in (result, tuned[1]))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def last_drawn(tuned: tuple[Path, Any]) -> dict[str, int]:
    return state_of(tuned[0], tuned[1].state.step)["drawn_samples"]


def test_more_epochs_go_on_where_the_last_ended(ranks: RankPool, base: Path, tmp_path: Path) -> None:
    """Also where the last step was not full, and a source is to be drawn more often than the others."""
    config = write_sft(tmp_path, base)
    (one,) = ranks.run(sft_on_rank, config, ("training.train_epochs=1",), world_size=1)
    rows = one.state.consumed_samples
    assert rows % 4, "the last step is not full"
    more = ("training.train_epochs=2", "data.train.1.epochs=3")
    (three,) = ranks.run(sft_on_rank, config, more, world_size=1)
    assert three.finished
    small = state_of(tmp_path, one.state.step)["drawn_samples"]["more"]
    drawn = state_of(tmp_path, three.state.step)["drawn_samples"]
    assert drawn == {"chats": 2 * (rows - small), "more": 3 * small}
    assert three.state.consumed_samples == sum(drawn.values())


def test_steps_and_weights_instead_of_epochs(
    ranks: RankPool, base: Path, tuned: tuple[Path, Any], tmp_path: Path
) -> None:
    config = write_sft(tmp_path, base)
    steps = ("training.train_epochs=null", "training.train_steps=6")
    ranks.run(sft_on_rank, config, steps, world_size=1)
    drawn = state_of(tmp_path, 6)["drawn_samples"]
    rows = last_drawn(tuned)
    for name, count in drawn.items():  # without weights every conversation is drawn equally often
        assert count == pytest.approx(24 * rows[name] / sum(rows.values()), abs=1)
    weights = (*steps, f"run_dir={tmp_path}/weighted", "data.train.0.weight=1", "data.train.1.weight=1")
    (result,) = ranks.run(sft_on_rank, config, weights, world_size=1)
    state = json.loads((Path(result.checkpoint) / "state.json").read_text())
    assert state["drawn_samples"] == {"chats": 12, "more": 12}


# ---------------------------------------------------------------------------------------------- refusals


def refused(path: Path, *overrides: str) -> str:
    """What is said before a run starts."""
    with pytest.raises((ConfigError, DataFormatError)) as error:
        with_train_steps(load_config(path, overrides), SPEC)
    return str(error.value)


def test_conversations_that_cannot_be_learned_from(base: Path, tmp_path: Path) -> None:
    config = write_sft(tmp_path, base)
    silent = make_conversations(5, seed=4)
    silent[1] = (silent[1][0], [0] * len(silent[1][0]))
    silent[3] = ([5], [1])  # nothing comes before its only token
    write_conversations(tmp_path / "more", silent)
    said = refused(config)
    assert "data.train.1 (more)" in said
    assert "2 of 5 conversations have no token that counts in the loss (documents 1, 3)" in said
    steps = with_train_steps(load_config(config, ("sft.without_response=drop",)), SPEC).training.train_steps
    assert steps > 0
    longer = [
        *make_conversations(3, seed=5, shortest=20),
        *make_conversations(1, seed=6, longest=80, shortest=70),
    ]
    write_conversations(tmp_path / "more", longer)
    size = len(longer[3][0])
    said = refused(config)
    assert "1 of 4 conversations have more than model.seq_length + 1 = 33 tokens" in said
    assert f"(document 3; the longest has {size:,})" in said
    assert "sft.too_long: drop" in said
    write_conversations(tmp_path / "more", [silent[1], silent[3]])
    assert "none is left" in refused(config, "sft.without_response=drop")


def test_what_is_left_out_is_counted(ranks: RankPool, base: Path, tmp_path: Path) -> None:
    config = write_sft(tmp_path, base)
    mixed = [
        *make_conversations(6, seed=4),
        *make_conversations(2, seed=6, longest=80, shortest=70),
        ([7, 8], [1, 0]),
    ]
    write_conversations(tmp_path / "chats", mixed)
    overrides = ("sft={too_long: drop, without_response: drop}", "training.train_epochs=1")
    ranks.run(sft_on_rank, config, overrides, world_size=1)
    kept = [*mixed[:6], *make_conversations(11, seed=2)]
    assert sum(r["response_tokens"] for r in records(tmp_path)) == sum(sum(mask[1:]) for _, mask in kept)


def test_a_dataset_without_a_mask_or_with_another_ones(base: Path, tmp_path: Path) -> None:
    config = write_sft(tmp_path, base)
    write_dataset(tmp_path / "plain")
    assert "what of" in refused(config, f"data.train.1.prefix={tmp_path}/plain")
    conversations = make_conversations(6, seed=4)
    write_conversations(tmp_path / "other", conversations)
    write_conversations(tmp_path / "more", conversations[::-1], mask=False)
    for suffix in ("bin", "idx"):
        (tmp_path / f"other_loss_mask.{suffix}").replace(tmp_path / f"more_loss_mask.{suffix}")
    assert "its lengths are not those of" in refused(config)
    ids = [ids for ids, _ in conversations]
    write_conversations(tmp_path / "more", [(row, [2] * len(row)) for row in ids])
    assert "a loss mask is 0 or 1" in refused(config)


def test_a_mask_of_the_same_lengths_that_the_manifest_does_not_name(base: Path, tmp_path: Path) -> None:
    config = write_sft(tmp_path, base)
    manifest = read_manifest(str(tmp_path / "more"))
    assert manifest is not None
    checksums = manifest.checksums | {"loss_mask.bin": sha256_of_file(tmp_path / "more_loss_mask.bin")}
    write_manifest(str(tmp_path / "more"), manifest.model_copy(update={"checksums": checksums}))
    assert with_train_steps(load_config(config), SPEC).training.train_steps
    mask = tmp_path / "more_loss_mask.bin"
    mask.write_bytes(bytes([1]) * mask.stat().st_size)
    assert "more_loss_mask.bin is not the mask that the dataset's manifest names" in refused(config)


def test_pretraining_on_conversations_is_warned_of(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(write_sft(tmp_path, base))
    for sft in (config.sft, None):
        inspect_sources(config.data, tokenizer_spec=SPEC, seq_length=ROW, sft=sft)
        assert ("outside of stage sft its loss mask is not used" in caplog.text) == (sft is None)


def test_one_template_for_all_training_conversations(ranks: RankPool, base: Path, tmp_path: Path) -> None:
    config = write_sft(tmp_path, base)
    other = TEMPLATE.model_copy(update={"chat_template": "{{ other }}", "chat_template_name": "other"})
    write_conversations(tmp_path / "more", make_conversations(11, seed=2), template=other)
    with pytest.raises(RankFailure, match=r"different chat templates: chats \(plain\), more \(other\)"):
        ranks.run(sft_on_rank, config, world_size=1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("sft.packing=false", "packing: recorded True, now False"),
        ("stage=continue", "stage: recorded sft, now not sft"),
    ],
)
def test_what_a_resumed_run_cannot_change(
    ranks: RankPool, base: Path, tuned: tuple[Path, Any], change: str, expected: str
) -> None:
    steps = ("training.train_epochs=null", "training.train_steps=30")
    with pytest.raises(RankFailure) as failure:
        ranks.run(sft_on_rank, tuned[0] / "sft.yaml", (change, *steps), world_size=1)
    assert expected in str(failure.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("init_from=null",), "init_from: missing: stage sft starts from a checkpoint"),
        (
            ("training.train_epochs=null",),
            "training.train_steps: missing, and it has no default; give a number, or",
        ),
        (("data.train.0.weight=2",), "data.train.0.weight: 2 beside epochs"),
        (
            ("training={train_steps: 3, global_batch_size: 4}", "data.train.0.weight=2"),
            "data.train.1.weight: missing: data.train.0 has a weight",
        ),
        (("data.train.0.tokens=5K",), "data.train.0.tokens: a budget of tokens is for pretraining"),
        (("data.validation.0.epochs=1",), "data.validation.0.epochs: got 1"),
        (("data.reset_position_ids=true",), "data.reset_position_ids: has no effect in stage sft"),
        (("parallel.context_parallel_size=2",), "parallel.context_parallel_size: 2 ranks would each need"),
        (
            ("precision.cuda_graph_impl=local",),
            "precision.cuda_graph_impl: local graphs do not take packed rows",
        ),
        (
            ("model.family=mixtral", "model.num_moe_experts=4"),
            "model.moe_aux_loss_coeff: 0.02: in stage sft",
        ),
        (("stage=continue", "training.train_steps=3"), "training.train_epochs: is for stage sft"),
        (
            ("stage=continue", "training={train_steps: 3, global_batch_size: 4}", "sft.packing=false"),
            "sft.packing: is for stage sft",
        ),
        (("training.train_steps=3",), "training.train_steps: got 3, but the epochs come to 17 steps"),
    ],
)
def test_settings_that_do_not_go_together(
    tuned: tuple[Path, Any], tmp_path: Path, overrides: tuple[str, ...], expected: str
) -> None:
    fresh = f"run_dir={tmp_path}/run"
    assert expected in refused(tuned[0] / "sft.yaml", fresh, *overrides)


def test_the_last_step_may_be_small_and_ranks_may_have_nothing(
    ranks: RankPool, base: Path, tmp_path: Path
) -> None:
    """One row in a batch of four rows on two ranks."""
    config = write_sft(tmp_path, base)
    write_conversations(tmp_path / "chats", make_conversations(1, seed=9))
    only = (f"data.train=[{{name: chats, prefix: {tmp_path}/chats}}]", "training.train_epochs=1")
    results = ranks.run(sft_on_rank, config, only, world_size=2)
    assert [result.state.consumed_samples for result in results] == [1, 1]
    assert np.isfinite(results[0].loss)
