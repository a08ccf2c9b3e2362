"""What the leader knows of each node when it judges. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_tokedit.cli.node_check.facts import Facts

Transport = Literal["gloo", "nccl"]
TRANSPORTS: tuple[Transport, ...] = ("nccl", "gloo")
SPELLED: dict[Transport, str] = {"nccl": "NCCL", "gloo": "gloo"}

NO_ANSWER = "no answer"
"""What an end of a pair says that waited in vain."""


@dataclass(frozen=True, slots=True)
class Link:
    """A measured pair, as seen from one end.

    Attributes:
        partner: rank of the other end.
        transport: what was measured.
        gb_per_second: each way; None: it failed.
        fault: why it failed.
    """

    partner: int
    transport: Transport
    gb_per_second: float | None = None
    fault: str | None = None


@dataclass(slots=True)
class Node:
    """One node's findings.

    Attributes:
        rank: of it.
        name: as Slurm calls it.
        facts: what it said of itself; None: it never did.
        missing: why nothing more is known of it: it never came, or stopped answering.
        seconds_ahead: its clock compared with node 0's.
        links: to its partners.
        copy_gb_per_second: of the slowest copy between neighboring GPUs of the node.
        told: faults that it found by itself.
        is_folder_shared: node 0 and it see each other's files in the run folder; None: not known.
        faults: the verdict, one sentence each.
        warnings: likewise; they fail nothing.
    """

    rank: int
    name: str
    facts: Facts | None = None
    missing: str | None = None
    seconds_ahead: float | None = None
    links: list[Link] = field(default_factory=list)
    copy_gb_per_second: float | None = None
    told: list[str] = field(default_factory=list)
    is_folder_shared: bool | None = None
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def best_link(self, transport: Transport) -> Link | None:
        """The fastest; None where none was measured or all failed."""
        good = [link for link in self.links if link.transport == transport and link.gb_per_second is not None]
        return max(good, key=lambda link: link.gb_per_second or 0.0, default=None)


@dataclass(frozen=True, slots=True)
class Limits:
    """What is demanded.

    Attributes:
        gpu_type: text that occurs in every GPU's name, in any case; None: any.
        min_free_gb: in the run folder.
        max_clock_skew_seconds: between a node and the others.
        min_bandwidth_gb: per second and node; None: a quarter of the median of four or more nodes.
    """

    gpu_type: str | None = None
    min_free_gb: float = 1.0
    max_clock_skew_seconds: float = 2.0
    min_bandwidth_gb: float | None = None
