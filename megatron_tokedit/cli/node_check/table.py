"""The verdict for a person: one line a node, warnings gathered by what they say, and the last line.

Invariant: a node's line stays one line, whatever a message of somebody else's contains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_tokedit.cli.node_check.findings import SPELLED, TRANSPORTS, Node

_MAX_SPELLED = 5
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"))


def lines(nodes: Sequence[Node], seconds: float) -> Iterator[str]:
    """The table and its sum."""
    rows = [
        (node.name, _gpus(node), "FAILED" if node.faults else "ok", _details(node, nodes)) for node in nodes
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        yield "  ".join(["node", *cells, _one_line(row[3])]).rstrip()
    for text, names in _gathered([(node.name, node.warnings) for node in nodes]):
        yield f"warning: {_one_line(text)} ({_which(names, nodes)})"
    failed = [node.name for node in nodes if node.faults]
    sum_ = f"{len(failed)} failed: {_listed(failed)}" if failed else "all well"
    yield f"{len(nodes)} node{'s' * (len(nodes) > 1)} checked in {seconds:.1f} s, {sum_}"


def last_line(nodes: Sequence[Node]) -> str:
    """What the error message says: who failed, why, and what to do."""
    failed = [node for node in nodes if node.faults]
    reasons = _gathered([(node.name, ["; ".join(node.faults)]) for node in failed])
    told = [
        f"node{'s' * (len(names) > 1)} {_listed(names)}: {_one_line(text)}"
        for text, names in reasons[:_MAX_SPELLED]
    ]
    if len(reasons) > _MAX_SPELLED:
        left = sum(len(names) for _, names in reasons[_MAX_SPELLED:])
        told.append(f"and {left} more node{'s' * (left > 1)}")
    if len(failed) * 2 <= len(nodes) and not _shared_by_none(nodes):
        it = "it" if len(failed) == 1 else "them"
        told.append(f"leave {it} out: sbatch --exclude={','.join(node.name for node in failed)} ...")
    return "; ".join(told)


def _shared_by_none(nodes: Sequence[Node]) -> bool:
    """Whether another node in place of the failed one would fail likewise."""
    answers = [node.is_folder_shared for node in nodes[1:] if node.is_folder_shared is not None]
    return bool(answers) and not any(answers)


def own_line(name: str, faults: Sequence[str]) -> str:
    """What a failing node says on its own stderr."""
    return f"node {name}: {_one_line('; '.join(faults))}"


def _gpus(node: Node) -> str:
    if node.facts is None:
        return "-"
    gpus = node.facts.gpus
    return gpus.describe() + (f" (driver {gpus.driver})" if gpus.gpus and gpus.driver else "")


def _details(node: Node, nodes: Sequence[Node]) -> str:
    if node.faults:
        return "; ".join(node.faults)
    return "; ".join(part for part in (_rates(node, nodes), _clock(node), *_room(node)) if part)


def _rates(node: Node, nodes: Sequence[Node]) -> str:
    names = {other.rank: other.name for other in nodes}
    parts = []
    for transport in TRANSPORTS:
        if link := node.best_link(transport):
            rate = f"{link.gb_per_second:.3g} GB/s ({SPELLED[transport]})"
            parts.append(f"to {names[link.partner]} {rate}")
    if node.copy_gb_per_second is not None:
        parts.append(f"between GPUs {node.copy_gb_per_second:.3g} GB/s")
    if parts and node.facts is not None and node.facts.interface:
        parts.append(f"via {node.facts.interface}")
    return ", ".join(parts)


def _clock(node: Node) -> str:
    if node.seconds_ahead is None:
        return ""
    ahead = node.seconds_ahead
    return f"clock {round(ahead * 1e3, 1) + 0.0:+.1f} ms" if abs(ahead) < 1 else f"clock {ahead:+.1f} s"


def _room(node: Node) -> Iterator[str]:
    if node.facts is None:
        return
    disks = {name: disk for name, disk in node.facts.disks.items() if disk.fault is None}
    spelled = [f"{name.removeprefix('/dev/')} {_bytes(disk.free_bytes)}" for name, disk in disks.items()]
    yield f"free: {', '.join(spelled)}" if spelled else ""
    yield f"{node.facts.num_cores} cores, {_bytes(node.facts.memory_bytes)}"


def _bytes(count: float) -> str:
    unit, name = next((pair for pair in _UNITS if count >= pair[0]), _UNITS[-1])
    value = count / unit
    return f"{value:.0f} {name}" if value >= 9.95 else f"{value:.1f} {name}"


def _gathered(texts: Sequence[tuple[str, Sequence[str]]]) -> list[tuple[str, list[str]]]:
    """Nodes by what is said of them, in the order in which it first is."""
    names: dict[str, list[str]] = {}
    for name, said in texts:
        for text in said:
            names.setdefault(text, []).append(name)
    return list(names.items())


def _which(names: Sequence[str], nodes: Sequence[Node]) -> str:
    if len(names) == len(nodes) > 1:
        return "all nodes"
    left = len(names) - _MAX_SPELLED
    return _listed(names) if left <= 1 else f"{_listed(names[:_MAX_SPELLED])} and {left} more"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _one_line(text: str) -> str:
    return " ".join(text.split())
