"""``python -m megatron_tokedit.cli COMMAND ...``: the commands of ``tools/``, from any folder."""

from __future__ import annotations

import importlib
import sys

COMMANDS = (
    "analyze_corpus",
    "collapse_experiment",
    "convert_checkpoint",
    "doctor",
    "evaluate",
    "generate",
    "gpu_check",
    "inspect_dataset",
    "loss_compare",
    "node_check",
    "preprocess_edit",
    "slurm_job",
    "submit",
    "train",
)
"""As in ``tools/``."""


def main() -> int:
    """Run the command that the first argument names; returns its exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        sys.stderr.write("usage: python -m megatron_tokedit.cli COMMAND ...\n\n")
        sys.stderr.write(f"commands: {', '.join(COMMANDS)}\n")
        return 0 if name in ("-h", "--help") else 2
    module = importlib.import_module(f"megatron_tokedit.cli.{name}")
    code: int = module.main(sys.argv[2:])
    return code


if __name__ == "__main__":
    sys.exit(main())
