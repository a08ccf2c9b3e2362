"""From what was found to faults and warnings of each node. Pure: no node is asked anything here.

Invariant: what has to be equal is compared with what most nodes have: the odd one out is named.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from megatron_tokedit.cli.node_check.facts import Facts
from megatron_tokedit.cli.node_check.findings import NO_ANSWER, SPELLED, TRANSPORTS, Limits, Node, Transport
from megatron_tokedit.cli.node_check.versions import COMMIT, SOURCE

_GIB = 2**30
_MAX_USED_MIB = 1024
"""Drivers hold some hundred MiB of an idle GPU."""
_MIN_SHM_BYTES = 64 * 10**6
_MIN_TMP_BYTES = 10**9
_MIN_OPEN_FILES = 4096
_MIN_FREE_FILES = 10_000
_BUSY_FACTOR = 1.5
_SLOW_FACTOR = 0.25
_MIN_NODES_FOR_MEDIAN = 4


def judge(nodes: Sequence[Node], limits: Limits) -> None:
    """Fill in every node's ``faults`` and ``warnings``."""
    for node in nodes:
        node.faults, node.warnings = [], []
        if node.missing is not None:
            node.faults.append(node.missing)
        node.faults += node.told
        if node.facts is not None:
            _judge_gpus(node, node.facts, limits)
            _judge_disks(node, node.facts, limits)
            _judge_limits(node, node.facts)
    known = [node for node in nodes if node.facts is not None]
    _compare(known, "", _gpus_of)
    _compare_versions(known)
    _compare(known, "active InfiniBand ports:", lambda facts: facts.num_active_infiniband_ports, warns=True)
    _judge_sharing(nodes)
    _judge_clocks(nodes, limits.max_clock_skew_seconds)
    _judge_links(nodes)
    _judge_rates(nodes, limits.min_bandwidth_gb)


# ------------------------------------------------------------------------------------------- one node


def _judge_gpus(node: Node, facts: Facts, limits: Limits) -> None:
    gpus = facts.gpus
    because = f" ({gpus.complaint})" if gpus.complaint else ""
    wanted = limits.gpu_type
    if gpus.num_promised and not gpus.gpus:
        node.faults.append(
            f"Slurm gives {gpus.num_promised} GPU(s) and none is to be seen{because or ': in a container?'}"
        )
    elif gpus.gpus and gpus.complaint:
        node.faults.append(gpus.complaint)
    elif wanted and not gpus.gpus:
        node.faults.append(f"no GPU where {wanted} is wanted{because}")
    odd = [gpu.name for gpu in gpus.gpus if wanted and wanted.lower() not in gpu.name.lower()]
    if odd:
        node.faults.append(f"{odd[0]} where {wanted} is wanted")
    if gpus.gpus and gpus.num_seen_by_torch is None:
        text = f"this torch is built without CUDA and cannot use the {len(gpus.gpus)} GPU(s)"
        (node.faults if gpus.num_promised or wanted else node.warnings).append(text)
    elif gpus.gpus and gpus.num_seen_by_torch != len(gpus.gpus):
        node.faults.append(f"torch can use {gpus.num_seen_by_torch} of {len(gpus.gpus)} GPUs")
    for gpu in gpus.gpus:
        if gpu.trouble:
            node.faults.append(f"GPU {gpu.index}: {gpu.trouble}")
        if gpu.num_uncorrected_errors:
            node.faults.append(f"GPU {gpu.index}: {gpu.num_uncorrected_errors} uncorrected memory errors")
        if gpu.used_mib is not None and gpu.used_mib > _MAX_USED_MIB:
            users = f" ({'; '.join(gpu.users)})" if gpu.users else ""
            node.faults.append(f"GPU {gpu.index}: {gpu.used_mib / 1024:.1f} GiB in use by others{users}")


def _judge_disks(node: Node, facts: Facts, limits: Limits) -> None:
    for name, disk in facts.disks.items():
        what = f"run folder {disk.folder}" if name == "run" else name
        free_gb = disk.free_bytes / 1e9
        if disk.fault is not None:
            (node.faults if name == "run" else node.warnings).append(disk.fault)
        elif name == "run" and free_gb < limits.min_free_gb:
            node.faults.append(
                f"{what}: {free_gb:.3g} GB free, less than --min-free-gb {limits.min_free_gb:g} "
                f"(TOKEDIT_MIN_FREE_GB of a job)"
            )
        elif name == "run" and disk.free_files is not None and disk.free_files < _MIN_FREE_FILES:
            node.faults.append(f"{what}: room for {disk.free_files} more files only (inodes)")
        elif name == "/dev/shm" and disk.free_bytes < _MIN_SHM_BYTES:
            node.warnings.append(f"{what}: {disk.free_bytes / 1e6:.0f} MB free; data loaders and NCCL use it")
        elif name == "/tmp" and disk.free_bytes < _MIN_TMP_BYTES:
            node.warnings.append(f"{what}: {disk.free_bytes / 1e6:.0f} MB free")


def _judge_limits(node: Node, facts: Facts) -> None:
    node.faults += facts.interface_faults
    if facts.num_cores < len(facts.gpus.gpus):
        node.faults.append(
            f"{facts.num_cores} core(s) for {len(facts.gpus.gpus)} GPUs: submit with --cpus-per-task"
        )
    if facts.open_files_limit is not None and facts.open_files_limit < _MIN_OPEN_FILES:
        node.warnings.append(f"open files are limited to {facts.open_files_limit} (ulimit -n)")
    if facts.locked_memory_limit_bytes is not None and facts.num_infiniband_ports:
        limit = facts.locked_memory_limit_bytes // 1024
        node.warnings.append(f"locked memory is limited to {limit} KiB (ulimit -l), which InfiniBand needs")
    if facts.load > _BUSY_FACTOR * facts.num_machine_cores + 1:
        times = facts.load / (facts.num_machine_cores or 1)
        node.warnings.append(f"the load is {times:.0f} times its cores: something else runs there")
    if facts.available_memory_bytes < facts.memory_bytes / 4:
        free, total = facts.available_memory_bytes / _GIB, facts.memory_bytes / _GIB
        node.warnings.append(f"{free:.1f} of {total:.1f} GiB of memory are free")


# ------------------------------------------------------------------------------------------- comparing


def _gpus_of(facts: Facts) -> str:
    """What has to be equal of the GPUs; memory to the GiB, since some of it may be set aside."""
    memory = {round((gpu.memory_mib or 0) / 1024) for gpu in facts.gpus.gpus}
    sizes = f" of {' and '.join(str(size) for size in sorted(memory))} GiB" if memory else ""
    return facts.gpus.describe() + sizes


def _compare(
    nodes: Sequence[Node], what: str, value_of: Callable[[Facts], Hashable], *, warns: bool = False
) -> None:
    """Note the nodes that differ from most; among equals the first node is right."""
    values = {node.rank: value_of(node.facts) for node in nodes if node.facts is not None}
    counted = Counter(values.values())  # in node order, which decides where counts are equal
    if len(counted) < 2:
        return
    usual, _ = counted.most_common(1)[0]
    odd = [node for node in nodes if values[node.rank] != usual]
    if len(nodes) == 2:
        others = next(f"{node.name} has" for node in nodes if node not in odd)
    else:
        others = "the others have" if len(odd) == 1 else "most have"
    for node in odd:
        own = values[node.rank]
        text = (
            f"no {what} where {others} {usual}"
            if own is None
            else f"{what} {own} where {others} {usual or 'none'}"
        )
        (node.warnings if warns else node.faults).append(text.strip())


def _compare_versions(nodes: Sequence[Node]) -> None:
    versions = [node.facts.versions for node in nodes if node.facts is not None]
    names = dict.fromkeys(name for own in versions for name in own)
    if len({own.get(SOURCE) for own in versions}) == 1:
        names.pop(COMMIT, None)
    for name in names:
        _compare(nodes, name, lambda facts, name=name: facts.versions.get(name))  # type: ignore[misc]


def _judge_sharing(nodes: Sequence[Node]) -> None:
    head = nodes[0]
    for node in nodes:
        if node.is_folder_shared is False and node.facts is not None:
            folder = node.facts.disks["run"].folder
            node.faults.append(
                f"the run folder {folder} is not the one of {head.name}: a file written on one is not seen "
                f"on the other; put run_dir on a file system that all nodes share"
            )


def _judge_clocks(nodes: Sequence[Node], limit_seconds: float) -> None:
    """Three or more are compared with their median, two with the leader."""
    known = {node.rank: node.seconds_ahead for node in nodes if node.seconds_ahead is not None}
    reference = statistics.median(known.values()) if len(known) > 2 else 0.0
    others = f"{nodes[0].name}'s" if len(known) <= 2 else "the others'"
    for node in nodes:
        if node.seconds_ahead is None:
            continue
        ahead = node.seconds_ahead - reference
        if abs(ahead) > limit_seconds:
            node.faults.append(f"clock {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} {others}")


# ------------------------------------------------------------------------------------------- the network


def _judge_links(nodes: Sequence[Node]) -> None:
    """Pairs that failed: the fault of the end that reaches nobody, else of both."""
    by_rank = {node.rank: node for node in nodes}
    here = [node for node in nodes if node.missing is None]
    for transport in TRANSPORTS:
        lost = {node.rank for node in here if node.best_link(transport) is None}
        for node in here:
            for link in node.links:
                partner = by_rank[link.partner]
                if link.transport != transport or link.fault is None or partner.missing is not None:
                    continue
                if node.rank not in lost and link.partner in lost:
                    continue
                if link.fault == NO_ANSWER and _knows_why(partner, node.rank, transport):
                    continue
                why = link.fault + _loopback_hint(partner, transport)
                node.faults.append(f"cannot reach {partner.name} over {SPELLED[transport]}: {why}")


def _loopback_hint(node: Node, transport: Transport) -> str:
    """A host name that means 127.0.1.1 on the node itself, as on some systems, is nothing to others."""
    interface = node.facts.interface if node.facts is not None else None
    if transport != "gloo" or interface is None or not interface.split()[-1].startswith("127."):
        return ""
    return f" (gloo listens on {interface} there; set GLOO_SOCKET_IFNAME)"


def _knows_why(node: Node, partner: int, transport: str) -> bool:
    """Whether this end of a failed pair could not even begin, so that the other waited in vain."""
    return any(
        link.partner == partner and link.transport == transport and link.fault not in (None, NO_ANSWER)
        for link in node.links
    )


def _judge_rates(nodes: Sequence[Node], wanted_gb: float | None) -> None:
    """Training's transport decides; a slow gloo beside NCCL is a warning."""
    has_nccl = any(link.transport == "nccl" for node in nodes for link in node.links)
    _judge_transport(nodes, "nccl" if has_nccl else "gloo", wanted_gb, warns=False)
    if has_nccl:
        _judge_transport(nodes, "gloo", None, warns=True)
    rates = {node.rank: node.copy_gb_per_second for node in nodes if node.copy_gb_per_second is not None}
    if len(rates) >= _MIN_NODES_FOR_MEDIAN:
        median = statistics.median(rates.values())
        for node in nodes:
            if (rate := rates.get(node.rank)) is not None and rate < _SLOW_FACTOR * median:
                node.faults.append(
                    f"{rate:.3g} GB/s between its GPUs, the median of all nodes is {median:.3g}"
                )


def _judge_transport(
    nodes: Sequence[Node], transport: Transport, wanted_gb: float | None, *, warns: bool
) -> None:
    best = {node.rank: link.gb_per_second or 0.0 for node in nodes if (link := node.best_link(transport))}
    limit, why = wanted_gb, f"less than --min-bandwidth-gb {wanted_gb or 0:g}"
    if limit is None and len(best) >= _MIN_NODES_FOR_MEDIAN:
        median = statistics.median(best.values())
        limit, why = _SLOW_FACTOR * median, f"the median of all nodes is {median:.3g}"
    for node in nodes:
        if limit is not None and node.rank in best and best[node.rank] < limit:
            text = f"{best[node.rank]:.3g} GB/s to other nodes over {SPELLED[transport]}, {why}"
            (node.warnings if warns else node.faults).append(text)
