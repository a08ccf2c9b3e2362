"""``tools/evaluate.py``: how good checkpoints are, side by side; ``perplexity`` over named domains."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import orjson
from tqdm import tqdm

from megatron_tokedit import log
from megatron_tokedit.cli.main import add_common_arguments, run_command
from megatron_tokedit.cli.train_report import known_sources
from megatron_tokedit.config.load import load_config
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.dataset import IndexedDataset, atomic_write_bytes, check_compatible, read_manifest
from megatron_tokedit.dataset.sources import dataset_exists
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.errors import ConfigError, DataFormatError
from megatron_tokedit.evaluation import CheckpointPerplexity, as_json, as_table, measure_perplexity
from megatron_tokedit.tokenizers import load_tokenizer

logger = log.get_logger(__name__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Evaluate checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    perplexity = commands.add_parser(
        "perplexity",
        help="held-out perplexity by domain",
        description="Held-out perplexity: a row a domain, a column a checkpoint, and their average. With "
        "--config: of a run's newest checkpoint on its validation sources.",
    )
    perplexity.add_argument(
        "--config",
        nargs="+",
        metavar=("RUN.yaml", "section.field=value"),
        help="a run and its overrides: gives --checkpoint, --data and --output where they are not given",
    )
    perplexity.add_argument(
        *("--checkpoint", "--checkpoints"),
        dest="checkpoints",
        nargs="+",
        metavar="DIR",
        help="run folders (their newest complete checkpoint), step folders, or Hugging Face model folders",
    )
    perplexity.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="NAME=PREFIX",
        help="a domain and its PREFIX.bin/.idx; with --config further ones",
    )
    perplexity.add_argument(
        "--output",
        metavar="FILE.json",
        help="write every figure here as well (default for --config without --checkpoint: "
        "RUN_DIR/evaluation/perplexity_step_N.json)",
    )
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
    scoring.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: auto, or the run's")
    scoring.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="positions a forward")
    scoring.add_argument(
        "--logits-bytes", type=int, default=128 << 20, metavar="N", help="memory of the head"
    )
    add_common_arguments(perplexity)
    return parser


def _given_domains(pairs: Sequence[str], prefixes: dict[str, str]) -> dict[str, str]:
    """The prefixes by name, and those of ``--data`` added to them.

    Raises:
        ConfigError: a pair that is not NAME=PREFIX, or a name given twice.
    """
    prefixes = dict(prefixes)
    for pair in pairs:
        name, equals, prefix = pair.partition("=")
        if not (name and equals and prefix):
            raise ConfigError(f"--data {pair}: expected NAME=PREFIX")
        if name in prefixes:
            raise ConfigError(f"--data: the name {name!r} is given twice")
        prefixes[name] = prefix.removesuffix(".bin").removesuffix(".idx")
    return prefixes


def _open_domains(prefixes: dict[str, str]) -> dict[str, IndexedDataset]:
    """The datasets by name.

    Raises:
        DataFormatError: a dataset that is missing or damaged.
    """
    domains = {name: IndexedDataset(prefix) for name, prefix in prefixes.items()}
    for dataset in domains.values():
        dataset.refuse_truncated()
    return domains


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
    arguments.device = arguments.device or config.runtime.device
    if arguments.checkpoints is None:
        folder = checkpoint_folder.require(Path(config.run_dir) / "checkpoints")
        step = checkpoint_folder.read_json(folder, checkpoint_folder.STATE_FILE)["step"]
        arguments.checkpoints = [str(folder)]
        arguments.output = arguments.output or str(evaluation_file(config.run_dir, step))
    return prefixes


def evaluation_file(run_dir: str, step: int) -> Path:
    """Where the evaluation of a run's checkpoint is written to."""
    return Path(run_dir) / "evaluation" / f"perplexity_step_{step}.json"


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
    scorer = load_scorer(identity, options, dtype=arguments.dtype, device=arguments.device or "auto")
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
    prefixes = _take_run(arguments) if arguments.config else {}
    domains = _open_domains(_given_domains(arguments.data, prefixes))
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
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.config and not (arguments.checkpoints and arguments.data):
        parser.error("give --checkpoint and --data, or --config")
    _perplexity(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_run, argv)
