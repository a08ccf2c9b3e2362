"""``tools/analyze_corpus.py``: what kind of text corpora are, side by side; JSON, pictures and a report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import orjson
from tqdm import tqdm

from megatron_tokedit import log
from megatron_tokedit.analysis.embedding_model import (
    DEFAULT_TOKENS,
    EmbeddingChoice,
    choose_embedding_model,
)
from megatron_tokedit.analysis.findings import as_table, judge
from megatron_tokedit.analysis.run import Analysis, Selection, Settings
from megatron_tokedit.analysis.sources import Corpus
from megatron_tokedit.cli import analyze_corpus_inputs as inputs
from megatron_tokedit.cli.main import GOES_ON, add_common_arguments, run_command
from megatron_tokedit.dataset import atomic_write_bytes
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.pipeline.placement import usable_cores
from megatron_tokedit.tokenizers import TOKENIZER_TYPES

logger = log.get_logger(__name__)
_DESCRIPTION = """\
Compare corpora, raw or indexed: how concentrated and repetitive they are, how predictable to a prior, how far
apart, and what an edit did. The first is what the others are held against. Writes analysis.json, pictures
and report.html, which says in words what they mean."""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="analyze_corpus.py",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_corpus_arguments(parser.add_argument_group("corpora"))
    _add_size_arguments(parser.add_argument_group("how much is looked at"))
    _add_prior_arguments(parser.add_argument_group("prior, for perplexity"))
    _add_embedding_arguments(parser.add_argument_group("map of documents"))
    _add_selection_arguments(parser.add_argument_group("selection (DSIR)"))
    add_common_arguments(parser)
    return parser


def _add_corpus_arguments(group: argparse._ArgumentGroup) -> None:
    """What is compared, in whose tokens, and where to."""
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="NAME=FILE_OR_PREFIX",
        help="a name again adds files to it; raw text as tools/preprocess_edit.py takes it (globs may be "
        "quoted), or PREFIX.bin/.idx; the original of an edited dataset is rebuilt from its journal",
    )
    group.add_argument(
        "--json-key",
        nargs="+",
        default=[],
        metavar="[NAME=]KEY",
        help="key (or parquet column) of the text, of one corpus or of all (default: text)",
    )
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES)
    group.add_argument(
        "--tokenizer-model", metavar="PATH", help="default: that of the manifests, or the prior's own"
    )
    group.add_argument("--pair", nargs="+", default=[], metavar="EDITED=ORIGINAL", help="names of two inputs")
    group.add_argument(
        "--no-originals", action="store_true", help="do not rebuild the originals of edited datasets"
    )
    group.add_argument("--output-dir", required=True, metavar="DIR")
    group.add_argument(
        "--max-bad-lines", type=_natural, default=0, metavar="N", help="of a corpus (default: 0)"
    )
    group.add_argument("--workers", type=_positive, metavar="N", help="processes (default: usable cores)")


def _add_size_arguments(group: argparse._ArgumentGroup) -> None:
    """Samples and budgets."""
    sample = group.add_mutually_exclusive_group()
    sample.add_argument(
        "--sample-documents", type=_positive, metavar="N", help="documents of each corpus (default: all)"
    )
    sample.add_argument("--sample-share", type=_share, metavar="P", help="the same as a share, 0 to 1")
    group.add_argument(
        "--token-budget",
        type=_positive,
        default=1_000_000,
        metavar="N",
        help="tokens of each corpus for what depends on size (default: 1000000, or the smallest corpus)",
    )
    group.add_argument("--seed", type=_natural, default=1234, metavar="N", help="default: 1234")


def _add_prior_arguments(group: argparse._ArgumentGroup) -> None:
    """The model that scores."""
    group.add_argument("--prior", metavar="PATH", help="a Hugging Face or a Megatron checkpoint folder")
    group.add_argument(
        "--prior-documents",
        type=_natural,
        default=1000,
        metavar="N",
        help="documents of each corpus that are scored (default: 1000; 0: all that are counted)",
    )
    group.add_argument("--prior-tokenizer-type", choices=TOKENIZER_TYPES)
    group.add_argument(
        "--prior-tokenizer-model", metavar="PATH", help="where it is not the one in the prior's folder"
    )
    group.add_argument("--prior-backend", choices=("auto", "hf", "megatron"), default="auto")
    group.add_argument(
        "--prior-dtype",
        choices=("float32", "bfloat16", "float16", "fp8", "fp8_blockwise", "mxfp8"),
        default="float32",
        help="default: float32",
    )
    group.add_argument("--prior-device", choices=("auto", "cpu", "cuda"), default="auto")
    group.add_argument(
        "--prior-context", type=_positive, metavar="N", help="tokens a window (default: the prior's limit)"
    )
    group.add_argument(
        "--prior-overlap", type=_positive, metavar="N", help="of them context only (default: 512, or 1/4)"
    )
    group.add_argument("--prior-batch-tokens", type=_positive, default=8192, metavar="N")
    group.add_argument("--prior-logits-bytes", type=_positive, default=128 << 20, metavar="N")


def _add_embedding_arguments(group: argparse._ArgumentGroup) -> None:
    """The model that makes vectors of documents."""
    group.add_argument(
        "--embedding-model",
        metavar="PATH_OR_NAME",
        help="a folder of sentence-transformers or transformers, or a name on the hub (extra `embedding`)",
    )
    group.add_argument(
        "--embedding-documents",
        type=_positive,
        metavar="N",
        help="documents of each corpus on the map (default: 300)",
    )
    group.add_argument(
        "--embedding-tokens",
        type=_positive,
        metavar="N",
        help=f"of a document that are read (default: {DEFAULT_TOKENS}, or the model's limit)",
    )
    group.add_argument("--embedding-device", choices=("auto", "cpu", "cuda"), help="default: auto")


def _add_selection_arguments(group: argparse._ArgumentGroup) -> None:
    """What is selected."""
    group.add_argument(
        "--select", metavar="B=A", help="draw documents of B that together are like A, and write them"
    )
    amount = group.add_mutually_exclusive_group()
    amount.add_argument("--select-documents", type=_positive, metavar="N")
    amount.add_argument("--select-share", type=_share, metavar="P", help="of B's documents (default: 0.1)")
    group.add_argument(
        "--select-output",
        metavar="PREFIX",
        help="PREFIX.jsonl of a raw corpus, PREFIX.bin/.idx of an indexed one (default: DIR/selected_B)",
    )


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return value


def _natural(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 or more")
    return value


def _share(text: str) -> float:
    if not 0.0 < (value := float(text)) <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0 and at most 1")
    return value


class BarProgress:
    """A bar a stage; see :class:`megatron_tokedit.analysis.run.Progress`."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: tqdm[None] | None = None

    def start(self, stage: str, total: int, unit: str) -> None:
        """Show the bar; on anything but a terminal say the stage in a line."""
        if not total:
            return
        if not sys.stderr.isatty():
            logger.info("%s: %d %ss", stage, total, unit)
        self._bar = tqdm(total=total, desc=stage, unit=unit, disable=self._quiet or None)

    def advance(self, count: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(count)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _selection(arguments: argparse.Namespace, corpora: Sequence[Corpus], folder: Path) -> Selection | None:
    """What ``--select`` asks for.

    Raises:
        ConfigError: names that are none, or an amount without ``--select``.
    """
    if arguments.select is None:
        for flag in ("select_documents", "select_share", "select_output"):
            if getattr(arguments, flag) is not None:
                raise ConfigError(f"--{flag.replace('_', '-')}: has no effect without --select B=A")
        return None
    source, target = inputs.named_pair("--select", arguments.select, [corpus.name for corpus in corpora])
    count, share = arguments.select_documents, arguments.select_share
    if count is None and share is None:
        share = 0.1
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in source)
    prefix = inputs.prefix_of(arguments.select_output or str(folder / f"selected_{safe}"))
    return Selection(source, target, count, share, prefix.removesuffix(".jsonl"))


def _embedding(arguments: argparse.Namespace) -> EmbeddingChoice | None:
    """The model of ``--embedding-model``.

    Raises:
        ConfigError: it cannot be used, or an option of its without it.
    """
    if arguments.embedding_model is None:
        for flag in ("embedding_documents", "embedding_tokens", "embedding_device"):
            if getattr(arguments, flag) is not None:
                raise ConfigError(f"--{flag.replace('_', '-')}: has no effect without --embedding-model")
        return None
    return choose_embedding_model(
        arguments.embedding_model,
        arguments.embedding_device or "auto",
        arguments.embedding_tokens,
    )


def _run(argv: Sequence[str]) -> None:
    """Open, check, count, judge, draw, write."""
    arguments = build_parser().parse_args(argv)
    corpora = inputs.open_corpora(
        arguments.input, arguments.json_key, with_originals=not arguments.no_originals
    )
    choice = inputs.choose_tokenizer(arguments, corpora)
    tokenizer = choice.load()
    inputs.check_tokenizer(corpora, tokenizer)
    prior = inputs.choose_prior(arguments, choice, tokenizer)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        corpora=tuple(corpora),
        tokenizer=choice,
        prior=prior,
        pairs=inputs.find_pairs(arguments.pair, corpora),
        selection=_selection(arguments, corpora, folder),
        sample_documents=arguments.sample_documents,
        sample_share=arguments.sample_share,
        prior_documents=arguments.prior_documents or None,
        embedding=_embedding(arguments),
        embedding_documents=arguments.embedding_documents or 300,
        budget_tokens=arguments.token_budget,
        seed=arguments.seed,
        workers=arguments.workers or usable_cores(os.environ),
        max_bad_lines=arguments.max_bad_lines,
    )
    progress = BarProgress(quiet=arguments.quiet)
    found = Analysis(settings, tokenizer, folder / "cache", progress).run()
    found["findings"] = judge(found)
    data = orjson.dumps(found, option=orjson.OPT_INDENT_2)
    atomic_write_bytes(folder / "analysis.json", data + b"\n")
    # imported here: matplotlib takes its time, and a refused input should not wait for it
    from megatron_tokedit.analysis.report import write_report

    write_report(found, folder)
    print(as_table(found))
    logger.info("wrote %s, analysis.json and the pictures beside it", folder / "report.html")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_run, argv, interrupted=GOES_ON)


if __name__ == "__main__":
    sys.exit(main())
