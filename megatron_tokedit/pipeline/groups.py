"""The first steps of a unit: its documents in groups, read and tokenized.

A group of about ``GROUP_BYTES`` of text is what is tokenized and scored together. Invariant: groups depend on
the unit's documents alone; every document of a group is edited, written as it is, or dropped, and which of
them is settled here, before anything is scored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from megatron_tokedit.config.preprocess import SFT_KEY, PreprocessConfig
from megatron_tokedit.corpus import BadLine, BadRecord, ConversationLayout, Document, WorkUnit, read_unit
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.pipeline.conversations import ConversationEncoder, EncodedConversation
from megatron_tokedit.pipeline.plan import GROUP_BYTES
from megatron_tokedit.pipeline.resources import JobTokenizers, PriorPlan, conversation_limit
from megatron_tokedit.pipeline.results import MAX_EXAMPLES, Stopwatch, UnitResult, check_bad_lines, count
from megatron_tokedit.tokenizers import Tokenizer, encode_documents

Sequences = list[npt.NDArray[np.int32]]


class Fate(Enum):
    """What is to become of a document."""

    EDIT = "edit"
    KEEP = "original"
    DROP = "drop"


@dataclass(slots=True)
class EncodedKey:
    """One JSON key of a group.

    Attributes:
        texts: the strings of each document.
        sequences: their ids, without empty sequences.
        output: the unedited documents in the output tokenizer's ids, where that is another.
        fates: one a document.
        spelled: control id, as a string -> how often the text spelled it.
        num_tokens: of ``sequences``.
        conversations: what the tokens of each document are, where the input is conversations; None for one
            that is dropped.
        reasons: why a document is dropped, where that is not its round trip.
    """

    texts: list[list[str]]
    sequences: list[Sequences]
    output: list[Sequences] | None
    fates: list[Fate]
    spelled: dict[str, int]
    num_tokens: int
    conversations: list[EncodedConversation | None] | None = None
    reasons: dict[int, str] = field(default_factory=dict)

    def conversations_of(self, part: slice) -> Sequence[EncodedConversation | None]:
        """Of some of the documents; None for what is no conversation."""
        return (self.conversations or [None] * len(self.texts))[part]

    def add_conversation(self, conversation: EncodedConversation | str) -> None:
        """Add a conversation, or the reason why it is dropped."""
        assert self.conversations is not None
        if isinstance(conversation, str):
            self.reasons[len(self.texts)] = conversation
            self.texts.append([])
            self.sequences.append([])
            self.fates.append(Fate.DROP)
            self.conversations.append(None)
            return
        self.texts.append([conversation.text])
        self.sequences.append([conversation.ids_T])
        self.fates.append(Fate.EDIT)
        self.conversations.append(conversation)
        self.num_tokens += len(conversation.ids_T)
        for id_, number in conversation.spelled.items():
            count(self.spelled, str(id_), number)

    @property
    def originals(self) -> list[Sequences]:
        """The unedited documents, in the ids that are written."""
        return self.sequences if self.output is None else self.output


@dataclass(slots=True)
class Group:
    """Consecutive documents of a unit, tokenized."""

    documents: list[Document]
    keys: dict[str, EncodedKey]


class GroupReader:
    """Reads and tokenizes units.

    Args:
        config: the job.
        tokenizers: its tokenizers.
        prior: as settled by the plan, if the job edits.
    """

    def __init__(self, config: PreprocessConfig, tokenizers: JobTokenizers, prior: PriorPlan | None) -> None:
        self._config = config
        self._tokenizers = tokenizers
        self._conversations = (
            ConversationEncoder(
                config, tokenizers.text, tokenizers.template, conversation_limit(config, prior)
            )
            if tokenizers.template
            else None
        )
        written = tokenizers.written
        self._is_spellable_V = np.zeros(written.vocab_size, bool)
        self._is_spellable_V[list(written.spellable_ids)] = True
        template = written.prefix_ids + written.suffix_ids
        self._template_hits = sum(id_ in written.spellable_ids for id_ in template)

    def groups(
        self, unit: WorkUnit, result: UnitResult, stopwatch: Stopwatch
    ) -> Generator[Group, None, None]:
        """The groups of a unit; counts what is read in ``result``.

        Raises:
            DataFormatError: a file cannot be read, the unit alone has too many bad lines, or a text spells a
                control token where that is an error.
        """
        documents = self._documents(unit, result)
        while True:
            with stopwatch.timed("read"):
                group = self._next_group(documents, result)
            if not group:
                return
            with stopwatch.timed("tokenize"):
                if self._conversations is not None:
                    group, conversations = self._encode_conversations(group, self._conversations, result)
                    encoded = {SFT_KEY: conversations}
                else:
                    encoded = {key: self._encode(group, key) for key in self._config.json_keys}
            yield Group(group, encoded)

    def _documents(self, unit: WorkUnit, result: UnitResult) -> Generator[Document, None, None]:
        """The unit's documents; bad lines are counted."""

        def on_bad(line: BadLine) -> None:
            result.documents_in += 1
            self._count_bad(line, result)

        yield from read_documents(self._config, unit, on_bad=on_bad)

    def _count_bad(self, line: BadLine, result: UnitResult) -> None:
        """Count a line that is no document.

        Raises:
            DataFormatError: the unit alone has too many.
        """
        result.bad_lines += 1
        result.bad_bytes += line.num_bytes
        if len(result.bad_examples) < MAX_EXAMPLES:
            result.bad_examples.append(str(line))
        check_bad_lines(result.bad_lines, result.bad_examples, self._config.max_bad_lines)

    def _next_group(self, documents: Generator[Document, None, None], result: UnitResult) -> list[Document]:
        """Documents of about GROUP_BYTES; none at the end."""
        group: list[Document] = []
        group_bytes = 0
        for document in documents:
            group.append(document)
            group_bytes += document.num_bytes
            if group_bytes >= GROUP_BYTES:
                break
        result.documents_in += len(group)
        result.bytes_in += group_bytes
        return group

    def _encode_conversations(
        self, group: Sequence[Document], encoder: ConversationEncoder, result: UnitResult
    ) -> tuple[list[Document], EncodedKey]:
        """Render and tokenize conversations; what the template cannot show is a bad line."""
        encoded = EncodedKey([], [], None, [], {}, 0, [])
        kept: list[Document] = []
        for document in group:
            assert document.conversation is not None
            try:
                conversation = encoder.encode(document.conversation)
            except BadRecord as error:
                result.bytes_in -= document.num_bytes
                line = BadLine(document.path, document.line, str(error), document.num_bytes)
                self._count_bad(line, result)
                continue
            kept.append(document)
            encoded.add_conversation(conversation)
        return kept, encoded

    def _encode(self, group: Sequence[Document], key: str) -> EncodedKey:
        """Tokenize one key of a group."""
        texts = [document.fields[key] for document in group]
        sequences = encode_documents(self._tokenizers.text, texts)
        fates = [Fate.EDIT] * len(texts)
        output = None
        if self._tokenizers.output is not None:
            output = encode_documents(self._tokenizers.output, texts)
            fates = [self._fate(*document) for document in zip(texts, sequences, output, strict=True)]
        num_tokens = sum(len(ids) for document in sequences for ids in document)
        spelled = self._count_spelled(group, sequences if output is None else output)
        return EncodedKey(texts, sequences, output, fates, spelled, num_tokens)

    def _fate(self, texts: Sequence[str], sequences: Sequences, output: Sequences) -> Fate:
        """What becomes of a document that is to be decoded and encoded again."""
        decode = self._tokenizers.text.decode
        if len(sequences) != len(output):  # a string that only one of the tokenizers gives ids to
            return Fate.DROP if self._config.output_round_trip == "drop" else Fate.KEEP
        if [decode(ids) for ids in sequences] == [text for text in texts if text]:
            return Fate.EDIT
        return {"original": Fate.KEEP, "decoded": Fate.EDIT, "drop": Fate.DROP}[
            self._config.output_round_trip
        ]

    def _count_spelled(self, group: Sequence[Document], documents: Sequence[Sequences]) -> dict[str, int]:
        """How often the texts spell control tokens, without those of the tokenizer's template.

        Raises:
            DataFormatError: they do, and that is an error.
        """
        arrays = [ids for sequences in documents for ids in sequences]
        if not arrays or not self._is_spellable_V.any():
            return {}
        ids = np.concatenate(arrays)
        hits = ids[self._is_spellable_V[ids]]
        if len(hits) <= self._template_hits * len(arrays):
            return {}
        if self._config.special_tokens_in_text == "error":
            self._refuse_spelled(group, documents)
        spelled = Counter(hits.tolist())
        written = self._tokenizers.written
        for id_ in written.prefix_ids + written.suffix_ids:
            spelled[id_] -= len(arrays)
        return {str(id_): number for id_, number in spelled.items() if number > 0}

    def _refuse_spelled(self, group: Sequence[Document], documents: Sequence[Sequences]) -> None:
        """Name the first document whose text spells a control token."""
        for document, sequences in zip(group, documents, strict=True):
            for ids in sequences:
                hits = ids[self._is_spellable_V[ids]]
                if len(hits) > self._template_hits:
                    name = spelling(
                        self._tokenizers.written, _beyond_template(self._tokenizers.written, hits)
                    )
                    raise DataFormatError(
                        f"{document.path}:{document.line}: the text spells the control token {name}; mend "
                        "it, or give --special-tokens-in-text split (it becomes ordinary text) or encode (it "
                        "becomes that token, as in Megatron-LM)"
                    )


def read_documents(
    config: PreprocessConfig, unit: WorkUnit, *, on_bad: Callable[[BadLine], None]
) -> Iterator[Document]:
    """The documents of a unit, or its conversations.

    Raises:
        DataFormatError: see :func:`megatron_tokedit.corpus.read_unit`.
    """
    layout = ConversationLayout(config.sft_format, config.sft_keys) if config.is_sft else None
    return read_unit(unit, layout or config.json_keys, on_bad=on_bad)


def spelling(tokenizer: Tokenizer, control_id: int) -> str:
    """How a text spells a control id."""
    template = np.array([*tokenizer.prefix_ids, control_id, *tokenizer.suffix_ids], np.int32)
    return tokenizer.decode(template)


def spelled_in_words(tokenizer: Tokenizer, spelled: Mapping[str, int]) -> str:
    """Which control tokens a text spells, and how often, from the counts by id."""
    return ", ".join(f"{spelling(tokenizer, int(id_))} {number} times" for id_, number in spelled.items())


def _beyond_template(tokenizer: Tokenizer, hits: npt.NDArray[np.int32]) -> int:
    """The first control id of a sequence that the template does not account for."""
    rest = hits.tolist()
    for id_ in tokenizer.prefix_ids + tokenizer.suffix_ids:
        if id_ in rest:
            rest.remove(id_)
    return int(rest[0])
