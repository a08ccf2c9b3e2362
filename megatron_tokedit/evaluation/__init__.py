"""Evaluation of checkpoints through a ``Scorer``: perplexity over named domains."""

from megatron_tokedit.evaluation.perplexity import (
    CheckpointPerplexity,
    DomainPerplexity,
    as_json,
    as_table,
    measure_perplexity,
)

__all__ = ["CheckpointPerplexity", "DomainPerplexity", "as_json", "as_table", "measure_perplexity"]
