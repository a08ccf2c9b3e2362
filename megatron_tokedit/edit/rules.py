"""Which tokens are edited: an ordered list of (condition on p, action), of which the presets are instances.

``p`` is ``P(x_t | x_<t)``, the prior's probability of the token as it stands in the original document. The
first rule whose condition holds decides; where none holds the token is kept. Strategies and thresholds are
those of "How to Synthesize Text Data without Model Collapse?" (arXiv 2412.14689) and its authors' script; the
paper writes ``>= p`` where the script tests ``> 0.99``, and here the comparison is ``>=``.

Both the presets and the list that a user writes (:func:`rules_from_config`) make the same :class:`Rules`, and
:meth:`Rules.to_json` writes any of them as such a list.

Invariant: a condition is tested in float32 log-probability, against the float32 logarithm of the threshold,
so that a token whose probability *is* the threshold meets ``at_least`` whatever exp and log round to, and the
scorer (which tests the same closed intervals) and the editor never disagree.

Legend: ``T`` tokens of a document.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_tokedit.errors import ConfigError

Strategy = Literal["none", "up_revise", "low_drop_up_revise", "filtering"]


class Action(IntEnum):
    """What happens to a token."""

    KEEP = 0
    RESAMPLE = 1
    DROP = 2


_SIGNS = {"at_least": ">=", "above": ">", "at_most": "<=", "below": "<"}
BOUNDS = tuple(_SIGNS)
"""The conditions that a rule may have."""
_ACTION_OF_NAME = {"resample": Action.RESAMPLE, "drop": Action.DROP}


@dataclass(frozen=True, slots=True)
class Rule:
    """One (condition, action). All the bounds given must hold; each is a probability in [0, 1].

    Attributes:
        action: RESAMPLE or DROP.
        at_least: p >= this.
        above: p > this.
        at_most: p <= this.
        below: p < this.
    """

    action: Action
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            ConfigError: a bound outside [0, 1], no bound at all, or a condition that no p can meet.
        """
        given = self.bounds
        if not given:
            raise ConfigError(
                f"edit rule {self.action.name.lower()}: it has no condition on p; give at least one of "
                f"{', '.join(BOUNDS)}"
            )
        for name, value in given.items():
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"edit rule {name}={value}: expected a probability between 0 and 1")
        low, high = self.interval
        if low > high:
            raise ConfigError(f"edit rule {given}: no probability meets these conditions together")

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that were given, by name."""
        values = {name: getattr(self, name) for name in BOUNDS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def interval(self) -> tuple[float, float]:
        """The condition as a closed interval of float32 log-probabilities (the upper end may be +inf)."""
        low, high = -math.inf, math.inf
        if self.at_least is not None:
            low = max(low, _log32(self.at_least))
        if self.above is not None:
            low = max(low, _next_float32(_log32(self.above), math.inf))
        if self.at_most is not None:
            high = min(high, _log32(self.at_most) if self.at_most < 1.0 else math.inf)
        if self.below is not None:
            high = min(high, _next_float32(_log32(self.below), -math.inf))
        return low, high

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The bounds strictly between 0 and 1, where a rounding error could change the outcome."""
        return tuple(bound for bound in self.bounds.values() if 0.0 < bound < 1.0)


@dataclass(frozen=True, slots=True)
class Rules:
    """An ordered list of rules; the first that matches decides.

    Attributes:
        rules: the list.
        resample_intervals: closed log-probability intervals whose rows may need candidates, for a scorer's
            request.
        thresholds: all distinct thresholds of the rules, ascending.
    """

    rules: tuple[Rule, ...]
    resample_intervals: tuple[tuple[float, float], ...] = field(init=False, repr=False, compare=False)
    thresholds: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _tests: tuple[tuple[float, float, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Derive from the rules, once, what every document needs."""
        intervals = tuple(rule.interval for rule in self.rules if rule.action is Action.RESAMPLE)
        thresholds = tuple(sorted({bound for rule in self.rules for bound in rule.thresholds}))
        tests = tuple((*rule.interval, int(rule.action)) for rule in reversed(self.rules))
        object.__setattr__(self, "resample_intervals", intervals)
        object.__setattr__(self, "thresholds", thresholds)
        object.__setattr__(self, "_tests", tests)

    def actions(self, logprobs_T: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
        """The action for each token: int8 ``[T]`` of :class:`Action`; NaN (an unscored token) is kept."""
        actions_T = np.zeros(len(logprobs_T), np.int8)
        with np.errstate(invalid="ignore"):
            for low, high, action in self._tests:  # last rule first: an earlier one overrides it
                met_T = logprobs_T >= low
                if high < math.inf:
                    met_T &= logprobs_T <= high
                actions_T[met_T] = action
        return actions_T

    def to_json(self) -> list[dict[str, Any]]:
        """The list that :func:`rules_from_config` reads, bounds as they were given."""
        return [{"action": rule.action.name.lower(), **rule.bounds} for rule in self.rules]


def preset(strategy: Strategy, *, threshold: float = 0.99, low_threshold: float = 0.001) -> Rules:
    """The rules of a named strategy.

    Args:
        strategy: ``none``; ``up_revise`` (resample where p >= threshold); ``filtering`` (drop where
            p < low_threshold); ``low_drop_up_revise`` (both).
        threshold: upper threshold.
        low_threshold: lower threshold.

    Raises:
        ConfigError: a threshold that is not a probability.
    """
    revise = Rule(Action.RESAMPLE, at_least=threshold)
    drop = Rule(Action.DROP, below=low_threshold)
    return Rules(
        {
            "none": (),
            "up_revise": (revise,),
            "low_drop_up_revise": (revise, drop),
            "filtering": (drop,),
        }[strategy]
    )


def rules_from_config(items: Sequence[Mapping[str, Any]]) -> Rules:
    """The rules that a user wrote, such as ``[{"action": "resample", "at_least": 0.99}]``.

    Args:
        items: one mapping a rule, in order: ``action`` (``resample`` or ``drop``) and one or more of
            ``at_least``, ``above``, ``at_most``, ``below``, each a probability.

    Raises:
        ConfigError: one message with every fault, each with its rule's index from 0 (``rules.0.at_least``).
    """
    if not isinstance(items, Sequence) or isinstance(items, str | bytes):
        raise ConfigError(f"rules: got {items!r}; expected a list of rules such as {_EXAMPLE}")
    if not items:
        raise ConfigError(f"rules: the list is empty; expected at least one rule such as {_EXAMPLE}")
    rules, faults = [], []
    for index, item in enumerate(items):
        found = [f"rules.{index}{fault}" for fault in _rule_faults(item)]
        if not found:
            bounds = {name: float(item[name]) for name in BOUNDS if name in item}
            try:
                rules.append(Rule(_ACTION_OF_NAME[item["action"]], **bounds))
            except ConfigError as error:
                found = [f"rules.{index}: {error}"]
        faults += found
    if len(faults) == 1:
        raise ConfigError(faults[0])
    if faults:
        raise ConfigError("\n  ".join([f"rules: {len(faults)} faults:", *faults]))
    return Rules(tuple(rules))


_EXAMPLE = "{action: resample, at_least: 0.99}"


def _rule_faults(item: Any) -> Iterator[str]:
    """What is wrong with one rule's names and types, to be put after the rule's index."""
    if not isinstance(item, Mapping):
        yield f": got {item!r}; expected a mapping such as {_EXAMPLE}"
        return
    known = ("action", *BOUNDS)
    for name in item:
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            yield f".{name}: unknown setting; {hint}"
    action = item.get("action")
    if "action" not in item:
        yield f".action: missing; expected {' or '.join(_ACTION_OF_NAME)}"
    elif not isinstance(action, str) or action not in _ACTION_OF_NAME:
        near = get_close_matches(str(action), _ACTION_OF_NAME, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f".action={action!r}: expected {' or '.join(_ACTION_OF_NAME)}{hint}"
    for name in BOUNDS:
        value = item.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            yield f".{name}={value!r}: expected a probability, a number between 0 and 1"


def rule_in_words(rule: Mapping[str, Any]) -> str:
    """An item of :meth:`Rules.to_json` as a person says it: ``resample where p >= 0.99``."""
    bounds = [f"p {sign} {rule[name]}" for name, sign in _SIGNS.items() if rule.get(name) is not None]
    return f"{rule.get('action')} where {' and '.join(bounds) or 'any'}"


def _log32(probability: float) -> float:
    """The float32 logarithm of a probability, -inf for 0."""
    return float(np.float32(math.log(probability))) if probability > 0.0 else -math.inf


def _next_float32(value: float, towards: float) -> float:
    """The neighbouring float32 of a float32 value."""
    return float(np.nextafter(np.float32(value), np.float32(towards)))
