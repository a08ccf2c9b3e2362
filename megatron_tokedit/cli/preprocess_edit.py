"""``tools/preprocess_edit.py``: raw corpora to edited indexed datasets.

Flags that Megatron-LM's ``tools/preprocess_data.py`` has keep its names and meaning. Invariant: every setting
goes through :class:`PreprocessConfig`, so the command line and the ``edit:`` mapping of a training source
cannot differ.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial

from tqdm import tqdm

from megatron_tokedit.cli.main import EXIT_ERROR, EXIT_OK, GOES_ON, add_common_arguments, run_command
from megatron_tokedit.config.preprocess import PreprocessConfig, preprocess_config
from megatron_tokedit.pipeline import LogProgress, Progress, Result, inspect_job, placement, run
from megatron_tokedit.pipeline.placement import WHOLE, Share
from megatron_tokedit.pipeline.replicas import find_place, needs_replicas, run_in_replica
from megatron_tokedit.tokenizers import TOKENIZER_TYPES
from megatron_tokedit.tokenizers.chat_template import TEMPLATE_NAMES

_DESCRIPTION = """\
Tokenize a corpus, let a prior language model edit its over-confident tokens (ToEdit, arXiv 2412.14689), and
write Megatron's PREFIX_KEY_document.bin and .idx with a manifest, statistics and an edit journal beside them.
Killed or stopped, the same command goes on where it was; --workers changes no byte of the output."""

_MANY_DOCUMENTS = 100_000
"""From here on the bar counts in thousands and millions."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(_main, argv, interrupted=GOES_ON)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="preprocess_edit.py",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_corpus_arguments(parser.add_argument_group("corpus, as in Megatron-LM's preprocess_data.py"))
    _add_conversation_arguments(parser.add_argument_group("conversations, for supervised fine-tuning"))
    _add_edit_arguments(parser.add_argument_group("editing"))
    _add_prior_arguments(parser.add_argument_group("prior"))
    _add_output_arguments(parser.add_argument_group("training tokenizer, where it is not the prior's"))
    _add_job_arguments(parser.add_argument_group("job"))
    add_common_arguments(parser)
    return parser


def _add_corpus_arguments(group: argparse._ArgumentGroup) -> None:
    """Input, output, tokenizer."""
    group.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="jsonl, txt (.gz, .zst), parquet; globs"
    )
    group.add_argument("--json-keys", nargs="+", metavar="KEY", help="one dataset a key (default: text)")
    group.add_argument("--output-prefix", required=True, metavar="PREFIX")
    group.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    group.add_argument("--tokenizer-model", required=True, metavar="PATH")
    group.add_argument("--append-eod", action="store_true", help="end every document with the end-of-text id")
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes (default: usable cores / --prior-threads; 1 with a prior on a GPU); changes no byte",
    )
    group.add_argument("--seed", type=int, metavar="N", help="default: 1234")
    group.add_argument(
        "--log-interval",
        type=int,
        metavar="N",
        help="documents a log line (default: 1000), at most a line a second",
    )


def _add_conversation_arguments(group: argparse._ArgumentGroup) -> None:
    """How conversations are read and rendered."""
    group.add_argument(
        "--format",
        choices=("text", "sft"),
        help="sft: records are conversations; responses alone are edited, each given the conversation before "
        "it; writes PREFIX_sft_document and its loss mask PREFIX_sft_document_loss_mask (default: text)",
    )
    group.add_argument(
        "--sft-format",
        choices=("auto", "messages", "sharegpt", "alpaca", "self_instruct", "prompt_response"),
        help="layout of the records (default: auto, told by each record's keys)",
    )
    group.add_argument(
        "--sft-keys",
        nargs="+",
        type=_part_and_key,
        metavar="PART=KEY",
        help="where a record has its parts: prompt=question response=answer, also system, input, tools; or "
        "messages=KEY",
    )
    group.add_argument(
        "--sft-chat-template",
        metavar="NAME|FILE",
        help=f"{', '.join(TEMPLATE_NAMES)}, or a Jinja file (default: the tokenizer's own)",
    )
    group.add_argument(
        "--sft-max-tokens",
        type=int,
        metavar="N",
        help="longest conversation (default: the prior's context; no bound with --edit-strategy none)",
    )
    group.add_argument(
        "--sft-too-long",
        choices=("drop", "truncate"),
        help="a longer one is dropped (default), or loses its oldest turns; counted either way",
    )
    group.add_argument(
        "--sft-score-without-prompt",
        action="store_true",
        help="score every response by itself, as the authors' script does",
    )


def _part_and_key(text: str) -> tuple[str, str]:
    """``PART=KEY``."""
    part, equals, key = text.partition("=")
    if not (part and equals and key):
        raise argparse.ArgumentTypeError(f"{text!r}: expected PART=KEY, for example prompt=question")
    return part, key


def _add_edit_arguments(group: argparse._ArgumentGroup) -> None:
    """What is edited and how."""
    group.add_argument(
        "--edit-strategy",
        choices=("none", "up_revise", "low_drop_up_revise", "filtering"),
        help="resample where p >= threshold (up_revise, the default), drop where p < low threshold "
        "(filtering), both (low_drop_up_revise), or only tokenize (none)",
    )
    group.add_argument("--edit-threshold", type=float, metavar="P", help="default: 0.99")
    group.add_argument("--edit-low-threshold", type=float, metavar="P", help="default: 0.001")
    group.add_argument("--edit-sampler", choices=("top_k", "top_p", "rejection"), help="default: top_k")
    group.add_argument("--edit-top-k", type=int, metavar="K", help="default: 8; for top_p: no bound")
    group.add_argument("--edit-top-p", type=float, metavar="P", help="of the sampler top_p (default: 0.9)")
    group.add_argument(
        "--edit-temperature", type=float, metavar="T", help="default: 1.5; low_drop_up_revise: 1.0"
    )
    group.add_argument(
        "--edit-exclude-original", action="store_true", help="never draw the original token again"
    )
    group.add_argument(
        "--edit-generations",
        type=int,
        metavar="N",
        help="edit the edited corpus again, N edits in all (default: 1); the last is PREFIX_KEY_document, "
        "the others PREFIX_KEY_generationI_document",
    )
    group.add_argument(
        "--edit-config", metavar="FILE.yaml", help="free rules and a sampler, instead of the flags above"
    )
    group.add_argument(
        "--special-tokens-in-text",
        choices=("encode", "split", "error"),
        help="text that spells a control token becomes that token (encode, the default, as in Megatron-LM), "
        "becomes ordinary text (split), or stops the job (error)",
    )


def _add_prior_arguments(group: argparse._ArgumentGroup) -> None:
    """The model that scores."""
    group.add_argument("--prior", metavar="PATH", help="a Hugging Face or a Megatron checkpoint folder")
    group.add_argument(
        "--prior-backend", choices=("auto", "hf", "megatron"), help="default: auto, by content"
    )
    group.add_argument(
        "--prior-dtype",
        choices=("float32", "bfloat16", "float16", "fp8", "fp8_blockwise", "mxfp8"),
        help="default: float32; the FP8 ones: the linear layers of a Megatron checkpoint, on a GPU with "
        "Transformer Engine (fp8: one scale a tensor; fp8_blockwise: one each 128 values; mxfp8: Blackwell)",
    )
    group.add_argument("--prior-device", choices=("auto", "cpu", "cuda"), help="default: auto")
    group.add_argument(
        "--prior-context", type=int, metavar="N", help="tokens a window (default: 2048, or the prior's limit)"
    )
    group.add_argument(
        "--prior-overlap", type=int, metavar="N", help="of them context only (default: 512, or a quarter)"
    )
    group.add_argument("--prior-batch-tokens", type=int, metavar="N", help="a forward (default: 4096)")
    group.add_argument(
        "--prior-logits-bytes", type=int, metavar="N", help="peak memory of the head (default: 128 MiB)"
    )
    group.add_argument(
        "--prior-threads", type=int, metavar="N", help="CPU threads a worker (default: 1); part of the plan"
    )
    group.add_argument(
        "--prior-tensor-parallel",
        type=int,
        metavar="N",
        help="processes that share every layer of a Megatron checkpoint (default: 1), under torchrun: 8 "
        "processes and N = 4 make 2 replicas; part of the plan",
    )
    group.add_argument(
        "--prior-pipeline-parallel",
        type=int,
        metavar="N",
        help="stages that share its layers among them (default: 1); changes no byte",
    )


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    """Decoding and encoding again."""
    group.add_argument("--output-tokenizer-type", choices=TOKENIZER_TYPES)
    group.add_argument("--output-tokenizer-model", metavar="PATH")
    group.add_argument(
        "--output-round-trip",
        choices=("original", "decoded", "drop"),
        help="a document that --tokenizer-model does not give back exactly: write the original text unedited "
        "(default), what the edited ids spell, or drop it",
    )


def _add_job_arguments(group: argparse._ArgumentGroup) -> None:
    """How the work is divided, and what may go wrong."""
    units = group.add_mutually_exclusive_group()
    units.add_argument("--unit-documents", type=int, metavar="N", help="documents a work unit")
    units.add_argument("--unit-bytes", type=int, metavar="N", help="input bytes a work unit (default: auto)")
    group.add_argument(
        "--rank", type=int, metavar="I", help="default: from torchrun or a Slurm array, else 0"
    )
    group.add_argument("--world-size", type=int, metavar="N", help="processes that share the job")
    group.add_argument("--stage", choices=("all", "edit", "merge"), help="default: all")
    group.add_argument("--max-bad-lines", type=int, metavar="N", help="default: 0")
    group.add_argument(
        "--restart", action="store_true", help="discard what an earlier run of this prefix recorded and did"
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, every problem, and the cost as a sample scored here tells it; touch nothing",
    )


def _main(argv: Sequence[str]) -> int:
    """Parse, configure, run, report."""
    arguments = vars(build_parser().parse_args(argv))
    quiet = arguments.pop("quiet", False)
    given = arguments.pop("rank", None), arguments.pop("world_size", None)
    rank, world_size = placement(os.environ, *given)
    stage = arguments.pop("stage", "all")
    restart = arguments.pop("restart", False)
    dry_run = arguments.pop("dry_run", False)
    if "sft_keys" in arguments:
        arguments["sft_keys"] = dict(arguments["sft_keys"])
    config = preprocess_config(arguments, origin="preprocess_edit.py")
    if dry_run:
        return _dry_run(config, restart)
    progress: Progress = LogProgress(config.log_interval)
    if sys.stderr.isatty() and not quiet and rank == 0:
        progress = BarProgress()
    job = partial(run, stage=stage, restart=restart, progress=progress)
    result: Result | None
    if needs_replicas(config) and stage != "merge":
        share = Share(rank, world_size) if given[0] is not None else WHOLE
        place = find_place(config, os.environ, share, argv)
        result = run_in_replica(
            config, place, os.environ, lambda config, rank, size: job(config, rank=rank, world_size=size)
        )
    else:
        result = job(config, rank=rank, world_size=world_size)
    if not quiet and result is not None:
        _print_result(result)
    return EXIT_OK


def _dry_run(config: PreprocessConfig, restart: bool) -> int:
    """Print what would be done; problems go to stderr and make the exit code 1."""
    report = inspect_job(config, restart=restart)
    print("\n".join(report.lines))
    for problem in report.problems:
        print(f"problem: {problem}", file=sys.stderr)
    return EXIT_ERROR if report.problems else EXIT_OK


def _print_result(result: Result) -> None:
    """A few lines for each dataset."""
    names = ", ".join(result.prefixes.values())
    if result.totals is None and result.outcome == "edited":
        print(f"edited: this process's units are done; the merge that writes {names} is still to come")
        return
    if result.totals is None:
        print(f"{result.outcome}: {names}")
        return
    for key, prefix in result.prefixes.items():
        counts = result.totals.keys[key]
        print(f"{prefix}.bin, .idx: {counts.documents:,} documents, {counts.tokens:,} tokens")
        kind = "tokens"
        if of := counts.conversations:
            kind = "response tokens"
            print(
                f"  {of.get('responses', 0):,} responses; {of.get('loss_tokens', 0):,} tokens count in the "
                f"loss ({of.get('loss_tokens', 0) / max(counts.tokens, 1):.2%})"
            )
        if (edit := counts.edit) is not None:
            print(
                f"  eligible {edit.eligible:,} of {edit.tokens:,} {kind} "
                f"({edit.eligible / max(edit.tokens, 1):.2%}); changed {edit.changed:,} "
                f"({edit.changed / max(edit.eligible, 1):.2%} of eligible); "
                f"dropped {edit.dropped:,}; perplexity {edit.perplexity or float('nan'):.2f}"
            )
            if edit.undone:
                print(f"  undone {edit.undone:,} edits that would have made invalid UTF-8")


class BarProgress:
    """A bar of documents on a terminal, with tokens a second; see :class:`Progress`."""

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None
        self._tokens = 0

    def start(self, total_documents: int, done_documents: int) -> None:
        """Show the bar."""
        self._bar = tqdm(
            total=total_documents,
            initial=done_documents,
            unit="doc",
            unit_scale=total_documents >= _MANY_DOCUMENTS,
        )

    def advance(self, documents: int, tokens: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._tokens += tokens
            seconds = max(self._bar.format_dict["elapsed"], 1e-9)
            self._bar.set_postfix_str(f"{self._tokens / seconds:,.0f} tokens/s", refresh=False)
            self._bar.update(documents)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    sys.exit(main())
