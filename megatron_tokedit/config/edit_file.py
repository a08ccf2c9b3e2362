"""``--edit-config FILE.yaml``: the general form of an edit, an ordered list of rules and a sampler.

    rules:                  # the first whose conditions all hold decides; where none does, the token stays
      - {action: resample, at_least: 0.99}    # conditions: at_least, above, at_most, below
      - {action: drop, below: 0.001}
    sampler: top_k          # top_k, top_p, rejection
    top_k: 8
    temperature: 1.5

Invariant: the file sets nothing that a flag could not name; what it holds goes into the plan and the
manifest, where it came from does not.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from megatron_tokedit.errors import ConfigError

_FIELDS = ("rules", "sampler", "top_k", "top_p", "temperature", "exclude_original", "generations")


def read_edit_file(path: str) -> dict[str, Any]:
    """Read the file as settings of :class:`megatron_tokedit.config.preprocess.PreprocessConfig`.

    Returns:
        ``edit_rules`` and whatever else the file gives, under the settings' names.

    Raises:
        ConfigError: unreadable, not a mapping, without rules, or with a key that is none.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"edit_config {path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"edit_config {path}: is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"edit_config {path}: expected a mapping with the keys {', '.join(_FIELDS)}")
    faults = []
    for name in content:
        if name not in _FIELDS:
            near = get_close_matches(str(name), _FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(_FIELDS)}"
            faults.append(f"{name}: unknown; {hint}")
    if not isinstance(content.get("rules"), list):
        faults.append("rules: missing, or not a list; expected a list of mappings with an action")
    if faults:
        raise ConfigError("\n  ".join([f"edit_config {path}:", *faults]))
    return {f"edit_{name}": value for name, value in content.items() if value is not None}
