"""The house keeps its walls: imports go down the architecture's table, sizes stay readable."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_tokedit"

# Room -> rooms it may import. `errors` and `log` are free to all; `config` is the vocabulary of settings.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "log": set(),
    "config": set(),
    "corpus": set(),
    "tokenizers": set(),
    "edit": set(),
    "engine": {"config"},
    "dataset": {"tokenizers", "config"},
    "scoring": {"engine"},
    "conversion": {"config", "engine", "tokenizers"},
    "generation": {"engine", "tokenizers"},
    "training": {"config", "dataset", "engine"},
    "pipeline": {"config", "corpus", "tokenizers", "scoring", "edit", "dataset"},
    "analysis": {"corpus", "tokenizers", "scoring", "edit", "dataset"},
    "evaluation": {"scoring", "generation", "dataset", "tokenizers"},
}
EVERYTHING_BUT_CLI = {*MAY_IMPORT, "experiments", "testing"}
MAY_IMPORT["experiments"] = EVERYTHING_BUT_CLI - {"experiments"}
MAY_IMPORT["testing"] = EVERYTHING_BUT_CLI - {"testing"}
MAY_IMPORT["cli"] = EVERYTHING_BUT_CLI
# Files outside engine/ that may touch megatron.core, and the part of it that they may touch.
MEGATRON_EXCEPTIONS = {"dataset": "megatron.core.datasets"}
HARDWARE_LIBRARIES = ("transformer_engine", "apex", "amp_C")
EDIT_MAY_USE = {"numpy", "torch"}


def package_files() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT / PACKAGE).parts
    return parts[0] if len(parts) > 1 else Path(parts[0]).stem


def imported_modules(path: Path) -> list[tuple[int, str]]:
    """(line, absolute module name) of every import in the file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute in this project"
            assert node.module is not None
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("path", package_files(), ids=lambda p: str(p.relative_to(ROOT / PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    faults = []
    for line, module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == PACKAGE and len(parts) > 1 and room != "__init__":
            other = parts[1]
            if other not in {room, "errors", "log", "__version__"} | MAY_IMPORT[room]:
                faults.append(f"{path.name}:{line}: room {room} may not import {module}")
        if parts[0] in HARDWARE_LIBRARIES and room != "engine":
            faults.append(f"{path.name}:{line}: only engine/ may import {module}")
        if parts[0] == "megatron" and room not in {"engine", "testing"}:
            allowed = MEGATRON_EXCEPTIONS.get(room)
            if allowed is None or not module.startswith(allowed):
                faults.append(f"{path.name}:{line}: room {room} may not import {module}")
        if module.startswith("megatron.training"):
            faults.append(f"{path.name}:{line}: the megatron-core wheel has no megatron.training")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", sorted((ROOT / PACKAGE / "edit").glob("*.py")), ids=lambda p: p.name)
def test_edit_is_pure(path: Path) -> None:
    third_party = {
        module.split(".")[0]
        for _, module in imported_modules(path)
        if module.split(".")[0] not in EDIT_MAY_USE | {PACKAGE, "__future__"}
    }
    assert third_party <= set(sys.stdlib_module_names)
    assert not third_party & {"os", "pathlib", "io", "shutil", "tempfile"}, "edit/ knows no files"


@pytest.mark.parametrize("path", package_files(), ids=lambda p: str(p.relative_to(ROOT / PACKAGE)))
def test_size_and_manners(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, "a file has up to 400 lines"
    assert text.isascii(), "code is ASCII"
    tree = ast.parse(text)
    room = room_of(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is longer than 60 lines"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
        if isinstance(node, ast.Call) and room not in {"cli", "testing"}:
            assert not (isinstance(node.func, ast.Name) and node.func.id in {"print", "exit"}), (
                f"line {node.lineno}: print and exit belong to cli/"
            )


def test_tools_are_thin_wrappers() -> None:
    for path in sorted((ROOT / "tools").glob("*.py")):
        assert len(path.read_text().splitlines()) <= 25, (
            f"{path.name}: tools/ only calls megatron_tokedit.cli"
        )
        assert any(m.startswith(f"{PACKAGE}.cli") for _, m in imported_modules(path))


def test_no_rooms_without_a_name_of_their_own() -> None:
    names = {p.name for p in package_files()}
    assert not names & {"utils.py", "helpers.py", "misc.py", "common.py"}
    assert {room_of(p) for p in package_files()} <= {*MAY_IMPORT, "__init__"}


def test_no_two_test_files_have_one_name() -> None:
    """They are top-level modules to pytest and to the ranks that tests start."""
    names = [path.stem for path in (ROOT / "tests").rglob("*.py") if path.stem != "conftest"]
    assert sorted(names) == sorted(set(names))
