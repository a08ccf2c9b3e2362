"""The preprocessing job: raw corpora in, edited indexed datasets out; crash-safe and deterministic."""

from megatron_tokedit.pipeline.dry_run import DryRun, inspect_job
from megatron_tokedit.pipeline.job import Result, Stage, run
from megatron_tokedit.pipeline.placement import placement
from megatron_tokedit.pipeline.progress import LogProgress, Progress

__all__ = ["DryRun", "LogProgress", "Progress", "Result", "Stage", "inspect_job", "placement", "run"]
