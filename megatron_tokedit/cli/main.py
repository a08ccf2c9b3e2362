"""What every command shares: logging, exit codes, and errors shown as one message.

Invariant: a command exits 0 on success, 1 on an error that the user can mend (one message on stderr, no
traceback), 2 on wrong usage, 130 when interrupted. Anything else that escapes is a bug and keeps its
traceback.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence

from megatron_tokedit import log
from megatron_tokedit.errors import TokeditError

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
GOES_ON = "interrupted; run the same command again to go on from here"
"""What a command says that keeps what it has done."""

_USER_OS_ERRORS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.EIO,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.EMFILE,
    }
)
"""Operating-system errors that come from the machine or the arguments rather than from a bug."""


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every command has: ``--quiet``."""
    parser.add_argument("--quiet", action="store_true", help="show warnings and errors only")


def run_command(
    main_fn: Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None = None,
    *,
    interrupted: str = "interrupted",
) -> int:
    """Run a command's body and turn its outcome into an exit code.

    Configures logging first (quiet if ``--quiet`` is among the arguments; rank from the environment), so the
    body may log at once. argparse's own ``SystemExit`` (0 for ``--help``, 2 for wrong usage) passes through.

    Args:
        main_fn: takes the arguments (without the program's name); returns an exit code, or None for success.
        argv: the arguments; default ``sys.argv[1:]``.
        interrupted: what to say after Ctrl-C: what has become of the work, and what a new start does; a
            ``KeyboardInterrupt`` with a message of its own is shown instead.

    Returns:
        The exit code for ``sys.exit``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    log.configure(quiet="--quiet" in arguments)
    try:
        return main_fn(arguments) or EXIT_OK
    except TokeditError as error:
        _show(str(error))
        return EXIT_ERROR
    except BrokenPipeError:  # the reader of our stdout went away, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except OSError as error:
        if error.errno not in _USER_OS_ERRORS:
            raise
        _show(f"{error.strerror}: {error.filename}" if error.filename else str(error))
        return EXIT_ERROR
    except KeyboardInterrupt as error:
        _show(str(error) or interrupted)
        return EXIT_INTERRUPTED


def _show(message: str) -> None:
    """Write one error message to stderr, after whatever the progress bar left on the line."""
    sys.stdout.flush()
    start = "\n" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{start}error: {message}\n")
    sys.stderr.flush()
