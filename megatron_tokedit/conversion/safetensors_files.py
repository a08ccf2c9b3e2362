"""Tensors of a Hugging Face folder, read and written one at a time.

A safetensors file is eight bytes with the length of a header, the header (JSON: name -> dtype, shape, byte
range), then the tensors. Files are read with ordinary reads, not mapped, so that memory is what is asked for.
Invariant: a file whose size is not what its header says is refused before any tensor is read.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from megatron_tokedit.conversion.layouts import Shape
from megatron_tokedit.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
"""Largest file that is written, as published ones are."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SYNCED_BYTES = 256 << 20
_MAX_HEADER_BYTES = 100_000_000  # as the library has it


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: where it is.
        dtype: of its values.
        shape: of it.
        start: its first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: Shape
    start: int

    @property
    def num_bytes(self) -> int:
        """Size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_tensor(stored: StoredTensor, *, num_rows: int | None = None) -> Tensor:
    """The tensor, in memory of its own.

    Args:
        stored: where it is.
        num_rows: of the result; those beyond the tensor's are zero. Default: as many as it has.

    Raises:
        CheckpointError: the file cannot be read, or is shorter than it was.
    """
    shape = stored.shape if num_rows is None else (num_rows, *stored.shape[1:])
    tensor = torch.empty(shape, dtype=stored.dtype)
    if num_rows is not None:
        tensor[stored.shape[0] :] = 0
    if not stored.num_bytes:
        return tensor
    buffer = _bytes_of(tensor)[: stored.num_bytes]
    try:
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.start)
            done = 0
            while done < len(buffer) and (count := file.readinto(buffer[done:])):
                done += count
    except OSError as error:
        raise CheckpointError(f"{stored.file}: cannot be read: {error.strerror}") from error
    if done < len(buffer):
        raise CheckpointError(f"{stored.file}: became shorter while it was read")
    return tensor


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def list_tensors(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Every tensor of a folder, and what is wrong with the files.

    Raises:
        CheckpointError: there are no safetensors files.
    """
    files, faults = _weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file, expected in files.items():
        try:
            found = read_header(folder / file)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        faults += [
            f"{folder / file}: no tensor {name}, which {INDEX_FILE} has there"
            for name in expected - found.keys()
        ]
        faults += [
            f"{folder / file}: tensor {name} is in another file too" for name in found.keys() & tensors.keys()
        ]
        tensors |= found
    return tensors, faults


def _weight_files(folder: Path) -> tuple[dict[str, set[str]], list[str]]:
    """Name of every file -> tensors that the index says are in it."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            places = json.loads(index.read_text())["weight_map"]
            files: dict[str, set[str]] = {}
            for name, file in places.items():
                files.setdefault(str(file), set()).add(name)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not an index of safetensors files ({error!r})") from error
        faults = []
        if SINGLE_FILE not in files and (folder / SINGLE_FILE).is_file():
            faults.append(
                f"{folder}: holds {SINGLE_FILE}, which transformers would load, and {INDEX_FILE} of other "
                "files: remove what is out of date"
            )
        return files, faults
    if (folder / SINGLE_FILE).is_file():
        return {SINGLE_FILE: set()}, []
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
    if pickles:
        raise CheckpointError(
            f"{folder}: has its weights in {pickles[0].name}, a pickle, which can neither be read a "
            "tensor at a time nor be trusted; write it anew with AutoModelForCausalLM.from_pretrained(OLD)"
            ".save_pretrained(NEW), which makes safetensors"
        )
    raise CheckpointError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        CheckpointError: it is missing, truncated, or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER_BYTES + 1
            header = opened.read(length) if length <= _MAX_HEADER_BYTES else b""
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _stored(file, 8 + length, entry) for name, entry in entries.items()}
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: not a safetensors file, or its header is truncated") from error
    needed = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != needed:
        kind = "truncated" if size < needed else "too long"
        raise CheckpointError(f"{file}: {kind}: {size} bytes, its header says {needed}; copy it again")
    return tensors


def _stored(file: Path, data_start: int, entry: Mapping[str, Any]) -> StoredTensor:
    begin, end = entry["data_offsets"]
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(f"{file}: dtype {entry['dtype']} is not known here")
    stored = StoredTensor(file, dtype, tuple(entry["shape"]), data_start + begin)
    if end - begin != stored.num_bytes:
        raise ValueError("a byte range does not fit its shape")
    return stored


class ShardWriter:
    """Writes tensors, announced beforehand, into as many files as it takes.

    As a context manager: on leaving without an error every file is whole and on the disk.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, Shape],
        dtypes: Mapping[str, torch.dtype],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Plan the files.

        Args:
            folder: exists.
            shapes: of all tensors, in the order in which they will come.
            dtypes: of all tensors.
            max_shard_bytes: largest file; a larger tensor has a file of its own.
        """
        self._folder, self._shapes, self._dtypes = folder, dict(shapes), dict(dtypes)
        self._shards: list[list[str]] = [[]]
        used = 0
        for name in shapes:
            size = self._size(name)
            if self._shards[-1] and used + size > max_shard_bytes:
                self._shards.append([])
                used = 0
            self._shards[-1].append(name)
            used += size
        self._pending = [name for shard in self._shards for name in shard]
        self._num_opened = 0
        self._file: Any = None
        self._unsynced = 0

    def _size(self, name: str) -> int:
        """Bytes of a tensor."""
        return math.prod(self._shapes[name]) * self._dtypes[name].itemsize

    @property
    def files(self) -> list[str]:
        """Their names."""
        count = len(self._shards)
        if count == 1:
            return [SINGLE_FILE]
        return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor.

        Raises:
            CheckpointError: the disk is full, or the like; or a value that the dtype cannot hold.
        """
        assert name == self._pending.pop(0), f"{name} is not the next tensor"
        assert tuple(tensor.shape) == self._shapes[name]
        dtype = self._dtypes[name]
        kept = tensor.to(dtype)
        if kept.dtype != tensor.dtype and kept.isfinite().sum() != tensor.isfinite().sum():
            raise CheckpointError(
                f"tensor {name}: has values up to {tensor.abs().max():.3g}, which {_NAMES[dtype]} "
                "cannot hold; give --dtype float32 or bfloat16"
            )
        try:
            self._write(name, kept)
        except OSError as error:
            raise CheckpointError(f"{self._folder}: cannot be written: {error.strerror}") from error

    def _write(self, name: str, tensor: Tensor) -> None:
        if self._num_opened < len(self._shards) and name == self._shards[self._num_opened][0]:
            self._close()
            self._open()
        data = _bytes_of(tensor.contiguous())
        while data:  # a system call writes 2 GiB at most
            count = self._file.write(data)
            data = data[count:]
            self._unsynced += count
        if self._unsynced >= _SYNCED_BYTES:  # the disk is to be busy now, not when all is written
            os.fdatasync(self._file.fileno())
            self._unsynced = 0

    def _open(self) -> None:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in self._shards[self._num_opened]:
            end = offset + self._size(name)
            entries[name] = {
                "dtype": _NAMES[self._dtypes[name]],
                "shape": list(self._shapes[name]),
                "data_offsets": [offset, end],
            }
            offset = end
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._file = (self._folder / self.files[self._num_opened]).open("wb", buffering=0)
        self._file.write(struct.pack("<Q", len(header)) + header)
        self._num_opened += 1

    def _close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _write_index(self) -> None:
        num_parameters = sum(math.prod(shape) for shape in self._shapes.values())
        places = {name: file for shard, file in zip(self._shards, self.files, strict=True) for name in shard}
        metadata = {"total_parameters": num_parameters, "total_size": sum(map(self._size, self._shapes))}
        text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(places.items()))}, indent=2)
        (self._folder / INDEX_FILE).write_text(text + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if kind is None:
            assert not self._pending, f"{len(self._pending)} tensors were announced and not written"
            if len(self._shards) > 1:
                self._write_index()
