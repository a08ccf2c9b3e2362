"""``tools/inspect_dataset.py``: show, verify, diff, undo and merge of indexed datasets.

Invariant: nothing that is there already is ever overwritten, and a damaged file ends in one clear message.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from megatron_tokedit.cli.inspect_diff import add_diff_arguments, diff
from megatron_tokedit.cli.inspect_files import progress_bar, size_on_disk
from megatron_tokedit.cli.inspect_merge import merge
from megatron_tokedit.cli.inspect_show import add_show_arguments, show
from megatron_tokedit.cli.main import add_common_arguments, run_command
from megatron_tokedit.dataset import IndexedDataset, read_manifest, undo_dataset, verify_dataset
from megatron_tokedit.errors import DataFormatError

_DESCRIPTION = "Look into Megatron indexed datasets (PREFIX.bin, PREFIX.idx), edited or not."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_run, argv)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="inspect_dataset.py", description=_DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    show_parser = _add_command(commands, "show", show, "what a dataset is made of, or the text of documents")
    show_parser.add_argument("prefix", type=prefix_of, metavar="PREFIX")
    add_show_arguments(show_parser)

    verify = _add_command(
        commands, "verify", _verify, "find every fault: sizes, pointers, ids, checksums, journal, counts"
    )
    verify.add_argument("prefixes", nargs="+", type=prefix_of, metavar="PREFIX")
    verify.add_argument(
        "--vocab-size", type=int, metavar="N", help="ids must be below (default: the manifest's)"
    )

    diff_parser = _add_command(commands, "diff", diff, "what differs, token by token, in colour")
    diff_parser.add_argument(
        "prefixes",
        nargs="+",
        type=prefix_of,
        metavar="PREFIX",
        help="original and edited; or only the edited",
    )
    add_diff_arguments(diff_parser)

    undo = _add_command(
        commands, "undo", _undo, "rebuild the original, byte for byte, from a dataset and its journal"
    )
    undo.add_argument("prefix", type=prefix_of, metavar="PREFIX")
    undo.add_argument("--output-prefix", required=True, type=prefix_of, metavar="PREFIX")

    merge_parser = _add_command(
        commands, "merge", merge, "join datasets, in the given order, with journals, manifests and statistics"
    )
    merge_parser.add_argument("output", type=prefix_of, metavar="OUT", help="prefix of the new dataset")
    merge_parser.add_argument("parts", nargs="+", type=prefix_of, metavar="PREFIX", help="of the parts")
    merge_parser.add_argument(
        "--allow-different-edits",
        action="store_true",
        help="join parts that were edited differently; the manifest then records the settings of each",
    )
    return parser


def prefix_of(text: str) -> str:
    """A prefix; the name of its ``.bin`` or ``.idx``, as a shell completes it, will do."""
    return text.removesuffix(".bin").removesuffix(".idx")


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], None],
    description: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=description, description=f"{description[0].upper()}{description[1:]}.", allow_abbrev=False
    )
    parser.set_defaults(run=run)
    add_common_arguments(parser)
    return parser


def _run(argv: Sequence[str]) -> None:
    arguments = build_parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # text of any language on a terminal of another one
        sys.stdout.reconfigure(errors="replace")
    arguments.run(arguments)


def _verify(arguments: argparse.Namespace) -> None:
    """Verify every dataset; the faults of all are told together."""
    faults = []
    for prefix in arguments.prefixes:
        try:
            with progress_bar(prefix, size_on_disk(prefix), "B", quiet=arguments.quiet) as on_bytes:
                report = verify_dataset(prefix, arguments.vocab_size, on_bytes=on_bytes)
        except DataFormatError as error:
            faults.append(str(error))
            continue
        if not arguments.quiet:
            print(
                f"{prefix}: whole. {report.num_documents:,} documents, {report.num_sequences:,} sequences, "
                f"{report.num_tokens:,} tokens ({report.dtype}"
                f"{'' if report.max_id is None else f', largest id {report.max_id}'}); "
                + (
                    "checksums agree"
                    if report.checksums_verified
                    else "no manifest, so no checksums to compare"
                )
            )
    if faults:
        raise DataFormatError("\n".join(faults))


def _undo(arguments: argparse.Namespace) -> None:
    """Rebuild the original and say what it is."""
    prefix, output, quiet = arguments.prefix, arguments.output_prefix, arguments.quiet
    num_documents = IndexedDataset(prefix).num_documents
    with (
        progress_bar("verify", size_on_disk(prefix), "B", quiet=quiet) as on_bytes,
        progress_bar("undo", num_documents, "doc", quiet=quiet) as on_document,
    ):
        summary = undo_dataset(prefix, output, on_bytes=on_bytes, on_document=on_document)
    if quiet:
        return
    manifest = read_manifest(output)
    print(
        f"{output}.bin, .idx{', .manifest.json' if manifest else ''}: the original of {prefix}, "
        f"{summary.num_documents:,} documents, {summary.num_tokens:,} tokens"
    )
    if manifest and (dropped := manifest.counts.get("num_documents_dropped")):
        print(f"without the {dropped:,} documents that the job dropped whole, which no journal holds")
