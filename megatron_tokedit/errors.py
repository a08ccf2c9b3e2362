"""The exception family of the package: every error that a user can cause and mend.

Invariant: an exception of this family carries a message that names the file and line, or the section and
field, and says what to do. ``cli/`` turns it into one message on stderr and exit code 1, without a traceback.
Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class TokeditError(Exception):
    """Base of all errors that are the user's to mend; shown without a traceback, exit code 1."""


class ConfigError(TokeditError):
    """A setting, or a combination of settings, that cannot be honoured. Lists every fault it knows of."""


class DataFormatError(TokeditError):
    """Input text, or a dataset on disk, that is missing, damaged or not what it claims to be."""


class TokenizerError(TokeditError):
    """A tokenizer that cannot be loaded, or that does not fit the model or the data it is used with."""


class PriorError(TokeditError):
    """A prior model that cannot be loaded, does not fit the tokenizer, or returns unusable numbers."""


class CheckpointError(TokeditError):
    """A checkpoint that is missing, incomplete, or does not fit the model it is loaded into."""


class DivergenceError(TokeditError):
    """A run whose loss or gradient is not finite any more."""


class PlanError(TokeditError):
    """A preprocessing job whose recorded plan is not the one asked for, or whose units are unfinished."""


def first_line(error: BaseException) -> str:
    """The first line of what another library's error says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
