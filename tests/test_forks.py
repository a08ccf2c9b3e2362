"""A forked command does what a started one does, as far as tests rely on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forks import Forked, run_forked, run_ranks

PROGRAM = """
import os, sys
print(sys.argv[1:], __name__, os.getcwd(), os.environ.get("PYTHONPATH"), os.environ.get("HERE"))
print("said", file=sys.stderr)
import beside
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 3])
@pytest.mark.parametrize("is_script", [False, True])
def test_the_same_words_and_the_same_end(tmp_path: Path, is_script: bool, code: int) -> None:
    (tmp_path / "beside.py").write_text("print('found')\n")
    (tmp_path / "script.py").write_text(PROGRAM)
    command = [*([str(tmp_path / "script.py")] if is_script else ["-c", PROGRAM]), str(code)]
    environment = {**os.environ, "HERE": "yes"}
    started = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    forked = run_forked(command, environment, cwd=tmp_path)
    assert started.returncode == code
    assert "found" in started.stdout
    for part in ("returncode", "stdout", "stderr"):
        assert getattr(forked, part) == getattr(started, part)


def test_an_error_that_nobody_catches() -> None:
    done = run_forked(["-c", "raise ArithmeticError('no such number')"])
    assert done.returncode == 1
    assert done.stderr.endswith("ArithmeticError: no such number\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_end_it(number: int) -> None:
    process = Forked(["-c", "import time; print('here', flush=True); time.sleep(60)"])
    while not process.streams[0].read_text():
        assert process.poll() is None
    process.send_signal(number)
    assert process.communicate(30)[0] == "here\n"
    assert process.returncode == -number


def test_a_command_that_takes_too_long_is_ended() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_forked(["-c", "import time; time.sleep(60)"], timeout=0.5)


def test_ranks_know_their_places() -> None:
    places = "import os, sys; print(os.environ['RANK'], os.environ['WORLD_SIZE']); "
    done = run_ranks(2, ["-c", places])
    assert (done.returncode, done.stdout) == (0, "0 2\n1 2\n")
    assert run_ranks(2, ["-c", places + "sys.exit(4 * int(os.environ['RANK']))"]).returncode == 4
