"""Evaluation of checkpoints through a ``Scorer``: perplexity over named domains."""

from megatron_tokedit.evaluation.perplexity import (
    CheckpointPerplexity,
    DocumentSums,
    DomainPerplexity,
    dataset_documents,
    dataset_responses,
    measure_perplexity,
)
from megatron_tokedit.evaluation.perplexity_report import as_json, as_tables
from megatron_tokedit.evaluation.perplexity_statistics import (
    UNITS,
    Bootstrap,
    PerplexityReport,
    Unit,
    analyse,
)
from megatron_tokedit.evaluation.text_counts import TextCounts, count_texts, dataset_texts

__all__ = [
    "UNITS",
    "Bootstrap",
    "CheckpointPerplexity",
    "DocumentSums",
    "DomainPerplexity",
    "PerplexityReport",
    "TextCounts",
    "Unit",
    "analyse",
    "as_json",
    "as_tables",
    "count_texts",
    "dataset_documents",
    "dataset_responses",
    "dataset_texts",
    "measure_perplexity",
]
