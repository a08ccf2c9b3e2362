"""Rules as a user writes them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tokedit.edit.rules import BOUNDS, Action, Rule, Rules, preset, rules_from_config
from megatron_tokedit.errors import ConfigError


@pytest.mark.parametrize(
    ("bounds", "word"),
    [({}, "no condition"), ({"at_least": 1.5}, "between 0 and 1"), ({"above": 0.5, "below": 0.4}, "no p")],
)
def test_impossible_rules_are_refused(bounds, word):
    with pytest.raises(ConfigError, match=word):
        Rule(Action.RESAMPLE, **bounds)


def _highest(item):
    """Below this the lower bounds leave room, rounded down a little for the float32 logarithm."""
    return min(item.get("at_most", 1.1), item.get("below", 1.1)) * (1 - 1e-6)


@given(
    st.lists(
        st.builds(
            lambda action, bounds: {"action": action, **bounds},
            st.sampled_from(["resample", "drop"]),
            st.dictionaries(st.sampled_from(BOUNDS), st.floats(0, 1), min_size=1),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_what_is_read_is_what_is_written(items):
    if any(max(item.get("at_least", 0), item.get("above", 0)) >= _highest(item) for item in items):
        return  # nearly or truly impossible; test_faulty_rules_are_named has these
    rules = rules_from_config(items)
    assert rules.to_json() == [
        {name: item[name] for name in ("action", *BOUNDS) if name in item} for item in items
    ]
    assert rules_from_config(json.loads(json.dumps(rules.to_json()))) == rules


def test_presets_are_lists_of_rules():
    assert preset("none").to_json() == []
    assert preset("up_revise").to_json() == [{"action": "resample", "at_least": 0.99}]
    assert preset("filtering").to_json() == [{"action": "drop", "below": 0.001}]
    both = preset("low_drop_up_revise")
    assert both.to_json() == [{"action": "resample", "at_least": 0.99}, {"action": "drop", "below": 0.001}]
    assert rules_from_config(both.to_json()) == both
    assert both.thresholds == (0.001, 0.99)
    assert both.resample_intervals == (Rule(Action.RESAMPLE, at_least=0.99).interval,)


def test_whole_numbers_are_probabilities():
    (rule,) = rules_from_config([{"action": "drop", "at_most": 1, "at_least": 0}]).rules
    assert (rule.at_least, rule.at_most) == (0.0, 1.0)


GOOD = {"action": "drop", "below": 0.1}


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], ["rules: the list is empty"]),
        ("resample", ["rules: got 'resample'", "list of rules"]),
        ({"action": "drop", "below": 0.1}, ["list of rules"]),
        ([GOOD, "drop"], ["rules.1: got 'drop'", "mapping"]),
        ([{"action": "resample", "at_lest": 0.9}], ["rules.0.at_lest: unknown", "did you mean at_least?"]),
        ([{**GOOD, "p": 0.9}], ["rules.0.p: unknown", "known are action, at_least, above, at_most, below"]),
        ([{**GOOD, 3: 0.9}], ["rules.0.3: unknown"]),
        ([GOOD, {"below": 0.1}], ["rules.1.action: missing", "resample or drop"]),
        ([{**GOOD, "action": "resampel"}], ["rules.0.action='resampel'", "did you mean resample?"]),
        ([{**GOOD, "action": ["drop"]}], ["rules.0.action=['drop']"]),
        ([GOOD, GOOD, {"action": "drop"}], ["rules.2: ", "no condition on p", "at_least"]),
        ([{**GOOD, "above": "0.5"}], ["rules.0.above='0.5'", "number between 0 and 1"]),
        ([{**GOOD, "above": True}], ["rules.0.above=True"]),
        ([{**GOOD, "above": None}], ["rules.0.above=None"]),
        ([{"action": "drop", "below": float("nan")}], ["rules.0: ", "below=nan", "between 0 and 1"]),
        ([{"action": "drop", "below": -0.1}], ["rules.0: ", "below=-0.1"]),
        ([{**GOOD, "above": 0.5}], ["rules.0: ", "no probability meets"]),
        ([{"x": 1}, GOOD, {"action": "drop"}], ["3 faults", "rules.0.x", "rules.0.action", "rules.2: "]),
    ],
)
def test_faulty_rules_are_named(items, words):
    with pytest.raises(ConfigError) as caught:
        rules_from_config(items)
    for word in words:
        assert word in str(caught.value)


def test_the_first_rule_that_matches_decides():
    rules = Rules((Rule(Action.DROP, above=0.5, below=0.9), Rule(Action.RESAMPLE, at_least=0.3)))
    logprobs = np.log(np.array([0.2, 0.4, 0.7, 0.95, np.nan], np.float32))
    assert rules.actions(logprobs).tolist() == [0, 1, 2, 1, 0]
