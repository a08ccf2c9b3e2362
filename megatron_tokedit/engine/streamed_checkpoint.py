"""Checkpoints written and read a tensor at a time, for weights that come from another format or go to one.

A save plan fetches every part only when its turn to be written has come; reading asks the stored metadata
which pieces of which files hold a parameter. Invariant: what is written is an ordinary checkpoint of one
rank, which ``checkpoint.load`` loads under every layout and precision; memory is that of the parts in the
making, one for each of two writing threads.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_tokedit.config.sections import ModelConfig
from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.engine.checkpoint_shards import check_shards
from megatron_tokedit.engine.weight_outline import StoredPart, WeightOutline, outline_weights
from megatron_tokedit.errors import CheckpointError
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)

ReadRows = Callable[[str, int, int], torch.Tensor]
"""(parameter, first row, number of rows) -> those rows."""

_NUM_WRITERS = 2
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")


def write_checkpoint(
    checkpoints_dir: Path,
    outline: WeightOutline,
    *,
    dtypes: Mapping[str, torch.dtype],
    read: ReadRows,
    state: dict[str, Any],
    run_config: dict[str, Any],
) -> Path:
    """Write a checkpoint of weights alone.

    Args:
        checkpoints_dir: of a run; made if needed.
        outline: of the model.
        dtypes: of every parameter.
        read: gives the rows of a parameter, on the CPU; called from several threads.
        state: as of ``checkpoint.save``.
        run_config: as of ``checkpoint.save``.

    Returns:
        The step's folder, complete.

    Raises:
        TokeditError: what ``read`` raised.
        CheckpointError: it could not be written.
    """
    from megatron.core import dist_checkpointing

    folder = checkpoint_folder.step_folder(checkpoints_dir, int(state["step"]))
    partial = folder.with_name(folder.name + checkpoint_folder.PARTIAL_SUFFIX)
    checkpoint_folder.remove_partial(checkpoints_dir)
    partial.mkdir(parents=True)
    for name, dtype in dtypes.items():
        entry = outline.sharded_state[name]
        entry.data = entry.data.detach().to(dtype)
        if hasattr(entry, "dtype"):
            entry.dtype = dtype
    strategy, fetched = _streamed_save(outline, read)
    with _quiet_threads():
        try:
            dist_checkpointing.save({"model": outline.sharded_state}, str(partial), sharded_strategy=strategy)
        except (OSError, RuntimeError, torch.distributed.checkpoint.api.CheckpointException) as error:
            fetched.raise_failure()
            reason = str(error).strip().splitlines()[-1]
            raise CheckpointError(f"{partial}: cannot be written ({reason[:300]})") from error
    fetched.raise_failure()
    check_shards(partial)
    checkpoint_folder.finish(partial, folder, state, run_config)
    return folder


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Log in one line what ends a writing thread; that its tensors are missing is noticed afterwards."""
    original = threading.excepthook
    threading.excepthook = lambda failure: logger.error("a writing thread failed: %s", failure.exc_value)
    try:
        yield
    finally:
        threading.excepthook = original


class _Fetcher:
    """Turns an item of a save plan into its tensor, and keeps the first failure: torch's writing threads lose
    what they raise.
    """

    def __init__(self, outline: WeightOutline, read: ReadRows) -> None:
        self._places: dict[tuple[str, tuple[int, ...]], tuple[str, StoredPart]] = {
            (part.key, part.offset): (name, part) for name, parts in outline.parts.items() for part in parts
        }
        self._read = read
        self._failure: Exception | None = None

    def fetch(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """The part that starts at ``offset`` of the stored tensor, or nothing after a failure."""
        if self._failure is not None:
            return torch.empty(0)
        name, part = self._places[key, offset]
        try:
            return self._read(name, part.first_row, part.shape[0]).contiguous().view(shape)
        except Exception as error:  # noqa: BLE001 - raised again by the thread that waits
            self._failure = error
            return torch.empty(0)

    def raise_failure(self) -> None:
        """Raise what stopped the fetching, if anything did."""
        if self._failure is not None:
            raise self._failure


def _streamed_save(outline: WeightOutline, read: ReadRows) -> tuple[Any, _Fetcher]:
    """megatron-core's strategy that saves from ``read``; here because importing megatron-core takes long."""
    from megatron.core.dist_checkpointing.strategies import torch as core_torch
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.planner import WriteItemType
    from torch.distributed.checkpoint.state_dict_saver import save as torch_save

    from megatron_tokedit.engine.save_strategy import InProcessSave

    fetcher = _Fetcher(outline, read)

    class FetchingPlanner(core_torch.MCoreSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if write_item.type == WriteItemType.BYTE_IO:
                return super().resolve_data(write_item)
            index = write_item.index
            sizes = tuple(write_item.tensor_data.chunk.sizes)
            return fetcher.fetch(index.fqn, tuple(index.offset), sizes)

    class StreamedSave(InProcessSave):
        def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
            by_key, _, _ = core_torch._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
            torch_save(
                core_torch.mcore_to_pyt_state_dict(by_key, False),
                storage_writer=FileSystemWriter(checkpoint_dir, thread_count=_NUM_WRITERS, overwrite=False),
                planner=FetchingPlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            )

    return StreamedSave(), fetcher


class StoredWeights:
    """The weights of a checkpoint, saved under any layout, a parameter at a time.

    Attributes:
        folder: the step's folder.
        model: its model section.
        state: its ``state.json``.
        vocab_size: real vocabulary.
        outline: of the model.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the newest complete checkpoint under ``path``.

        Raises:
            CheckpointError: there is none, it is damaged, or it does not hold what its model section says.
        """
        self.folder = checkpoint_folder.require(path)
        run_config = checkpoint_folder.read_json(self.folder, checkpoint_folder.RUN_CONFIG_FILE)
        self.state = checkpoint_folder.read_json(self.folder, checkpoint_folder.STATE_FILE)
        try:
            self.model = ModelConfig.model_validate(run_config["model"])
            self.vocab_size = int(self.state["vocab_size"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{self.folder}: does not say what model it holds: {error}") from error
        self._reader = FileSystemReader(self.folder)
        try:
            metadata = self._reader.read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise CheckpointError(f"{self.folder}: its .metadata cannot be read ({error})") from error
        self._reader.set_up_storage_reader(metadata, True)
        self._stored = {
            key: tensor
            for key, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata) and key.startswith(_MODEL_KEYS)
        }
        self.outline = outline_weights(self.model, self.vocab_size)
        self._refuse_other_weights()

    def _refuse_other_weights(self) -> None:
        """Compare what is stored with the model."""
        faults = []
        wanted = {part.key: part for parts in self.outline.parts.values() for part in parts}
        for key, part in wanted.items():
            if key not in self._stored:
                faults.append(f"{key}: missing")
                continue
            found, expected = tuple(self._stored[key].size), part.global_shape
            enough = found[0] >= self.vocab_size and found[1:] == expected[1:]
            if not (enough if part.may_be_padded else found == expected):
                faults.append(f"{key}: of shape {list(found)}, expected {list(expected)}")
        faults += [f"{key}: surplus" for key in self._stored if key not in wanted]
        if faults:
            raise CheckpointError(
                f"{self.folder}: does not hold the model of its {checkpoint_folder.RUN_CONFIG_FILE}:"
                + "".join(f"\n  - {fault}" for fault in faults)
            )

    def dtype(self, name: str) -> torch.dtype:
        """What a parameter is stored in."""
        return self._stored[self.outline.parts[name][0].key].properties.dtype

    def read(self, name: str) -> torch.Tensor:
        """A parameter of the whole model; one that is padded comes with its first ``vocab_size`` rows.

        Raises:
            CheckpointError: its file cannot be read.
        """
        parts = self.outline.parts[name]
        shape = self.outline.shapes[name]
        if parts[0].may_be_padded:
            shape = (self.vocab_size, *shape[1:])
        num_axes = len(parts[0].offset) - len(shape)
        offset = (*parts[0].offset[:num_axes], *[0] * len(shape))
        sizes = (*[1] * num_axes, *shape)
        key = parts[0].key
        target = torch.empty(sizes, dtype=self.dtype(name))
        chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, self._stored[key], [chunk])
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensor(target))  # type: ignore[arg-type]
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{self.folder}: {key} cannot be read ({reason[:300]})") from error
        return target.view(shape)


class _IntoTensor:
    """The part of a load planner that reading one tensor needs."""

    def __init__(self, target: torch.Tensor) -> None:
        self._target = target

    def resolve_tensor(self, item: Any) -> torch.Tensor:
        """Where the data of an item belongs."""
        target = self._target
        for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, item: Any, tensor: torch.Tensor) -> None:
        """It is in place already."""
