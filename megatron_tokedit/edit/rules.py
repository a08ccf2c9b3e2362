"""Which tokens are edited: an ordered list of (condition on p, action), of which the presets are instances.

``p`` is ``P(x_t | x_<t)``, the prior's probability of the token as it stands in the original document. The
first rule whose condition holds decides; where none holds the token is kept. Strategies and thresholds are
those of "How to Synthesize Text Data without Model Collapse?" (arXiv 2412.14689) and its authors' script; the
paper writes ``>= p`` where the script tests ``> 0.99``, and here the comparison is ``>=``.

Invariant: a condition is tested in float32 log-probability, against the float32 logarithm of the threshold,
so that a token whose probability *is* the threshold meets ``at_least`` whatever exp and log round to, and the
scorer (which tests the same closed intervals) and the editor never disagree.

Legend: ``T`` tokens of a document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_tokedit.errors import ConfigError

Strategy = Literal["none", "up_revise", "low_drop_up_revise", "filtering"]


class Action(IntEnum):
    """What happens to a token."""

    KEEP = 0
    RESAMPLE = 1
    DROP = 2


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
        bounds = {name: getattr(self, name) for name in ("at_least", "above", "at_most", "below")}
        given = {name: value for name, value in bounds.items() if value is not None}
        if not given:
            raise ConfigError(f"edit rule {self.action.name.lower()}: it has no condition on p")
        for name, value in given.items():
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"edit rule {name}={value}: expected a probability between 0 and 1")
        low, high = self.interval
        if low > high:
            raise ConfigError(f"edit rule {given}: no probability meets these conditions together")

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
        given = (self.at_least, self.above, self.at_most, self.below)
        return tuple(bound for bound in given if bound is not None and 0.0 < bound < 1.0)


@dataclass(frozen=True, slots=True)
class Rules:
    """An ordered list of rules; the first that matches decides."""

    rules: tuple[Rule, ...]

    @property
    def resample_intervals(self) -> tuple[tuple[float, float], ...]:
        """Closed log-probability intervals whose rows may need candidates, for a scorer's request."""
        return tuple(rule.interval for rule in self.rules if rule.action is Action.RESAMPLE)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """All distinct thresholds of the rules, ascending."""
        return tuple(sorted({bound for rule in self.rules for bound in rule.thresholds}))

    def actions(self, logprobs_T: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
        """The action for each token: int8 ``[T]`` of :class:`Action`; NaN (an unscored token) is kept."""
        actions_T = np.zeros(len(logprobs_T), np.int8)
        for rule in reversed(self.rules):
            low, high = rule.interval
            with np.errstate(invalid="ignore"):
                actions_T[(logprobs_T >= np.float32(low)) & (logprobs_T <= np.float32(high))] = rule.action
        return actions_T


DEFAULT_TEMPERATURE = {"up_revise": 1.5, "low_drop_up_revise": 1.0, "filtering": 1.0}
"""The temperature that each preset's authors used."""


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


def _log32(probability: float) -> float:
    """The float32 logarithm of a probability, -inf for 0."""
    return float(np.float32(math.log(probability))) if probability > 0.0 else -math.inf


def _next_float32(value: float, towards: float) -> float:
    """The neighbouring float32 of a float32 value."""
    return float(np.nextafter(np.float32(value), np.float32(towards)))
