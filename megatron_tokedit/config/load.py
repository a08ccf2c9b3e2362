"""From a YAML file and dotted overrides to a :class:`RunConfig`.

Why: a run that is about to occupy a cluster must not be started a fifth time because the fourth fault was
only found after the third was mended. Invariant: every fault that can be known is in one message, each with
the place (line or override), ``section.field``, what was got and what was expected.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_tokedit.config.faults import Fault, KeyPath, raise_faults
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.config.validate import cross_section_faults
from megatron_tokedit.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-4`` as a number (YAML 1.2), as everybody who writes it means."""


_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in entries if entry[0] != "tag:yaml.org,2002:float"]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF|nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


_OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "batch_size": "training.global_batch_size",
    "max_steps": "training.train_steps",
    "train_iters": "training.train_steps",
    "warmup_steps": "schedule.lr_warmup_steps",
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "dtype": "precision.recipe",
}
"""Names that other systems use, which no spelling distance leads to ours."""


def load_config(
    path: str | FilePath,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    machine_faults: Callable[[Mapping[str, Any]], Sequence[Fault]] | None = None,
) -> RunConfig:
    """Read, override and check a run's configuration.

    Args:
        path: the YAML file.
        overrides: ``section.field=value`` with YAML values; list entries by index, as in
            ``data.train.0.weight=2``.
        world_size: number of ranks, where known; adds the checks that need it.
        machine_faults: asked with the sections that are sound for what the machine cannot do of them.

    Raises:
        ConfigError: one message with every fault.
    """
    tree, places, faults = read_yaml(path)
    faults += apply_overrides(tree, places, overrides)
    sections, schema_faults = _parse_sections(tree, places)
    faults += schema_faults
    faults += [fault.at(places) for fault in cross_section_faults(sections, world_size=world_size)]
    if machine_faults is not None:
        faults += [fault.at(places) for fault in machine_faults(sections)]
    raise_faults(faults, str(path))
    return RunConfig.model_validate(tree, strict=True)


def config_from_mapping(tree: Mapping[str, Any], *, origin: str) -> RunConfig:
    """A recorded configuration (``run_config.json`` of a checkpoint or a run folder) read back.

    Raises:
        ConfigError: it does not fit this version's sections; ``origin`` names the file.
    """
    sections, faults = _parse_sections(tree, {})
    raise_faults(faults + cross_section_faults(sections), origin)
    return RunConfig.model_validate(tree, strict=True)


# ---------------------------------------------------------------------------------------------- YAML


def read_yaml(path: str | FilePath) -> tuple[dict[str, Any], dict[KeyPath, str], list[Fault]]:
    """Read a YAML mapping.

    Returns:
        the mapping; where each key stands (``line 12``); faults (keys given twice).

    Raises:
        ConfigError: the file is missing, is not UTF-8 or YAML, or holds no mapping.
    """
    try:
        text = FilePath(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}") from None
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        lines = list(_walk_lines(root)) if root is not None else []
        tree = loader.construct_document(root) if root is not None else None  # writes merges (<<) into root
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if root is None or not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections (model:, data:, ...), got {_shown(tree)}")
    places: dict[KeyPath, str] = {}
    faults: list[Fault] = []
    for key_path, line in lines:
        if key_path in places:
            faults.append(Fault(key_path, f"given twice, first on {places[key_path]}", f"line {line}"))
        places[key_path] = f"line {line}"
    return tree, places, faults


def _walk_lines(node: yaml.Node, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    """Every key path below ``node`` with its 1-based line."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, str(key.value))
            yield path, key.start_mark.line + 1
            yield from _walk_lines(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*prefix, index), value.start_mark.line + 1
            yield from _walk_lines(value, (*prefix, index))


# ----------------------------------------------------------------------------------------- overrides


def apply_overrides(
    tree: dict[str, Any], places: dict[KeyPath, str], overrides: Sequence[str]
) -> list[Fault]:
    """Apply ``section.field=value`` strings to ``tree`` in place, in order; later ones win.

    ``places`` is told which override a key came from. Returns the faults of overrides that cannot be applied.
    """
    faults = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = tuple(int(key) if key.isdecimal() else key for key in dotted.strip().split("."))
        where = f"override {override!r}"
        if not equals or not all(key != "" for key in keys):
            faults.append(Fault((), f"got {override!r}, expected section.field=value", "override"))
            continue
        try:
            value = yaml.load(text, Loader=_Loader)
            _set(tree, keys, value)
        except (yaml.YAMLError, LookupError) as error:
            reason = error.args[0] if isinstance(error, LookupError) else f"the value is not YAML: {error}"
            faults.append(Fault(keys, str(reason), where))
            continue
        places[keys] = where
    return faults


def _set(tree: Any, keys: KeyPath, value: Any) -> None:
    """Set ``tree[k0][k1]...``; missing or null sections are made. Raises LookupError with the reason."""
    for depth, key in enumerate(keys):
        inside = ".".join(map(str, keys[:depth])) or "the configuration"
        if isinstance(tree, list):
            if not isinstance(key, int) or key >= len(tree):
                last = len(tree) - 1
                raise LookupError(f"{inside} is a list, expected an index from 0 to {last}, got {key!r}")
        elif isinstance(tree, dict):
            key = str(key)
        else:
            raise LookupError(f"{inside} is {_shown(tree)} and has no fields")
        if depth == len(keys) - 1:
            tree[key] = value
            return
        if isinstance(tree, dict) and tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]


# -------------------------------------------------------------------------------------------- schema


def _parse_sections(
    tree: Mapping[str, Any], places: Mapping[KeyPath, str]
) -> tuple[dict[str, Any], list[Fault]]:
    """The top-level values that are sound, by name, and the faults of the others."""
    try:
        config = RunConfig.model_validate(tree, strict=True)
        return {name: getattr(config, name) for name in RunConfig.model_fields}, []
    except ValidationError as error:
        faults = [schema_fault(details).at(places) for details in error.errors()]
    faulty = {fault.path[0] for fault in faults}
    sections = {}
    for name, field in RunConfig.model_fields.items():
        if name in faulty:
            continue
        if name not in tree:
            sections[name] = field.get_default(call_default_factory=True)
        else:
            kind = _model_in(field.annotation)
            sections[name] = kind.model_validate(tree[name], strict=True) if kind else tree[name]
    return sections, faults


def schema_fault(details: ErrorDetails, root: type[BaseModel] = RunConfig) -> Fault:
    """One pydantic error of a configuration in our words; ``root`` is the class of the whole file."""
    path = details["loc"]
    owner = _model_at(path[:-1], root)
    if details["type"] in ("extra_forbidden", "invalid_key"):
        return Fault(path, f"unknown key (got {_shown(details['input'])}); {_nearest(path, owner)}")
    if details["type"] == "missing":
        field = owner.model_fields.get(str(path[-1])) if owner else None
        about = f" ({' '.join(field.description.split())})" if field and field.description else ""
        return Fault(path, f"missing, and it has no default{about}")
    if details["type"] == "model_type":
        return Fault(path, f"got {_shown(details['input'])}, expected a mapping of fields")
    expected = details["msg"].replace("Input should be ", "").replace("a valid ", "a ")
    expected = expected.replace("integer", "whole number").replace("a string", "text")
    return Fault(path, f"got {_shown(details['input'])}, expected {expected}")


def _model_at(path: KeyPath, root: type[BaseModel]) -> type[BaseModel] | None:
    """The section class that stands at ``path``; None where there is none."""
    model: type[BaseModel] | None = root
    for key in path:
        if isinstance(key, int) or model is None:
            continue
        field = model.model_fields.get(key)
        model = _model_in(field.annotation) if field else None
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section class inside ``Section``, ``list[Section]`` or ``Section | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)


def _nearest(path: KeyPath, owner: type[BaseModel] | None) -> str:
    """The nearest right name for an unknown key: in its own section, else in another one."""
    name = str(path[-1])
    if name in _OTHER_NAMES:
        return f"did you mean {_OTHER_NAMES[name]}?"
    own = list(owner.model_fields) if owner else []
    close = difflib.get_close_matches(name, own, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    elsewhere = {
        field: section
        for section, info in RunConfig.model_fields.items()
        if (model := _model_in(info.annotation)) is not None
        for field in model.model_fields
    }
    close = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8)
    if close:
        return f"did you mean {elsewhere[close[0]]}.{close[0]}?"
    return f"known here: {', '.join(own)}"


def _shown(value: Any) -> str:
    """A value and its kind, as a user wrote it."""
    kinds = {str: "text", int: "a whole number", float: "a number", bool: "true/false", list: "a list"}
    if value is None:
        return "nothing (null)"
    if isinstance(value, dict):
        return "a mapping"
    text = repr(value)
    return (
        f"{text if len(text) <= 60 else text[:57] + '...'} ({kinds.get(type(value), type(value).__name__)})"
    )
