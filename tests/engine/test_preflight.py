# ruff: noqa: E501 - tables of messages read better unbroken
"""The probe on machines that are bare, broken or whole, and everything that it makes the preflight refuse."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tokedit.config.recipes import RECIPES
from megatron_tokedit.config.sections import ParallelConfig, PrecisionConfig, RuntimeConfig, SftConfig
from megatron_tokedit.engine import kernels, machine, preflight
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.testing.models import tiny_llama

OPTIONAL = (
    "transformer_engine",
    "apex",
    "flash_attn",
    "fused_layer_norm_cuda",
    "fused_weight_gradient_mlp_cuda",
)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path to put packages into; the probe forgets what it saw before and after."""
    monkeypatch.syspath_prepend(str(tmp_path))
    preflight.probe.cache_clear()
    yield tmp_path
    preflight.probe.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in OPTIONAL]:
        del sys.modules[name]


def write_package(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)


def write_engine(folder: Path, version: str = "2.11.0", pytorch: str = "") -> None:
    write_package(folder, "transformer_engine", f"__version__ = {version!r}")
    write_package(folder, "transformer_engine/pytorch", pytorch)
    for part in ("distributed", "tensor"):
        write_package(folder, f"transformer_engine/pytorch/{part}", "")


# ------------------------------------------------------------------------------------------- looking


@no_gpu
def test_a_bare_machine(packages: Path) -> None:
    found = preflight.check()
    assert found == machine.Probe(
        has_cuda=False, transformer_engine=None, fused_wgrad=False, faults=(), cuda_version=torch.version.cuda
    )
    assert preflight.describe(found) == f"no CUDA device; torch {torch.__version__}"


@no_gpu
def test_transformer_engine_without_a_gpu(packages: Path) -> None:
    """It may be installed; what it cannot do here is said of a recipe, not of the machine."""
    write_engine(packages)
    found = preflight.check()
    assert found.transformer_engine == "2.11.0"
    assert preflight.machine_faults(PrecisionConfig(), found, ParallelConfig()) == []
    (fault,) = preflight.machine_faults(PrecisionConfig(recipe="fp8_delayed"), found, ParallelConfig())
    assert fault.startswith("precision.recipe: fp8_delayed needs a GPU of compute capability 8.9, and this machine has no CUDA device")  # fmt: skip


@pytest.mark.parametrize(
    "error",
    ["RuntimeError('no libcudart')", "FileNotFoundError('libtransformer_engine.so')", "AssertionError()"],
)
@pytest.mark.parametrize("broken", ["package", "extension"])
def test_half_installed_transformer_engine(packages: Path, error: str, broken: str) -> None:
    if broken == "package":
        write_package(packages, "transformer_engine", f"raise {error}")
    else:
        write_engine(packages, pytorch=f"raise {error}")
    with pytest.raises(
        ConfigError, match=r"transformer_engine is installed but cannot be imported .*reinstall"
    ):
        preflight.check()
    faults = preflight.machine_faults(PrecisionConfig(), preflight.probe(), ParallelConfig())
    assert len(faults) == 1, "it would break a run that does not want it too"


def test_transformer_engine_without_a_part_that_megatron_core_needs(packages: Path) -> None:
    write_engine(packages)
    (packages / "transformer_engine/pytorch/tensor/__init__.py").unlink()
    (packages / "transformer_engine/pytorch/tensor").rmdir()
    with pytest.raises(ConfigError, match=r"No module named 'transformer_engine.pytorch.tensor'.*reinstall"):
        preflight.check()


def test_unrelated_apex(packages: Path) -> None:
    write_package(packages, "apex", "")
    with pytest.raises(ConfigError, match="pip uninstall apex"):
        preflight.check()


def test_an_apex_that_raises(packages: Path) -> None:
    write_package(packages, "apex", "raise RuntimeError('built for another torch')")
    with pytest.raises(ConfigError, match="pip uninstall apex"):
        preflight.check()


def test_parts_of_apex_that_count(packages: Path) -> None:
    write_package(packages, "apex", "")
    write_package(packages, "apex/normalization", "")
    write_package(packages, "fused_layer_norm_cuda", "")
    write_package(packages, "fused_weight_gradient_mlp_cuda", "")
    assert preflight.check().fused_wgrad


def test_flash_attn(packages: Path) -> None:
    write_package(packages, "flash_attn", "__version__ = '2.8.3'")
    assert preflight.check().flash_attn == "2.8.3"


def test_flash_attn_that_nobody_can_import_is_none(packages: Path) -> None:
    write_package(packages, "flash_attn", "raise ImportError('undefined symbol')")
    assert preflight.check().flash_attn is None


def test_flash_attn_that_breaks_its_users(packages: Path) -> None:
    write_package(packages, "flash_attn", "raise OSError('libcudart.so.12')")
    with pytest.raises(
        ConfigError, match=r"flash_attn is installed but cannot be imported \(OSError: libcudart"
    ):
        preflight.check()


def test_all_that_is_broken_is_said_at_once(packages: Path) -> None:
    write_package(packages, "transformer_engine", "raise RuntimeError('no libcudart')")
    write_package(packages, "flash_attn", "raise OSError('x')")
    write_package(packages, "apex", "")
    with pytest.raises(ConfigError) as caught:
        preflight.refuse_faults(PrecisionConfig(recipe="mxfp8"), ParallelConfig())
    text = str(caught.value)
    assert text.startswith("this machine: 4 problems" if not torch.cuda.is_available() else "this machine:")
    assert all(name in text for name in ("transformer_engine", "flash_attn", "pip uninstall apex", "mxfp8"))


def test_a_driver_that_does_not_fit(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int) -> str:
        raise RuntimeError("CUDA driver version is insufficient\nfor CUDA runtime version")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", fail)
    found = preflight.probe()
    assert not found.has_cuda
    assert (
        "cannot use it (RuntimeError: CUDA driver version is insufficient); update the driver"
        in found.faults[0]
    )


def test_the_weakest_of_the_gpus_counts(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9 - index, 0))
    found = preflight.probe()
    assert (found.num_gpus, found.compute_capability) == (2, (8, 0))
    assert "2 x NVIDIA H100 80GB HBM3 (compute capability 8.0)" in preflight.describe(found)


@no_gpu
def test_device_is_chosen_with_a_reason() -> None:
    assert preflight.resolve_device("auto") == ("cpu", "no CUDA device was found")
    assert preflight.resolve_device("cpu")[0] == "cpu"
    with pytest.raises(ConfigError, match=r"runtime\.device: 'cuda' was asked for"):
        preflight.resolve_device("cuda")


# ------------------------------------------------------------------------------------------ refusing

H100 = machine.assumed("h100")
BARE = dataclasses.replace(H100, has_cuda=False, gpu_name=None, compute_capability=None, num_gpus=0, transformer_engine=None)  # fmt: skip
FITS = {
    "v100": {"fp32"},
    "a100": {"fp32", "bf16"},
    "l40s": {"fp32", "bf16", "fp8_tensorwise", "fp8_delayed"},
    "h100": {"fp32", "bf16", "fp8_tensorwise", "fp8_delayed", "fp8_blockwise"},
    "h200": {"fp32", "bf16", "fp8_tensorwise", "fp8_delayed", "fp8_blockwise"},
    "b200": set(RECIPES),
    "rtx5090": set(RECIPES) - {"mxfp8"},
}
OTHERS = {"v100": ("NVIDIA V100", (7, 0)), "rtx5090": ("NVIDIA GeForce RTX 5090", (12, 0))}


def a_machine_with(gpu: str) -> machine.Probe:
    if gpu not in OTHERS:
        return machine.assumed(gpu)
    name, capability = OTHERS[gpu]
    return dataclasses.replace(H100, gpu_name=name, compute_capability=capability)


@pytest.mark.parametrize("gpu", FITS)
def test_recipes_by_gpu(gpu: str) -> None:
    found = a_machine_with(gpu)
    assert {answer.recipe for answer in kernels.recipe_answers(found) if not answer.faults} == FITS[gpu]


@pytest.mark.parametrize(
    ("found", "precision", "parallel", "expected"),
    [
        ({"compute_capability": (8, 0), "gpu_name": "A100"}, {"recipe": "fp8_tensorwise"}, {}, "precision.recipe: fp8_tensorwise needs compute capability 8.9, and the A100 has 8.0; use bf16"),
        ({"compute_capability": (8, 9), "gpu_name": "L4"}, {"recipe": "fp8_blockwise"}, {}, "fp8_blockwise needs compute capability 9.0, and the L4 has 8.9; use bf16 or fp8_tensorwise or fp8_delayed"),
        ({"compute_capability": (12, 0), "gpu_name": "B40"}, {"recipe": "mxfp8"}, {}, "mxfp8 has no kernels for compute capability 12.0 or later, and the B40 has 12.0; use bf16 or fp8_tensorwise or fp8_delayed or fp8_blockwise"),
        ({"compute_capability": (7, 0), "gpu_name": "V100"}, {"recipe": "bf16"}, {}, "precision.recipe: bf16 needs compute capability 8.0 for bfloat16, and the V100 has 7.0; use fp32"),
        ({"cuda_version": "12.6"}, {"recipe": "fp8_blockwise"}, {}, f"precision.recipe: fp8_blockwise needs CUDA 12.9, and torch {torch.__version__} is built for 12.6"),
        ({"transformer_engine": None}, {"recipe": "fp8_tensorwise"}, {}, "precision.recipe: fp8_tensorwise needs Transformer Engine's layers: it is not installed (pip install --no-build-isolation -e '.[fp8]')"),
        ({"transformer_engine": "2.8.0"}, {"recipe": "fp8_tensorwise"}, {}, "version 2.8.0 is installed, and megatron-core 0.16 takes 2.9 up to, not including, 2.12"),
        ({"transformer_engine": "2.12.0+abc"}, {"recipe": "bf16"}, {}, "Transformer Engine would be used on the GPU, but version 2.12.0+abc is installed"),
        ({"transformer_engine": None, "faults": ("transformer_engine is broken",)}, {"recipe": "fp8_delayed"}, {}, "fp8_delayed needs Transformer Engine's layers: its installation is broken (see above)"),
        ({"transformer_engine": None}, {"cross_entropy_fusion_impl": "te"}, {}, "precision.cross_entropy_fusion_impl: te needs Transformer Engine: it is not installed"),
        ({"transformer_engine": None}, {"cuda_graph_impl": "transformer_engine"}, {}, "precision.cuda_graph_impl: transformer_engine needs Transformer Engine"),
        ({"transformer_engine": None}, {}, {"tp_comm_overlap": True}, "parallel.tp_comm_overlap: true needs Transformer Engine"),
        ({"transformer_engine": None}, {}, {"context_parallel_size": 2}, "parallel.context_parallel_size: 2 needs Transformer Engine"),
    ],
)  # fmt: skip
def test_refusals(
    found: dict[str, Any], precision: dict[str, Any], parallel: dict[str, Any], expected: str
) -> None:
    probe = dataclasses.replace(H100, **found)
    layout = ParallelConfig.model_validate(parallel)
    faults = preflight.machine_faults(PrecisionConfig.model_validate(precision), probe, layout)
    assert any(expected in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("precision", "parallel", "expected"),
    [
        ({"recipe": recipe}, {}, f"precision.recipe: {recipe} needs a GPU of compute capability")
        for recipe in RECIPES
        if RECIPES[recipe].is_fp8
    ]
    + [
        ({"cross_entropy_loss_fusion": True}, {}, "precision.cross_entropy_loss_fusion: true needs a GPU, and this machine has no CUDA device; remove it"),
        ({"cross_entropy_fusion_impl": "te"}, {}, "precision.cross_entropy_fusion_impl: te needs a GPU"),
        ({"cuda_graph_impl": "local"}, {}, "precision.cuda_graph_impl: local needs a GPU"),
        ({}, {"tp_comm_overlap": True}, "parallel.tp_comm_overlap: true needs a GPU"),
        ({}, {"context_parallel_size": 4}, "parallel.context_parallel_size: 4 needs a GPU"),
    ],
)  # fmt: skip
def test_refusals_without_a_gpu(precision: dict[str, Any], parallel: dict[str, Any], expected: str) -> None:
    layout = ParallelConfig.model_validate(parallel)
    (fault,) = preflight.machine_faults(PrecisionConfig.model_validate(precision), BARE, layout)
    assert expected in fault


def test_nothing_is_refused_that_works() -> None:
    graphs = PrecisionConfig(recipe="fp8_tensorwise", cuda_graph_impl="local", cross_entropy_fusion_impl="te")
    layout = ParallelConfig(context_parallel_size=2, tp_comm_overlap=True)
    assert preflight.machine_faults(graphs, H100, layout) == []
    assert preflight.machine_faults(PrecisionConfig(), BARE, ParallelConfig()) == []
    plain = dataclasses.replace(H100, transformer_engine=None)
    native = PrecisionConfig(cross_entropy_loss_fusion=True, cuda_graph_impl="local")
    assert preflight.machine_faults(native, plain, ParallelConfig()) == []


def test_sections_of_a_run() -> None:
    """A run on ``cpu`` is checked without a machine; ``cuda`` needs one; unsound sections are left out."""
    from megatron_tokedit.config.sections import RuntimeConfig

    fp8 = {"precision": PrecisionConfig(recipe="fp8_delayed"), "parallel": ParallelConfig()}
    assert preflight.section_faults({**fp8, "runtime": RuntimeConfig(device="cpu")}, BARE) == []
    plain = {"precision": PrecisionConfig(), "parallel": ParallelConfig()}
    (fault,) = preflight.section_faults({**plain, "runtime": RuntimeConfig(device="cuda")}, BARE)
    assert str(fault).startswith("runtime.device: 'cuda' was asked for")
    broken = dataclasses.replace(BARE, faults=("apex is not apex",))
    assert [str(fault) for fault in preflight.section_faults({}, broken)] == ["apex is not apex"]


# ------------------------------------------------------------------------------------------- kernels


def kernel_of(name: str, found: machine.Probe, **settings: Any) -> kernels.Part:
    parts = kernels.training_parts(
        found, PrecisionConfig.model_validate(settings), ParallelConfig(), tiny_llama()
    )
    return next(part for part in parts if part.name == name)


def test_which_kernel_each_part_uses() -> None:
    plain = dataclasses.replace(H100, transformer_engine=None)
    apex = dataclasses.replace(H100, fused_wgrad=True, flash_attn="2.8.3")
    assert kernel_of("linear layers", BARE).reason == "no CUDA device"
    assert kernel_of("linear layers", plain).kernel == "megatron-core's, torch matrix products in bf16"
    assert "its present largest value" in kernel_of("linear layers", H100, recipe="fp8_tensorwise").kernel
    assert "our blocked kernel" in kernel_of("attention", BARE).kernel
    assert "flash-attn 2.8.3" in kernel_of("attention", apex).kernel
    assert "cuDNN" in kernel_of("attention", H100).kernel
    assert kernel_of("loss", BARE).kernel.startswith("our blocked cross entropy")
    assert kernel_of("loss", H100).kernel.startswith("Transformer Engine's")
    assert kernel_of("loss", plain).kernel == "megatron-core's in float32, unfused"
    assert kernel_of("loss", H100, cross_entropy_fusion_impl="native").kernel == "megatron-core's, compiled"
    assert kernel_of("weight gradients", apex).reason == "apex's extension is found"
    assert "inside Transformer Engine's products" in kernel_of("weight gradients", H100).kernel
    assert "FusedAdam" in kernel_of("optimizer", H100).kernel
    assert "torch's fused AdamW" in kernel_of("optimizer", plain).kernel
    assert kernel_of("collectives", H100).kernel == "NCCL"
    assert kernel_of("CUDA graphs", H100, cuda_graph_impl="local").kernel == "local, whole layers"


def blocked_positions() -> int:
    from megatron_tokedit.engine.cpu_kernels import MAX_BLOCKED_POSITIONS

    return MAX_BLOCKED_POSITIONS


def test_the_limit_that_is_told_is_the_one_that_holds(ranks: Any) -> None:
    assert ranks.run(blocked_positions, world_size=1) == [kernels.MAX_BLOCKED_POSITIONS]


@pytest.mark.parametrize(
    ("machine_has", "recipe", "packing", "expected"),
    [
        ({"compute_capability": (9, 0)}, "bf16", True, []),
        ({"compute_capability": (9, 0)}, "fp32", True, ["precision.recipe: fp32: on a GPU, packed rows"]),
        ({"compute_capability": (9, 0)}, "fp32", False, []),
        ({"compute_capability": (8, 0)}, "bf16", True, ["sft.packing: true needs the package flash-attn"]),
        ({"compute_capability": (8, 0), "flash_attn": "2.8.3"}, "bf16", True, []),
        ({"compute_capability": (8, 0), "is_assumed": True}, "bf16", True, []),
        ({"compute_capability": (8, 0), "transformer_engine": None}, "fp32", True, []),
    ],
)
def test_packed_rows_want_an_attention_that_takes_them(
    machine_has: dict[str, Any], recipe: str, packing: bool, expected: list[str]
) -> None:
    found = machine.Probe(**{
        "has_cuda": True, "transformer_engine": "2.11.0", "fused_wgrad": False, "faults": (), "gpu_name": "GPU",
        **machine_has,
    })  # fmt: skip
    sections = {
        "stage": "sft", "sft": SftConfig(packing=packing), "precision": PrecisionConfig(recipe=recipe),
        "parallel": ParallelConfig(), "runtime": RuntimeConfig(),
    }  # fmt: skip
    faults = [str(fault) for fault in preflight.section_faults(sections, found)]
    assert len(faults) == len(expected)
    assert all(fault.startswith(start) for fault, start in zip(faults, expected, strict=True))
    assert not preflight.section_faults({**sections, "stage": "continue"}, found)
