"""What a job will cost, from a small sample, before anything is spent.

Documents of a few units, spread over the input, are tokenized, scored and edited; tokens, time, device-hours,
memory and output size of the whole input follow by proportion. Invariant: nothing is written, and what was
measured is told apart from what was extrapolated.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.corpus import WorkUnit, read_unit
from megatron_tokedit.dataset import best_dtype
from megatron_tokedit.edit.editor import Candidates
from megatron_tokedit.edit.random import document_key
from megatron_tokedit.edit.statistics import EditStatistics
from megatron_tokedit.pipeline.method import candidate_request, make_editor
from megatron_tokedit.pipeline.placement import usable_bytes
from megatron_tokedit.pipeline.plan import Plan
from megatron_tokedit.pipeline.resources import JobTokenizers, PriorPlan, load_prior
from megatron_tokedit.tokenizers import Tokenizer, encode_documents

_SAMPLE_UNITS = 8
_SAMPLE_BYTES = 256 << 10
"""Text of the sample that is tokenized."""
_FIRST_TOKENS = 1024
_SECONDS = 10.0
"""How long the prior may score."""
_LARGE_CPU_PRIOR_BYTES = 8 << 30
_DEVICES = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """Some documents, and what they say of the whole input.

    Attributes:
        texts: the strings of each document.
        sequences: their ids.
        num_tokens: estimate for the whole input, one key, end-of-document ids apart.
        tokens_per_second: of the tokenizer, on one core.
    """

    texts: list[list[str]]
    sequences: list[list[npt.NDArray[np.int32]]]
    num_tokens: int
    tokens_per_second: float

    @property
    def ids(self) -> list[npt.NDArray[np.int32]]:
        """Each document's sequences laid end to end."""
        return [np.concatenate([*sequences, np.empty(0, np.int32)]) for sequences in self.sequences]


def take_sample(config: PreprocessConfig, plan: Plan, tokenizer: Tokenizer, key: str) -> Sample:
    """Read a few units and tokenize the first documents of each.

    Raises:
        DataFormatError: a file cannot be read.
    """
    chosen = [
        plan.units[index]
        for index in sorted({i * len(plan.units) // _SAMPLE_UNITS for i in range(_SAMPLE_UNITS)})
    ]
    texts: list[list[str]] = []
    raw_bytes = text_bytes = sample_bytes = 0
    for unit in chosen:
        taken = 0
        for document_texts, num_bytes in _documents(config, unit, key):
            text_bytes += num_bytes
            if taken < _SAMPLE_BYTES // len(chosen):
                texts.append(document_texts)
                taken += num_bytes
        raw_bytes += unit.num_bytes
        sample_bytes += taken
    begin = time.perf_counter()
    sequences = encode_documents(tokenizer, texts)
    seconds = max(time.perf_counter() - begin, 1e-9)
    tokens = sum(len(ids) for document in sequences for ids in document)
    all_text_bytes = sum(unit.num_bytes for unit in plan.units) * text_bytes / max(raw_bytes, 1)
    return Sample(texts, sequences, int(all_text_bytes * tokens / max(sample_bytes, 1)), tokens / seconds)


def _documents(config: PreprocessConfig, unit: WorkUnit, key: str) -> Iterator[tuple[list[str], int]]:
    """Strings of one key of a unit's documents, and their bytes; bad lines are passed over."""
    for document in read_unit(unit, config.json_keys, on_bad=lambda line: None):
        texts = document.fields[key]
        yield texts, sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


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
        DataFormatError: a file cannot be read.
        PriorError: the prior cannot be loaded or returns unusable numbers.
    """
    samples = [take_sample(config, plan, tokenizers.text, key) for key in config.json_keys]
    num_tokens = sum(sample.num_tokens for sample in samples)
    lines = [f"tokens      about {num_tokens:,} (from a sample of {sum(map(_size, samples)):,})"]
    lines += [f"disk        about {_output_bytes(config, tokenizers, plan, num_tokens) / 1e9:,.3g} GB"]
    if prior is None:
        rate = min(sample.tokens_per_second for sample in samples)
        lines += _times("a worker", rate, num_tokens, workers)
        return lines
    if prior.device == "cpu" and prior.identity.weight_bytes > _LARGE_CPU_PRIOR_BYTES:
        return [
            *lines,
            "cost        not measured: a prior of this size on a CPU; --dry-run where the job will run",
        ]
    if prior.device == "cpu" and prior.memory_bytes > usable_bytes():
        needs = f"the prior needs about {prior.memory_bytes / 1e9:.1f} GB"
        return [*lines, f"cost        not measured: {needs}, {usable_bytes() / 1e9:.1f} GB are free here"]
    return lines + _score_sample(config, tokenizers.text, prior, samples, workers)


def _score_sample(
    config: PreprocessConfig, tokenizer: Tokenizer, prior: PriorPlan, samples: list[Sample], workers: int
) -> list[str]:
    """Score and edit as much of the samples as there is time for."""
    from megatron_tokedit.scoring.cost import measure_rate

    scorer = load_prior(prior)
    editor = make_editor(config, tokenizer)
    request = candidate_request(editor.method, tokenizer, scorer.vocab_size)
    ids = [document for sample in samples for document in sample.ids]
    texts = [document for sample in samples for document in sample.texts]
    sequences = [document for sample in samples for document in sample.sequences]
    first = measure_rate(scorer, _up_to(ids, _FIRST_TOKENS), request)
    chosen = _up_to(ids, max(_FIRST_TOKENS, int(first.tokens_per_second * _SECONDS)))
    rate = measure_rate(scorer, chosen, request)
    statistics = EditStatistics()
    scored = _up_to(ids, max(_FIRST_TOKENS, sum(map(len, chosen)) // 4))
    for index, score in enumerate(scorer.score(scored, request)):
        candidates = Candidates(
            score.candidate_positions_E, score.candidate_ids_EK, score.candidate_logprobs_EK
        )
        document = _cut(sequences[index], len(scored[index]))
        edited = editor.edit(document, score.logprobs_T, candidates, document_key(texts[index]))
        statistics.add(score.logprobs_T, edited, editor.method.rules.thresholds)
    num_tokens = config.edit_generations * sum(sample.num_tokens for sample in samples)
    device = "a GPU" if prior.device != "cpu" else f"a worker ({prior.threads} threads)"
    return [
        f"prior       {rate.num_parameters:,} parameters, {rate.flops_per_token / 1e6:,.4g} MFLOP a token",
        f"speed       {rate.share_of_device_rate:.0%} of the matrix-product rate of {device} in "
        f"{prior.dtype}, {rate.device_flops / 1e9:,.0f} GFLOP/s",
        f"memory      {rate.peak_memory_bytes / 1e9:.2f} GB {device}, {workers} of them here",
        *_times(device, rate.tokens_per_second, num_tokens, workers),
        f"sample      {statistics.tokens:,} tokens: eligible "
        f"{statistics.eligible / max(statistics.tokens, 1):.2%}, of these changed "
        f"{statistics.changed / max(statistics.eligible, 1):.2%}; "
        f"perplexity {statistics.perplexity or float('nan'):.2f}",
    ]


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


def _size(sample: Sample) -> int:
    """Tokens of a sample."""
    return sum(map(len, sample.ids))


def _times(device: str, tokens_per_second: float, num_tokens: int, workers: int) -> list[str]:
    """Time on one device and on several."""
    seconds = num_tokens / max(tokens_per_second, 1e-9)
    several = sorted({workers, _DEVICES} - {1})
    shared = "; ".join(f"{number}: {_duration(seconds / number)}" for number in several)
    return [
        f"time        {tokens_per_second:,.0f} tokens/s {device}: {_duration(seconds)} on 1; {shared} "
        f"({seconds / 3600:,.4g} device-hours)"
    ]


def _duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def _output_bytes(config: PreprocessConfig, tokenizers: JobTokenizers, plan: Plan, num_tokens: int) -> int:
    """Size of all ``.bin`` and ``.idx`` files, and as much again for the units while they are merged."""
    itemsize = np.dtype(best_dtype(tokenizers.written.vocab_size)).itemsize
    index_bytes = (4 + 8 + 8) * plan.num_documents * len(config.json_keys)
    return 2 * config.edit_generations * (num_tokens * itemsize + index_bytes)
