"""``tools/evaluate.py``: how good checkpoints are; ``perplexity`` on named domains, and lm-eval's ``tasks``.

Each subcommand is a module of its own, which knows its flags and runs it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_tokedit.cli import evaluate_perplexity, evaluate_tasks
from megatron_tokedit.cli.main import run_command


def _run(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Evaluate checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    evaluate_perplexity.add_parser(commands)
    evaluate_tasks.add_parser(commands)
    arguments = parser.parse_args(argv)
    if arguments.command == "tasks":
        evaluate_tasks.run(arguments)
    else:
        evaluate_perplexity.run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_run, argv)
