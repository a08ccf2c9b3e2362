"""Which network interface torch takes on this node, by the environment's word or by the host name.

gloo: the interface in ``GLOO_SOCKET_IFNAME``, else the address that the host name resolves to. NCCL:
interfaces that begin with an entry of ``NCCL_SOCKET_IFNAME`` (``=eth0``: exactly that one, ``^docker``: all
others).
"""

from __future__ import annotations

import socket
from collections.abc import Mapping


def addresses() -> dict[str, list[str]]:
    """IP addresses by interface, IPv4 first."""
    import psutil

    return {
        name: [entry.address.partition("%")[0] for entry in sorted(entries, key=lambda e: e.family)]
        for name, entries in (
            (name, [e for e in entries if e.family in (socket.AF_INET, socket.AF_INET6)])
            for name, entries in psutil.net_if_addrs().items()
        )
    }


def interface_of_gloo(environment: Mapping[str, str]) -> str | None:
    """``eth0 10.0.0.2``; None where there is no such thing."""
    known = addresses()
    if named := environment.get("GLOO_SOCKET_IFNAME", ""):
        first = named.split(",")[0]
        return f"{first} {known[first][0]}" if known.get(first) else None
    try:
        address = str(socket.getaddrinfo(socket.gethostname(), None)[0][4][0])
    except OSError:
        return "lo 127.0.0.1"
    names = [name for name, own in known.items() if address in own]
    return f"{names[0]} {address}" if names else address


def interface_faults(
    environment: Mapping[str, str], *, has_gpus: bool, known: Mapping[str, object] | None = None
) -> list[str]:
    """What the environment names that is not there."""
    known = addresses() if known is None else known
    faults = []
    have = f"the interfaces here are {', '.join(sorted(known))}"
    for name in filter(None, environment.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if name not in known:
            faults.append(f"GLOO_SOCKET_IFNAME names {name}: {have}")
    wanted = environment.get("NCCL_SOCKET_IFNAME", "")
    if has_gpus and wanted and not any(_nccl_takes(name, wanted) for name in known):
        faults.append(f"NCCL_SOCKET_IFNAME is {wanted}: {have}")
    return faults


def _nccl_takes(name: str, wanted: str) -> bool:
    sign = wanted[0] if wanted[0] in "^=" else ""
    rest = wanted[len(sign) :]
    if rest.startswith("="):  # ^=docker0
        return name not in rest[1:].split(",")
    entries = [entry for entry in rest.split(",") if entry]
    if sign == "=":
        return name in entries
    return any(name.startswith(entry) for entry in entries) != (sign == "^")
