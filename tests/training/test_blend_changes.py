"""What a run draws when its sources change on the way, sample by sample; without a process group."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blend_cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_cases import SPEC, write_dataset

from megatron_tokedit.config.sections import DataConfig, SourceConfig, TrainingConfig
from megatron_tokedit.dataset import sources as source_module
from megatron_tokedit.dataset.blend import BlendState, SampleLocation, TrainBlend, resume_blend
from megatron_tokedit.dataset.blend_plan import ExpectedBlend, beyond_cap
from megatron_tokedit.dataset.index_cache import blend_order
from megatron_tokedit.dataset.sources import SourceInfo, format_shares, inspect_sources, source_shares
from megatron_tokedit.errors import CheckpointError, ConfigError, DataFormatError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        write_dataset(tmp_path / name, seed=seed, num_documents=12 + 10 * seed)
    return tmp_path


@dataclass
class Run:
    """A run that is stopped and goes on with other sources; what a checkpoint carries goes through JSON."""

    folder: Path
    record: str | None = None
    consumed: int = 0
    drawn: list[tuple[SampleLocation, list[int]]] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    def go(self, data: DataConfig, until: int, *, planned: int | None = None, seed: int = 11) -> TrainBlend:
        """Draw up to sample ``until`` of ``planned``, then save."""
        infos = inspect_sources(data, tokenizer_spec=SPEC, seq_length=blend_cases.SEQ_LENGTH)
        recorded = BlendState.from_mapping(json.loads(self.record)) if self.record else None
        state, self.changes = resume_blend(recorded, self.consumed, data, infos)
        train = blend_cases.build(
            data, self.folder, planned or until, blend_state=state, start_sample=self.consumed, seed=seed
        ).train
        for sample in range(self.consumed, until):
            assert train.counters_at(sample) == train.state.counters_at(sample)
            self.drawn.append((train.locate(sample), train[sample]["tokens"].tolist()))
        self.record = json.dumps(train.state.to_mapping(), sort_keys=True)
        self.consumed = until
        return train

    def of(self, name: str) -> list[tuple[int, int]]:
        """(epoch, sample) of the draws of a source, in order."""
        return [(at.epoch, at.sample_in_epoch) for at, _ in self.drawn if at.source == name]


def sources(folder: Path, **asked: float | dict[str, Any]) -> DataConfig:
    """``name=weight``, or ``name={fields}``; a name's dataset is its first letter's."""
    train = []
    for name, value in asked.items():
        fields = value if isinstance(value, dict) else {"weight": value}
        train.append(SourceConfig(**{"name": name, "prefix": f"{folder}/{name[0]}", **fields}))
    return DataConfig(train=train)


def epoch_samples(folder: Path, name: str) -> int:
    data = sources(folder, **{name: 1.0})
    (info,) = inspect_sources(data, tokenizer_spec=SPEC, seq_length=blend_cases.SEQ_LENGTH).values()
    return info.num_samples


def in_order(count: int, epoch_length: int) -> list[tuple[int, int]]:
    """Draws 0 to ``count`` of a source, none left out, none twice."""
    return [divmod(number, epoch_length) for number in range(count)]


def test_no_sample_twice_and_none_left_out(folder: Path) -> None:
    """Weights changed, a source added, removed, renamed, and brought back."""
    run = Run(folder)
    run.go(sources(folder, a=3.0, b=1.0), 41)
    assert run.changes == []
    run.go(sources(folder, a=1.0, b=1.0), 83)
    assert run.changes == ["source a: weight 3, now weight 1"]
    run.go(sources(folder, a=1.0, b=1.0, c=2.0), 130)
    assert run.changes == ["source c is new: it goes on after 0 samples"]
    run.go(sources(folder, c=1.0), 140)
    assert [change.split(",")[0] for change in run.changes[:2]] == ["source a is gone", "source b is gone"]
    run.go(sources(folder, c_again=1.0, b=3.0), 190)
    assert "source c_again is c under a new name: it goes on after" in run.changes[0]
    assert "source b is back: it goes on after" in run.changes[1]
    last = run.go(sources(folder, c_again=1.0, b=3.0, a=1.0), 260)
    c = [*run.of("c"), *run.of("c_again")]
    for name, found in (("a", run.of("a")), ("b", run.of("b")), ("c", c)):
        assert found == in_order(len(found), epoch_samples(folder, name)), name
        assert len(found) > 20
    assert last.counters_at(260) == {"a": len(run.of("a")), "b": len(run.of("b")), "c_again": len(c)}


def test_a_draw_is_the_same_sample_whatever_the_blend(folder: Path) -> None:
    """Tokens of draw k of a source, against the source trained on alone; epochs have orders of their own."""
    run = Run(folder)
    run.go(sources(folder, a=3.0, b=1.0), 50, planned=1000)
    run.go(sources(folder, a=1.0, b=5.0), 200)
    for name in "ab":
        tokens = [text for at, text in run.drawn if at.source == name]
        alone = Run(folder)
        alone.go(sources(folder, **{name: 1.0}), len(tokens), planned=777)
        assert [text for _, text in alone.drawn] == tokens
        length = epoch_samples(folder, name)
        assert len(tokens) > length, "there are two epochs to compare"
        second = tokens[length : 2 * length]
        assert second != tokens[: len(second)]


def test_interruptions_and_the_number_of_steps_change_nothing(folder: Path) -> None:
    data = sources(folder, a=3.0, b=1.0, c=0.5)
    straight, stopped = Run(folder), Run(folder)
    straight.go(data, 120)
    for until, planned in ((7, 40), (56, 300), (90, 91), (120, 5000)):
        stopped.go(data, until, planned=planned)
        assert stopped.changes == []
    assert stopped.drawn == straight.drawn


def test_other_names_for_the_same_thing_begin_no_stretch(folder: Path) -> None:
    """Weights times a factor, sources in another order: the order of the samples stays."""
    straight, stopped = Run(folder), Run(folder)
    straight.go(sources(folder, a=0.3, b=0.1, c=0.3), 100)
    stopped.go(sources(folder, a=0.3, b=0.1, c=0.3), 33)
    train = stopped.go(sources(folder, c=3.0, b=1.0, a=3.0), 100)
    assert stopped.changes == []
    assert train.state.start_sample == 0
    assert stopped.drawn == straight.drawn


def test_changed_content_is_refused_and_a_new_name_starts_at_zero(folder: Path) -> None:
    run = Run(folder)
    run.go(sources(folder, a=1.0, b=1.0), 30)
    write_dataset(folder / "b", seed=77)
    with pytest.raises(
        DataFormatError, match=r"content is not what .*: b \(after 15 samples\).*another name"
    ):
        run.go(sources(folder, a=1.0, b=1.0), 60)
    run.go(sources(folder, a=1.0, b_new=1.0), 60)
    assert run.of("b_new") == in_order(len(run.of("b_new")), epoch_samples(folder, "b"))
    assert run.of("a") == in_order(len(run.of("a")), epoch_samples(folder, "a"))


def test_content_without_a_manifest_is_known_by_its_bytes(folder: Path) -> None:
    """A copy with other times is the same source; one changed byte is another."""
    run = Run(folder)
    (folder / "a.manifest.json").unlink()
    run.go(sources(folder, a=1.0, b=1.0), 30)
    data = (folder / "a.bin").read_bytes()
    (folder / "a.bin").write_bytes(data)
    run.go(sources(folder, a=1.0, b=1.0), 40)
    (folder / "a.bin").write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    with pytest.raises(DataFormatError, match="content is not what this run was drawing from: a"):
        run.go(sources(folder, a=1.0, b=1.0), 50)


def test_large_files_are_known_by_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Size, first and last bytes count; every block is read where it should be."""
    path = folder / "large"
    data = bytes(range(256)) * 40
    path.write_bytes(data)
    whole = source_module._sampled_sha256(str(path))
    monkeypatch.setattr(source_module, "_HASHED_WHOLE_BYTES", 1000)
    monkeypatch.setattr(source_module, "_BLOCK_BYTES", 100)
    found = {whole, source_module._sampled_sha256(str(path))}
    for changed in (b"x" + data[1:], data[:-1] + b"x", data[:5000] + bytes(100) + data[5100:], data + data):
        path.write_bytes(changed)
        found.add(source_module._sampled_sha256(str(path)))
    assert len(found) == 6


def test_another_seed_is_refused(folder: Path) -> None:
    run = Run(folder)
    run.go(sources(folder, a=1.0), 10)
    with pytest.raises(
        ConfigError, match="seed: got 12, but the samples drawn so far are in the order of seed 11"
    ):
        run.go(sources(folder, a=1.0), 20, seed=12)


def test_a_checkpoint_without_a_record_goes_on_as_if_nothing_had_changed(folder: Path) -> None:
    straight, stopped = Run(folder), Run(folder)
    straight.go(sources(folder, a=2.0, b=1.0), 60)
    stopped.go(sources(folder, a=2.0, b=1.0), 20)
    stopped.record = None
    stopped.go(sources(folder, a=2.0, b=1.0), 60)
    assert "does not record what was drawn" in stopped.changes[0]
    assert stopped.drawn == straight.drawn


def test_a_damaged_record_is_refused() -> None:
    for values in ({}, {"sources": [{"name": "a"}], "start_sample": 0}, {"sources": None}):
        with pytest.raises(CheckpointError, match="record of the data blend is damaged"):
            BlendState.from_mapping(values)


def test_samples_of_an_earlier_stretch_have_no_place(folder: Path) -> None:
    run = Run(folder)
    run.go(sources(folder, a=1.0), 10)
    train = run.go(sources(folder, a=1.0, b=1.0), 20)
    for ask in (train.locate, train.counters_at, train.__getitem__):
        with pytest.raises(IndexError, match="sample 9: expected 10 to"):
            ask(9)
    with pytest.raises(IndexError, match="sample 20: expected 10 to 19"):
        train.locate(20)
    assert str(train.locate(10)) == "a, epoch 0, sample 10"


def test_many_epochs_keep_few_files_open(folder: Path) -> None:
    length = epoch_samples(folder, "a")
    train = blend_cases.build(sources(folder, a=1.0), folder, 40 * length).train
    for sample in range(0, 40 * length, length // 2):
        train[sample]
    assert len(train._open) == 2
    assert train[None]["loss_mask"].sum() == 0


# --------------------------------------------------------------------------------------- token budgets


def budgets(folder: Path, **tokens: int | str) -> DataConfig:
    return sources(folder, **{name: {"tokens": value} for name, value in tokens.items()})


def test_budgets_are_shares_and_what_was_drawn_is_taken_off(folder: Path) -> None:
    """3,200 and 1,600 tokens are 200 and 100 samples; c joins after 150 samples; at the end all are used."""
    run = Run(folder)
    run.go(budgets(folder, a=3200, b="1.6K"), 150, planned=300)
    assert (len(run.of("a")), len(run.of("b"))) == (100, 50)
    run.go(budgets(folder, a=3200, b="1.6K", c=2400), 222, planned=450)
    assert run.changes == ["source c is new: it goes on after 0 samples"]
    run.go(budgets(folder, a=3200, b="1.6K", c=2400), 450)
    assert run.changes == []
    assert {name: len(run.of(name)) for name in "abc"} == {"a": 200, "b": 100, "c": 150}
    for name in "abc":
        assert run.of(name) == in_order(len(run.of(name)), epoch_samples(folder, name))
    run.go(budgets(folder, a=3200, b=1600, c=4000), 460)
    assert run.changes[0].startswith("source c: token budget 2,400, now token budget 4,000")
    assert run.changes[1:] == [
        f"source {name}: its budget is used up, it is not drawn from any more" for name in "ab"
    ]
    assert {name: len(run.of(name)) for name in "abc"} == {"a": 200, "b": 100, "c": 160}
    with pytest.raises(ConfigError, match=r"budgets of all sources \(a\) are used up"):
        run.go(budgets(folder, a=3200), 480)


def test_table_of_a_run_with_budgets_that_was_begun(folder: Path) -> None:
    run = Run(folder)
    data = budgets(folder, a=3200, b=1600)
    run.go(data, 150)
    infos = inspect_sources(data, tokenizer_spec=SPEC, seq_length=16)
    state, _ = resume_blend(BlendState.from_mapping(json.loads(run.record or "")), 150, data, infos)
    shares = source_shares(data, infos, num_train_samples=225, seq_length=16, state=state, start_sample=150)
    table = [line.split() for line in format_shares(shares)]
    assert table[0] == ["source", "documents", "tokens", "share", "budget", "drawn", "before", "tokens", "drawn", "epochs"]  # fmt: skip  # noqa: E501
    assert table[1][3:7] == ["66.7%", "3,200", "1,600", "2,400"]
    assert table[2][3:7] == ["33.3%", "1,600", "800", "1,200"]
    assert " ".join(table[3]) == "the run draws 3,600 of 4,800 budgeted tokens (75.0%)"


# ------------------------------------------------------------------------------------------ epoch caps


def test_a_run_beyond_the_cap_is_refused_with_the_arithmetic(folder: Path) -> None:
    """And the number of steps in the message fits, while one more does not."""
    data = sources(folder, a={"weight": 1.0, "max_epochs": 2.0}, b={"weight": 2.0})
    length = epoch_samples(folder, "a")

    def attempt(steps: int) -> None:
        training = TrainingConfig(train_steps=steps, global_batch_size=4)
        blend_cases.build(data, folder, steps * 4, training=training)

    with pytest.raises(ConfigError) as refusal:
        attempt(100)
    message = str(refusal.value)
    assert f"data.train.0.max_epochs (a): 2 x {length} samples = {2 * length} may be drawn" in message
    assert f"of the run's 400 samples 134 ({134 / length:.2f} epochs) are from this source" in message
    fits = int(message.split("train_steps that fits is ")[1].split(":")[0])
    attempt(fits)
    with pytest.raises(ConfigError):
        attempt(fits + 1)


def test_a_cap_that_was_passed_before(folder: Path) -> None:
    """No number of steps would help, so none is named; also where the source is drawn from no more."""
    run = Run(folder)
    run.go(budgets(folder, a=1600, b=1600), 200)
    capped = sources(folder, a={"tokens": 1600, "max_epochs": 0.5}, b={"tokens": 3200})
    infos = inspect_sources(capped, tokenizer_spec=SPEC, seq_length=16)
    recorded = BlendState.from_mapping(json.loads(run.record or ""))
    state, _ = resume_blend(recorded, 200, capped, infos)
    assert list(state.shares) == ["b"]
    training = TrainingConfig(train_steps=75, global_batch_size=4)
    with pytest.raises(ConfigError, match=r"samples 100 .* are from this source; raise max_epochs, or lower"):
        blend_cases.build(capped, folder, 300, blend_state=state, start_sample=200, training=training)
    by_name = {source.name: infos[source.prefix or ""] for source in capped.train}
    assert list(beyond_cap(capped, by_name, ExpectedBlend(state, 300), training))


def test_a_dry_run_expects_what_the_run_draws(folder: Path) -> None:
    """By the shares alone: the number of steps that fits is that of the run, or one beside it."""
    data = sources(folder, a={"weight": 1.0, "max_epochs": 2.0}, b={"weight": 2.0})
    infos = inspect_sources(data, tokenizer_spec=SPEC, seq_length=16)
    by_name = {source.name: infos[source.prefix or ""] for source in data.train}
    state, _ = resume_blend(None, 0, data, infos)
    without_cap = sources(folder, a=1.0, b=2.0)
    plans = [ExpectedBlend(state, 400), blend_cases.build(without_cap, folder, 400).train]
    training = TrainingConfig(train_steps=100, global_batch_size=4)
    lines = ["".join(beyond_cap(data, by_name, plan, training)) for plan in plans]
    expected, drawn = (int(line.split("that fits is ")[1].split(":")[0]) for line in lines)
    assert abs(expected - drawn) <= 1


# ------------------------------------------------------------------------------------- any history at all

NAMES = ("p", "q", "r", "s")
INFOS = {
    name: SourceInfo(name, 1, 1 + 16 * length, name, 16)
    for name, length in zip(NAMES, (3, 7, 11, 40), strict=True)
}
STRETCH = st.tuples(
    st.dictionaries(st.sampled_from(NAMES), st.integers(1, 9), min_size=1),
    st.integers(0, 60),
    st.integers(0, 100),
)


@settings(max_examples=60, deadline=None)
@given(stretches=st.lists(STRETCH, min_size=1, max_size=6), by_tokens=st.booleans())
def test_any_history_draws_every_source_in_order(
    stretches: list[tuple[dict[str, int], int, int]], by_tokens: bool
) -> None:
    """Whatever the weights or budgets, the lengths and the plans: draw k of a source follows draw k - 1."""
    record: dict[str, Any] | None = None
    consumed = 0
    drawn: dict[str, list[int]] = {name: [] for name in NAMES}
    for asked, length, planned_beyond in stretches:
        fields = {
            name: {"tokens": 160 * value} if by_tokens else {"weight": value} for name, value in asked.items()
        }
        data = DataConfig(train=[SourceConfig(name=name, prefix=name, **fields[name]) for name in asked])
        recorded = BlendState.from_mapping(json.loads(json.dumps(record, sort_keys=True))) if record else None
        try:
            state, _ = resume_blend(recorded, consumed, data, INFOS)
        except ConfigError as error:
            if by_tokens and "used up" in str(error):
                continue
            raise
        stop = consumed + length
        order = blend_order([*state.shares.values()], stop + planned_beyond - state.start_sample)
        blend = TrainBlend(
            state, INFOS, stop + planned_beyond, order if len(state.shares) > 1 else None, no_epochs
        )
        for sample in range(consumed, stop):
            at = blend.locate(sample)
            drawn[at.source].append(at.epoch * INFOS[at.source].num_samples + at.sample_in_epoch)
        assert {name: count for name, count in blend.counters_at(stop).items() if count} == {
            name: len(numbers) for name, numbers in drawn.items() if numbers
        }
        record, consumed = state.to_mapping(), stop
    for numbers in drawn.values():
        assert numbers == [*range(len(numbers))]


def no_epochs(info: SourceInfo, epoch: int) -> Any:
    raise AssertionError("nothing is read")
