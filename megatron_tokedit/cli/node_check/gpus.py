"""The GPUs of a node as ``nvidia-smi`` and torch see them, before this process has touched one.

Invariant: a node without ``nvidia-smi`` has no GPUs and no fault; what counts is what the job may use
(``CUDA_VISIBLE_DEVICES``), though ``nvidia-smi`` shows all.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_QUERY_SECONDS = 10.0
_FIELDS = "index,uuid,name,driver_version,memory.total,memory.used"
_ECC_FIELDS = "uuid,ecc.errors.uncorrected.volatile.total"
_REMAP_FIELDS = "gpu_uuid,remapped_rows.failure"
_APP_FIELDS = "gpu_uuid,pid,process_name,used_memory"
_BROKEN = ("requires reset", "unknown error", "gpu is lost", "err!")


@dataclass(slots=True)
class Gpu:
    """One GPU.

    Attributes:
        index: as ``nvidia-smi`` counts.
        uuid: of it.
        name: the model's.
        memory_mib: all of it.
        used_mib: in use before the check used any.
        num_uncorrected_errors: of its memory since the driver was loaded; None: not counted.
        users: processes that use it, as ``4711 python, 40000 MiB``.
        trouble: that ``nvidia-smi`` says it is in; None: none.
    """

    index: int
    uuid: str
    name: str
    memory_mib: int | None = None
    used_mib: int | None = None
    num_uncorrected_errors: int | None = None
    users: list[str] = field(default_factory=list)
    trouble: str | None = None


@dataclass(slots=True)
class GpuFacts:
    """A node's GPUs.

    Attributes:
        gpus: that the job may use.
        driver: version.
        complaint: what ``nvidia-smi`` said where it failed.
        num_promised: by Slurm; None: it did not say.
        num_seen_by_torch: None where torch was not asked, being built without CUDA.
    """

    gpus: list[Gpu] = field(default_factory=list)
    driver: str | None = None
    complaint: str | None = None
    num_promised: int | None = None
    num_seen_by_torch: int | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> GpuFacts:
        """Of what ``asdict`` made."""
        return cls(**{**values, "gpus": [Gpu(**gpu) for gpu in values["gpus"]]})

    def describe(self) -> str:
        """``8 x NVIDIA H100 80GB HBM3``."""
        names = [gpu.name for gpu in self.gpus]
        counted = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
        return " + ".join(counted) or "no GPU"


def look_at_gpus(environment: Mapping[str, str]) -> GpuFacts:
    """Ask ``nvidia-smi`` and torch; never raises."""
    facts = GpuFacts(num_promised=_number(environment.get("SLURM_GPUS_ON_NODE")))
    if shutil.which("nvidia-smi", path=environment.get("PATH")) is not None:
        rows, facts.complaint = _query("gpu", _FIELDS)
        every = [gpu for row in rows if (gpu := _gpu(row)) is not None]
        facts.driver = next((row[3] for row in rows if len(row) > 3), None)
        facts.gpus = visible(every, environment.get("CUDA_VISIBLE_DEVICES"))
        if facts.gpus:
            _add_errors(facts.gpus)
            _add_users(facts.gpus)
    facts.num_seen_by_torch = _seen_by_torch()
    return facts


def visible(gpus: list[Gpu], setting: str | None) -> list[Gpu]:
    """Those that ``CUDA_VISIBLE_DEVICES`` leaves; parts of a GPU (MIG) leave all."""
    if setting is None:
        return gpus
    kept: list[Gpu] = []
    for entry in (entry.strip() for entry in setting.split(",")):
        if entry.startswith("MIG"):
            return gpus
        found = [gpu for gpu in gpus if entry == str(gpu.index) or (entry and gpu.uuid.startswith(entry))]
        if not found:  # CUDA, too, stops at the first that there is not
            break
        kept += found
    return kept


def _query(what: str, fields: str) -> tuple[list[list[str]], str | None]:
    """Rows of a query, and what was said where it failed."""
    command = ["nvidia-smi", f"--query-{what}={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi does not answer within {_QUERY_SECONDS:.0f} s"
    except OSError as error:
        return [], f"nvidia-smi cannot be run: {error.strerror}"
    num_fields = fields.count(",") + 1
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(done.stdout))]
    fitting = [row for row in rows if len(row) == num_fields]
    if done.returncode == 0:
        return fitting, None
    said = (done.stdout + "\n" + done.stderr).strip().splitlines()
    other = [line.strip() for line in said if line.strip() and line.count(",") != num_fields - 1]
    return fitting, f"nvidia-smi: {other[0] if other else f'exit code {done.returncode}'}"


def _gpu(row: list[str]) -> Gpu | None:
    index, uuid, name, _, total, used = row
    if not index.isdigit():
        return None
    bad = next((cell for cell in row if any(word in cell.lower() for word in _BROKEN)), None)
    return Gpu(int(index), uuid, name, _number(total), _number(used), trouble=bad)


def _add_errors(gpus: list[Gpu]) -> None:
    """Errors of the memory, where this GPU and this ``nvidia-smi`` count them."""
    counts = {row[0]: _number(row[1]) for row in _query("gpu", _ECC_FIELDS)[0]}
    failures = {row[0]: row[1] for row in _query("remapped-rows", _REMAP_FIELDS)[0]}
    for gpu in gpus:
        gpu.num_uncorrected_errors = counts.get(gpu.uuid)
        if failures.get(gpu.uuid, "0").lower() in ("1", "yes"):
            gpu.trouble = gpu.trouble or "broken memory that cannot be remapped any more"


def _add_users(gpus: list[Gpu]) -> None:
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    for uuid, pid, name, used in _query("compute-apps", _APP_FIELDS)[0]:
        if uuid in by_uuid:
            by_uuid[uuid].users.append(f"{pid} {name.rpartition('/')[2]}, {used} MiB")


def _seen_by_torch() -> int | None:
    import torch

    if torch.version.cuda is None:
        return None
    try:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception:  # noqa: BLE001 - a driver that does not fit raises anything
        return 0


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdigit() else None
