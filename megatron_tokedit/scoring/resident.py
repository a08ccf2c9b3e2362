"""The memory that this process has had, for statistics and estimates; needs no torch.

Invariant: what a parent process held does not count.
"""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far.

    On Linux not of getrusage, which remembers what the parent held when it started this process.
    """
    with suppress(OSError, IndexError, ValueError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
