"""The command line of ``tools/node_check.py``: arguments, the two roles, what is printed and written.

Invariant: only node 0 prints the table; it does so before any other node ends on account of the verdict.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_tokedit import __version__
from megatron_tokedit.cli.main import EXIT_ERROR, EXIT_OK, add_common_arguments, run_command
from megatron_tokedit.cli.node_check.deadlines import Background, Watchdog, leave
from megatron_tokedit.cli.node_check.facts import look
from megatron_tokedit.cli.node_check.findings import Limits, Node
from megatron_tokedit.cli.node_check.follower import follow
from megatron_tokedit.cli.node_check.judge import judge
from megatron_tokedit.cli.node_check.leader import WATCHDOG_SECONDS, Leader
from megatron_tokedit.cli.node_check.meeting import LeaderGone, Place, open_meeting
from megatron_tokedit.cli.node_check.table import last_line, lines, own_line
from megatron_tokedit.cli.node_check.work import Work
from megatron_tokedit.errors import ConfigError, TokeditError

_LINGER_SECONDS = 20.0

_DESCRIPTION = """\
Check the nodes of a job before it starts: presence, GPUs, equal versions, clocks, disks, a run folder that
all share, limits, and the rate at which nodes send to each other. One process a node; node 0 (SLURM_NODEID)
leads and prints one line a node:

  srun --ntasks-per-node=1 python tools/node_check.py --nodes 2 --node-names n1,n2 \\
      --master-addr n1 --master-port 29500 --path runs/mine --gpu-type h100

Exits with 1 where a node failed; the last line on stderr names it and why."""


class NodesFailed(TokeditError):
    """The verdict of a check that found a fault."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="node_check.py", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes of the job")
    parser.add_argument(
        "--node-names", metavar="n1,n2,...", help="their names, by number (default: node0 ...)"
    )
    parser.add_argument("--master-addr", metavar="A", help="address of node 0; needed for two or more nodes")
    parser.add_argument("--master-port", type=int, default=29500, metavar="P", help="a free port there")
    parser.add_argument(
        "--path", type=Path, required=True, metavar="RUN_DIR", help="the run folder, or where it will be"
    )
    parser.add_argument(
        "--gpu-type", metavar="TEXT", help="has to occur in the name of every GPU, in any case"
    )
    parser.add_argument("--min-free-gb", type=float, default=1.0, metavar="G", help="in RUN_DIR (default 1)")
    parser.add_argument("--max-clock-skew", type=float, default=2.0, metavar="S", help="seconds (default 2)")
    parser.add_argument(
        "--min-bandwidth-gb",
        type=float,
        metavar="G",
        help="GB/s of a node to its best partner, by NCCL where there are GPUs (default: a quarter of the "
        "median, from four nodes on)",
    )
    parser.add_argument(
        "--join-timeout", type=float, default=120.0, metavar="S", help="for all to come (default 120)"
    )
    parser.add_argument(
        "--task-timeout", type=float, default=15.0, metavar="S", help="for each step (default 15)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="node 0 writes all it found there")
    add_common_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, or ends the process where a call of it still runs or hangs."""
    code = run_command(_run, argv)
    if Background.is_any_running():
        leave(code)
    return code


def _run(argv: Sequence[str]) -> int:
    arguments, place = _parse(argv)
    begin = time.monotonic()
    _prepare_environment()
    work: list[Work] = []
    watchdog = Watchdog(lambda: _give_up(place, work))
    watchdog.allow(arguments.join_timeout + WATCHDOG_SECONDS)
    import torch.distributed  # noqa: F401 - by one thread, and done before there is another

    facts = Background(lambda: look(arguments.path))
    try:
        meeting = open_meeting(place, arguments.join_timeout)
    except LeaderGone as error:
        if place.rank == 0:
            raise
        return _stay_out(error, place, watchdog, min(arguments.join_timeout, _LINGER_SECONDS))
    work.append(Work(meeting, arguments.path, facts))
    is_over = False
    try:
        if place.rank == 0:
            code = _lead(Leader(meeting, work[0], watchdog, arguments.task_timeout), arguments, begin)
        else:
            code = follow(meeting, work[0], watchdog, arguments.join_timeout, arguments.task_timeout)
        is_over = True
    except (LeaderGone, NodesFailed):
        is_over = True
        raise
    finally:
        watchdog.allow(WATCHDOG_SECONDS)
        work[0].clear(everyone=is_over or place.rank == 0)
        watchdog.stop()
    return code


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Place]:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.nodes < 1:
        parser.error("--nodes is a number of nodes, at least 1")
    for name in ("join_timeout", "task_timeout"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is a number of seconds above 0")
    given = arguments.node_names.split(",") if arguments.node_names else None
    names = tuple(given or [f"node{rank}" for rank in range(arguments.nodes)])
    if len(names) != arguments.nodes:
        parser.error(f"--node-names has {len(names)} names for --nodes {arguments.nodes}")
    if arguments.nodes > 1 and not arguments.master_addr:
        parser.error("--master-addr is needed for two or more nodes")
    number = os.environ.get("SLURM_NODEID", "0" if arguments.nodes == 1 else "")
    if not number.isdigit() or int(number) >= arguments.nodes:
        raise ConfigError(
            f"SLURM_NODEID is {number or 'not set'}, and has to be this node's number, 0 to "
            f"{arguments.nodes - 1}: srun --nodes={arguments.nodes} --ntasks-per-node=1 sets it"
        )
    return arguments, Place(int(number), names, arguments.master_addr or "", arguments.master_port)


def _prepare_environment() -> None:
    """Before torch is imported: our messages instead of its own; a hanging NCCL must not abort us."""
    for name, value in {
        "TORCH_CPP_LOG_LEVEL": "FATAL",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
    }.items():
        os.environ[name] = value
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _lead(leader: Leader, arguments: argparse.Namespace, begin: float) -> int:
    """Find out, judge, print, tell the others."""
    nodes = leader.find_out(arguments.join_timeout)
    judge(
        nodes,
        Limits(
            arguments.gpu_type, arguments.min_free_gb, arguments.max_clock_skew, arguments.min_bandwidth_gb
        ),
    )
    seconds = time.monotonic() - begin
    has_failed = any(node.faults for node in nodes)
    if has_failed or not arguments.quiet:
        print("\n".join(lines(nodes, seconds)), flush=True)
    leader.announce()
    if arguments.json is not None:
        _write(arguments.json, nodes, seconds)
    if has_failed:
        raise NodesFailed(last_line(nodes))
    return EXIT_OK


def _write(path: Path, nodes: Sequence[Node], seconds: float) -> None:
    report = {
        "version": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
        "failed": [node.name for node in nodes if node.faults],
        "nodes": [asdict(node) for node in nodes],
    }
    try:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        sys.stderr.write(f"warning: --json: {path} cannot be written: {error.strerror}\n")


def _stay_out(error: LeaderGone, place: Place, watchdog: Watchdog, linger_seconds: float) -> int:
    """Say it, but end a little later: the first to end may take the leader along, which names all others."""
    sys.stderr.write(f"error: {own_line(place.names[place.rank], [str(error)])}\n")
    sys.stderr.flush()
    watchdog.stop()
    time.sleep(linger_seconds)
    return EXIT_ERROR


def _give_up(place: Place, work: Sequence[Work]) -> None:
    """The watchdog's last words."""
    if place.rank == 0:
        what = "its check stands still"
    else:
        what = f"{place.head}, which leads the check, does not answer any more"
    sys.stderr.write(f"error: {own_line(place.names[place.rank], [what])}\n")
    sys.stderr.flush()
    for own in work:
        own.clear(everyone=place.rank == 0)
