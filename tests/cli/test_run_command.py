from __future__ import annotations

import errno

import pytest

from megatron_tokedit.cli.main import EXIT_INTERRUPTED, run_command
from megatron_tokedit.errors import ConfigError


def raising(error):
    def body(argv):
        raise error

    return body


def test_exit_codes(capsys):
    assert run_command(lambda argv: None, []) == 0
    assert run_command(lambda argv: len(argv), ["a", "b"]) == 2
    assert run_command(raising(ConfigError("model.x: wrong")), []) == 1
    assert capsys.readouterr().err == "error: model.x: wrong\n"
    assert run_command(raising(OSError(errno.ENOSPC, "No space left on device", "out.bin")), []) == 1
    assert "No space left on device: out.bin" in capsys.readouterr().err
    assert run_command(raising(KeyboardInterrupt()), []) == EXIT_INTERRUPTED == 130


def test_bugs_keep_their_traceback():
    for bug in (ValueError("bug"), FileNotFoundError(errno.ENOENT, "No such file", "x")):
        with pytest.raises(type(bug)):
            run_command(raising(bug), [])
