"""A conversation at the terminal: a prompt a line, its continuation below, settings changed in between."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from megatron_tokedit.cli.generate_screen import Screen
from megatron_tokedit.errors import ConfigError, TokeditError
from megatron_tokedit.generation.settings import GenerationSettings

if TYPE_CHECKING:
    from megatron_tokedit.generation import TextModel

_KINDS: dict[str, Any] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "seed": int,
}
_HELP = """\
A line is a prompt; \\n in it is a line break; an empty line writes a document from its start.
  :set NAME VALUE   max_new_tokens, temperature, top_k, top_p or seed; VALUE none: no top_k, top_p
  :show             the settings
  :help             this
  :quit             or Ctrl-D; Ctrl-C ends a continuation
"""


def talk(
    model: TextModel, settings: GenerationSettings, *, num_samples: int = 1, document_start: bool = True
) -> None:
    """Ask for prompts until there are no more; a repeated prompt gets a further sample."""
    from megatron_tokedit.generation import Prompt, generate

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() a line that can be edited, and a history

    sys.stderr.write(_HELP)
    next_sample = 0
    while (line := ask()) is not None and line != ":quit":
        if line.startswith(":"):
            settings = obey(line, settings, _HELP)
            continue
        text = line.replace("\\n", "\n")
        samples = range(next_sample, next_sample + num_samples)
        next_sample = samples.stop
        screen = Screen(model, samples, has_headings=num_samples > 1)
        on_text = screen.add if sys.stdout.isatty() else None
        try:
            prompt = Prompt(model.prompt_ids(text, document_start=document_start), samples, text)
            for _ in screen.show(generate(model, [prompt], settings, on_text=on_text)):
                pass
        except KeyboardInterrupt:
            sys.stdout.write("\n")
        except TokeditError as error:
            sys.stderr.write(f"{error}\n")


def ask() -> str | None:
    """A line, or None where there are no more."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        sys.stderr.write("\n")
        return None


def obey(line: str, settings: GenerationSettings, usage: str) -> GenerationSettings:
    """Do what a line that begins with a colon says, or show how to use it; the settings from now on."""
    words = line.split()
    if words[0] == ":set" and len(words) == 3 and words[1] in _KINDS:
        name, value = words[1:]
        try:
            is_none = value == "none" and name in ("top_k", "top_p")
            change: dict[str, Any] = {name: None if is_none else _KINDS[name](value)}
            settings = dataclasses.replace(settings, **change)
        except ValueError:
            sys.stderr.write(f"{name}: {value!r} is not a number\n")
        except ConfigError as error:
            sys.stderr.write(f"{error}\n")
    elif words == [":show"]:
        shown = (f"{name} {getattr(settings, name)}" for name in _KINDS)
        sys.stderr.write("  ".join(shown) + "\n")
    else:
        sys.stderr.write(usage)
    return settings
