"""``tools/doctor.py``: what this machine has, which kernel each part will use and why, what is broken.

Invariant: starts no process group, builds no model, changes nothing on disk, and goes on past a fault to find
the next one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from megatron_tokedit import __version__
from megatron_tokedit.cli.main import EXIT_ERROR, EXIT_OK, add_common_arguments, run_command
from megatron_tokedit.config.faults import Fault
from megatron_tokedit.config.load import load_config
from megatron_tokedit.config.sections import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tokedit.errors import ConfigError

if TYPE_CHECKING:
    from megatron_tokedit.engine.kernels import Part, RecipeAnswer
    from megatron_tokedit.engine.machine import Probe

_DISTRIBUTION = "megatron_tokedit"
_UNNAMED = (
    "transformer-engine-torch",
    "flash-attn",
    "apex",
    "triton",
    "nvidia-cudnn-cu13",
    "nvidia-nccl-cu13",
)
"""Packages that matter where they are installed, and that no requirement of ours names."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package that this one needs or can use.

    Attributes:
        name: as on the package index.
        version: installed; None: not installed.
        needed: versions that fit; empty: any.
        extra: the extra that asks for it; empty: always needed.
    """

    name: str
    version: str | None
    needed: str
    extra: str


@dataclass(frozen=True, slots=True)
class Findings:
    """All there is to say; ``config`` is the file that was checked, if one was."""

    machine: Probe
    packages: list[Package]
    parts: list[Part]
    recipes: list[RecipeAnswer]
    faults: list[str]
    config: str | None


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="doctor.py",
        description="Say what this machine has, which kernel each part of training and preprocessing will "
        "use and why, and what is broken, with the command that mends it. Exits with 1 where something is.",
    )
    parser.add_argument("--config", metavar="RUN.yaml", help="answer for this run, and check it")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="with --config: replaces a setting"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_common_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(_run, argv)


def _run(argv: Sequence[str]) -> int:
    parser = build_parser()
    arguments = parser.parse_intermixed_args(argv)
    if arguments.overrides and not arguments.config:
        parser.error("section.field=value goes with --config")
    findings = examine(arguments.config, arguments.overrides)
    if arguments.json:
        print(json.dumps(_to_mapping(findings), indent=2))
    else:
        for line in _lines(findings):
            print(line)
    return EXIT_ERROR if findings.faults else EXIT_OK


# ------------------------------------------------------------------------------------------- finding


def examine(config_path: str | None = None, overrides: Sequence[str] = ()) -> Findings:
    """Look at the machine and, where one is named, at a run's configuration."""
    from megatron_tokedit.engine import kernels, machine

    found = machine.probe()
    packages = list(_packages())
    faults = [*found.faults, *_package_faults(packages)]
    settings: tuple[PrecisionConfig, ParallelConfig, ModelConfig | None]
    settings = (PrecisionConfig(), ParallelConfig(), None)
    if config_path is not None:
        settings = _settings(config_path, overrides, found, faults)
    if not found.faults and (fault := machine.megatron_fault()):
        faults.append(fault)
    parts = [*kernels.training_parts(found, *settings), *_preprocessing_parts(found, packages)]
    return Findings(found, packages, parts, kernels.recipe_answers(found), faults, config_path)


def _settings(
    path: str, overrides: Sequence[str], found: Probe, faults: list[str]
) -> tuple[PrecisionConfig, ParallelConfig, ModelConfig | None]:
    """The run's settings that are sound; its faults, and what the machine lacks for it, are added."""
    from megatron_tokedit.engine import preflight

    sound: dict[str, Any] = {}

    def note(sections: Mapping[str, Any]) -> list[Fault]:
        sound.update(sections)
        faults_here = preflight.section_faults(sections, found)
        return [fault for fault in faults_here if fault.problem not in found.faults]

    try:
        load_config(path, overrides, machine_faults=note)
    except ConfigError as error:
        faults += str(error).split("\n  - ")[1:] or [str(error)]
    precision = sound.get("precision", PrecisionConfig())
    return precision, sound.get("parallel", ParallelConfig()), sound.get("model")


def _packages() -> Iterator[Package]:
    """What our requirements name, and what else matters."""
    from packaging.requirements import Requirement

    named = set()
    for text in metadata.requires(_DISTRIBUTION) or ():
        requirement = Requirement(text)
        extra = _extra(str(requirement.marker or ""))
        if extra == "dev" or requirement.name in named:
            continue
        named.add(requirement.name)
        version = _version(requirement.name)
        yield Package(requirement.name, version, str(requirement.specifier), extra)
    for name in _UNNAMED:
        yield Package(name, _version(name), "", "optional")


def _extra(marker: str) -> str:
    """``fp8`` of ``extra == "fp8"``."""
    _, found, rest = marker.partition("extra == ")
    return rest.strip().strip("\"'").partition('"')[0] if found else ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _package_faults(packages: Sequence[Package]) -> Iterator[str]:
    """Versions that do not fit, and what is missing though it is always needed."""
    from packaging.specifiers import SpecifierSet

    from megatron_tokedit.engine.machine import INSTALL_TRANSFORMER_ENGINE

    for package in packages:
        quoted = f"pip install '{package.name}{package.needed}'"
        if package.version is None:
            if not package.extra:
                yield f"{package.name} is not installed: {quoted}"
        elif package.needed and not SpecifierSet(package.needed).contains(package.version, prereleases=True):
            mend = f"pip install -e '.[{package.extra}]'" if package.extra else quoted
            mend = INSTALL_TRANSFORMER_ENGINE if package.extra == "fp8" else mend
            yield f"{package.name} {package.version} is installed, and {package.needed} is needed: {mend}"


def _preprocessing_parts(found: Probe, packages: Sequence[Package]) -> Iterator[Part]:
    """The parts of tools/preprocess_edit.py, and reading, writing and recording."""
    from megatron_tokedit.engine.kernels import Part

    versions = {package.name: package.version for package in packages}
    yield _hugging_face_part(found, versions)
    usable = found.has_cuda and found.transformer_engine is not None
    yield Part(
        "scoring, Megatron prior",
        "the engine's layers (see linear layers, attention); float32, bfloat16"
        + (" and fp8" if usable else ""),
        "--prior-dtype fp8 needs a GPU and Transformer Engine" if not usable else "Transformer Engine",
    )
    fast = versions.get("gigatoken")
    why = (
        "installed; used for tokenizers that it encodes alike"
        if fast
        else "pip install -e '.[fast]' for gigatoken"
    )
    yield Part("tokenizing, Hugging Face", f"gigatoken {fast}" if fast else "tokenizers", why)
    yield Part("tokenizing, SentencePiece", f"sentencepiece {versions.get('sentencepiece')}", "the only one")
    readers = ", ".join(f"{name} {versions.get(name)}" for name in ("orjson", "zstandard", "pyarrow"))
    yield Part("reading", readers, "jsonl, .zst, parquet")
    yield Part("checkpoints", "megatron-core's torch_dist, written by torch's threads", "the only one")
    trackers = [name for name in ("tensorboard", "wandb", "mlflow") if versions.get(name)]
    missing = [name for name in ("wandb", "mlflow") if not versions.get(name)]
    hint = f"pip install -e '.[{','.join(missing)}]' for the others" if missing else "all are installed"
    yield Part("recording", ", ".join(["metrics.jsonl", *trackers]), hint)


def _hugging_face_part(found: Probe, versions: Mapping[str, str | None]) -> Part:
    """How a Hugging Face prior is computed."""
    import torch

    from megatron_tokedit.engine.kernels import Part
    from megatron_tokedit.scoring.packed import can_pack

    library = f"transformers {versions.get('transformers')}"
    if found.has_cuda:
        return Part("scoring, Hugging Face prior", f"{library}, torch's attention", "a CUDA device")
    packed = [
        name for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)) if can_pack(dtype)
    ]
    how = f"oneDNN's packed products in {' and '.join(packed)}" if packed else "torch's matrix products"
    reason = "this processor has them" if packed else "this processor has no packed products"
    return Part("scoring, Hugging Face prior", f"{library}, {how}", reason)


# ------------------------------------------------------------------------------------------- showing


def _to_mapping(findings: Findings) -> dict[str, Any]:
    return {"megatron_tokedit": __version__, "system": _system(), **asdict(findings)}


def _system() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    return {"python": sys.version.split()[0], "platform": platform.platform(), "usable_cores": cores}


def _lines(findings: Findings) -> Iterator[str]:
    from megatron_tokedit.engine.machine import describe

    system = _system()
    yield f"megatron_tokedit {__version__}, Python {system['python']}, {system['platform']}"
    yield f"{system['usable_cores']} usable cores"
    yield describe(findings.machine)
    yield "\n# packages"
    installed = [package for package in findings.packages if package.version]
    yield from _table([(p.name, p.version or "", p.needed, p.extra) for p in installed])
    absent = [f"{p.name} ({p.extra})" if p.extra else p.name for p in findings.packages if not p.version]
    yield f"not installed: {', '.join(absent) or 'none'}"
    about = " (bf16; --config RUN.yaml answers for a run)"
    if findings.config:
        about = f" under {findings.config}" + (", as far as it is sound" if findings.faults else "")
    yield f"\n# what each part will use{about}"
    yield from _table([(part.name, part.kernel, part.reason) for part in findings.parts])
    yield "\n# precision recipes"
    rows = [
        (a.recipe, "no" if a.faults else "yes", "; ".join(a.faults) or a.description)
        for a in findings.recipes
    ]
    yield from _table(rows)
    if findings.faults:
        yield f"\n# {len(findings.faults)} fault(s)"
        yield from (f"- {fault}" for fault in findings.faults)
    else:
        yield "\nno faults found"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns as wide as their widest cell, the last as it is."""
    if not rows:
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)]
        yield "  ".join([*padded, row[-1]]).rstrip()
