"""The ``slurm`` section: what sbatch would refuse, or would break the chain of jobs, is refused first."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tokedit.config.load import config_from_mapping, load_config
from megatron_tokedit.config.record import to_mapping, to_yaml
from megatron_tokedit.config.slurm import seconds_of
from megatron_tokedit.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny_cpu.yaml"


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(TINY, overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("4:00:00", 14400),
        ("2-0", 172800),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-12:30:05", 131405),
        ("", None),
        ("4h", None),
        ("1:2", None),
        ("1-", None),
        ("-5", None),
    ],
)
def test_time_limits(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


def test_defaults_and_record() -> None:
    bare = load_config(TINY)
    assert bare.slurm.evaluate is None
    assert bare.slurm.train.world_size is None
    given = load_config(
        TINY,
        [
            'slurm.train={nodes: 2, gpus_per_node: 2, time: "1-0", mem: 0, gpu_type: h100}',
            "slurm.evaluate={}",
        ],
    )
    assert (given.slurm.train.world_size, given.slurm.train.seconds, given.slurm.train.mem) == (4, 86400, "0")
    assert config_from_mapping(to_mapping(given), origin="record") == given


def test_a_printed_configuration_keeps_its_times(tmp_path: Path) -> None:
    config = load_config(TINY, ['slurm.train.time="4:00:00"', "slurm.train.mem=1000"])
    path = tmp_path / "printed.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path).slurm.train == config.slurm.train


def test_an_unquoted_time_is_told_to_be_quoted(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(TINY.read_text() + "\nslurm:\n  train:\n    time: 4:00:00\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert "slurm.train.time: got 14400 (a whole number), expected a time in quotes" in str(error.value)
    assert "quote it" in str(error.value)
    assert "[line" in str(error.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("slurm.train.time=4h", "slurm.train.time: got '4h' (text), expected a time longer than 0 as sbatch"),
        ('slurm.train.time="0"', "expected a time longer than 0"),
        (
            "slurm.train.mem=64 GB",
            "slurm.train.mem: got '64 GB' (text), expected memory a node as sbatch takes",
        ),
        ("slurm.train.nodes=0", "slurm.train.nodes: got 0 (a whole number), expected greater than 0"),
        ("slurm.preprocess.tasks=-1", "slurm.preprocess.tasks: got -1"),
        ("slurm.train.tasks=2", "slurm.train.tasks: unknown key"),
        ("slurm.train.partition=a b", "slurm.train.partition: got 'a b' (text), expected one word"),
        ("slurm.account=--x", "slurm.account: got '--x' (text), expected one word"),
        ("slurm.sbatch=[mail-type=FAIL]", "slurm.sbatch.0: got 'mail-type=FAIL' (text), expected one flag"),
        ("slurm.sbatch=[--mail-type FAIL]", "expected one flag of sbatch an entry, in one word"),
        ("slurm.merge.sbatch=[--array=0-3]", "the field instead of the flag: preprocess.tasks and"),
        ("slurm.merge.sbatch=[--licenses=a, -pgpu]", "slurm.merge.sbatch.1: got '-pgpu' (text), expected"),
        ("slurm.train.sbatch=[--nodes=3]", "the field instead of the flag: train.nodes"),
        ("slurm.train.sbatch=[--gres=gpu:8]", "the field instead of the flag: gpus_per_node (and gres_type)"),
        ("slurm.train.sbatch=[--job-name=x]", "expected no --job-name: it is the run folder's name"),
        ("slurm.train.sbatch=[--output=x]", "expected no --output: it is RUN_DIR/slurm"),
        ("slurm.train.sbatch=[--signal=USR2@9]", "the field instead of the flag: signal"),
        ("slurm.train.sbatch=[-dsingleton]", "expected no --dependency: submit.py makes the chain"),
        ("slurm.train.gres_type=h100", "slurm.train.gres_type: has no effect without gpus_per_node"),
        ('slurm.train.time="9:59"', "slurm.train.time: 9:59 is shorter than 10 minutes: the job is told to"),
        ('slurm.preprocess.time="3"', "slurm.preprocess.time: 3 is shorter than 4 minutes"),
        ('slurm.train={time: "20", signal: 900}', "slurm.train.time: 20 is shorter than 30 minutes"),
        ("slurm.merge.signal=60", "slurm.merge.signal: unknown key"),
        ("slurm.evaluate.nodes=2", "slurm.evaluate.nodes: unknown key"),
    ],
)
def test_fault(override: str, expected: str) -> None:
    said = message(override)
    assert expected in said
    assert "1 problem" in said


def test_ranks_must_make_whole_copies_of_the_model() -> None:
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    said = message(*layout, "slurm.train={nodes: 3, gpus_per_node: 2}")
    assert (
        "slurm.train.nodes: 3 x gpus_per_node = 2 makes 6 ranks, and the layout under `parallel` needs a "
        "multiple of 4; try 4 or 8"
    ) in said
    load_config(TINY, [*layout, "slurm.train={nodes: 2, gpus_per_node: 2}"])
    load_config(TINY, [*layout, "slurm.train.nodes=3"])  # the ranks a node are the site's


def test_an_evaluation_needs_data() -> None:
    said = message("slurm.evaluate={}", "data.validation=[]")
    assert "slurm.evaluate: there is nothing to evaluate on: data.validation is empty" in said


def test_other_flags_go_through() -> None:
    flags = ["--mail-type=FAIL", "--gres=nvme:1", "-xnode3", "--comment=two words", "--exclusive"]
    config = load_config(TINY, [f"slurm.sbatch={flags}"])
    assert config.slurm.sbatch == flags
