"""All checks in the order in which they are done, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from megatron_tokedit.cli.gpu_check.checks import Check
from megatron_tokedit.cli.gpu_check.layer_checks import layer_checks
from megatron_tokedit.cli.gpu_check.packed_checks import packed_checks
from megatron_tokedit.cli.gpu_check.prior_checks import prior_checks
from megatron_tokedit.cli.gpu_check.text_checks import text_checks
from megatron_tokedit.cli.gpu_check.training_checks import training_checks


def all_checks() -> list[Check]:
    """Every check, cheap ones first."""
    return [*layer_checks(), *packed_checks(), *training_checks(), *text_checks(), *prior_checks()]


def choose(checks: Sequence[Check], patterns: Sequence[str]) -> tuple[list[Check], list[str]]:
    """The checks that a pattern names (``*`` stands for anything), and the patterns that name none."""
    if not patterns:
        return list(checks), []
    chosen = [check for check in checks if any(fnmatchcase(check.name, pattern) for pattern in patterns)]
    unknown = [
        pattern for pattern in patterns if not any(fnmatchcase(check.name, pattern) for check in checks)
    ]
    return chosen, unknown
