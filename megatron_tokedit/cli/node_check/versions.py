"""Versions that have to be equal on all nodes. Packages but torch are not imported for it."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import megatron_tokedit

_PACKAGES = ("megatron-core", "transformer-engine", "numpy", "transformers", "tokenizers", "sentencepiece")
_GIT_SECONDS = 5.0

COMMIT = "megatron_tokedit's git commit"
SOURCE = "megatron_tokedit's source"
"""What decides whether the code is equal; a node may not have git to tell the commit."""


def installed_versions() -> dict[str, str | None]:
    """By name as a person knows it; None: not installed, or not known."""
    import torch

    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "CUDA": torch.version.cuda,
        "NCCL": _nccl_version(),
    }
    found |= {name: _package_version(name) for name in _PACKAGES}
    folder = Path(megatron_tokedit.__file__).parent
    found["megatron_tokedit"] = megatron_tokedit.__version__
    found[COMMIT] = git_commit(folder.parent)
    found[SOURCE] = source_digest(folder)
    return found


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _nccl_version() -> str | None:
    import torch

    if torch.version.cuda is None:
        return None
    try:
        return ".".join(str(part) for part in torch.cuda.nccl.version())
    except Exception:  # noqa: BLE001 - a build without NCCL raises what it likes
        return None


def git_commit(folder: Path) -> str | None:
    """Of a checkout, short; None where the folder is none or git cannot say."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "--short=10", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def source_digest(folder: Path) -> str:
    """Of the Python files below: two checkouts of one commit can differ by what was edited."""
    digest = hashlib.blake2b(digest_size=5)
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
