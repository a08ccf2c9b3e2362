"""The middle of a unit: score a group, edit it, as often as there are generations.

Invariant: generation n is an edit of generation n - 1 by the same prior, with the random numbers of (seed, n,
document); what a journal records is always against the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.corpus import Document
from megatron_tokedit.dataset import CHANGED, DROPPED
from megatron_tokedit.dataset.alignment import align
from megatron_tokedit.edit.editor import Candidates
from megatron_tokedit.edit.lineage import Lineage
from megatron_tokedit.edit.random import document_key
from megatron_tokedit.edit.statistics import EditStatistics
from megatron_tokedit.errors import PriorError
from megatron_tokedit.pipeline.conversations import EncodedConversation
from megatron_tokedit.pipeline.groups import EncodedKey, Fate, Group, Sequences
from megatron_tokedit.pipeline.method import candidate_request, make_editor
from megatron_tokedit.pipeline.resources import JobTokenizers, PriorPlan, load_prior
from megatron_tokedit.pipeline.responses import count_roles, score_alone, without_first
from megatron_tokedit.pipeline.results import KeyCounts, Stopwatch
from megatron_tokedit.scoring.base import TokenScores

Changes = tuple[npt.NDArray[np.integer], npt.NDArray[np.integer], npt.NDArray[np.integer]]
Step = Callable[[], list["Lineage | None"]]
OnGeneration = Callable[[int, Step], None]
_NO_RESPONSES = np.empty(0, np.int32)
NO_CHANGES: Changes = (np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.uint8))


@dataclass(frozen=True, slots=True)
class _Slice:
    """Documents that are scored in one call: where they are from, as they stand, what they are as
    conversations, and their keys for random numbers.
    """

    documents: Sequence[Document]
    lineages: Sequence[Lineage | None]
    conversations: Sequence[EncodedConversation | None]
    keys: Sequence[bytes]


class GroupEditor:
    """Holds the prior and the editors of a job.

    Args:
        config: the job.
        tokenizers: its tokenizers.
        prior: as settled by the plan.

    Raises:
        PriorError: the prior cannot be loaded.
    """

    def __init__(self, config: PreprocessConfig, tokenizers: JobTokenizers, prior: PriorPlan) -> None:
        generations = range(1, config.edit_generations + 1)
        self._editors = [make_editor(config, tokenizers.text, generation) for generation in generations]
        self._scorer = load_prior(prior)
        self._request = candidate_request(self._editors[0].method, tokenizers.text, self._scorer.vocab_size)
        is_open = self._request.nucleus is not None and self._request.num_candidates is None
        self._alone = config.sft_score_without_prompt
        self._slice_tokens = prior.options.batch_tokens if is_open else None

    def edit(
        self,
        group: Group,
        key: str,
        counts: Sequence[KeyCounts],
        stopwatch: Stopwatch,
        on_batch: Callable[[int], None],
        on_generation: OnGeneration,
    ) -> None:
        """Score and edit one key of a group.

        Args:
            group: read and tokenized.
            key: which JSON key.
            counts: one a generation; what is scored and edited is counted in.
            stopwatch: told the time of scoring and editing.
            on_batch: told the tokens of every batch that is scored.
            on_generation: called for every generation in order with its index and with what gives the edited
                documents (None for those that are not to be edited). That of the last generation may be
                called later and in another thread, those before are called at once.

        Raises:
            PriorError: the prior returned unusable numbers, with the documents it was given.
        """
        encoded = group.keys[key]
        lineages = [
            Lineage.start(sequences) if fate is Fate.EDIT else None
            for sequences, fate in zip(encoded.sequences, encoded.fates, strict=True)
        ]
        keys = [document_key(texts) for texts in encoded.texts]
        for index in range(len(self._editors)):
            steps: list[Step] = []
            for part in self._slices(lineages):
                slice_ = _Slice(
                    group.documents[part], lineages[part], encoded.conversations_of(part), keys[part]
                )
                with stopwatch.timed("score"):
                    scores = self._score(slice_, on_batch)
                steps.append(partial(self._apply, index, slice_, scores, counts[index], stopwatch))
                if self._slice_tokens is not None:
                    steps[-1] = partial(list, steps[-1]())  # now, to be rid of the candidates
            if index + 1 < len(self._editors):
                lineages = _in_order(steps)
                on_generation(index, partial(list, lineages))
            else:
                on_generation(index, partial(_in_order, steps))

    def _slices(self, lineages: Sequence[Lineage | None]) -> Iterator[slice]:
        """The documents that are scored in one call: all, but for a nucleus without a bound.

        There a token may have as many candidates as the vocabulary has ids, and those of a whole group would
        take gigabytes; a slice ends with the document that reaches ``batch_tokens``.
        """
        if self._slice_tokens is None:
            yield slice(0, len(lineages))
            return
        begin = num_tokens = 0
        for end, lineage in enumerate(lineages, 1):
            num_tokens += sum(map(len, lineage.sequences)) if lineage else 0
            if num_tokens >= self._slice_tokens or end == len(lineages):
                yield slice(begin, end)
                begin, num_tokens = end, 0

    def _score(self, part: _Slice, on_batch: Callable[[int], None]) -> list[TokenScores]:
        """Scores of the documents as they stand; empty for those that are not to be edited."""
        ids = [
            np.concatenate([*(lineage.sequences if lineage else ()), np.empty(0, np.int32)])
            for lineage in part.lineages
        ]
        score = partial(self._scorer.score, candidates=self._request, on_batch=on_batch)
        try:
            if not self._alone:
                return score(ids)
            responses = [
                conversation.responses_of(lineage) if conversation and lineage else _NO_RESPONSES
                for conversation, lineage in zip(part.conversations, part.lineages, strict=True)
            ]
            return score_alone(score, ids, responses)
        except PriorError as error:
            first, last = part.documents[0], part.documents[-1]
            until = last.line if last.path == first.path else f"{last.path}:{last.line}"
            raise PriorError(f"{first.path}:{first.line} to {until}: {error}") from error

    def _apply(
        self,
        index: int,
        part: _Slice,
        scores: Sequence[TokenScores],
        counts: KeyCounts,
        stopwatch: Stopwatch,
    ) -> list[Lineage | None]:
        """Edit the documents of one generation, and count it."""
        editor = self._editors[index]
        thresholds = editor.method.rules.thresholds
        statistics = counts.edit or EditStatistics()
        results: list[Lineage | None] = []
        with stopwatch.timed("edit"):
            for lineage, conversation, score, key in zip(
                part.lineages, part.conversations, scores, part.keys, strict=True
            ):
                if lineage is None:
                    results.append(None)
                    continue
                candidates = Candidates(
                    score.candidate_positions_E, score.candidate_ids_EK, score.candidate_logprobs_EK
                )
                editable_T, counted = None, score.logprobs_T
                if conversation is not None:
                    responses_T = conversation.responses_of(lineage)
                    editable_T = without_first(responses_T) if self._alone else responses_T >= 0
                    counted = score.logprobs_T[responses_T >= 0]
                    count_roles(counts.conversations, score.logprobs_T, conversation.roles_of(lineage))
                edited = editor.edit(lineage.sequences, score.logprobs_T, candidates, key, editable_T)
                statistics.add(counted, edited, thresholds)
                results.append(lineage.advance(edited))
        return results


def _in_order(steps: Sequence[Step]) -> list[Lineage | None]:
    """The documents of all slices."""
    return [lineage for step in steps for lineage in step()]


class Reencoder:
    """From an edited document to what is written of it, and what the journal says.

    Args:
        config: the job.
        tokenizers: its tokenizers.
    """

    def __init__(self, config: PreprocessConfig, tokenizers: JobTokenizers) -> None:
        self._tokenizers = tokenizers
        self._decodes_all = config.output_round_trip == "decoded"
        self._control_ids = np.array(sorted(tokenizers.written.spellable_ids), np.int32)

    def written(
        self, encoded: EncodedKey, index: int, lineage: Lineage | None
    ) -> tuple[Sequences, Changes, bool]:
        """The sequences to write of a document of a group, and the journal's entries against the original.

        Edits that cannot be written are not: where a sequence would vanish, or where the edited text spells
        more control tokens than the original does. The last value says that this is so.
        """
        original = encoded.originals[index]
        if lineage is None:
            return original, NO_CHANGES, False
        positions_N, ids_N, dropped_N = lineage.changes()
        output = self._tokenizers.output
        if output is None:
            return lineage.sequences, (positions_N, ids_N, np.where(dropped_N, DROPPED, CHANGED)), False
        if not original or not (len(positions_N) or self._decodes_all):
            return original, NO_CHANGES, False
        texts = [self._tokenizers.text.decode(ids) for ids in lineage.sequences]
        sequences = [ids for ids in output.encode_batch(texts) if len(ids)]
        if len(sequences) != len(original) or self._num_control(sequences) > self._num_control(original):
            return original, NO_CHANGES, True
        return sequences, _align_sequences(original, sequences), False

    def _num_control(self, sequences: Sequences) -> int:
        """Control ids that a text can spell."""
        return sum(int(np.isin(ids, self._control_ids).sum()) for ids in sequences)


def _align_sequences(original: Sequences, edited: Sequences) -> Changes:
    """Journal entries of a document, sequence by sequence, laid end to end."""
    parts = []
    start = 0
    for before, after in zip(original, edited, strict=True):
        positions, ids, kinds = align(before, after)
        parts.append((positions + start, ids, kinds))
        start += len(before)
    positions_N, ids_N, kinds_N = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return positions_N, ids_N, kinds_N
