"""``tools/collapse_experiment.py``: does a model collapse; ``theory``, in linear regression."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import orjson
from tqdm import tqdm

from megatron_tokedit import log
from megatron_tokedit.cli.main import add_common_arguments, run_command
from megatron_tokedit.dataset import atomic_write_bytes

logger = log.get_logger(__name__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="collapse_experiment.py",
        description="Train a small model on human text, let it write or edit the next generation's text, "
        "train on that, and so on; held-out perplexity by generation, arm and domain, with error bars over "
        "seeds. What is made is kept by its content: the same command goes on where it was stopped.",
        epilog="`collapse_experiment.py theory` is another command: the paper's theory, simulated.",
    )
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="see examples/collapse/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="YAML values")
    parser.add_argument(
        "--smoke", action="store_true", help="little text, few steps: does everything work here?"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, and list what is to be made")
    add_common_arguments(parser)
    return parser


def _theory_parser() -> argparse.ArgumentParser:
    theory = argparse.ArgumentParser(
        prog="collapse_experiment.py theory",
        description="Fits least squares generation after generation: to labels that the last model wrote "
        "(iterated), to all labels so far (accumulated), or to labels of which an edit replaced a part. "
        "Compares the measured test error with the paper's closed forms and bounds, and says where they "
        "hold.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    theory.add_argument(
        "--output-dir", metavar="DIR", help="write theory.json and theory.png here (else: the table only)"
    )
    problem = theory.add_argument_group("the problem")
    problem.add_argument("--samples", type=int, default=200, metavar="T", help="rows of the design")
    problem.add_argument("--features", type=int, default=20, metavar="D", help="its columns")
    problem.add_argument("--noise", type=float, default=1.0, metavar="SIGMA", help="of every label")
    problem.add_argument(
        "--generations", type=int, default=20, metavar="N", help="fits, the first to human labels"
    )
    problem.add_argument("--trials", type=int, default=2000, metavar="N", help="independent simulations")
    problem.add_argument("--seed", type=int, default=1234, metavar="N", help="of all trials")
    edit = theory.add_argument_group("the edited arms")
    edit.add_argument(
        "--edit-share", type=float, default=0.3, metavar="Q", help="labels that an edit replaces, 0 to 1"
    )
    edit.add_argument(
        "--edit-shrink",
        type=float,
        default=0.7,
        metavar="ETA",
        help="of the shrinking arms: |M_i| = ETA |M_{i-1}|",
    )
    add_common_arguments(theory)
    return theory


def _theory(arguments: argparse.Namespace) -> None:
    """Simulate, print the table, write the files."""
    # imported here: `--help` and wrong usage should not wait for numpy
    from megatron_tokedit.experiments import regression, regression_report

    problem = regression.Regression(
        num_samples=arguments.samples,
        num_features=arguments.features,
        noise=arguments.noise,
        generations=arguments.generations,
        trials=arguments.trials,
        seed=arguments.seed,
    )
    arms = regression.default_arms(arguments.edit_share, arguments.edit_shrink)
    with tqdm(total=problem.trials, unit="trial", disable=arguments.quiet or None) as bar:
        curves = regression.simulate(problem, arms, on_trials=bar.update)
    print(regression_report.as_table(problem, curves))
    if arguments.output_dir:
        folder = Path(arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        found = regression_report.as_json(problem, curves)
        atomic_write_bytes(folder / "theory.json", orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n")
        regression_report.plot(problem, curves, folder / "theory.png")
        logger.info("wrote %s and theory.png", folder / "theory.json")


def _run(argv: Sequence[str]) -> None:
    if argv[:1] == ["theory"]:
        _theory(_theory_parser().parse_args(argv[1:]))
        return
    arguments = _parser().parse_args(argv)
    from megatron_tokedit.cli import collapse_run  # imported here: `--help` should not wait for its libraries

    collapse_run.run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_run, argv)
