"""One work unit: read, tokenize, score, edit, write, and say that it is done.

Reading and tokenizing run ahead of the scorer, editing and writing behind it, each in a thread of its own.
Invariant: a unit's files depend on the plan and the input alone; its marker is written after them, so a unit
either counts as a whole or is done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.corpus import WorkUnit
from megatron_tokedit.dataset import IndexedDatasetWriter, JournalWriter, best_dtype
from megatron_tokedit.dataset.loss_mask import LOSS_MASK_DTYPE, LOSS_MASK_SUFFIXES, loss_mask_prefix
from megatron_tokedit.edit.lineage import Lineage
from megatron_tokedit.edit.statistics import EditStatistics
from megatron_tokedit.errors import PriorError
from megatron_tokedit.pipeline.conversations import TOKEN_ROLES, EncodedConversation
from megatron_tokedit.pipeline.editing import GroupEditor, Reencoder
from megatron_tokedit.pipeline.groups import Fate, Group, GroupReader, Sequences
from megatron_tokedit.pipeline.overlap import Behind, ahead
from megatron_tokedit.pipeline.resources import JobTokenizers, PriorPlan, environment
from megatron_tokedit.pipeline.results import (
    NOT_WRITABLE,
    ROUND_TRIP,
    KeyCounts,
    Stopwatch,
    UnitResult,
    count,
)
from megatron_tokedit.pipeline.workdir import WorkDir, make_folder
from megatron_tokedit.scoring.resident import peak_resident_bytes
from megatron_tokedit.tokenizers import append_eod

Advance = Callable[[int, int], None]
"""Told the documents and the tokens that were done since it was told last."""


@dataclass(slots=True)
class _Output:
    """The open files of one dataset."""

    dataset: IndexedDatasetWriter
    journal: JournalWriter | None
    counts: KeyCounts
    loss_mask: IndexedDatasetWriter | None = None


class UnitWorker:
    """Does units, one after another; holds the tokenizers and, where the job edits, the prior.

    Args:
        config: the job.
        tokenizers: its tokenizers.
        prior: as settled by the plan.

    Raises:
        PriorError: the prior cannot be loaded.
    """

    def __init__(self, config: PreprocessConfig, tokenizers: JobTokenizers, prior: PriorPlan | None) -> None:
        self._config = config
        self._workdir = WorkDir(config.output_prefix)
        self._written = tokenizers.written
        self._dtype = best_dtype(tokenizers.written.vocab_size)
        self._reader = GroupReader(config, tokenizers, prior)
        self._reencoder = Reencoder(config, tokenizers)
        self._reencode_step = "write" if tokenizers.output is None else "reencode"
        self._editor = GroupEditor(config, tokenizers, prior) if prior else None
        self._device = prior.device if prior else None
        self._environment = environment(prior.device) if prior else None

    def process(self, unit: WorkUnit, advance: Advance) -> UnitResult:
        """Do one unit and write its marker; a unit that another process has done meanwhile is left alone.

        Args:
            unit: which.
            advance: told how far it is, always from this thread.

        Raises:
            DataFormatError: a file cannot be read or written, the unit alone has too many bad lines, or a
                text spells a control token where that is an error.
            PriorError: the prior returned unusable numbers.
        """
        marker = self._workdir.unit_marker(unit.unit_id)
        if marker.exists():
            advance(unit.num_documents, 0)
            return UnitResult.load(marker)
        begin = time.perf_counter()
        result = UnitResult(unit.unit_id, device=self._device, environment=self._environment)
        stopwatch = Stopwatch()
        make_folder(marker.parent)
        with ExitStack() as stack:
            outputs = {
                key: [self._open(unit.unit_id, name, stack) for name in self._config.dataset_names(key)]
                for key in self._config.json_keys
            }
            behind = stack.enter_context(Behind())
            groups = stack.enter_context(closing(ahead(self._reader.groups(unit, result, stopwatch))))
            for group in groups:
                for key, generations in outputs.items():
                    self._process_key(group, key, generations, behind, stopwatch, unit, advance)
                advance(len(group.documents), 0)
            behind.finish()
            with stopwatch.timed("write"):
                for key, generations in outputs.items():
                    for name, output in zip(self._config.dataset_names(key), generations, strict=True):
                        result.keys[name] = self._close(output)
        result.seconds = stopwatch.seconds
        result.wall_seconds = time.perf_counter() - begin
        result.peak_bytes = peak_resident_bytes()
        result.save(marker)
        return result

    def _open(self, unit_id: int, name: str, stack: ExitStack) -> _Output:
        """Start a dataset's files; they vanish if the unit fails."""
        prefix = self._workdir.unit_part(unit_id, name)
        dataset = stack.enter_context(IndexedDatasetWriter(prefix, self._dtype))
        loss_mask = None
        if self._config.is_sft:
            writer = IndexedDatasetWriter(loss_mask_prefix(prefix), LOSS_MASK_DTYPE)
            loss_mask = stack.enter_context(writer)
        if self._editor is None:
            return _Output(dataset, None, KeyCounts(), loss_mask)
        journal = stack.enter_context(JournalWriter(f"{prefix}.edits", self._dtype))
        return _Output(dataset, journal, KeyCounts(edit=EditStatistics()), loss_mask)

    def _close(self, output: _Output) -> KeyCounts:
        """Give a dataset's files their names."""
        checksums = output.counts.checksums
        if output.journal is not None:
            checksums[".edits"] = output.journal.finalize()
        if output.loss_mask is not None:
            mask = output.loss_mask.finalize()
            checksums |= dict(zip(LOSS_MASK_SUFFIXES, (mask.bin_sha256, mask.idx_sha256), strict=True))
        summary = output.dataset.finalize()
        checksums |= {".bin": summary.bin_sha256, ".idx": summary.idx_sha256}
        output.counts.documents = summary.num_documents
        output.counts.sequences = summary.num_sequences
        output.counts.tokens = summary.num_tokens
        return output.counts

    def _process_key(
        self,
        group: Group,
        key: str,
        generations: list[_Output],
        behind: Behind,
        stopwatch: Stopwatch,
        unit: WorkUnit,
        advance: Advance,
    ) -> None:
        """Edit one key of a group and have it written, one dataset a generation."""
        if self._editor is None:
            nothing: list[Lineage | None] = [None] * len(group.documents)
            behind.submit(self._write, group, key, generations[0], lambda: nothing, stopwatch)
            advance(0, group.keys[key].num_tokens)
            return
        try:
            self._editor.edit(
                group,
                key,
                [output.counts for output in generations],
                stopwatch,
                on_batch=lambda tokens: advance(0, tokens),
                on_generation=lambda index, lineages: behind.submit(
                    self._write, group, key, generations[index], lineages, stopwatch
                ),
            )
        except PriorError as error:
            raise PriorError(f"work unit {unit.unit_id}, {error}") from error

    def _write(
        self,
        group: Group,
        key: str,
        output: _Output,
        lineages: Callable[[], list[Lineage | None]],
        stopwatch: Stopwatch,
    ) -> None:
        """Write one generation of one key of a group."""
        encoded = group.keys[key]
        for id_, number in encoded.spelled.items():
            count(output.counts.spelled, id_, number)
        edited = lineages()
        with stopwatch.timed(self._reencode_step):
            written = [
                None if fate is Fate.DROP else self._reencoder.written(encoded, index, edited[index])
                for index, fate in enumerate(encoded.fates)
            ]
        count(output.counts.unedited, ROUND_TRIP, encoded.fates.count(Fate.KEEP))
        with stopwatch.timed("write"):
            for index, document in enumerate(written):
                if document is None:
                    reason = encoded.reasons.get(index, ROUND_TRIP)
                    count(output.counts.dropped, reason)
                    count(output.counts.dropped_bytes, reason, group.documents[index].num_bytes)
                    continue
                sequences, changes, is_refused = document
                count(output.counts.unedited, NOT_WRITABLE, int(is_refused))
                output.dataset.add_document(self._ended(sequences))
                conversation = encoded.conversations[index] if encoded.conversations else None
                if output.loss_mask is not None and conversation is not None:
                    _write_loss_mask(output, conversation, edited[index])
                if output.journal is not None:
                    original = self._ended(encoded.originals[index])
                    output.journal.add_document([len(ids) for ids in original], *changes)

    def _ended(self, sequences: Sequences) -> Sequences:
        """The sequences with the end-of-document id, where it is wanted."""
        return append_eod(sequences, self._written.eod) if self._config.append_eod else sequences


def _write_loss_mask(output: _Output, conversation: EncodedConversation, edited: Lineage | None) -> None:
    """Write which tokens of a conversation count in the loss, and count what its tokens are."""
    assert output.loss_mask is not None
    loss_M = conversation.loss_of(edited)
    output.loss_mask.add_document([loss_M.astype(LOSS_MASK_DTYPE)])
    roles_M = conversation.roles_T if edited is None else conversation.roles_of(edited)
    counts = output.counts.conversations
    for number, role in enumerate(TOKEN_ROLES):
        count(counts, f"tokens.{role}", int(np.count_nonzero(roles_M == number)))
    count(counts, "loss_tokens", int(np.count_nonzero(loss_M)))
    count(counts, "responses", conversation.num_responses)
    count(counts, "silent_responses", conversation.num_silent)
    count(counts, "empty_prompts", conversation.num_empty_prompts)
    count(counts, "truncated", int(conversation.num_cut_before > 0))
    count(counts, "messages_cut_before", conversation.num_cut_before)
    count(counts, "messages_cut_after", conversation.num_cut_after)
