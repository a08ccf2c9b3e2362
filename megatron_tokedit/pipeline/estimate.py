"""What a job will cost, from a small sample, before anything is spent.

Documents of a few units, spread over the input, are read and tokenized as the job does it, scored and edited;
tokens, time, device-hours, memory and output size of the whole input follow by proportion. Invariant: nothing
is written, and what was measured is told apart from what was extrapolated.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.corpus import BadLine, WorkUnit
from megatron_tokedit.dataset import best_dtype
from megatron_tokedit.edit.editor import Candidates
from megatron_tokedit.edit.random import document_key
from megatron_tokedit.edit.statistics import EditStatistics
from megatron_tokedit.pipeline.groups import (
    EncodedKey,
    Fate,
    GroupReader,
    Sequences,
    read_documents,
    spelled_in_words,
)
from megatron_tokedit.pipeline.method import candidate_request, make_editor
from megatron_tokedit.pipeline.placement import usable_bytes
from megatron_tokedit.pipeline.plan import Plan
from megatron_tokedit.pipeline.resources import JobTokenizers, PriorPlan, load_prior
from megatron_tokedit.pipeline.results import Stopwatch, UnitResult, count
from megatron_tokedit.tokenizers import Tokenizer

_SAMPLE_UNITS = 8
"""Units, spread over the input, whose first group of documents is the sample."""
_MEASURED_BYTES = 16 << 20
"""Text of each of them that is read to tell text from markup."""
_FIRST_TOKENS = 1024
_SECONDS = 10.0
"""How long the prior may score."""
_LARGE_CPU_PRIOR_BYTES = 8 << 30
_DEVICES = 8
_JOURNAL_ENTRY_BYTES = 7
"""A changed or dropped token in ``.edits``."""


@dataclass(slots=True)
class Sample:
    """Some documents, and what they say of the whole input.

    Attributes:
        texts: the strings of each document that is to be edited.
        sequences: their ids.
        editable: for each document which of its tokens are a response's; None: all may be edited.
        text_bytes: of the sample, all keys.
        num_tokens: of the sample, in the ids of the tokenizer that reads the text; end-of-document ids apart.
        num_written: the same of the ids that are written.
        num_documents: of the sample, a key.
        num_failed: of these, which the prior's tokenizer does not give back exactly.
        spelled: control id, as a string -> how often the sample's text spells it.
        dropped: reason -> conversations of the sample that are dropped.
        seconds: of reading and tokenizing, on one core.
        input_text_bytes: estimate for the whole input.
    """

    texts: list[list[str]] = field(default_factory=list)
    sequences: list[Sequences] = field(default_factory=list)
    editable: list[npt.NDArray[np.bool_] | None] = field(default_factory=list)
    text_bytes: int = 0
    num_tokens: int = 0
    num_written: int = 0
    num_documents: int = 0
    num_failed: int = 0
    spelled: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    input_text_bytes: float = 0.0

    def of_input(self, number: int) -> int:
        """A count of the sample, extrapolated to the whole input."""
        return round(number * self.input_text_bytes / max(self.text_bytes, 1))

    def add(self, encoded: EncodedKey) -> None:
        """Add one key of a group."""
        self.num_tokens += encoded.num_tokens
        self.num_documents += len(encoded.texts)
        self.num_failed += len(encoded.fates) - encoded.fates.count(Fate.EDIT) - len(encoded.reasons)
        for reason in encoded.reasons.values():
            count(self.dropped, reason)
        for name, number in encoded.spelled.items():
            count(self.spelled, name, number)
        for texts, sequences, written, fate, conversation in zip(
            encoded.texts,
            encoded.sequences,
            encoded.originals,
            encoded.fates,
            encoded.conversations_of(slice(None)),
            strict=True,
        ):
            if fate is not Fate.DROP:
                self.num_written += sum(map(len, written))
            if fate is Fate.EDIT:
                self.texts.append(texts)
                self.sequences.append(sequences)
                self.editable.append(conversation.responses_T >= 0 if conversation else None)


def take_sample(
    config: PreprocessConfig, tokenizers: JobTokenizers, prior: PriorPlan | None, plan: Plan
) -> Sample:
    """Read and tokenize the first group of documents of a few units, as the job will.

    Raises:
        DataFormatError: a file cannot be read, has too many bad lines, or a text spells a control token where
            that is an error.
    """
    sample, reader, stopwatch = Sample(), GroupReader(config, tokenizers, prior), Stopwatch()
    raw_bytes = text_bytes = 0.0
    for index in sorted({i * len(plan.units) // _SAMPLE_UNITS for i in range(_SAMPLE_UNITS)}):
        unit = plan.units[index]
        result = UnitResult(unit.unit_id)
        with closing(reader.groups(unit, result, stopwatch)) as groups:
            group = next(groups, None)
        if group is None:
            continue
        sample.text_bytes += result.bytes_in
        for encoded in group.keys.values():
            sample.add(encoded)
        share, unit_text_bytes = _text_bytes(config, unit)
        raw_bytes += share * unit.num_bytes
        text_bytes += unit_text_bytes
    sample.seconds = sum(stopwatch.seconds.values())
    sample.input_text_bytes = sum(unit.num_bytes for unit in plan.units) * text_bytes / max(raw_bytes, 1.0)
    _shuffle(sample)
    return sample


def _text_bytes(config: PreprocessConfig, unit: WorkUnit) -> tuple[float, int]:
    """How much of a unit was read, as a share of its documents, and the bytes of its text."""
    num_records = num_bytes = 0

    def on_bad(line: BadLine) -> None:
        nonlocal num_records
        num_records += 1

    for document in read_documents(config, unit, on_bad=on_bad):
        num_records += 1
        num_bytes += document.num_bytes
        if num_bytes >= _MEASURED_BYTES:
            break
    return min(1.0, num_records / max(unit.num_documents, 1)), num_bytes


def _shuffle(sample: Sample) -> None:
    """Mix the documents, so that the first ones speak for all units."""
    order = np.random.default_rng(0).permutation(len(sample.texts))
    sample.texts = [sample.texts[index] for index in order]
    sample.sequences = [sample.sequences[index] for index in order]
    sample.editable = [sample.editable[index] for index in order]


def estimate(
    config: PreprocessConfig, tokenizers: JobTokenizers, prior: PriorPlan | None, plan: Plan, workers: int
) -> list[str]:
    """Lines that say what the job will cost.

    Args:
        config: the job.
        tokenizers: its tokenizers.
        prior: its prior, if it edits.
        plan: its plan.
        workers: processes of this machine.

    Raises:
        DataFormatError: a file cannot be read, or a text spells a control token where that is an error.
        PriorError: the prior cannot be loaded or returns unusable numbers.
    """
    sample = take_sample(config, tokenizers, prior, plan)
    num_tokens = sample.of_input(sample.num_tokens)
    lines = [f"tokens      about {num_tokens:,} (from a sample of {sample.num_tokens:,})"]
    if tokenizers.output is not None:
        lines += [
            f"written     about {sample.of_input(sample.num_written):,} of the output tokenizer's tokens"
        ]
    lines += _sample_warnings(config, tokenizers, sample)
    if prior is None:
        rate = sample.num_tokens / max(sample.seconds, 1e-9)
        return [
            *lines,
            _disk(config, tokenizers, plan, sample, 0.0),
            *_times("worker", rate, num_tokens, workers),
            "            for reading and tokenizing; starting and writing come on top",
        ]
    reason = _too_large(prior)
    if reason is not None:
        return [
            *lines,
            _disk(config, tokenizers, plan, sample, 0.0),
            f"cost        not measured: {reason}; give --dry-run where the job will run",
        ]
    changed_share, measured = _score_sample(config, tokenizers.text, prior, sample, workers)
    return [*lines, _disk(config, tokenizers, plan, sample, changed_share), *measured]


def _sample_warnings(config: PreprocessConfig, tokenizers: JobTokenizers, sample: Sample) -> list[str]:
    """What of the sample's text deserves a word."""
    lines = []
    if sample.spelled:
        spelled = spelled_in_words(tokenizers.written, sample.spelled)
        lines.append(
            f"warning     the sample's text spells control tokens ({spelled}), which become these tokens; "
            "--special-tokens-in-text split makes them ordinary text"
        )
    for reason, number in sample.dropped.items():
        lines.append(
            f"warning     {number:,} of the sample's {sample.num_documents:,} conversations are dropped: "
            f"{reason}"
        )
    if sample.num_failed:
        lines.append(
            f"warning     {sample.num_failed:,} of the sample's {sample.num_documents:,} documents are not "
            "given back exactly by the prior's tokenizer; --output-round-trip "
            f"{config.output_round_trip} decides on them"
        )
    return lines


def _too_large(prior: PriorPlan) -> str | None:
    """Why a prior is not tried on this machine."""
    if prior.layout.num_ranks > 1:
        return f"a prior that {prior.layout.num_ranks} processes hold together"
    if prior.device != "cpu":
        return None
    if prior.identity.weight_bytes > _LARGE_CPU_PRIOR_BYTES:
        return "a prior of this size on a CPU"
    if prior.memory_bytes > usable_bytes():
        needs = f"the prior needs about {prior.memory_bytes / 1e9:.1f} GB"
        return f"{needs}, {usable_bytes() / 1e9:.1f} GB are free here"
    return None


def _score_sample(
    config: PreprocessConfig, tokenizer: Tokenizer, prior: PriorPlan, sample: Sample, workers: int
) -> tuple[float, list[str]]:
    """Score and edit as much of the sample as there is time for.

    Returns:
        Changed and dropped tokens, as a share of all, and the lines that say what was measured.
    """
    from megatron_tokedit.scoring.cost import measure_rate

    scorer = load_prior(prior)
    editor = make_editor(config, tokenizer)
    request = candidate_request(editor.method, tokenizer, scorer.vocab_size)
    ids = [np.concatenate([*sequences, np.empty(0, np.int32)]) for sequences in sample.sequences]
    first = measure_rate(scorer, _up_to(ids, _FIRST_TOKENS), request)
    chosen = _up_to(ids, max(_FIRST_TOKENS, int(first.tokens_per_second * _SECONDS)))
    rate = measure_rate(scorer, chosen, request)
    statistics = EditStatistics()
    scored = _up_to(ids, max(_FIRST_TOKENS, sum(map(len, chosen)) // 4))
    for index, score in enumerate(scorer.score(scored, request)):
        candidates = Candidates(
            score.candidate_positions_E, score.candidate_ids_EK, score.candidate_logprobs_EK
        )
        document = _cut(sample.sequences[index], len(scored[index]))
        editable_T, counted = sample.editable[index], score.logprobs_T
        if editable_T is not None:
            editable_T = editable_T[: len(scored[index])]
            counted = counted[editable_T]
        key = document_key(sample.texts[index])
        edited = editor.edit(document, score.logprobs_T, candidates, key, editable_T)
        statistics.add(counted, edited, editor.method.rules.thresholds)
    num_tokens = config.edit_generations * sample.of_input(sum(map(len, ids)))
    tokens = max(statistics.tokens, 1)
    device = "GPU" if prior.device != "cpu" else "worker"
    threads = "" if device == "GPU" else f" with {_number(prior.threads, 'thread')}"
    lines = [
        f"prior       {rate.num_parameters:,} parameters, {rate.flops_per_token / 1e6:,.4g} MFLOP a token",
        f"speed       {rate.share_of_device_rate:.0%} of the matrix-product rate of a {device}{threads} in "
        f"{rate.rate_dtype}, {rate.device_flops / 1e9:,.0f} GFLOP/s",
        f"memory      {rate.peak_memory_bytes / 1e9:.2f} GB a worker, {_number(workers, 'worker')} here",
        *_times(device, rate.tokens_per_second, num_tokens, workers),
        f"to expect   eligible {statistics.eligible / tokens:.2%} (of {statistics.tokens:,} sampled "
        f"{'response tokens' if config.is_sft else 'tokens'}), "
        f"of these changed {statistics.changed / max(statistics.eligible, 1):.2%}; dropped "
        f"{statistics.dropped / tokens:.2%}; perplexity {statistics.perplexity or float('nan'):.2f}",
    ]
    scored_tokens = max(sum(map(len, scored)), 1)
    return (statistics.changed + statistics.dropped) / scored_tokens, lines


def _up_to(documents: list[npt.NDArray[np.int32]], num_tokens: int) -> list[npt.NDArray[np.int32]]:
    """The first documents that have so many tokens, the last one cut."""
    chosen = []
    for ids in documents:
        if num_tokens <= 0:
            break
        chosen.append(ids[:num_tokens])
        num_tokens -= len(ids)
    return chosen


def _cut(sequences: list[npt.NDArray[np.int32]], num_tokens: int) -> list[npt.NDArray[np.int32]]:
    """The first tokens of a document."""
    cut = []
    for ids in sequences:
        cut.append(ids[:num_tokens])
        num_tokens -= len(cut[-1])
    return cut


def _times(device: str, tokens_per_second: float, num_tokens: int, workers: int) -> list[str]:
    """Time on one device and on several."""
    seconds = num_tokens / max(tokens_per_second, 1e-9)
    several = sorted({workers, _DEVICES} - {1})
    shared = "".join(f", {_duration(seconds / number)} on {number}" for number in several)
    return [
        f"time        {_duration(seconds)} on 1 {device} ({tokens_per_second:,.0f} tokens/s){shared}; "
        f"{seconds / 3600:,.2g} {device}-hours"
    ]


def _duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def _number(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _disk(
    config: PreprocessConfig, tokenizers: JobTokenizers, plan: Plan, sample: Sample, changed_share: float
) -> str:
    """Size of all ``.bin``, ``.idx`` and ``.edits``; the units take as much again until they are merged."""
    itemsize = np.dtype(best_dtype(tokenizers.written.vocab_size)).itemsize
    num_documents = plan.num_documents * len(config.json_keys)
    num_tokens = sample.of_input(sample.num_written) + num_documents * config.append_eod
    dataset_bytes = num_tokens * itemsize + (4 + 8 + 8) * num_documents
    # Each generation's journal is against the original, so the entries add up.
    journals = config.edit_generations * (config.edit_generations + 1) // 2
    journal_bytes = journals * _JOURNAL_ENTRY_BYTES * changed_share * num_tokens
    total = config.edit_generations * dataset_bytes + journal_bytes
    return f"disk        about {_size(total)}, and as much again until the units are merged"


def _size(number: float) -> str:
    """Bytes as a person says them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"
