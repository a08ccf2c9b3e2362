"""Conversations that spell control tokens outside of contents, that ask nothing; templates without an end."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import orjson
import pytest
from pipeline_cases import TOKENIZER
from sft_cases import documents, sft

from megatron_tokedit.config.preprocess import PreprocessConfig, preprocess_config
from megatron_tokedit.errors import ConfigError, DataFormatError
from megatron_tokedit.pipeline import inspect_job, run

SHOWS_ALL = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}<|{{ m.role }}|>{{ m.name or '' }}\n"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}"
    "{{ eos_token if m.role == 'assistant' else '' }}\n{% endfor %}"
)
CALL = {"name": "add", "arguments": {"<sep>": "</s> <sep>"}}
CALLS = {
    "messages": [
        {"role": "user", "content": "the river", "name": "<sep>"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "hills"},
        {"role": "assistant", "content": "falls"},
    ],
    "tools": [{"name": "add", "description": "</s> and <sep>"}],
}


def job(folder: Path, name: str, *records: object, template: str = "tulu", **changes: object) -> str:
    (folder / "talks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if "{" in template:
        (folder / "mine.jinja").write_text(template)
        template = str(folder / "mine.jinja")
    run(preprocess_config(sft(folder, name, sft_chat_template=template, **changes)))
    return f"{folder}/{name}_sft_document"


def conversations_of(prefix: str) -> dict[str, int]:
    return orjson.loads(Path(f"{prefix}.stats.json").read_bytes())["conversations"]


def test_control_tokens_in_tool_calls_tools_and_names(tmp_path: Path) -> None:
    """As in contents: a user-defined piece becomes that token and is counted, a control piece is text."""
    prefix = job(tmp_path, "a", CALLS, template=SHOWS_ALL)
    ((ids, mask),) = documents(prefix)
    assert (ids == 2).sum() == 2, "one end a response, and none of the data's"
    assert (ids == 4).sum() == 4
    stats = orjson.loads(Path(f"{prefix}.stats.json").read_bytes())
    assert stats["special_tokens_in_text"] == {"<sep>": 4}
    ends = (ids == 2).nonzero()[0]
    assert mask[ends].all(), "both responses are learned up to their ends"
    assert mask[ends[0] - 8 : ends[0]].all()


def test_control_tokens_in_a_tool_call_can_be_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataFormatError, match=r"talks.jsonl:1: a tool call, a tool or a name spells the control token <sep>"
    ):
        job(tmp_path, "a", CALLS, template=SHOWS_ALL, special_tokens_in_text="error")


def test_a_turn_ends_with_the_templates_last_control_token_not_with_the_datas(tmp_path: Path) -> None:
    """Without any of the template's own behind it the whole turn counts."""
    template = SHOWS_ALL.replace("{{ eos_token if m.role == 'assistant' else '' }}", "!")
    ((_, mask),) = documents(job(tmp_path, "a", CALLS, template=template))
    ((_, plain),) = documents(
        job(tmp_path, "b", json.loads(json.dumps(CALLS).replace("<sep>", "+")), template=template)
    )
    turns = [
        sum(b > a for a, b in zip(each[:-1].tolist(), each[1:].tolist(), strict=True))
        for each in (mask, plain)
    ]
    assert turns == [2, 2]
    assert mask[-1] == plain[-1] == 1


def test_empty_prompts_are_counted_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = {"role": "assistant", "content": "hills"}
    records = [
        {"prompt": " \n", "response": "the sea"},
        {"prompt": "who", "response": "the sea"},
        {"messages": [{"role": "user", "content": ""}, said, {"role": "user", "content": "\t"}, said]},
        {"instruction": "", "input": "what is it", "output": "hills"},
    ]
    with caplog.at_level(logging.WARNING):
        prefix = job(tmp_path, "a", *records)
    assert conversations_of(prefix)["empty_prompts"] == 3
    assert len(documents(prefix)) == 4
    assert "3 messages of the user are empty, so that their responses are learned as" in caplog.text
    caplog.clear()
    assert conversations_of(job(tmp_path, "b", records[1]))["empty_prompts"] == 0
    assert "are empty" not in caplog.text


UNMARKED_END = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}END\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "learns"),
    [
        (PLAIN.replace("END", ""), "does not learn to stop"),
        (PLAIN.replace("END", "<end>"), "learns to write '<end>' there, at which only programs stop that"),
        (UNMARKED_END, "does not learn to stop"),
        ("chatml", "learns to write '<|im_end|>' there"),
        ("tulu", None),
        (PLAIN.replace("END", "{{ eos_token }}"), None),
    ],
)  # fmt: skip
def test_a_template_without_an_end_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, template: str, learns: str | None
) -> None:
    with caplog.at_level(logging.WARNING):
        job(tmp_path, "a", {"prompt": "who", "response": "the sea"}, template=template)
    warned = [record.getMessage() for record in caplog.records if "ends a response" in record.getMessage()]
    if learns is None:
        assert warned == []
        return
    (warning,) = warned
    name = template if "{" not in template else f"{tmp_path}/mine.jinja"
    assert f"the chat template {name} ends a response with no control token of this tokenizer" in warning
    assert f"a model trained on it {learns}" in warning
    assert "take --sft-chat-template tulu or alpaca" in warning
    shown = inspect_job(preprocess_config(sft(tmp_path, "b", sft_chat_template=name)))
    assert f"warning     {warning}" in shown.lines


def test_a_configuration_made_in_python_names_its_dataset_sft(tmp_path: Path) -> None:
    settings = sft(tmp_path, "a")
    config = PreprocessConfig(**settings)
    assert config == preprocess_config(settings)
    assert config.json_keys == ["sft"]
    assert PreprocessConfig(**{**settings, "format": "text"}).json_keys == ["text"]
    assert not list(config.faults())
    (tmp_path / "talks.jsonl").write_text(json.dumps({"prompt": "who", "response": "the sea"}) + "\n")
    run(config)
    assert len(documents(f"{tmp_path}/a_sft_document")) == 1


def test_another_training_tokenizer_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        preprocess_config(
            sft(
                tmp_path, "a", edit_strategy="up_revise", prior="p",
                output_tokenizer_type="SentencePieceTokenizer", output_tokenizer_model=TOKENIZER,
            )
        )  # fmt: skip
    said = str(caught.value)
    assert "format sft writes the ids that the prior read" in said
    assert "give the training tokenizer as tokenizer_type and tokenizer_model, with a prior of that" in said
    assert "the model that is to be fine-tuned is one" in said
