from __future__ import annotations

import json

import numpy as np

from megatron_tokedit.edit.editor import EditedDocument
from megatron_tokedit.edit.statistics import EditStatistics


def edited(num_eligible: int, changed: int, dropped: int) -> EditedDocument:
    number = changed + dropped
    return EditedDocument(
        [],
        np.arange(number),
        np.zeros(number, np.int32),
        np.arange(number) >= changed,
        num_eligible,
        num_eligible,
    )


def test_counts_of_one_document():
    logprobs = np.log(np.array([np.nan, 1.0, 0.99, 0.98995, 0.5, 0.005], np.float32))
    statistics = EditStatistics()
    statistics.add(logprobs, edited(3, 1, 1), (0.99,))
    assert (statistics.tokens, statistics.scored, statistics.eligible) == (6, 5, 3)
    assert (statistics.changed, statistics.dropped, statistics.margin) == (1, 1, 2)
    assert statistics.histogram[[0, 50, 98, 99]].sum() == 5
    assert statistics.histogram[99] >= 1
    mean = np.log([1.0, 0.99, 0.98995, 0.5, 0.005]).mean()
    assert np.isclose(statistics.perplexity, np.exp(-mean), rtol=1e-6)


def test_merge_is_a_single_pass_and_json_keeps_all():
    rng = np.random.default_rng(0)
    documents = [np.log(rng.random(n, np.float32) + 1e-6) for n in (5, 0, 1, 300)]
    whole, parts = EditStatistics(), [EditStatistics(), EditStatistics()]
    for index, logprobs in enumerate(documents):
        whole.add(logprobs, edited(len(logprobs) // 2, 0, 0), (0.5,))
        parts[index // 2].add(logprobs, edited(len(logprobs) // 2, 0, 0), (0.5,))
    merged = EditStatistics()
    for part in parts:
        merged.merge(EditStatistics.from_json(json.loads(json.dumps(part.to_json()))))
    assert merged.to_json() | {"logprob_sum": 0} == whole.to_json() | {"logprob_sum": 0}
    assert np.isclose(merged.logprob_sum, whole.logprob_sum)
    assert merged.histogram.sum() == merged.scored == 306
    assert EditStatistics().perplexity is None
