"""Writing the documents that were selected: JSON lines of a raw corpus, a dataset of an indexed one.

Invariant: a file appears whole under its name or not at all, documents keep the order of their corpus, and
nothing that is there already is overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import orjson

from megatron_tokedit.analysis.blocks import Ints
from megatron_tokedit.analysis.dsir import Floats
from megatron_tokedit.analysis.sources import Corpus, of_part, read_raw
from megatron_tokedit.dataset import (
    AtomicFile,
    IndexedDataset,
    IndexedDatasetWriter,
    Journal,
    JournalWriter,
    read_manifest,
    refuse_existing,
    undo_document,
    write_manifest,
)
from megatron_tokedit.dataset.loss_mask import has_loss_mask
from megatron_tokedit.errors import ConfigError, DataFormatError

OnDocument = Callable[[int], None]


def output_of(corpus: Corpus, prefix: str) -> str:
    """The file, or the prefix, that a selection of this corpus is written to."""
    return f"{prefix}.jsonl" if corpus.kind == "raw" else prefix


def check_output(corpus: Corpus, prefix: str) -> None:
    """Refuse, before anything is counted, what could not be written.

    Raises:
        ConfigError: a corpus that no subset can be made of.
        DataFormatError: the output is there already, or its folder is not.
    """
    if corpus.kind == "undone":
        raise ConfigError(
            f"--select {corpus.name}: is rebuilt from a journal while it is read; write it with "
            "tools/inspect_dataset.py undo, and select from that dataset"
        )
    if corpus.kind == "indexed" and has_loss_mask(corpus.paths[0]):
        raise ConfigError(
            f"--select {corpus.name}: {corpus.paths[0]} has a loss mask, which a selection would lose; "
            "select from the raw conversations and preprocess those"
        )
    folder = Path(prefix).parent
    if not folder.is_dir():
        raise DataFormatError(f"{folder}: no such folder for the selection; make it, or choose another")
    if corpus.kind == "indexed":
        refuse_existing(prefix)
    elif os.path.lexists(output_of(corpus, prefix)):
        raise DataFormatError(
            f"{output_of(corpus, prefix)}: there already, and nothing is overwritten; "
            "choose another --select-output, or remove it first"
        )


def write_selection(
    corpus: Corpus, prefix: str, chosen: Ints, weights: Floats, on_document: OnDocument
) -> str:
    """Write the chosen documents.

    Args:
        corpus: where they are from.
        prefix: of the output.
        chosen: their ordinals, ascending.
        weights: log importance weight of each.
        on_document: told how many more are written.

    Returns:
        The file or prefix that was written.

    Raises:
        DataFormatError: the output cannot be written, or the corpus changed meanwhile.
    """
    check_output(corpus, prefix)
    if corpus.kind == "raw":
        _write_lines(corpus, output_of(corpus, prefix), chosen, weights, on_document)
    else:
        _write_dataset(corpus, prefix, chosen, on_document)
    return output_of(corpus, prefix)


def _write_lines(corpus: Corpus, path: str, chosen: Ints, weights: Floats, on_document: OnDocument) -> None:
    """JSON lines: the text under the corpus's key, and where it came from."""
    weight_of = dict(zip(chosen.tolist(), weights.tolist(), strict=True))
    written = 0
    with AtomicFile(path) as file:
        for part, bounds in enumerate(corpus.parts):
            ordinals = of_part(chosen, bounds)
            if ordinals is None or not len(ordinals):
                continue
            for ordinal, document in read_raw(corpus, part, ordinals, lambda line: None):
                texts = document.fields[corpus.json_key]
                record = {
                    corpus.json_key: texts[0] if len(texts) == 1 else texts,
                    "selected_from": {"path": document.path, "line": document.line},
                    "dsir_log_weight": weight_of[ordinal],
                }
                file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
                written += 1
                on_document(1)
        if written != len(chosen):
            raise DataFormatError(
                f"{corpus.name}: changed while it was read: {written} of {len(chosen)} documents were found"
            )
        file.commit()


def _write_dataset(corpus: Corpus, prefix: str, chosen: Ints, on_document: OnDocument) -> None:
    """A dataset with the sequences as they are, its manifest and, of an edited one, its journal."""
    source = corpus.paths[0]
    dataset, manifest = IndexedDataset(source), read_manifest(source)
    journal_path = f"{source}.edits"
    journal = Journal(journal_path) if os.path.isfile(journal_path) else None
    checksums: dict[str, str] = {}
    with (
        IndexedDatasetWriter(prefix, dataset.dtype) as writer,
        JournalWriter(f"{prefix}.edits", dataset.dtype) as edits,
    ):
        for number in chosen.tolist():
            sequences = dataset.document(number)
            writer.add_document(sequences)
            if journal is not None:
                entries = journal.entries(number)
                lengths = [len(ids) for ids in undo_document(sequences, entries)]
                edits.add_document(lengths, entries.positions, entries.original_ids, entries.kinds)
            on_document(1)
        if journal is not None:
            checksums["edits"] = edits.finalize()
        summary = writer.finalize()
    if manifest is not None:
        checksums |= {"bin": summary.bin_sha256, "idx": summary.idx_sha256}
        counts = summary.counts() | {"num_documents_selected_from": dataset.num_documents}
        write_manifest(prefix, manifest.model_copy(update={"counts": counts, "checksums": checksums}))
