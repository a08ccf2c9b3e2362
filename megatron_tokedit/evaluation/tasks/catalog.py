"""Finding tasks: names of lm-eval's, names in folders that are given, and task files by path.

Reading the names of all of lm-eval's tasks takes ten seconds, which are spared where only files are given.
Invariant: a task that cannot be had is refused by its name, with what to do, before any model is loaded.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager

from megatron_tokedit.errors import ConfigError

_SUFFIXES = (".yaml", ".yml")
_NO_DATA = ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "DatasetNotFoundError")


@dataclass(frozen=True, slots=True)
class LoadedTasks:
    """Tasks with their data.

    Attributes:
        tasks: name -> lm-eval's task; groups and tags are resolved.
        content: all of it, as ``lm_eval.evaluator.evaluate`` takes it.
    """

    tasks: dict[str, Any]
    content: dict[str, Any]


def load_tasks(specs: Sequence[str], include_path: Sequence[str] = ()) -> LoadedTasks:
    """Load tasks with their data sets.

    Args:
        specs: names and patterns of tasks, groups and tags, task files, and folders of task files; a path has
            a slash or ends in .yaml.
        include_path: folders of further task files, which go before lm-eval's.

    Raises:
        ConfigError: an unknown task, a faulty file, data that cannot be had, a task that is asked for twice,
            or one that wants what is not offered here.
    """
    for folder in include_path:
        if not Path(folder).is_dir():
            raise ConfigError(f"--include-path {folder}: no such folder")
    given = TaskManager(include_path=list(include_path), include_defaults=False)
    everything = given
    if any(_needs_defaults(spec, given) for spec in specs):
        everything = TaskManager(include_path=list(include_path))
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for spec in dict.fromkeys(specs):
        for manager, name in _resolve(spec, everything):
            loaded = _load(manager, name)
            for task_name, task in loaded["tasks"].items():
                if task_name in tasks:
                    raise ConfigError(
                        f"--tasks: the task {task_name} is in {spec} and in what stands before it"
                    )
                _refuse_unusable(task_name, task)
                tasks[task_name] = task
            groups |= loaded.get("groups", {})
    if not tasks:
        raise ConfigError(f"--tasks {' '.join(specs)}: there is no task in it")
    group_map = {group.name: group.child_names for group in groups.values()}
    return LoadedTasks(tasks, {"tasks": tasks, "groups": groups, "group_map": group_map})


def _is_path(spec: str) -> bool:
    return "/" in spec or spec.endswith(_SUFFIXES)


def _needs_defaults(spec: str, given: TaskManager) -> bool:
    """Whether a task may be one of lm-eval's, or a group of such."""
    if not _is_path(spec):
        return spec not in given.all_tasks
    if not Path(spec).is_file():
        return False
    try:
        with open(spec, encoding="utf-8") as file:
            return any(line.startswith("group:") for line in file)
    except (OSError, UnicodeDecodeError):
        return False  # said when it is loaded


def _resolve(spec: str, manager: TaskManager) -> list[tuple[TaskManager, str]]:
    """Who loads what.

    Raises:
        ConfigError: there is no such file, folder or name.
    """
    path = Path(spec)
    if _is_path(spec):
        if path.is_dir():
            folder = TaskManager(include_path=[spec], include_defaults=False)
            if not folder.all_subtasks:
                raise ConfigError(f"--tasks {spec}: no task files (*.yaml with a `task:`) in this folder")
            return [(folder, name) for name in folder.all_subtasks]
        if not path.is_file():
            raise ConfigError(f"--tasks {spec}: no such file or folder")
        return [(manager, spec)]
    if any(sign in spec for sign in "*?["):
        if names := manager.match_tasks([spec]):
            return [(manager, name) for name in names]
    elif spec in manager.all_tasks:
        return [(manager, spec)]
    near = difflib.get_close_matches(spec, manager.all_tasks, n=5)
    hints = [f"did you mean {', '.join(near)}?"] if near else []
    if path.is_dir():
        hints.append(f"the folder of this name is ./{spec}")
    what = "; ".join(hints) or "give a name that `lm-eval ls tasks` lists, or a task file"
    raise ConfigError(f"--tasks {spec}: lm-eval has no such task, group or tag; {what}")


def _load(manager: TaskManager, name: str) -> dict[str, Any]:
    """A task or group with its data.

    Raises:
        ConfigError: it cannot be loaded.
    """
    try:
        loaded: dict[str, Any] = manager.load([name])
    except yaml.YAMLError as error:
        raise ConfigError(f"task file {name}: is not YAML: {' '.join(str(error).split())}") from error
    except Exception as error:  # whatever data sets and the functions of tasks raise
        lines = str(error).strip().splitlines() or [""]
        message = f"task {name}: cannot be loaded: {type(error).__name__}: {lines[0][:300]}"
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if kinds & {*_NO_DATA}:
            message += (
                "\n  Its data set is not on this machine"
                + (" and HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "")
                + "; load it once where there is network, with the same HF_HOME, or give a task file whose "
                "data_files are here (docs/evaluation_tasks.md)"
            )
        raise ConfigError(message) from error
    return loaded


def _refuse_unusable(name: str, task: Any) -> None:
    """Refuse what no scorer of text can do, or what nobody should run unasked.

    Raises:
        ConfigError: such a task.
    """
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"task {name}: runs code that the model writes, which is not offered here")
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"task {name}: shows pictures or sounds, and these are models of text")
