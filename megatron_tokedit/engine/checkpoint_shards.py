"""Whether everything that a checkpoint was to hold has been written.

torch's writer forgets what a thread that failed was to write: the others' files are whole, the metadata names
them alone, and nothing is raised.
"""

from __future__ import annotations

from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_tokedit.errors import CheckpointError


def check_shards(partial: Path) -> None:
    """Compare what was planned with what the ranks say they wrote, and that with the files that are here.

    Args:
        partial: folder of a checkpoint in megatron-core's ``torch_dist`` format, metadata included.

    Raises:
        CheckpointError: a tensor was not written, or a file is missing or too short.
    """
    metadata = FileSystemReader(partial).read_metadata()
    _check_tensors(partial, metadata)
    needed: dict[str, int] = {}
    for part in metadata.storage_data.values():
        needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
    sizes = {entry.name: entry.stat().st_size for entry in partial.iterdir()}
    if lost := [name for name, size in sorted(needed.items()) if sizes.get(name, -1) < size]:
        raise CheckpointError(
            f"{partial}: {len(lost)} of {len(needed)} files are missing or too short for rank 0, the "
            f"first is {lost[0]}; is the disk full, or run_dir not on a file system that all nodes share?"
        )


def _check_tensors(partial: Path, metadata: Metadata) -> None:
    """Every part of a tensor, and every object, has a place in a file."""
    written = {(index.fqn, tuple(index.offset or ())) for index in metadata.storage_data}
    planned: set[tuple[str, tuple[int, ...]]] = set()
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            planned |= {(key, tuple(chunk.offsets)) for chunk in stored.chunks}
        else:
            planned.add((key, ()))
    if lost := planned - written:
        raise CheckpointError(
            f"{partial}: {len(lost)} of {len(planned)} tensors and objects were not written, such as "
            f"{min(lost)[0]}; is the disk full?"
        )
