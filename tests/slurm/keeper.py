"""Runs one program and everything that it starts; all of it dies when the keeper's standard input closes.

The pipe closes however its other end goes (close, Ctrl-C, kill -9), so a test session cannot leave a daemon
behind. The keeper is the subreaper of its descendants: a slurmstepd that was made a daemon is still below it,
and a node is killed, or frozen, as a whole.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

_PR_SET_CHILD_SUBREAPER = 36


def descendants(root: int) -> list[int]:
    """The processes below one, by parent; without those that have ended."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError), open(f"/proc/{name}/stat") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(name)] = int(parent)
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found[1:]


def send(number: signal.Signals, root: int) -> None:
    """Send a signal to all processes below one, until no new one is found."""
    told: set[int] = set()
    while new := set(descendants(root)) - told:
        for process in new:
            with suppress(ProcessLookupError):
                os.kill(process, number)
        told |= new


def reap() -> None:
    """Collect what has ended, adopted processes too."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    closed = threading.Event()

    def wait_for_close() -> None:
        while os.read(0, 1):
            pass
        closed.set()

    threading.Thread(target=wait_for_close, daemon=True).start()
    while not closed.wait(0.05):
        reap()
    while left := descendants(os.getpid()):
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    reap()


if __name__ == "__main__":
    main()
