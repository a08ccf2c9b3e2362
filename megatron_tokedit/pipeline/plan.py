"""The plan of a job: what goes in, what is done to it, and how it is cut into units.

A plan is recorded before any work is done; a rerun makes its plan anew and compares. Input files whose size
and time of change are those of the recorded plan are not read again.

Invariant: whatever can change a byte of the output is in the fingerprint, and nothing else is: neither the
number of workers nor how many lines may be bad.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.corpus import InputFile, WorkUnit, expand_inputs, plan_units
from megatron_tokedit.dataset.atomic import atomic_write_bytes
from megatron_tokedit.errors import DataFormatError, PlanError
from megatron_tokedit.pipeline.resources import PriorPlan, edit_settings
from megatron_tokedit.tokenizers import Tokenizer

FORMAT_VERSION = 1
GROUP_BYTES = 512 << 10
"""Documents of a unit are tokenized and scored in groups of about so many bytes of text."""
_MIN_UNIT_BYTES, _MAX_UNIT_BYTES, _UNITS_AIMED_AT = 256 << 10, 16 << 20, 64
_MAX_DIFFERENCES_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Plan:
    """A job.

    Attributes:
        settings: JSON-able; what is done.
        inputs: the input files.
        units: the work units, in order.
        file_states: path -> [size in bytes, time of change in ns] when it was read; not part of the identity.
    """

    settings: dict[str, Any]
    inputs: list[InputFile]
    units: list[WorkUnit]
    file_states: dict[str, list[int]]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that can change a byte of the output.

        Not of the input files' paths: a job goes on after its input was moved, or named from another folder.
        """
        identity = {
            "settings": self.settings,
            "inputs": [_without_path(file) for file in self.inputs],
            "units": [_without_path(unit) for unit in self.units],
        }
        return hashlib.sha256(orjson.dumps(identity, option=orjson.OPT_SORT_KEYS)).hexdigest()

    @property
    def num_documents(self) -> int:
        """Documents of all units, bad lines included."""
        return sum(unit.num_documents for unit in self.units)

    def share(self, rank: int, world_size: int) -> list[WorkUnit]:
        """The units of one process: I mod N."""
        return self.units[rank::world_size]

    def save(self, path: Path) -> None:
        """Write the plan, by rename."""
        content = {
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            "inputs": [file.to_json() for file in self.inputs],
            "units": [unit.to_json() for unit in self.units],
            "file_states": self.file_states,
        }
        atomic_write_bytes(path, orjson.dumps(content, option=orjson.OPT_INDENT_2))


def load_plan(path: Path) -> Plan | None:
    """The recorded plan; None where there is none.

    Raises:
        PlanError: it is damaged or of another version.
    """
    try:
        content = orjson.loads(path.read_bytes())
        if content["format_version"] != FORMAT_VERSION:
            raise KeyError(f"format_version {content['format_version']}")
        return Plan(
            settings=content["settings"],
            inputs=[InputFile.from_json(fields) for fields in content["inputs"]],
            units=[WorkUnit.from_json(fields) for fields in content["units"]],
            file_states=content["file_states"],
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(
            f"{path}: not a plan of this version ({error}); --restart discards it and what was done"
        ) from error


def make_plan(
    config: PreprocessConfig, tokenizer: Tokenizer, prior: PriorPlan | None, recorded: Plan | None
) -> Plan:
    """The plan of a configuration.

    Args:
        config: the job.
        tokenizer: its tokenizer.
        prior: its prior, if it edits.
        recorded: an earlier plan, whose scan of unchanged input files is taken over.

    Raises:
        DataFormatError: an input file is missing, empty or unreadable, or has no field for several keys.
    """
    paths = expand_inputs(config.input)
    states = {path: _file_state(path) for path in paths}
    unit_size = _unit_size(config, sum(size for size, _ in states.values()))
    settings = _settings(config, tokenizer, prior) | {"unit": unit_size}
    if (
        recorded is not None
        and recorded.file_states == states
        and [file.path for file in recorded.inputs] == paths
        and recorded.settings.get("unit") == unit_size
    ):
        return Plan(settings, recorded.inputs, recorded.units, states)
    inputs, units = plan_units(
        paths, unit_documents=unit_size.get("documents"), unit_bytes=unit_size.get("bytes")
    )
    if len(config.json_keys) > 1 and (
        text := [file.path for file in inputs if file.format.startswith("text")]
    ):
        raise DataFormatError(
            f"{text[0]}: a text file has one field, but --json-keys asks for {', '.join(config.json_keys)}"
        )
    return Plan(settings, inputs, units, states)


def refuse_changes(recorded: Plan, asked: Plan, path: Path) -> None:
    """Refuse a plan that is not the recorded one.

    Raises:
        PlanError: with the differences spelled out.
    """
    if recorded.fingerprint == asked.fingerprint:
        return
    differences = list(_differences(recorded, asked))
    shown = differences[:_MAX_DIFFERENCES_SHOWN]
    if len(differences) > len(shown):
        shown.append(f"... and {len(differences) - len(shown)} more")
    raise PlanError(
        "\n  ".join(
            [
                f"{path} records another plan than the one asked for:",
                *shown,
                "run the recorded command again to finish it, give another --output-prefix, or --restart "
                "to discard what was done",
            ]
        )
    )


def _settings(config: PreprocessConfig, tokenizer: Tokenizer, prior: PriorPlan | None) -> dict[str, Any]:
    """What is done to the documents, in the names of the flags where there are any."""
    return {
        "json_keys": config.json_keys,
        "tokenizer": {
            "type": tokenizer.tokenizer_type,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "fingerprint": tokenizer.fingerprint,
        },
        "append_eod": config.append_eod,
        "special_tokens_in_text": config.special_tokens_in_text,
        "group_bytes": GROUP_BYTES,
        "edit": edit_settings(config) if config.edits else {"strategy": "none"},
        "prior": prior.settings() if prior else None,
    }


def _unit_size(config: PreprocessConfig, input_bytes: int) -> dict[str, int]:
    """The unit size as given, or one that depends on the input alone."""
    if config.unit_documents is not None:
        return {"documents": config.unit_documents}
    default = min(max(input_bytes // _UNITS_AIMED_AT, _MIN_UNIT_BYTES), _MAX_UNIT_BYTES)
    return {"bytes": config.unit_bytes or default}


def refuse_changed_files(plan: Plan) -> None:
    """Refuse input files that were written to since this process made its plan.

    Raises:
        DataFormatError: with the first of them.
    """
    for path, state in plan.file_states.items():
        if _file_state(path) != state:
            raise DataFormatError(
                f"{path}: was changed while it was being read; run again, with --restart if its content is "
                "another now"
            )


def _without_path(part: InputFile | WorkUnit) -> dict[str, Any]:
    """The fields of an input file or a unit that say what is in it."""
    return {name: value for name, value in part.to_json().items() if name != "path"}


def _file_state(path: str) -> list[int]:
    """Size and time of change of a file."""
    try:
        state = os.stat(path)
    except OSError as error:
        raise DataFormatError(f"{path}: cannot be read: {error.strerror}") from error
    return [state.st_size, state.st_mtime_ns]


def _differences(recorded: Plan, asked: Plan) -> Iterator[str]:
    """One line for each setting or input that differs."""
    was, now = _flat(recorded.settings), _flat(asked.settings)
    for name in [*was, *(name for name in now if name not in was)]:
        if was.get(name) != now.get(name):
            yield f"{name}: recorded {was.get(name)!r}, now {now.get(name)!r}"
    if [*map(_without_path, recorded.inputs)] == [*map(_without_path, asked.inputs)]:
        return
    old_files = {file.path: file for file in recorded.inputs}
    new_files = {file.path: file for file in asked.inputs}
    for path in old_files.keys() | new_files.keys():
        if path not in new_files:
            yield f"input {path}: recorded, but not given now"
        elif path not in old_files:
            yield f"input {path}: given now, but not recorded"
        elif old_files[path] != new_files[path]:
            yield f"input {path}: its content has changed since it was recorded"
    if [*old_files] != [*new_files] and old_files.keys() == new_files.keys():
        yield "input: the same files in another order"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
