"""Finding tasks, and scoring of continuations against a table of probabilities."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tokedit.cli import evaluate_tasks
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.evaluation.tasks.continuations import score_pairs
from megatron_tokedit.evaluation.tasks.encoding import Pair
from megatron_tokedit.evaluation.tasks.results import CheckpointScores, Score, TaskScores, as_json, as_table
from megatron_tokedit.scoring.scorer import CausalScorer, ScoringOptions
from megatron_tokedit.testing.fake_prior import BigramBackbone, random_bigrams

sys.path.append(str(Path(__file__).resolve().parent))
import task_cases

VOCAB = 150  # more than the candidates that are looked at
LIMIT = 6
TABLE = random_bigrams(VOCAB, seed=3)
ids = st.lists(st.integers(0, VOCAB - 1) | st.sampled_from([0, 1]), min_size=1, max_size=9).map(tuple)
pairs = st.lists(st.builds(Pair, ids, ids.filter(lambda found: len(found) <= LIMIT)), min_size=1, max_size=30)


@settings(deadline=None)
@given(pairs, st.integers(1, 60))
def test_continuations(asked: list[Pair], tokens_at_once: int) -> None:
    """The table token by token, whatever else is asked, with and without a shared beginning."""
    options = ScoringOptions(LIMIT + 1, 1, None, 16, 4000)
    scorer = CausalScorer(BigramBackbone(TABLE, max_context_tokens=LIMIT), options)
    told: list[int] = []
    found = score_pairs(
        scorer,
        asked,
        max_positions=LIMIT,
        tokens_at_once=tokens_at_once,
        on_answers=lambda answers: told.extend(number for number, _ in answers),
    )
    assert sorted(told) == list(range(len(asked)))
    logprobs = np.log(TABLE)
    for pair, (value, is_greedy) in zip(asked, found, strict=True):
        before = [pair.context[-1], *pair.continuation[:-1]]
        expected = sum(logprobs[a, b] for a, b in zip(before, pair.continuation, strict=True))
        assert value == pytest.approx(expected, abs=1e-4)
        best = [int(TABLE[a].argmax()) for a in before]
        assert is_greedy == (best == list(pair.continuation))


def test_a_shared_beginning_is_scored_once() -> None:
    backbone = BigramBackbone(TABLE)
    scorer = CausalScorer(backbone, ScoringOptions(101, 1, None, 1000, 1 << 20))
    best = np.argsort(-TABLE[7])[:5]
    asked = [Pair(tuple(range(50)) + (7,), (int(i),)) for i in best]
    answers = score_pairs(scorer, asked, max_positions=100, tokens_at_once=1000)
    assert backbone.forward_shapes == [(1, 51)]
    assert [is_greedy for _, is_greedy in answers] == [True, False, False, False, False]


def test_names_files_and_folders(tmp_path: Path) -> None:
    from megatron_tokedit.evaluation.tasks.catalog import load_tasks
    from megatron_tokedit.evaluation.tasks.harness import silence

    tasks = task_cases.write_tasks(tmp_path / "tasks")
    group = {"group": "local_group", "task": ["local_choices"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / "group.yaml").write_text(json.dumps(group))
    named = {"local_choices", "local_starts", "local_texts"}
    with silence():
        assert set(load_tasks([str(tasks)]).tasks) == named
        assert set(load_tasks([str(tasks / "texts.yaml")]).tasks) == {"local_texts"}
        assert set(load_tasks(["local_*"], [str(tasks)]).tasks) == named
        loaded = load_tasks(["local_group"], [str(tasks), str(tmp_path / "groups")])
        assert set(loaded.tasks) == {"local_choices"}
        assert loaded.content["group_map"] == {"local_group": ["local_choices"]}


def test_tasks_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_tokedit.evaluation.tasks.catalog import load_tasks
    from megatron_tokedit.evaluation.tasks.harness import silence

    tasks = task_cases.write_tasks(tmp_path / "tasks")
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [\n")
    no_data = task_cases.write_task(tmp_path, "no_data", output_type="multiple_choice")
    remote = task_cases.write_task(
        tmp_path, "remote", dataset_path="nobody/nothing", dataset_kwargs={}, output_type="multiple_choice"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cases: list[tuple[list[str], str]] = [
        (["local_choice"], r"has no such task, group or tag; did you mean local_choices"),
        ([f"{tmp_path}/empty"], r"no task files"),
        ([str(broken)], r"broken.yaml: is not YAML: .*line 2"),
        ([str(no_data)], r"no_data.yaml: cannot be loaded: FileNotFoundError"),
        (
            [str(remote)],
            r"(?s)remote.yaml: cannot be loaded: .*is not on this machine and HF_HUB_OFFLINE is set",
        ),
        (
            [str(tasks), str(tasks / "texts.yaml")],
            r"the task local_texts is in .*texts.yaml and in what stands",
        ),
    ]
    for specs, message in cases:
        with silence(), pytest.raises(ConfigError, match=message):
            load_tasks(specs, [str(tasks)])
    with pytest.raises(ConfigError, match="no such folder"):
        load_tasks(["local_texts"], [str(tmp_path / "gone")])


def arguments(**changes: Any) -> Namespace:
    fields = dict.fromkeys(("config", "num_fewshot", "limit", "seed", "output"))
    numbers = {"bootstrap_iters": 0, "tensor_parallel": 1, "batch_tokens": 1}
    return Namespace(**{**fields, **numbers, "checkpoints": ["x"], "tasks": ["a,b"], **changes})


def test_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, message in (
        ({"tasks": [","]}, "--tasks: expected at least one"),
        ({"limit": 0.0}, "--limit: 0.0, expected a number of documents"),
        ({"limit": 1.5}, "--limit: 1.5, expected a whole number"),
        ({"num_fewshot": -1}, "--num-fewshot: -1, expected at least 0"),
        ({"output": str(tmp_path)}, "is a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate_tasks.run(arguments(**changes))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name)
    )
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[eval\]'"):
        evaluate_tasks.run(arguments())


def test_the_table() -> None:
    def scores(value: float, perplexity: float) -> CheckpointScores:
        task = TaskScores(
            "t",
            (),
            (Score("acc", "none", value, 0.01, True), Score("ppl", "strict", perplexity, None, False)),
            1200,
            0,
            "1",
            "00",
        )
        return CheckpointScores("c", "hf", "f", 1.0, (task,))

    results = [scores(0.5, 9.0), scores(0.25, 9.0)]
    assert as_table(results, ["a", "b"]).splitlines() == [
        "task  metric        documents                 a                  b",
        "t     acc               1,200  0.5000 +- 0.0100*  0.2500 +- 0.0100",
        "t     ppl (strict)      1,200            9.0000             9.0000",
    ]
    record = as_json(results, settings={"seed": 1})
    assert record["table"][1] == {
        "task": "t", "metric": "ppl", "filter": "strict", "value": [9.0, 9.0], "stderr": [None, None]
    }  # fmt: skip
    assert record["settings"] == {"seed": 1}
    assert json.dumps(record)
