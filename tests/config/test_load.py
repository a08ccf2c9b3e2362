# ruff: noqa: E501 - tables of messages read better unbroken
"""Every fault of a configuration is found at once, named by section.field, with the nearest right name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_tokedit.config.collapse import load_collapse_config
from megatron_tokedit.config.load import _Loader, config_from_mapping, load_config
from megatron_tokedit.config.record import differences, resolve, to_mapping, to_yaml
from megatron_tokedit.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
GOOD = """\
run_dir: runs/x
tokenizer: {type: SentencePieceTokenizer, model: a.model}
model: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, seq_length: 32}
optimizer: {lr: 1e-4}
training: {train_steps: 10, global_batch_size: 8}
data:
  train:
    - {name: a, prefix: x}
    - name: b
      prefix: y
"""
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "examples").rglob("*.yaml"))
EXPERIMENTS = [path for path in FILES if path.parent.name == "collapse"]
EXAMPLES = [path for path in FILES if path not in EXPERIMENTS]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return path


def faults(path: Path, *overrides: str, world_size: int | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides, world_size=world_size)
    return str(error.value).split("\n  - ")


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_examples_are_valid(path: Path) -> None:
    config = load_config(ROOT / path)
    assert config_from_mapping(to_mapping(config), origin="record") == config


@pytest.mark.parametrize("path", EXPERIMENTS, ids=str)
def test_experiments_are_valid(path: Path) -> None:
    load_collapse_config(str(ROOT / path))


def test_values_and_overrides(good: Path) -> None:
    config = load_config(
        good,
        [
            "data.train.1.weight=2",
            "optimizer.lr=3e-4",
            "parallel.tensor_model_parallel_size=2",
            "model.kv_channels=null",
            "data.validation=[{name: v, prefix: z}]",
            "optimizer.lr=5E-4",
        ],
    )
    assert config.optimizer.lr == 5e-4
    assert [source.weight for source in config.data.train] == [None, 2.0]
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.data.validation[0].prefix == "z"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.num_layer=4"], "model.num_layer: unknown key (got 4 (a whole number)); did you mean num_layers?"),
        (["training.seq_length=4"], "training.seq_length: unknown key (got 4 (a whole number)); did you mean model.seq_length?"),
        (["optimizer.learning_rate=1"], "did you mean optimizer.lr?"),
        (["modle.num_layers=1"], "modle: unknown key (got a mapping); did you mean model?"),
        (["data.train.0.wait=1"], "data.train.0.wait: unknown key (got 1 (a whole number)); did you mean weight?"),
        (["model.hidden_size='64'"], "model.hidden_size: got '64' (text), expected a whole number"),
        (["model.hidden_size=64.0"], "model.hidden_size: got 64.0 (a number), expected a whole number"),
        (["model.hidden_size=true"], "model.hidden_size: got True (true/false), expected a whole number"),
        (["optimizer.lr=fast"], "optimizer.lr: got 'fast' (text), expected a number"),
        (["optimizer.lr=-1"], "optimizer.lr: got -1 (a whole number), expected greater than 0"),
        (["optimizer.lr=.inf"], "optimizer.lr: got inf (a number), expected a finite number"),
        (["run_dir=''"], "run_dir: got '' (text)"),
        (["optimizer=null"], "optimizer: got nothing (null), expected a mapping of fields"),
        (["precision.recipe=fp7"], "precision.recipe: got 'fp7' (text), expected 'fp32', 'bf16', 'fp8_tensorwise', 'fp8_delayed', 'fp8_blockwise' or 'mxfp8'"),
        (["data.train=[]"], "data.train: got [] (a list), expected"),
        (["data.train.2.weight=1"], "data.train is a list, expected an index from 0 to 1, got 2"),
        (["data.train.a.weight=1"], "data.train is a list, expected an index from 0 to 1, got 'a'"),
        (["run_dir.x=1"], "run_dir is 'runs/x' (text) and has no fields"),
        (["oops"], "got 'oops', expected section.field=value"),
        (["a..b=1"], "got 'a..b=1', expected section.field=value"),
        (["model.seq_length=[1"], "model.seq_length: the value is not YAML"),
    ],
)  # fmt: skip
def test_one_fault(good: Path, overrides: list[str], expected: str) -> None:
    found = faults(good, *overrides)
    assert found[0] == f"{good}: 1 problem"
    assert expected in found[1]


def test_faults_name_line_or_override(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD.replace("      prefix: y", "      prefix: 3\n      weigth: 2"))
    found = faults(path, "optimizer.lr=0")
    assert any(
        fault.startswith("data.train.1.prefix: got 3") and fault.endswith("[line 10]") for fault in found
    )
    assert any("did you mean weight? [line 11]" in fault for fault in found)
    assert any(fault.endswith("[override 'optimizer.lr=0']") for fault in found)


def test_all_faults_together_schema_and_arithmetic(good: Path) -> None:
    """Faults of one section do not hide those between two sound ones."""
    found = faults(
        good,
        "optimizer.lr=x",
        "parallel.tensor_model_parallel_size=3",
        "training.micro_batch_size=3",
        "logging.foo=1",
        "data.train.1.name=a",
    )
    text = "\n".join(found)
    assert len(found) == 1 + 2 + 3 + 1 + 1
    assert "3 does not divide model.num_attention_heads = 4: 4 / 3 = 1.333" in text
    assert "8 is not a multiple of micro_batch_size = 3; try 6 or 9" in text
    assert "data.train.1.name: 'a' is also the name of data.train.0" in text


def test_missing_sections_and_fields(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {hidden_size: 4}\n")
    text = "\n".join(faults(path))
    for name in ("run_dir", "tokenizer", "model.num_layers", "optimizer", "training", "data"):
        assert f"\n{name}: missing, and it has no default" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected a mapping of sections"),
        (b"- 1\n", "expected a mapping of sections"),
        (b"a: [1\n", "not valid YAML"),
        (b"a: \xff\n", "cannot read the configuration"),
        (b"run_dir: a\nrun_dir: b\n", "run_dir: given twice, first on line 1 [line 2]"),
        (b"1: 2\n", "1: unknown key"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert expected in "\n".join(faults(path))


def test_merged_keys_are_not_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        GOOD.replace("- {name: a, ", "- &a {name: a, ").replace("- name: b", "- <<: *a\n      name: b")
    )
    assert [source.prefix for source in load_config(path).data.train] == ["x", "y"]


def test_missing_file(tmp_path: Path) -> None:
    assert "cannot read the configuration" in faults(tmp_path / "no.yaml")[0]


def test_windows_file_with_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_config(path).model.num_layers == 4


def test_record_is_resolved_and_loads_again(good: Path, tmp_path: Path) -> None:
    config = resolve(load_config(good), vocab_size=1000)
    assert config.model.ffn_hidden_size == 192
    assert config.model.num_query_groups == 4
    assert config.model.vocab_size == 1000
    assert config.schedule.lr_decay_steps == 10
    assert config.data.cache_dir == "runs/x/index_cache"
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config
    assert resolve(config, vocab_size=5) == config


def test_differences_are_spelled_out(good: Path) -> None:
    old, new = to_mapping(load_config(good)), to_mapping(load_config(good, ["model.num_layers=8", "seed=1"]))
    assert differences(old, new) == ["seed: recorded 1234, now 1", "model.num_layers: recorded 4, now 8"]


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=1e-30, max_value=1e30))
def test_numbers_survive_the_record(value: float) -> None:
    assert yaml.load(repr(value), Loader=_Loader) == value
    assert yaml.load(f"{value:.3e}", Loader=_Loader) == float(f"{value:.3e}")
    assert yaml.load(yaml.safe_dump(value), Loader=_Loader) == value
