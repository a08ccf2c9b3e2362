"""Finding a chat template (shipped, in a file, the tokenizer's own), and refusing one that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from megatron_tokedit.errors import TokenizerError
from megatron_tokedit.tokenizers.chat_template import TEMPLATE_NAMES, ChatTemplate


def load_chat_template(
    chat_template: str | None,
    own: str | None,
    special_tokens: Mapping[str, str],
    tokenizer_model: str,
    *,
    flag: str = "--sft-chat-template",
) -> ChatTemplate:
    """Find a template and check that it can be used.

    Args:
        chat_template: name of a shipped one, or a file; None: the tokenizer's.
        own: Jinja text of the tokenizer's.
        special_tokens: of the tokenizer.
        tokenizer_model: for messages.
        flag: that ``chat_template`` is given with, for messages.

    Raises:
        TokenizerError: the tokenizer has none, there is no such file, it is no Jinja, writes the current
            date, or refers to a special token that the tokenizer does not have.
    """
    shipped = ", ".join(TEMPLATE_NAMES)
    if chat_template is None:
        if own is None:
            raise TokenizerError(
                f"{tokenizer_model} has no chat template; give {flag} with one of {shipped}, "
                "or with a Jinja file"
            )
        name, source = "tokenizer", own
    elif chat_template in TEMPLATE_NAMES:
        name = chat_template
        folder = resources.files("megatron_tokedit.tokenizers") / "chat_templates"
        source = (folder / f"{chat_template}.jinja").read_text(encoding="utf-8")
    else:
        name = chat_template
        try:
            source = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(
                f"{flag} {chat_template}: cannot be read ({error}); shipped are {shipped}"
            ) from error
    _check(name, source, special_tokens, tokenizer_model, flag)
    return ChatTemplate(name, source, special_tokens)


def _check(
    name: str, source: str, special_tokens: Mapping[str, str], tokenizer_model: str, flag: str
) -> None:
    from jinja2 import meta
    from jinja2.exceptions import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        environment = _compile_jinja_template(source).environment
        variables = meta.find_undeclared_variables(environment.parse(source))
    except TemplateSyntaxError as error:
        raise TokenizerError(f"the chat template {name}, line {error.lineno}: {error.message}") from error
    if "strftime_now" in variables or "strftime_now" in source:
        raise TokenizerError(
            f"the chat template {name} writes the current date, so no two runs would write the same; save a "
            f"copy with a fixed date and give that with {flag} FILE.jinja"
        )
    missing = sorted(
        variable
        for variable in variables
        if variable in ("bos_token", "eos_token", "pad_token") and variable not in special_tokens
    )
    if missing:
        raise TokenizerError(
            f"the chat template {name} writes {', '.join(missing)}, which {tokenizer_model} does not have; "
            "take another template"
        )
