"""What a node says of itself. Plain data that goes through JSON; collected without touching the network.

Invariant: :func:`look` does not raise; what cannot be found out is None or empty.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_tokedit.cli.node_check.disks import Disk, look_at_disks
from megatron_tokedit.cli.node_check.gpus import GpuFacts, look_at_gpus
from megatron_tokedit.cli.node_check.versions import installed_versions


@dataclass(slots=True)
class Facts:
    """A node.

    Attributes:
        host: what it calls itself.
        versions: of software, by name; None: not installed.
        gpus: its GPUs.
        disks: free space, by what for: ``run``, ``/tmp``, ``/dev/shm``.
        interface: network interface and address that gloo will use, as ``eth0 10.0.0.2``.
        interface_faults: what is wrong with the interfaces that the environment names.
        num_cores: that this process may use.
        num_machine_cores: that the machine has.
        memory_bytes: of the machine.
        available_memory_bytes: of it, not in use.
        load: processes that ran or waited over the last minute, on average.
        open_files_limit: soft limit; None: none.
        locked_memory_limit_bytes: soft limit; None: none.
        infiniband_ports: "active" of each port that has a link.
        num_infiniband_ports: with or without one.
    """

    host: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)
    gpus: GpuFacts = field(default_factory=GpuFacts)
    disks: dict[str, Disk] = field(default_factory=dict)
    interface: str | None = None
    interface_faults: list[str] = field(default_factory=list)
    num_cores: int = 0
    num_machine_cores: int = 0
    memory_bytes: int = 0
    available_memory_bytes: int = 0
    load: float = 0.0
    open_files_limit: int | None = None
    locked_memory_limit_bytes: int | None = None
    num_active_infiniband_ports: int = 0
    num_infiniband_ports: int = 0

    def to_json(self) -> dict[str, Any]:
        """For :meth:`from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Facts:
        """Of what :meth:`to_json` made."""
        disks = {name: Disk(**disk) for name, disk in values["disks"].items()}
        return cls(**{**values, "disks": disks, "gpus": GpuFacts.from_json(values["gpus"])})


def look(path: Path, environment: Mapping[str, str] = os.environ) -> Facts:
    """Look at this node; ``path`` is the run folder, there or not."""
    from megatron_tokedit.cli.node_check.network import interface_faults, interface_of_gloo

    gpus = look_at_gpus(environment)
    active, ports = _infiniband_ports()
    memory = _memory()
    return Facts(
        host=socket.gethostname(),
        versions=installed_versions() | {"NVIDIA driver": gpus.driver},
        gpus=gpus,
        disks=look_at_disks(path),
        interface=interface_of_gloo(environment),
        interface_faults=interface_faults(environment, has_gpus=bool(gpus.gpus)),
        num_cores=len(os.sched_getaffinity(0)),
        num_machine_cores=os.cpu_count() or 0,
        memory_bytes=memory.get("MemTotal", 0),
        available_memory_bytes=memory.get("MemAvailable", 0),
        load=os.getloadavg()[0],
        open_files_limit=_limit(resource.RLIMIT_NOFILE),
        locked_memory_limit_bytes=_limit(resource.RLIMIT_MEMLOCK),
        num_active_infiniband_ports=active,
        num_infiniband_ports=ports,
    )


def _limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _memory(table: Path = Path("/proc/meminfo")) -> dict[str, int]:
    """Bytes by name."""
    try:
        rows = [line.split() for line in table.read_text(encoding="ascii").splitlines()]
    except OSError:
        return {}
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3}


def _infiniband_ports(folder: Path = Path("/sys/class/infiniband")) -> tuple[int, int]:
    """Active ports and all ports."""
    states = []
    for state in folder.glob("*/ports/*/state"):
        try:
            states.append(state.read_text(encoding="ascii"))
        except OSError:
            states.append("")
    return sum("ACTIVE" in state for state in states), len(states)
