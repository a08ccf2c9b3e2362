"""A real Slurm of two nodes on this machine, for as long as a test session.

Everything is in a folder of its own and on free ports: the machine's own Slurm and munge are not touched, and
no root is needed (SlurmUser and SlurmdUser are whoever runs the tests).
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from keeper import descendants, send

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")
START_SECONDS = 30
NODES = ("n1", "n2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL")
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])

# cred_expire: a requeued job waits a second longer than it, by default two minutes; 5 is the least.
# config_overrides: a node may claim more CPUs than the machine has.
_CONFIG = """\
ClusterName=tokedit
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=10
SlurmdTimeout=30
CompleteWait=0
EpilogMsgTime=0
MpiDefault=none
SwitchType=switch/none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


class NoSlurm(Exception):
    """Slurm is not installed, or does not start here."""


class Daemon:
    """A program, and all that it starts, below a keeper."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        with log.open("ab") as file:
            self.keeper = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("keeper.py")), *command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
            )

    def kill(self) -> None:
        """``kill -9`` all of it."""
        assert self.keeper.stdin is not None
        self.keeper.stdin.close()
        self.keeper.wait(20)


class Node:
    """One slurmd with the processes of its job steps."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self._daemon: Daemon | None = None

    def launch(self) -> None:
        """Start it, if it does not run."""
        if self._daemon is None:
            log = self.cluster.folder / f"slurmd-{self.name}.log"
            self._daemon = Daemon(["slurmd", "-D", "-N", self.name], log, self.cluster.environment)

    def start(self) -> None:
        """Start it and wait until Slurm gives it work."""
        self.launch()
        self.cluster.wait_for_nodes()

    def kill(self) -> None:
        """End slurmd and every process of the node's steps at once, as if it crashed."""
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon = None

    def freeze(self) -> None:
        """Stop all processes of the node where they are: connections stay open and nothing answers."""
        assert self._daemon is not None
        send(signal.SIGSTOP, self._daemon.keeper.pid)

    def processes(self, program: str, **environment: str) -> list[int]:
        """The node's processes with an argument that ends in ``program``, and with these variables."""
        assert self._daemon is not None
        wanted = {f"{name}={value}" for name, value in environment.items()}
        return [
            process
            for process in descendants(self._daemon.keeper.pid)
            if any(argument.endswith(program) for argument in _strings(process, "cmdline"))
            and wanted <= set(_strings(process, "environ"))
        ]


class Cluster:
    """The running cluster. Job ids are what sbatch says; an array's task is ``ID_TASK``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        others = ("SLURM", "SBATCH", "SQUEUE", "TOKEDIT", "RANK", "OMP_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(others)} | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": _PATH,
            "TOKEDIT_VENV": sys.prefix,
        }
        self.nodes = {name: Node(self, name) for name in NODES}
        self._daemons: list[Daemon] = []

    def start(self) -> None:
        """Start munge, the controller and both nodes."""
        for name in ("munge", "state"):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        host, user = socket.gethostname().partition(".")[0], getpass.getuser()
        text = _CONFIG.format(host=host, ports=free_ports(3), user=user, folder=self.folder)
        (self.folder / "slurm.conf").write_text(text)
        files = [f"--{name}-file={self.folder}/munge/{name}" for name in ("key", "pid", "seed", "log")]
        self._run_daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge/socket", *files)
        self.until("munge's socket", START_SECONDS, (self.folder / "munge" / "socket").exists)
        self._run_daemon("slurmctld", "-D", "-i")
        for node in self.nodes.values():
            node.launch()
        self.wait_for_nodes()

    def stop(self) -> None:
        """End every process of the cluster."""
        for node in self.nodes.values():
            node.kill()
        for daemon in reversed(self._daemons):
            daemon.kill()

    def _run_daemon(self, program: str, *arguments: str) -> None:
        log = self.folder / f"{program}.log"
        self._daemons.append(Daemon([program, *arguments], log, self.environment))

    def run(self, *command: str, check: bool = True, seconds: float = 60, **kwargs: Any) -> str:
        """Run one of Slurm's commands, or one that calls them; returns its standard output."""
        done = subprocess.run(
            command,
            env=self.environment | kwargs.pop("env", {}),
            text=True,
            capture_output=True,
            timeout=seconds,
            **kwargs,
        )
        if check and done.returncode:
            said = f"{shlex.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            raise AssertionError(f"{said}\n{self.logs()}")
        return done.stdout

    # ------------------------------------------------------------------------------------------------- jobs

    def submit(self, script: Path, *arguments: str, cwd: Path, log: Path, **options: Any) -> str:
        """``sbatch --KEY=VALUE ... SCRIPT ARGUMENT ...`` in ``cwd``; returns the job's id.

        Args:
            script: to run.
            arguments: of the script.
            cwd: where sbatch is called.
            log: the job's.
            options: sbatch's, with underscores; ``env`` are variables of the job.
        """
        env = options.pop("env", {})
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return self.run(
            "sbatch", "--parsable", f"--output={log}", *flags, str(script), *arguments, cwd=cwd, env=env
        ).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says: JobState, Restarts, ExitCode, ..."""
        line = self.run("scontrol", "show", "job", job, "--oneliner", check=False)
        return dict(re.findall(r"(\S+?)=(\S*)", line))

    def wait(self, job: str, *states: str, seconds: float, log: Path | None = None) -> dict[str, str]:
        """Wait until the job is in one of the states (default: has ended); returns its facts.

        Another end than these fails at once.
        """
        wanted = states or ENDED
        deadline = time.monotonic() + seconds
        while True:
            facts = self.facts(job)
            state = facts.get("JobState", "unknown")
            if state in wanted:
                return facts
            if state in ENDED or time.monotonic() > deadline:
                expected = f"not {' or '.join(wanted)} within {seconds:g} s"
                raise AssertionError(f"job {job} is {state}, {expected}\n{self.logs(job, log)}")
            time.sleep(0.3)

    def until(
        self, what: str, seconds: float, done: Callable[[], Any], *, job: str = "", log: Path | None = None
    ) -> Any:
        """Wait until ``done()`` is true and return it; fails at once where the job ends before."""
        deadline = time.monotonic() + seconds
        while not (value := done()):
            ended = bool(job) and self.facts(job).get("JobState") in ENDED and not done()
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {seconds:g} s\n{self.logs(job, log)}")
            time.sleep(0.1)
        return value

    def cancel_all(self) -> None:
        """Leave no job behind, and both nodes in order."""
        self.run("scancel", f"--user={getpass.getuser()}", check=False)
        for node in self.nodes.values():
            node.launch()
        self.until("an empty queue", 60, lambda: not self.run("squeue", "--noheader").strip())
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        """Wait until both nodes take work."""
        for name in NODES:
            self.until(f"node {name}", START_SECONDS, lambda name=name: self._is_ready(name))

    def _is_ready(self, name: str) -> bool:
        state = self.run("sinfo", "--noheader", f"--nodes={name}", "--format=%T", check=False).split()
        if any(word in one for one in state for word in ("down", "drain")):
            self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
        return bool(state) and set(state) <= {"idle", "mixed", "allocated"}

    def logs(self, job: str = "", log: Path | None = None) -> str:
        """The ends of all logs, for the message of a failed test."""
        parts = [self.run("scontrol", "show", "job", job, check=False)] if job else []
        files = [
            *([log] if log is not None and log.exists() else []),
            *sorted(self.folder.glob("slurm*.log")),
        ]
        return "\n".join([*parts, *(f"--- {file.name}\n{_tail(file)}" for file in files)])


def _strings(process: int, file: str) -> list[str]:
    try:
        return Path(f"/proc/{process}/{file}").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _tail(path: Path, lines: int = 50) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster that runs inside the ``with`` block.

    Raises:
        NoSlurm: a program is missing, or a daemon does not come up.
    """
    if sys.platform != "linux":
        raise NoSlurm("Slurm runs on Linux only")
    if missing := [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]:
        raise NoSlurm(f"Slurm's {', '.join(missing)} not found; on Debian: apt-get install slurm-wlm munge")
    # a short path: a socket's has up to 107 characters
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)
    cluster = Cluster(folder)
    try:
        try:
            cluster.start()
        except AssertionError as error:
            raise NoSlurm(f"a Slurm of two nodes does not start here: {error}") from error
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
