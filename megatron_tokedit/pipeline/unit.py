"""One work unit: read, tokenize, score, edit, write, and say that it is done.

Invariant: a unit's files depend on the plan and the input alone; its marker is written after them, so a unit
either counts as a whole or is done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.corpus import BadLine, Document, WorkUnit, read_unit
from megatron_tokedit.dataset import (
    CHANGED,
    DROPPED,
    IndexedDatasetWriter,
    JournalWriter,
    atomic_write_bytes,
    best_dtype,
)
from megatron_tokedit.edit.editor import Candidates, EditedDocument
from megatron_tokedit.edit.random import document_key
from megatron_tokedit.edit.statistics import EditStatistics
from megatron_tokedit.errors import DataFormatError, PlanError, PriorError
from megatron_tokedit.pipeline.plan import GROUP_BYTES
from megatron_tokedit.pipeline.resources import (
    PriorPlan,
    candidate_request,
    load_prior,
    make_editor,
)
from megatron_tokedit.pipeline.workdir import WorkDir, make_folder
from megatron_tokedit.tokenizers import Tokenizer, append_eod, encode_documents

Sequences = list[npt.NDArray[np.int32]]
OnGroup = Callable[[int, int], None]
MAX_EXAMPLES = 20
STEPS = ("read", "tokenize", "score", "edit", "write")


@dataclass(slots=True)
class KeyCounts:
    """What a unit wrote for one JSON key.

    Attributes:
        documents: written.
        sequences: written.
        tokens: written, appended end-of-document ids included.
        eod_in_text: end-of-document ids that the text itself spelled.
        edit: what was scored and edited; None where nothing is.
    """

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    eod_in_text: int = 0
    edit: EditStatistics | None = None

    def merge(self, other: KeyCounts) -> None:
        """Add the counts of another unit."""
        self.documents += other.documents
        self.sequences += other.sequences
        self.tokens += other.tokens
        self.eod_in_text += other.eod_in_text
        if other.edit is not None:
            self.edit = self.edit or EditStatistics()
            self.edit.merge(other.edit)


@dataclass(slots=True)
class UnitResult:
    """The counts of a finished unit, and its marker's content.

    Attributes:
        unit_id: which.
        documents_in: read, bad lines included.
        bytes_in: UTF-8 bytes of the documents' text.
        bad_lines: lines that were no documents.
        bad_examples: the first of them, as messages.
        device: where the prior ran; None where nothing is edited.
        keys: JSON key -> what was written.
        seconds: step -> time spent.
    """

    unit_id: int
    documents_in: int = 0
    bytes_in: int = 0
    bad_lines: int = 0
    bad_examples: list[str] = field(default_factory=list)
    device: str | None = None
    keys: dict[str, KeyCounts] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 0.0))

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time of a block to a step."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - begin

    def save(self, path: Path) -> None:
        """Write the marker, by rename."""
        content = asdict(self)
        for key, counts in self.keys.items():
            content["keys"][key]["edit"] = counts.edit.to_json() if counts.edit else None
        atomic_write_bytes(path, orjson.dumps(content))

    @classmethod
    def load(cls, path: Path) -> UnitResult:
        """Read a marker.

        Raises:
            PlanError: it is damaged.
        """
        try:
            content: dict[str, Any] = orjson.loads(path.read_bytes())
            for key, counts in content["keys"].items():
                edit = counts.pop("edit")
                content["keys"][key] = KeyCounts(
                    **counts, edit=EditStatistics.from_json(edit) if edit else None
                )
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PlanError(
                f"{path}: the marker of a finished unit is damaged; remove it and run again"
            ) from error


@dataclass(slots=True)
class _Output:
    """The open files of one JSON key."""

    dataset: IndexedDatasetWriter
    journal: JournalWriter | None
    counts: KeyCounts


class UnitWorker:
    """Does units, one after another; holds the tokenizer and, where the job edits, the prior.

    Args:
        config: the job.
        tokenizer: its tokenizer.
        prior: as settled by the plan.

    Raises:
        PriorError: the prior cannot be loaded.
    """

    def __init__(self, config: PreprocessConfig, tokenizer: Tokenizer, prior: PriorPlan | None) -> None:
        self._config = config
        self._workdir = WorkDir(config.output_prefix)
        self._tokenizer = tokenizer
        self._dtype = best_dtype(self._tokenizer.vocab_size)
        self._editor = make_editor(config, self._tokenizer)
        self._scorer = load_prior(prior) if prior else None
        self._device = prior.device if prior else None
        self._request = (
            candidate_request(self._editor, self._tokenizer, self._scorer) if self._scorer else None
        )

    def process(self, unit: WorkUnit, on_group: OnGroup) -> UnitResult:
        """Do one unit and write its marker; a unit that another process has done meanwhile is left alone.

        Args:
            unit: which.
            on_group: told the documents and tokens of each group as it is done.

        Raises:
            DataFormatError: a file cannot be read or written, or the unit alone has too many bad lines.
            PriorError: the prior returned unusable numbers.
        """
        marker = self._workdir.unit_marker(unit.unit_id)
        if marker.exists():
            on_group(unit.num_documents, 0)
            return UnitResult.load(marker)
        result = UnitResult(unit.unit_id, device=self._device)
        make_folder(marker.parent)
        with ExitStack() as stack:
            outputs = {key: self._open(unit.unit_id, key, stack) for key in self._config.json_keys}
            for group in self._groups(unit, result):
                tokens = sum(
                    self._process_group(group, key, output, result) for key, output in outputs.items()
                )
                on_group(len(group), tokens)
            for key, output in outputs.items():
                with result.timed("write"):
                    result.keys[key] = self._close(output)
        result.save(marker)
        return result

    def _open(self, unit_id: int, key: str, stack: ExitStack) -> _Output:
        """Start a key's files; they vanish if the unit fails."""
        prefix = self._workdir.unit_part(unit_id, key)
        dataset = stack.enter_context(IndexedDatasetWriter(prefix, self._dtype))
        if self._scorer is None:
            return _Output(dataset, None, KeyCounts())
        journal = stack.enter_context(JournalWriter(f"{prefix}.edits", self._dtype))
        return _Output(dataset, journal, KeyCounts(edit=EditStatistics()))

    def _close(self, output: _Output) -> KeyCounts:
        """Give a key's files their names."""
        if output.journal is not None:
            output.journal.finalize()
        summary = output.dataset.finalize()
        output.counts.documents = summary.num_documents
        output.counts.sequences = summary.num_sequences
        output.counts.tokens = summary.num_tokens
        return output.counts

    def _groups(self, unit: WorkUnit, result: UnitResult) -> Iterator[list[Document]]:
        """The unit's documents in groups of about GROUP_BYTES, counting as they are read."""

        def on_bad(line: BadLine) -> None:
            result.documents_in += 1
            result.bad_lines += 1
            if len(result.bad_examples) < MAX_EXAMPLES:
                result.bad_examples.append(str(line))
            check_bad_lines(result.bad_lines, result.bad_examples, self._config.max_bad_lines)

        group: list[Document] = []
        group_bytes = 0
        documents = read_unit(unit, self._config.json_keys, on_bad=on_bad)
        while True:
            with result.timed("read"):
                document = next(documents, None)
            if document is None:
                break
            result.documents_in += 1
            result.bytes_in += document.num_bytes
            group.append(document)
            group_bytes += document.num_bytes
            if group_bytes >= GROUP_BYTES:
                yield group
                group, group_bytes = [], 0
        if group:
            yield group

    def _process_group(self, group: Sequence[Document], key: str, output: _Output, result: UnitResult) -> int:
        """Tokenize, edit and write one key of a group; returns the number of tokens that came in."""
        texts = [document.fields[key] for document in group]
        with result.timed("tokenize"):
            documents = encode_documents(self._tokenizer, texts)
            all_ids = np.concatenate(
                [ids for sequences in documents for ids in sequences] or [np.empty(0, int)]
            )
            output.counts.eod_in_text += self._spelled_eods(documents, all_ids)
        if output.journal is not None:
            documents = self._edit_group(group, documents, texts, output, result)
        with result.timed("write"):
            for sequences in documents:
                output.dataset.add_document(self._ended(sequences))
        return len(all_ids)

    def _ended(self, sequences: Sequences) -> Sequences:
        """The sequences with the end-of-document id, where it is wanted."""
        return append_eod(sequences, self._tokenizer.eod) if self._config.append_eod else sequences

    def _spelled_eods(self, documents: Sequence[Sequences], all_ids: npt.NDArray[np.int32]) -> int:
        """End-of-document ids that the text itself spelled, without those of the tokenizer's template."""
        template = self._tokenizer.prefix_ids + self._tokenizer.suffix_ids
        added = template.count(self._tokenizer.eod) * sum(map(len, documents))
        return int(np.count_nonzero(all_ids == self._tokenizer.eod)) - added

    def _edit_group(
        self,
        group: Sequence[Document],
        documents: Sequence[Sequences],
        texts: Sequence[list[str]],
        output: _Output,
        result: UnitResult,
    ) -> list[Sequences]:
        """Score and edit a group; returns the edited documents."""
        assert self._scorer is not None
        assert output.journal is not None
        assert output.counts.edit is not None
        with result.timed("score"):
            ids = [np.concatenate([*sequences, np.empty(0, np.int32)]) for sequences in documents]
            try:
                scores = self._scorer.score(ids, self._request)
            except PriorError as error:
                where = f"{group[0].path}:{group[0].line} to {group[-1].line}"
                raise PriorError(f"work unit {result.unit_id} ({where}): {error}") from error
        edited_documents = []
        with result.timed("edit"):
            for sequences, text, score in zip(documents, texts, scores, strict=True):
                candidates = Candidates(
                    score.candidate_positions_E, score.candidate_ids_EK, score.candidate_logprobs_EK
                )
                edited = self._editor.edit(sequences, score.logprobs_T, candidates, document_key(text))
                output.counts.edit.add(score.logprobs_T, edited, self._editor.method.rules.thresholds)
                self._record(output.journal, sequences, edited)
                edited_documents.append(edited.sequences)
        return edited_documents

    def _record(self, journal: JournalWriter, sequences: Sequences, edited: EditedDocument) -> None:
        """Write a document's edits to the journal, against the original as it would have been written."""
        journal.add_document(
            [len(ids) for ids in self._ended(sequences)],
            edited.positions_N,
            edited.original_ids_N,
            np.where(edited.dropped_N, DROPPED, CHANGED),
        )


def check_devices(devices: Collection[str | None]) -> None:
    """Refuse a job whose units were scored on several kinds of device, which round differently.

    Raises:
        PlanError: with the kinds.
    """
    if len(set(devices)) > 1:
        raise PlanError(
            f"the prior ran on {' and on '.join(sorted(map(str, set(devices))))}, whose scores differ in "
            "rounding; do all units on one kind (--prior-device), or --restart"
        )


def check_bad_lines(number: int, examples: Sequence[str], allowed: int) -> None:
    """Refuse more bad lines than allowed.

    Raises:
        DataFormatError: with the first of them.
    """
    if number <= allowed:
        return
    shown = list(examples[:MAX_EXAMPLES])
    if number > len(shown):
        shown.append(f"... and {number - len(shown)} more")
    lines = "1 bad line" if number == 1 else f"{number} bad lines"
    raise DataFormatError(
        "\n  ".join([f"{lines} so far, allowed are {allowed}; mend them or raise --max-bad-lines:", *shown])
    )
