"""The chat template that a fine-tuned model was taught, handed on from its data to its checkpoints.

Invariant: the conversations that a model learns from are rendered by one template, and a checkpoint names the
one that its own data were rendered by, else the one that it was started with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_tokedit.config.sections import DataConfig, RunConfig, SourceConfig
from megatron_tokedit.dataset.manifest import ConversationRecord, read_manifest
from megatron_tokedit.dataset.sources import prefix_of
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)

STATE_KEYS = ("chat_template", "chat_template_name")
"""Of ``state.json``: the Jinja text, and what it is called."""


def chat_template_state(config: RunConfig, inherited: Mapping[str, Any], *, speaks: bool) -> dict[str, Any]:
    """What a checkpoint records of the chat template. Not collective; reads manifests in stage ``sft``.

    Args:
        config: of the run.
        inherited: ``state.json`` of the checkpoint that the run goes on from.
        speaks: whether to log warnings; true on one rank only.

    Raises:
        DataFormatError: training sources were rendered by different templates.
    """
    before = {key: inherited[key] for key in STATE_KEYS if key in inherited}
    if config.stage != "sft":
        return before
    template = training_template(config.data)
    for warning in template_warnings(config.data, template) if speaks else ():
        logger.warning("%s", warning)
    if template is None:
        return before
    name = template.chat_template_name
    if speaks and before.get("chat_template") not in (None, template.chat_template):
        logger.warning(
            "the weights were taught another chat template (%s) before; from here on it is %s",
            before.get("chat_template_name"), name,
        )  # fmt: skip
    return {"chat_template": template.chat_template, "chat_template_name": name}


def training_template(data: DataConfig) -> ConversationRecord | None:
    """The template of the training sources; None where no manifest names one.

    Raises:
        DataFormatError: they were rendered by different ones.
    """
    known = _records(data.train)
    if len({record.chat_template for record in known.values()}) > 1:
        listed = ", ".join(f"{name} ({record.chat_template_name})" for name, record in known.items())
        raise DataFormatError(
            f"data.train: conversations rendered by different chat templates: {listed}; a model can be "
            f"talked to in one only: make the datasets with the same template"
        )
    return next(iter(known.values()), None)


def template_warnings(data: DataConfig, template: ConversationRecord | None) -> Iterable[str]:
    """Sources whose template is not known, or not the training sources'."""
    known = _records([*data.train, *data.validation])
    for source in data.train:
        if source.name not in known:
            yield f"data.train ({source.name}): no manifest says which chat template it was rendered by"
    for source in data.validation:
        record = known.get(source.name)
        if template is not None and record is not None and record.chat_template != template.chat_template:
            yield (
                f"data.validation ({source.name}): rendered by another chat template "
                f"({record.chat_template_name}) than the training sources ({template.chat_template_name})"
            )


def _records(sources: Iterable[SourceConfig]) -> dict[str, ConversationRecord]:
    """What is known, by name."""
    found = {}
    for source in sources:
        manifest = read_manifest(prefix_of(source))
        if manifest is not None and manifest.conversation is not None:
            found[source.name] = manifest.conversation
    return found
