"""safetensors files as the library reads and writes them, and an output folder that is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_tokedit.conversion.output_folder import refuse_output, staged
from megatron_tokedit.conversion.safetensors_files import ShardWriter, list_tensors, read_header, read_tensor
from megatron_tokedit.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 100, 1])
def test_files_that_the_library_reads(tmp_path, dtype, max_shard_bytes):
    tensors = {f"t{i}": torch.randn(i, 7).to(dtype) for i in (3, 1, 5, 2)} | {
        "scalar": torch.ones(()).to(dtype)
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with ShardWriter(
        tmp_path, shapes, dict.fromkeys(shapes, dtype), max_shard_bytes=max_shard_bytes
    ) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == sorted(writer.files)
    found = {}
    for file in files:
        with safe_open(tmp_path / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == dtype for name, tensor in tensors.items()
    )
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert index["weight_map"].keys() == tensors.keys()
    ours, faults = list_tensors(tmp_path)
    assert faults == []
    assert all(torch.equal(read_tensor(ours[name]), tensor) for name, tensor in tensors.items())


def test_files_that_the_library_writes(tmp_path):
    tensors = {
        "a": torch.randn(4, 3),
        "b": torch.arange(5),
        "empty": torch.empty(0, 3),
        "c": torch.ones(2).bool(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_header(tmp_path / "model.safetensors")
    assert all(torch.equal(read_tensor(found[name]), tensor) for name, tensor in tensors.items())
    padded = read_tensor(found["a"], num_rows=6)
    assert torch.equal(padded[:4], tensors["a"])
    assert not padded[4:].any()
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(tmp_path / "model.safetensors")


def test_an_output_appears_whole(tmp_path):
    output = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "of a killed run").touch()
    with pytest.raises(FileNotFoundError), staged(output) as folder:
        (folder / "half" / "no such folder").touch()
    assert list(tmp_path.iterdir()) == []
    with staged(output) as folder:
        (folder / "whole").touch()
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["whole"]
    with staged(output) as folder:
        (folder / "again").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "again"]


def make(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def test_what_is_not_replaced(tmp_path):
    source = make(tmp_path / "in", "config.json")
    for output in (source, source / "below", tmp_path):
        with pytest.raises(CheckpointError, match="is the input, or inside it, or around it"):
            refuse_output(output, source, overwrite=True)
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "new", tmp_path / "empty"):
        refuse_output(output, source, overwrite=False)
    published = make(tmp_path / "a", "config.json", "model.safetensors")
    converted = make(tmp_path / "b", "checkpoints/latest", "checkpoints/step_00000000/x")
    trained = make(
        tmp_path / "c", "checkpoints/latest", "checkpoints/step_00000000/x", "checkpoints/step_00000100/x"
    )
    other = make(tmp_path / "d", "thesis.tex")
    for output in (published, converted, trained, other):
        with pytest.raises(CheckpointError, match="exists; give another folder, or --overwrite"):
            refuse_output(output, source, overwrite=False)
    for output in (published, converted):
        refuse_output(output, source, overwrite=True)
    for output in (trained, other):
        with pytest.raises(CheckpointError, match="--overwrite does not replace it"):
            refuse_output(output, source, overwrite=True)
    make(published, "checkpoint-500/optimizer.pt")  # a trainer's output folder
    make(converted, "tensorboard/events")  # a run that began there
    for output in (published, converted):
        with pytest.raises(CheckpointError, match="--overwrite does not replace it"):
            refuse_output(output, source, overwrite=True)
    for output in (Path(), Path("/")):
        with pytest.raises(CheckpointError, match="has no name of its own"):
            refuse_output(output, source, overwrite=True)


def test_what_appears_while_it_is_written_stays(tmp_path):
    output, source = tmp_path / "out", make(tmp_path / "in", "config.json")

    def refuse() -> None:
        refuse_output(output, source, overwrite=False)

    def convert() -> None:
        with staged(output, before_naming=refuse) as folder:
            (folder / "ours").touch()
            make(output, "theirs")

    with pytest.raises(CheckpointError, match="exists; give another folder"):
        convert()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert [path.name for path in output.iterdir()] == ["theirs"]
    (tmp_path / "new.partial").touch()
    with pytest.raises(CheckpointError, match=r"new\.partial: is in the way"), staged(tmp_path / "new"):
        pass


def test_two_conversions_into_one_folder(tmp_path):
    with staged(tmp_path / "out") as folder:
        (folder / "first").touch()
        with (
            pytest.raises(CheckpointError, match="another conversion is writing it"),
            staged(tmp_path / "out"),
        ):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "first"]
