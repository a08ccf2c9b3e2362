"""The indexed dataset on disk: Megatron's ``.bin``/``.idx``, the manifest and the edit journal beside them.

Invariant: files appear complete, by rename, or not at all; bytes are those Megatron-LM would write; and what
is on disk can be proved whole (:func:`verify_dataset`) and undone to the unedited data
(:func:`undo_dataset`).
"""

from megatron_tokedit.dataset.alignment import align
from megatron_tokedit.dataset.atomic import AtomicFile, atomic_write_bytes, remove_temporaries, sha256_of_file
from megatron_tokedit.dataset.format import best_dtype
from megatron_tokedit.dataset.journal import Journal, JournalWriter, NoEdits, merge_journals
from megatron_tokedit.dataset.journal_format import CHANGED, DROPPED, INSERTED, JournalEntries
from megatron_tokedit.dataset.manifest import (
    ConversationRecord,
    InputRecord,
    Manifest,
    TokenizerRecord,
    check_compatible,
    read_manifest,
    refuse_existing,
    shorten_inputs,
    write_manifest,
)
from megatron_tokedit.dataset.merge import merge_datasets
from megatron_tokedit.dataset.merge_manifests import check_mergeable, merge_manifests
from megatron_tokedit.dataset.reader import IndexedDataset
from megatron_tokedit.dataset.undo import undo_dataset, undo_document
from megatron_tokedit.dataset.verify import VerifyReport, verify_dataset
from megatron_tokedit.dataset.writer import DatasetSummary, IndexedDatasetWriter

__all__ = [
    "CHANGED",
    "DROPPED",
    "INSERTED",
    "AtomicFile",
    "ConversationRecord",
    "DatasetSummary",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "InputRecord",
    "Journal",
    "JournalEntries",
    "JournalWriter",
    "Manifest",
    "NoEdits",
    "TokenizerRecord",
    "VerifyReport",
    "align",
    "atomic_write_bytes",
    "best_dtype",
    "check_compatible",
    "check_mergeable",
    "merge_datasets",
    "merge_journals",
    "merge_manifests",
    "read_manifest",
    "refuse_existing",
    "remove_temporaries",
    "sha256_of_file",
    "shorten_inputs",
    "undo_dataset",
    "undo_document",
    "verify_dataset",
    "write_manifest",
]
