"""``tools/evaluate.py``: how good checkpoints are, side by side; ``perplexity`` over named domains."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import orjson
from tqdm import tqdm

from megatron_tokedit import log
from megatron_tokedit.cli.main import add_common_arguments, run_command
from megatron_tokedit.dataset import IndexedDataset, atomic_write_bytes, check_compatible, read_manifest
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.evaluation import CheckpointPerplexity, as_json, as_table, measure_perplexity
from megatron_tokedit.tokenizers import load_tokenizer

logger = log.get_logger(__name__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Evaluate checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    perplexity = commands.add_parser(
        "perplexity",
        help="held-out perplexity by domain",
        description="Held-out perplexity: a row a domain, a column a checkpoint, and their average.",
    )
    perplexity.add_argument(
        *("--checkpoint", "--checkpoints"),
        dest="checkpoints",
        nargs="+",
        required=True,
        metavar="DIR",
        help="run folders (their newest complete checkpoint), step folders, or Hugging Face model folders",
    )
    perplexity.add_argument(
        "--data", nargs="+", required=True, metavar="NAME=PREFIX", help="a domain and its PREFIX.bin/.idx"
    )
    perplexity.add_argument("--output", metavar="FILE.json", help="write every figure here as well")
    scoring = perplexity.add_argument_group("scoring")
    scoring.add_argument(
        "--context", type=int, metavar="N", help="tokens a window (default: the model's limit)"
    )
    scoring.add_argument(
        "--overlap",
        type=int,
        metavar="N",
        help="of them context only (default: 512, or a quarter)",
    )
    scoring.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "fp8", "fp8_blockwise", "mxfp8"),
        default="float32",
        help="default: float32; the FP8 ones need a GPU with Transformer Engine",
    )
    scoring.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    scoring.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="positions a forward")
    scoring.add_argument(
        "--logits-bytes", type=int, default=128 << 20, metavar="N", help="memory of the head"
    )
    add_common_arguments(perplexity)
    return parser


def _open_domains(pairs: Sequence[str]) -> dict[str, IndexedDataset]:
    """The datasets by name.

    Raises:
        ConfigError: a pair that is not NAME=PREFIX, or a name given twice.
        DataFormatError: a dataset that is missing or damaged.
    """
    domains: dict[str, IndexedDataset] = {}
    for pair in pairs:
        name, equals, prefix = pair.partition("=")
        if not (name and equals and prefix):
            raise ConfigError(f"--data {pair}: expected NAME=PREFIX")
        if name in domains:
            raise ConfigError(f"--data: the name {name!r} is given twice")
        domains[name] = IndexedDataset(prefix.removesuffix(".bin").removesuffix(".idx"))
        domains[name].refuse_truncated()
    return domains


def _measure(
    path: str, domains: dict[str, IndexedDataset], arguments: argparse.Namespace
) -> CheckpointPerplexity:
    """One checkpoint on all domains."""
    # imported here: `--help` and wrong usage should not wait for torch
    from megatron_tokedit.scoring.load import identify_prior, load_scorer, scoring_options

    identity = identify_prior(path)
    start_ids = set()
    for dataset in domains.values():
        manifest = read_manifest(dataset.prefix)
        if manifest is None:
            logger.warning(
                "%s has no manifest: whether its tokenizer fits %s is not checked", dataset.prefix, path
            )
            continue
        check_compatible(
            dataset.prefix,
            manifest,
            tokenizer_fingerprint=identity.tokenizer_fingerprint,
            vocab_size=identity.vocab_size,
        )
        if identity.start_id is None:
            tokenizer = load_tokenizer(manifest.tokenizer.type, manifest.tokenizer.model)
            start_ids.add(tokenizer.bos if tokenizer.prepends_bos else None)
    if len(start_ids) > 1:
        raise ConfigError(
            "--data: the datasets were made with tokenizers of different BOS ids; evaluate them apart"
        )
    start_id = identity.start_id if identity.start_id is not None else next(iter(start_ids), None)
    options = scoring_options(
        identity,
        start_id=start_id,
        context_tokens=arguments.context,
        overlap_tokens=arguments.overlap,
        batch_tokens=arguments.batch_tokens,
        logits_bytes=arguments.logits_bytes,
    )
    scorer = load_scorer(identity, options, dtype=arguments.dtype, device=arguments.device)
    total = sum(dataset.num_tokens for dataset in domains.values())
    with tqdm(
        total=total, unit="tok", unit_scale=True, desc=Path(path).name, disable=arguments.quiet or None
    ) as bar:
        results = tuple(
            measure_perplexity(scorer, dataset, name, on_tokens=bar.update)
            for name, dataset in domains.items()
        )
    return CheckpointPerplexity(path, scorer.fingerprint, results)


def _perplexity(arguments: argparse.Namespace) -> None:
    """Measure, print the table, write the JSON."""
    domains = _open_domains(arguments.data)
    results = [_measure(path, domains, arguments) for path in arguments.checkpoints]
    names = [Path(path).name or path for path in arguments.checkpoints]
    if len(set(names)) < len(names):
        names = list(arguments.checkpoints)
    print(as_table(results, names))
    print("perplexity a token; average: mean of the rows" + ("; *: lowest of its row" if names[1:] else ""))
    if arguments.output:
        path = Path(arguments.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, orjson.dumps(as_json(results), option=orjson.OPT_INDENT_2) + b"\n")
        logger.info("wrote %s", path)


def _run(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    _perplexity(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_run, argv)
