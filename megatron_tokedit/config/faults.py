"""A fault of a configuration: where, and what is wrong. Faults are collected, then raised together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_tokedit.errors import ConfigError

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Fault:
    """One problem.

    Attributes:
        path: keys from the root, e.g. ``("data", "train", 0, "weight")``.
        problem: what was got, what was expected.
        place: ``line 12`` or ``override '...'``; empty where unknown.
    """

    path: KeyPath
    problem: str
    place: str = ""

    def at(self, places: Mapping[KeyPath, str]) -> Fault:
        """This fault with the place of its key, or of the nearest enclosing key that has one."""
        for depth in range(len(self.path), 0, -1):
            if place := places.get(self.path[:depth]):
                return replace(self, place=place)
        return self

    def __str__(self) -> str:
        dotted = ".".join(map(str, self.path))
        where = f" [{self.place}]" if self.place else ""
        return f"{dotted}: {self.problem}{where}" if dotted else f"{self.problem}{where}"


def raise_faults(faults: Sequence[Fault], origin: str) -> None:
    """Raise one error that lists all faults; do nothing where there are none.

    Raises:
        ConfigError: ``faults`` is not empty.
    """
    if faults:
        count = "1 problem" if len(faults) == 1 else f"{len(faults)} problems"
        raise ConfigError("\n  - ".join([f"{origin}: {count}", *map(str, faults)]))
