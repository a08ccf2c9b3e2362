"""``tools/evaluate.py perplexity``: flags, and the way from folders to tables, files and TensorBoard.

Invariant: every checkpoint is checked against all data before the first one is loaded; what was measured is
printed before anything is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from megatron_tokedit import log
from megatron_tokedit.cli.evaluate_board import append_to_board
from megatron_tokedit.cli.evaluate_checkpoints import measure, prepare
from megatron_tokedit.cli.evaluate_domains import given_domains, open_domains
from megatron_tokedit.cli.evaluate_run import add_checkpoint_arguments, take_checkpoint
from megatron_tokedit.cli.main import add_common_arguments
from megatron_tokedit.cli.train_report import known_sources
from megatron_tokedit.config.load import load_config
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.dataset import AtomicFile, atomic_write_bytes
from megatron_tokedit.dataset.sources import dataset_exists
from megatron_tokedit.errors import ConfigError, DataFormatError

if TYPE_CHECKING:
    from megatron_tokedit.evaluation import PerplexityReport, Unit

logger = log.get_logger(__name__)

_DESCRIPTION = """\
Held-out perplexity: a row a domain, a column a checkpoint, and their average, with 95 % intervals from a
bootstrap of the documents. Of several checkpoints each is compared with the first on the same documents. With
--config: of a run's newest checkpoint on its validation sources."""
_PLOT_SUFFIXES = (".png", ".pdf", ".svg")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand ``perplexity``."""
    parser = commands.add_parser(
        "perplexity",
        help="held-out perplexity by domain",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint_arguments(parser, gives="--checkpoint, --data and --output")
    _add_data_arguments(parser.add_argument_group("data"))
    _add_report_arguments(parser.add_argument_group("report"))
    _add_output_arguments(parser.add_argument_group("output"))
    _add_scoring_arguments(parser.add_argument_group("scoring"))
    add_common_arguments(parser)


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="NAME=PLACE",
        help="a domain: PREFIX of PREFIX.bin/.idx, or a text file (.jsonl, .txt, .parquet, ...; a glob of "
        "such), which each checkpoint's own tokenizer reads; with --config further ones",
    )
    group.add_argument("--json-key", default="text", metavar="KEY", help="of text files; default: text")
    group.add_argument("--tokenizer-type", metavar="TYPE", help="for text files; default: the folder's")
    group.add_argument(
        "--tokenizer-model", metavar="PATH", help="for text files; where the tokenizer lies now"
    )


def _add_report_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--per",
        choices=("token", "word", "byte"),
        help="what checkpoints are compared by: perplexity a token or word, or bits a byte (default: token; "
        "byte where their tokenizers differ)",
    )
    group.add_argument(
        "--baseline", metavar="NAME", help="column that the others are compared with (default: the first)"
    )
    group.add_argument(
        "--bootstrap",
        type=int,
        default=1000,
        metavar="N",
        help="resamples of the documents that intervals are made of; default: 1000, 0: no intervals",
    )
    group.add_argument("--seed", type=int, default=1234, metavar="N", help="of the resamples; default: 1234")


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        metavar="FILE.json",
        help="write every figure here as well (default for --config without --checkpoint: "
        "RUN_DIR/evaluation/perplexity_step_N.json)",
    )
    group.add_argument(
        "--per-document",
        metavar="FILE.jsonl",
        help="write a line a document: its sums of each checkpoint",
    )
    group.add_argument("--plot", metavar="FILE.png", help="draw the table; also .pdf or .svg")
    group.add_argument(
        "--no-board",
        dest="board",
        action="store_false",
        help="do not enter the numbers into the TensorBoard of the checkpoints' runs",
    )


def _add_scoring_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--context", type=int, metavar="N", help="tokens a window (default: the model's limit)"
    )
    group.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens that a window begins behind the one before, and scores; the others of it are their "
        "context (default: context - 512, or three quarters)",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "fp8", "fp8_blockwise", "mxfp8"),
        default="float32",
        help="default: float32; the FP8 ones need a GPU with Transformer Engine",
    )
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: auto, or the run's")
    group.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="positions a forward")
    group.add_argument("--logits-bytes", type=int, default=128 << 20, metavar="N", help="memory of the head")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the tables, write the files."""
    if not arguments.config and not (arguments.checkpoints and arguments.data):
        arguments.usage_error("give --checkpoint and --data, or --config")
    places = _take_run(arguments) if arguments.config else {}
    names = _names(arguments.checkpoints)
    baseline = _check_report_arguments(arguments, names)
    domains = open_domains(given_domains(arguments.data, places), arguments.json_key)
    prepared = [prepare(path, domains, arguments) for path in arguments.checkpoints]
    results = [measure(checkpoint, domains, arguments) for checkpoint in prepared]
    # imported here: `--help` and wrong usage should not wait for torch
    from megatron_tokedit.evaluation import Bootstrap, analyse, as_json, as_tables

    bootstrap = Bootstrap(arguments.bootstrap, arguments.seed)
    report = analyse(results, names, baseline=baseline, bootstrap=bootstrap)
    unit = _unit(report, arguments.per)
    print(as_tables(report, unit))
    content = as_json(report)
    content["data"] = [domain.to_json() for domain in domains]
    for entry, checkpoint in zip(content["checkpoints"], prepared, strict=True):
        entry["scoring"] = checkpoint.to_json(arguments.dtype)
    _write(arguments, report, unit, content)
    if arguments.board:
        _enter_into_boards(content["checkpoints"])


def _names(paths: Sequence[str]) -> list[str]:
    """Short names of the checkpoints; whole paths where those are not different."""
    names = [Path(path).name or path for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def _check_report_arguments(arguments: argparse.Namespace, names: Sequence[str]) -> int:
    """The index of the baseline.

    Raises:
        ConfigError: a flag of the report that cannot be honoured.
    """
    if len(set(names)) < len(names):
        raise ConfigError(f"--checkpoint: {' '.join(names)}: one is given twice")
    for flag in ("bootstrap", "seed"):
        if getattr(arguments, flag) < 0:
            raise ConfigError(f"--{flag} {getattr(arguments, flag)}: expected 0 or more")
    if arguments.plot and Path(arguments.plot).suffix.lower() not in _PLOT_SUFFIXES:
        raise ConfigError(
            f"--plot {arguments.plot}: expected one of the suffixes {', '.join(_PLOT_SUFFIXES)}"
        )
    if arguments.baseline is None:
        return 0
    if len(names) == 1:
        raise ConfigError(f"--baseline {arguments.baseline}: there is one checkpoint only")
    for known in (names, arguments.checkpoints):
        if arguments.baseline in known:
            return known.index(arguments.baseline)
    raise ConfigError(f"--baseline {arguments.baseline}: expected one of {', '.join(names)}")


def _unit(report: PerplexityReport, wanted: Unit | None) -> Unit:
    """What the checkpoints are compared by.

    Raises:
        ConfigError: what is asked for is not known.
    """
    if wanted not in (None, "token") and not report.knows(wanted):
        raise ConfigError(f"--per {wanted}: the {wanted}s of the data are not known, as the warnings say")
    if report.same_tokens or (wanted is None and not report.knows("byte")):
        return wanted or "token"
    if wanted == "token":
        logger.warning("the checkpoints' tokenizers differ: numbers a token cannot be compared (--per byte)")
    return wanted or "byte"


def _write(
    arguments: argparse.Namespace, report: PerplexityReport, unit: Unit, content: dict[str, Any]
) -> None:
    """Write the files that are asked for."""
    for name in (arguments.output, arguments.per_document, arguments.plot):
        if name:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
    if arguments.output:
        atomic_write_bytes(arguments.output, orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
        logger.info("wrote %s", arguments.output)
    if arguments.per_document:
        from megatron_tokedit.evaluation.perplexity_report import document_lines

        with AtomicFile(arguments.per_document) as file:
            for line in document_lines(report):
                file.write(orjson.dumps(line) + b"\n")
            file.commit()
        logger.info("wrote %s", arguments.per_document)
    if arguments.plot:
        from megatron_tokedit.evaluation.perplexity_plot import plot

        plot(report, unit, arguments.plot)
        logger.info("wrote %s", arguments.plot)


def _enter_into_boards(checkpoints: Sequence[dict[str, Any]]) -> None:
    """Enter perplexities, and bits a byte where they are known, into the TensorBoard of each run."""
    for checkpoint in checkpoints:
        rows = [*checkpoint["domains"], checkpoint["average"] | {"domain": "average"}]
        values = {
            f"evaluation/{key}/{row['domain']}": row[key]
            for key in ("perplexity", "bits_per_byte")
            for row in rows
            if row[key] is not None
        }
        if folder := append_to_board(checkpoint["checkpoint"], values):
            logger.info("TensorBoard: %s", folder)


def _validation_prefixes(config: RunConfig) -> dict[str, str]:
    """The datasets of a run's validation sources by name.

    Raises:
        ConfigError: there are no sources.
        DataFormatError: lists the datasets that are not there.
    """
    if not config.data.validation:
        raise ConfigError("data.validation: is empty, so there is nothing to evaluate on; or give --data")
    prefixes, missing = {}, []
    for index, source in enumerate(known_sources(config).data.validation):
        if source.prefix is not None and dataset_exists(source.prefix):
            prefixes[source.name] = source.prefix
        else:
            place = source.prefix or f"in {config.data.prepared_dir}, for this `input` and `edit`"
            missing.append(f"data.validation.{index} ({source.name}): no dataset {place}")
    if missing:
        how = "make them with tools/train.py --config ... --prepare, or the jobs of tools/submit.py"
        raise DataFormatError("\n  - ".join([f"datasets that are not there; {how}:", *missing]))
    return prefixes


def _take_run(arguments: argparse.Namespace) -> dict[str, str]:
    """Fill in what ``--config`` says of checkpoint, output and device; returns the prefixes by name.

    Raises:
        TokeditError: the configuration is faulty, or its run has no checkpoint or no data to evaluate on.
    """
    path, *overrides = arguments.config
    config = load_config(path, overrides)
    prefixes = {} if arguments.data and not config.data.validation else _validation_prefixes(config)
    take_checkpoint(arguments, config, "perplexity")
    return prefixes
