"""Datasets that lie under the identity of what they are made from, so that runs share them.

    PREPARED_DIR/FINGERPRINT/STRATEGY_KEY_document.*    a dataset; FINGERPRINT is the start of its plan's
    PREPARED_DIR/plans/SETTINGS.json                    the plan that a job's settings led to
    PREPARED_DIR/plans/SETTINGS.lock                    held while it is made; empty

The fingerprint of a plan covers the content of the input files, every edit setting, and the tokenizer's and
the prior's own fingerprints. The plans are kept so that unchanged input (by size and time of change) and
unchanged weights are not read again at every start.

Invariant: the same identity is the same bytes; a change of anything that counts makes a new dataset and
leaves the old one alone.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.corpus import expand_inputs
from megatron_tokedit.errors import PlanError, TokeditError
from megatron_tokedit.log import get_logger
from megatron_tokedit.pipeline.plan import Plan, load_plan, make_plan
from megatron_tokedit.pipeline.resources import find_prior, load_tokenizers
from megatron_tokedit.pipeline.workdir import WorkDir, file_lock, make_folder

logger = get_logger(__name__)

_FINGERPRINT_DIGITS = 24
_NOT_THE_BYTES = {
    "output_prefix",
    "workers",
    "log_interval",
    "max_bad_lines",
    "prior_device",
    "prior_pipeline_parallel",
}


def placed_output_prefix(job: PreprocessConfig, prepared_dir: str | Path) -> str | None:
    """Where the dataset of a job lies, as far as that is known without reading its input.

    Needs no torch. Tokenizer and prior are taken to be what they were. None where the job was never placed,
    or its input has changed since.
    """
    recorded = _recorded(job, prepared_dir)
    if recorded is None or not (_is_unchanged(job, recorded) or _stands_alone(job, recorded, prepared_dir)):
        return None
    return _place(job, recorded, prepared_dir)


def place_output(job: PreprocessConfig, prepared_dir: str | Path) -> str:
    """The output prefix of a job under its identity; reads what input it does not know.

    Any number of processes may ask at once: one reads, the others wait and find what it recorded. The plan is
    also put where the job will look for it, so that the input is read once.

    Raises:
        TokeditError: the input, the tokenizer or the prior cannot be used, or the folder not be written.
    """
    recorded = _recorded(job, prepared_dir)
    if recorded is not None and (why := _stands_alone(job, recorded, prepared_dir)):
        output_prefix = _place(job, recorded, prepared_dir)
        logger.warning("%s is gone; going on with %s, which was made from it", why, output_prefix)
        return output_prefix
    if recorded is not None and _is_unchanged(job, recorded):
        return _placed(job, recorded, prepared_dir)
    path = _record_path(job, prepared_dir)
    make_folder(path.parent)
    with file_lock(path.with_suffix(".lock")):
        return _placed(job, _recorded(job, prepared_dir), prepared_dir)


def _placed(job: PreprocessConfig, recorded: Plan | None, prepared_dir: str | Path) -> str:
    """Make the plan, of which what ``recorded`` does not know is read, and put it in its two places."""
    plan = _plan(job, recorded)
    if recorded is None or (recorded.fingerprint, recorded.modified_ns) != (
        plan.fingerprint,
        plan.modified_ns,
    ):
        path = _record_path(job, prepared_dir)
        make_folder(path.parent)
        plan.save(path)
    output_prefix = _place(job, plan, prepared_dir)
    make_folder(Path(output_prefix).parent)
    workdir = WorkDir(output_prefix)
    if not workdir.plan.exists() and not _is_made(job, output_prefix):
        workdir.make()
        with workdir.lock("plan"):
            if not workdir.plan.exists():
                plan.save(workdir.plan)
    return output_prefix


def _plan(job: PreprocessConfig, recorded: Plan | None) -> Plan:
    """The job's plan; only what ``recorded`` does not know is read."""
    known = None
    if recorded is not None and recorded.prior_files:
        from megatron_tokedit.scoring.identity import PriorFiles

        known = PriorFiles.from_json(recorded.prior_files)
    tokenizers = load_tokenizers(job)
    prior = find_prior(job, tokenizers.text, template=tokenizers.template, only_merges=True, known=known)
    return make_plan(job, tokenizers, prior, recorded)


def _recorded(job: PreprocessConfig, prepared_dir: str | Path) -> Plan | None:
    path = _record_path(job, prepared_dir)
    try:
        return load_plan(path)
    except PlanError:
        logger.warning("%s is not a plan of this version: the input is read again", path)
        return None


def _record_path(job: PreprocessConfig, prepared_dir: str | Path) -> Path:
    """Named by the settings, as given: other names of the same input only cost another reading of it."""
    of_conversations = {name for name in type(job).model_fields if name == "format" or name[:4] == "sft_"}
    settings = job.model_dump_json(exclude=_NOT_THE_BYTES | (set() if job.is_sft else of_conversations))
    name = hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()
    return Path(prepared_dir) / "plans" / f"{name}.json"


def _place(job: PreprocessConfig, plan: Plan, prepared_dir: str | Path) -> str:
    return str(Path(prepared_dir) / plan.fingerprint[:_FINGERPRINT_DIGITS] / job.strategy)


def _is_made(job: PreprocessConfig, output_prefix: str) -> bool:
    """Whether the datasets are there (``.idx`` files appear last)."""
    return all(Path(f"{WorkDir(output_prefix).output(key)}.idx").is_file() for key in job.json_keys)


def _is_unchanged(job: PreprocessConfig, recorded: Plan) -> bool:
    """Whether the input files are those of the plan, by size and time of change."""
    try:
        states = [os.stat(path) for path in expand_inputs(job.input)]
    except (TokeditError, OSError):
        return False
    return [(state.st_size, state.st_mtime_ns) for state in states] == [
        (file.num_bytes, modified_ns)
        for file, modified_ns in zip(recorded.inputs, recorded.modified_ns, strict=True)
    ]


def _stands_alone(job: PreprocessConfig, recorded: Plan, prepared_dir: str | Path) -> str | None:
    """What of a made dataset's origin is gone, so that it cannot be compared: the dataset is what counts."""
    if not _is_made(job, _place(job, recorded, prepared_dir)):
        return None
    origins = [file.path for file in recorded.inputs] + ([job.prior] if job.prior and job.edits else [])
    return next((path for path in origins if not os.path.exists(path)), None)
