"""The file of ``tools/generate.py --output``: a stopped run goes on, a finished one is not written over.

    FILE.partial         the lines so far, in the order of prompts and samples
    FILE.partial.json    the model and the settings that they were written with

Invariant: FILE appears when it is whole, and holds what one run without a stop would have written (up to the
float rounding of other batches): lines are kept only under the same model and settings, and only where they
are what the prompts ask for, one by one.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import orjson

from megatron_tokedit.config.record import differences
from megatron_tokedit.dataset.atomic import atomic_write_bytes, sync_folder
from megatron_tokedit.errors import ConfigError, DataFormatError
from megatron_tokedit.log import get_logger

if TYPE_CHECKING:
    from megatron_tokedit.generation import GenerationSettings, Prompt, TextModel

logger = get_logger(__name__)

PARTIAL_SUFFIX = ".partial"
SETTINGS_SUFFIX = ".partial.json"
_WITHOUT_EFFECT = ("batch_rows",)
_SHOWN_CHARACTERS = 60


def refuse_output(output: Path, prompt_file: str | None, *, overwrite: bool) -> None:
    """Refuse a file that could not be written in the end, is there already, or has the prompts in it.

    Raises:
        ConfigError: such a file.
    """
    if output.is_dir():
        raise ConfigError(f"--output {output}: is a folder; give the name of a file")
    if not output.exists():
        return
    if prompt_file is not None and Path(prompt_file).exists() and output.samefile(prompt_file):
        raise ConfigError(f"--output {output}: is the --prompt-file, which it would replace; give another")
    if not overwrite:
        raise ConfigError(f"--output {output}: exists; give another file, or --overwrite to write it anew")


def recorded_settings(
    model: TextModel,
    settings: GenerationSettings,
    *,
    samples: range,
    document_start: bool,
    machine: str,
    chat_template: str | None = None,
) -> dict[str, Any]:
    """What the texts of a file depend on, beside their prompts, as JSON values.

    Args:
        model: that writes.
        settings: how.
        samples: numbers of every prompt's texts.
        document_start: whether prompts begin with what a document begins with.
        machine: device and precision.
        chat_template: Jinja text, where conversations are answered.
    """
    files = [entry.stat() for entry in Path(model.path).iterdir() if entry.is_file()]
    changed = max((file.st_mtime_ns for file in files), default=0)
    recorded: dict[str, Any] = {
        "checkpoint": str(Path(model.path).resolve()),
        "checkpoint files": f"{sum(file.st_size for file in files)} bytes, changed {changed}",
        "tokenizer": model.tokenizer.fingerprint,
        "machine": machine,
        "document_start": document_start,
        "first_sample": samples.start,
        "num_samples": len(samples),
        **dataclasses.asdict(settings),
    }
    if chat_template is not None:
        recorded["chat_template"] = hashlib.sha256(chat_template.encode()).hexdigest()
    kept = {name: value for name, value in recorded.items() if name not in _WITHOUT_EFFECT}
    loaded: dict[str, Any] = orjson.loads(orjson.dumps(kept))  # as it will be read: tuples are lists
    return loaded


class LinesFile:
    """The file that is being written; as a context manager it keeps the lines of a run that fails.

    Args:
        output: FILE.
        settings: from :func:`recorded_settings`.
        samples: numbers of every prompt's texts.
        overwrite: lines of other settings are thrown away.

    Raises:
        ConfigError: lines of other settings are there, or another process is writing the file.
        DataFormatError: the file cannot be written.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], samples: range, *, overwrite: bool) -> None:
        self._output, self._samples, self._overwrite = output, samples, overwrite
        self._partial = output.with_name(output.name + PARTIAL_SUFFIX)
        self._settings_file = output.with_name(output.name + SETTINGS_SUFFIX)
        self.num_found = 0
        self.num_written = 0
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self._partial.open("a+b")
        except OSError as error:
            raise DataFormatError(f"cannot write {self._partial}: {error.strerror}") from error
        try:
            self._lock()
            self._adopt(settings)
        except BaseException:
            self._file.close()
            raise

    @property
    def partial(self) -> Path:
        """Where the lines are until the file is whole."""
        return self._partial

    def _lock(self) -> None:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"--output {self._output}: another process is writing it") from error

    def _adopt(self, settings: Mapping[str, Any]) -> None:
        """Go on with lines of the same settings; throw nothing away without ``overwrite``."""
        if self._partial.stat().st_size:
            faults = self._differences(settings)
            if not faults:
                return
            if not self._overwrite:
                listed = "\n  - ".join(["", *faults])
                raise ConfigError(
                    f"--output {self._output}: {self._partial} was begun with other settings:{listed}\n"
                    "  Give the same, or --overwrite to begin anew, or another --output."
                )
            self._file.truncate(0)
        atomic_write_bytes(self._settings_file, orjson.dumps(settings, option=orjson.OPT_INDENT_2) + b"\n")

    def _differences(self, settings: Mapping[str, Any]) -> list[str]:
        try:
            recorded = orjson.loads(self._settings_file.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            recorded = None
        if not isinstance(recorded, dict):
            return [f"{self._settings_file}, which says them, cannot be read"]
        return differences(recorded, settings)

    def remaining(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """Every prompt with the numbers of its texts that are not there yet, which may be none.

        To be exhausted up to the first prompt with such numbers before :meth:`write` is called.

        Raises:
            ConfigError: the lines are those of other prompts.
        """
        lines = self._lines()
        line = next(lines, None)
        for index, prompt in enumerate(prompts):
            num_done = 0
            while line is not None and num_done < len(self._samples):
                self._refuse_other_prompt(line, (index, self._samples[num_done], prompt.text))
                num_done += 1
                line = next(lines, None)
            yield dataclasses.replace(prompt, samples=self._samples[num_done:])
        if line is not None:
            raise ConfigError(
                f"--output {self._output}: {self._partial} holds texts of more prompts than there are now; "
                "give the same prompts, or remove it"
            )

    def _refuse_other_prompt(self, line: Mapping[str, Any], expected: tuple[int, int, str]) -> None:
        found = (line.get("prompt_index"), line.get("sample"), line.get("prompt"))
        if found != expected:
            index, sample, text = expected
            raise ConfigError(
                f"{self._partial}:{self.num_found}: is sample {found[1]} of prompt {found[0]}, "
                f"{str(found[2])[:_SHOWN_CHARACTERS]!r}; now sample {sample} of prompt {index}, "
                f"{text[:_SHOWN_CHARACTERS]!r}, stands in its place: give the same prompts, or remove it"
            )

    def _lines(self) -> Iterator[dict[str, Any]]:
        """The whole lines from the beginning; what a kill left of another one is cut off."""
        self._file.seek(0)
        size = 0
        for line in self._file:
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                break
            if not (line.endswith(b"\n") and isinstance(record, dict)):
                break
            size += len(line)
            self.num_found += 1
            yield record
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)
        if self.num_found:
            logger.info("%s: %d texts are there, going on behind them", self._partial, self.num_found)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line, which a kill of this process does not lose.

        Raises:
            DataFormatError: it cannot be written.
        """
        try:
            self._file.write(orjson.dumps(record) + b"\n")
            self._file.flush()
        except OSError as error:
            raise DataFormatError(f"cannot write {self._partial}: {error.strerror}") from error
        self.num_written += 1

    def finish(self) -> None:
        """Give the file its name.

        Raises:
            ConfigError: a file of this name has appeared meanwhile.
            DataFormatError: it cannot be written.
        """
        if self._output.exists() and not self._overwrite:
            raise ConfigError(
                f"--output {self._output}: has appeared while the texts were written, which are all in "
                f"{self._partial}; move one of the two"
            )
        try:
            os.fsync(self._file.fileno())
            os.replace(self._partial, self._output)
            self._settings_file.unlink(missing_ok=True)
            sync_folder(str(self._output))
        except OSError as error:
            raise DataFormatError(f"cannot write {self._output}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        with suppress(OSError):
            if self._partial.stat().st_size == 0:
                self._partial.unlink()
                self._settings_file.unlink(missing_ok=True)
