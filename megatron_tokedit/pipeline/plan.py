"""The plan of a job: what goes in, what is done to it, and how it is cut into units.

A plan is recorded before any work is done; a rerun makes its plan anew and compares. Input files whose size
and time of change are those of the recorded plan are not read again.

Invariant: whatever can change a byte of the output is in the fingerprint, and nothing else is: neither the
number of workers nor how many lines may be bad.
"""

from __future__ import annotations

import hashlib
import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from megatron_tokedit.config.preprocess import PreprocessConfig
from megatron_tokedit.corpus import InputFile, WorkUnit, expand_inputs, plan_units
from megatron_tokedit.dataset import AtomicFile
from megatron_tokedit.errors import DataFormatError, PlanError
from megatron_tokedit.pipeline.method import edit_settings
from megatron_tokedit.pipeline.resources import JobTokenizers, PriorPlan, conversation_identity
from megatron_tokedit.tokenizers import Tokenizer

if TYPE_CHECKING:
    from megatron_tokedit.scoring.identity import PriorFiles

FORMAT_VERSION = 3
GROUP_BYTES = 512 << 10
"""Documents of a unit are tokenized and scored in groups of about so many bytes of text."""
_MIN_UNIT_BYTES, _MAX_UNIT_BYTES, _UNITS_AIMED_AT = 256 << 10, 16 << 20, 64
_MIN_PLAIN_UNIT_BYTES = 4 << 20
"""Where nothing is edited a unit takes milliseconds, and a small one would mostly wait for the disk."""
_MAX_DIFFERENCES_SHOWN = 12


@dataclass(frozen=True)
class Plan:
    """A job.

    Attributes:
        settings: JSON-able; what is done.
        inputs: the input files.
        units: the work units, in order.
        modified_ns: time of change of each input file when it was read; not part of the identity.
        prior_files: JSON-able; the prior's files as they were found, so that unchanged weights are not hashed
            at every start; not part of the identity.
    """

    settings: dict[str, Any]
    inputs: list[InputFile]
    units: list[WorkUnit]
    modified_ns: array[int]
    prior_files: dict[str, Any] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that can change a byte of the output.

        Not of the input files' paths: a job goes on after its input was moved, or named from another folder.
        """
        digest = hashlib.sha256(orjson.dumps(self.settings, option=orjson.OPT_SORT_KEYS))
        for file in self.inputs:
            digest.update(orjson.dumps(_without_path(file)))
        for unit in self.units:
            digest.update(orjson.dumps(_without_path(unit)))
        return digest.hexdigest()

    @property
    def num_documents(self) -> int:
        """Documents of all units, bad lines included."""
        return sum(unit.num_documents for unit in self.units)

    def share(self, rank: int, world_size: int) -> list[WorkUnit]:
        """The units of one process: I mod N."""
        return self.units[rank::world_size]

    def save(self, path: Path) -> None:
        """Write the plan, by rename: JSON with a line for every input file and every unit, and at its end the
        SHA-256 of the lines before.

        Raises:
            DataFormatError: the disk is full, or the folder cannot be written.
        """
        inputs = (
            file.to_json() | {"modified_ns": modified_ns}
            for file, modified_ns in zip(self.inputs, self.modified_ns, strict=True)
        )
        units = (unit.to_json() for unit in self.units)
        with AtomicFile(path) as file:
            file.write(b'{\n"format_version": %d,\n' % FORMAT_VERSION)
            file.write(b'"settings": %s,\n' % orjson.dumps(self.settings))
            file.write(b'"prior_files": %s,\n' % orjson.dumps(self.prior_files))
            file.write(b'"inputs": [')
            _write_records(file, inputs)
            file.write(b'],\n"units": [')
            _write_records(file, units)
            file.write(b"],\n")
            file.write(b'"sha256": "%s"\n}\n' % file.sha256.encode())
            file.commit()


def _write_records(file: AtomicFile, records: Iterator[dict[str, Any]]) -> None:
    """A line for each item of a JSON list."""
    separator = b"\n"
    for record in records:
        file.write(separator + orjson.dumps(record))
        separator = b",\n"
    file.write(b"\n")


def load_plan(path: Path) -> Plan | None:
    """The recorded plan; None where there is none.

    Raises:
        PlanError: it is damaged or of another version.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            lines = _hashed(file, digest)
            if (opening := next(lines)) != b"{\n":
                raise ValueError(f"it begins with {opening[:20]!r}")
            if (version := _read_field(lines, "format_version")) != FORMAT_VERSION:
                raise ValueError(f"format_version {version}")
            settings, prior_files = _read_field(lines, "settings"), _read_field(lines, "prior_files")
            inputs: list[InputFile] = []
            modified_ns = array("q")
            for fields in _read_records(lines, "inputs"):
                modified_ns.append(fields.pop("modified_ns"))
                _share_strings(fields)
                inputs.append(InputFile.from_json(fields))
            paths = {file.path: file.path for file in inputs}
            units = []
            for fields in _read_records(lines, "units"):
                for part in fields["parts"]:
                    _share_strings(part)
                    part["path"] = paths[part["path"]]  # one string, however many parts
                units.append(WorkUnit.from_json(fields))
            if digest.hexdigest() != _read_field(lines, "sha256"):
                raise ValueError("its checksum does not fit its content")
            return Plan(settings, inputs, units, modified_ns, prior_files)
    except FileNotFoundError:
        return None
    except (
        OSError,
        StopIteration,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:
        raise PlanError(
            f"{path}: not a plan of this version ({error!r}); --restart discards it and what was done"
        ) from error


def recorded_prior_files(path: Path) -> PriorFiles | None:
    """The prior's files as a recorded plan knows them, without reading the whole plan; None: no record."""
    from megatron_tokedit.scoring.identity import PriorFiles

    try:
        with path.open("rb") as lines:
            next(lines)
            for name in ("format_version", "settings"):
                _read_field(lines, name)
            fields = _read_field(lines, "prior_files")
        return PriorFiles.from_json(fields) if fields else None
    except (OSError, StopIteration, ValueError, KeyError, TypeError):  # load_plan says what is wrong
        return None


def _hashed(lines: Iterable[bytes], digest: hashlib._Hash) -> Iterator[bytes]:
    """The lines; each is taken into the digest."""
    for line in lines:
        digest.update(line)
        yield line


def _share_strings(fields: dict[str, Any]) -> None:
    """Let all files and parts have the same few strings."""
    for name in ("format", "compression"):
        fields[name] = sys.intern(fields[name])


def _read_field(lines: Iterator[bytes], name: str) -> Any:
    """The value of the field on the next line."""
    return orjson.loads(b"{%s}" % next(lines).rstrip(b",\n"))[name]


def _read_records(lines: Iterator[bytes], name: str) -> Iterator[dict[str, Any]]:
    """The items of a list, a line each."""
    if (opening := next(lines, b"")) != b'"%s": [\n' % name.encode():
        raise ValueError(f"{name} are expected, found {opening[:20]!r}")
    while not (line := next(lines, b"")).startswith(b"]"):
        if not line:
            raise ValueError("it ends too early")
        yield orjson.loads(line.rstrip(b",\n"))


def make_plan(
    config: PreprocessConfig, tokenizers: JobTokenizers, prior: PriorPlan | None, recorded: Plan | None
) -> Plan:
    """The plan of a configuration.

    Args:
        config: the job.
        tokenizers: its tokenizers.
        prior: its prior, if it edits.
        recorded: an earlier plan, whose scan of unchanged input files is taken over.

    Raises:
        DataFormatError: an input file is missing, empty, unreadable or changing, or has no field for several
            keys.
    """
    paths = expand_inputs(config.input)
    sizes, modified_ns = array("q"), array("q")
    for path in paths:
        size, modified = _file_state(path)
        sizes.append(size)
        modified_ns.append(modified)
    unit_size = _unit_size(config, sum(sizes))
    settings = _settings(config, tokenizers, prior) | {"unit": unit_size}
    prior_files = prior.identity.files.to_json() if prior else None
    if (
        recorded is not None
        and recorded.modified_ns == modified_ns
        and all(map(_is_file, recorded.inputs, paths, sizes))
        and recorded.settings.get("unit") == unit_size
    ):
        return Plan(settings, recorded.inputs, recorded.units, modified_ns, prior_files)
    inputs, units = plan_units(
        paths, unit_documents=unit_size.get("documents"), unit_bytes=unit_size.get("bytes")
    )
    _check_scan(inputs, sizes, config.json_keys)
    return Plan(settings, inputs, units, modified_ns, prior_files)


def _check_scan(inputs: Sequence[InputFile], sizes: Sequence[int], json_keys: Sequence[str]) -> None:
    """Refuse files that grew or shrank while they were read, and several keys of a file with one field.

    Raises:
        DataFormatError: with the first of them.
    """
    for file, size in zip(inputs, sizes, strict=True):
        if file.num_bytes != size:
            raise _changed_while_read(file.path)
        if len(json_keys) > 1 and file.format.startswith("text"):
            raise DataFormatError(
                f"{file.path}: a text file has one field, but --json-keys asks for {', '.join(json_keys)}"
            )


def _is_file(file: InputFile, path: str, num_bytes: int) -> bool:
    """Whether a recorded input file is that of a path and a size."""
    return file.path == path and file.num_bytes == num_bytes


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


def _settings(config: PreprocessConfig, tokenizers: JobTokenizers, prior: PriorPlan | None) -> dict[str, Any]:
    """What is done to the documents, in the names of the flags where there are any."""
    output = tokenizers.output
    conversation = (
        {"conversation": conversation_identity(config, tokenizers.template, prior)}
        if tokenizers.template
        else {}
    )
    return {
        **conversation,
        "json_keys": config.json_keys,
        "tokenizer": _tokenizer_settings(tokenizers.text),
        "output_tokenizer": (
            _tokenizer_settings(output) | {"round_trip": config.output_round_trip} if output else None
        ),
        "append_eod": config.append_eod,
        "special_tokens_in_text": config.special_tokens_in_text,
        "group_bytes": GROUP_BYTES,
        "edit": edit_settings(config) if config.edits else {"strategy": "none"},
        "prior": prior.settings() if prior else None,
    }


def _tokenizer_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """What of a tokenizer determines the bytes."""
    return {
        "type": tokenizer.tokenizer_type,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "fingerprint": tokenizer.fingerprint,
    }


def _unit_size(config: PreprocessConfig, input_bytes: int) -> dict[str, int]:
    """The unit size as given, or one that depends on the input alone."""
    if config.unit_documents is not None:
        return {"documents": config.unit_documents}
    smallest = _MIN_UNIT_BYTES if config.edits else _MIN_PLAIN_UNIT_BYTES
    default = min(max(input_bytes // _UNITS_AIMED_AT, smallest), _MAX_UNIT_BYTES)
    return {"bytes": config.unit_bytes or default}


def refuse_changed_files(plan: Plan) -> None:
    """Refuse input files that were written to since this process made its plan.

    Raises:
        DataFormatError: with the first of them.
    """
    for file, modified_ns in zip(plan.inputs, plan.modified_ns, strict=True):
        if _file_state(file.path) != (file.num_bytes, modified_ns):
            raise _changed_while_read(file.path)


def _changed_while_read(path: str) -> DataFormatError:
    """What to say of a file that another process writes to."""
    return DataFormatError(
        f"{path}: was changed while it was being read; run again, with --restart if its content is another "
        "now"
    )


def _without_path(record: InputFile | WorkUnit) -> dict[str, Any]:
    """The fields of an input file or a unit that say what is in it."""
    fields = record.to_json()
    for part in fields.get("parts", [fields]):
        del part["path"]
    return fields


def _file_state(path: str) -> tuple[int, int]:
    """Size in bytes and time of change in ns of a file."""
    try:
        state = os.stat(path)
    except OSError as error:
        raise DataFormatError(f"{path}: cannot be read: {error.strerror}") from error
    return state.st_size, state.st_mtime_ns


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
