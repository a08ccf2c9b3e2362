"""A conversation as a prompt, and where its reply ends: as the data say that a model is fine-tuned on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from generation_cases import TOKENIZERS, bigram_model

from megatron_tokedit.cli.preprocess_edit import main as preprocess
from megatron_tokedit.dataset import IndexedDataset
from megatron_tokedit.dataset.loss_mask import open_loss_mask
from megatron_tokedit.errors import ConfigError, TokenizerError
from megatron_tokedit.generation import Chat, GenerationSettings, TextModel, generate, open_chat
from megatron_tokedit.tokenizers import ChatTemplate, load_tokenizer, turn_end

LINES = """\
{%- for message in messages -%}
{{- ('User: ' if message['role'] == 'user' else 'Bot: ') + message['content'] + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Bot: ' -}}{%- endif -%}
"""
BARE_EOS = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% if m['role'] == 'assistant' %} \n"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where does the river </s> rise?"},
    {"role": "assistant", "content": "In the hills."},
    {"role": "user", "content": "And  then?\n"},
    {"role": "assistant", "content": "It falls into the caf\u00e9."},
]


class ScriptedDecoder:
    """Every row is continued with the same ids, whatever they are."""

    can_join = True

    def __init__(self, ids: Sequence[int], vocab_size: int) -> None:
        self.num_rows = 0
        self._logits_LV = torch.full((len(ids), vocab_size), -30.0)
        self._logits_LV[torch.arange(len(ids)), torch.tensor(ids)] = 30.0
        self._places: list[int] = []

    def add(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        self._places += [0] * len(prompts)
        return self._logits_LV[[0] * len(prompts)]

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        self._places = [place + 1 for place in self._places]
        return self._logits_LV[self._places]

    def keep(self, rows: Sequence[int]) -> None:
        self._places = [self._places[row] for row in rows]


def saying(model: TextModel, ids: Sequence[int]) -> TextModel:
    return dataclasses.replace(model, make_decoder=lambda: ScriptedDecoder(ids, model.vocab_size))


def template_of(source: str, tokenizer: str) -> ChatTemplate:
    return ChatTemplate("given", source, load_tokenizer(*TOKENIZERS[tokenizer]).special_tokens)


@pytest.mark.parametrize("tokenizer", list(TOKENIZERS))
@pytest.mark.parametrize("name", ["tulu", "alpaca", "lines.jinja"])
def test_a_prompt_is_how_the_conversation_of_a_dataset_begins(
    tmp_path: Path, tokenizer: str, name: str
) -> None:
    """Up to every response, token for token; also where a message spells a control token."""
    if name == "lines.jinja":
        (tmp_path / name).write_text(LINES)
        name = str(tmp_path / name)
    messages = TALK if name in ("tulu", "alpaca") else TALK[1:]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    kind, place = TOKENIZERS[tokenizer]
    code = preprocess([
        "--quiet", "--format", "sft", "--sft-chat-template", name, "--input", str(tmp_path / "talk.jsonl"),
        "--output-prefix", str(tmp_path / "out"), "--edit-strategy", "none", "--workers", "1",
        "--tokenizer-type", kind, "--tokenizer-model", place,
    ])  # fmt: skip
    assert code == 0
    dataset = IndexedDataset(f"{tmp_path}/out_sft_document")
    ids = np.concatenate(dataset.document(0)).tolist()
    mask = np.concatenate(open_loss_mask(dataset).document(0)).astype(int)
    begins = [i for i in np.flatnonzero(mask) if not mask[i - 1]]
    chat = open_chat(bigram_model(tokenizer), name)
    answered = [i for i, each in enumerate(messages) if each["role"] == "assistant"]
    assert len(begins) == len(answered) == 2
    for begin, index in zip(begins, answered, strict=True):
        assert chat.prompt(messages[:index]).ids == ids[:begin]


def test_what_ends_a_reply() -> None:
    tokenizer = load_tokenizer(*TOKENIZERS["sentencepiece"])
    model = bigram_model("sentencepiece")
    eos = tokenizer.eod
    for name in ("tulu", "alpaca"):
        end = turn_end(open_chat(model, name).template, tokenizer)
        assert (end.id, end.texts, end.before_id) == (eos, (), "")
    end = turn_end(open_chat(model, "chatml").template, tokenizer)
    assert (end.id, end.texts) == (None, ("<|im_end|>",)), "no control token of this tokenizer"
    end = turn_end(template_of(LINES, "sentencepiece"), tokenizer)
    assert (end.id, end.texts) == (None, ("\nUser:",)), "a line end can be part of a reply"
    end = turn_end(template_of(BARE_EOS, "sentencepiece"), tokenizer)
    assert (end.id, end.texts, end.before_id) == (eos, (), " \n")
    only_one = "{% if messages|length > 2 %}{{ raise_exception('no') }}{% endif %}" + BARE_EOS
    assert turn_end(template_of(only_one, "sentencepiece"), tokenizer).id == eos


def test_control_tokens_of_the_tokenizer_end_a_reply(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(TOKENIZERS["byte level"][1])
    loaded.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    loaded.save_pretrained(tmp_path)
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    model = dataclasses.replace(bigram_model("byte level"), tokenizer=tokenizer)
    chat = open_chat(model, "chatml")
    end = turn_end(chat.template, tokenizer)
    assert (end.id, end.texts, end.before_id) == (tokenizer.control_tokens["<|im_end|>"], (), "")
    assert chat.model.stop_ids == {end.id, tokenizer.eod}


@pytest.mark.parametrize(
    ("source", "written"),
    [
        (BARE_EOS, "in the hills \n</s> and more"),
        (LINES, "in the hills\nUser: what"),
        (LINES, "in the hills</s>"),
    ],
)
def test_a_reply_ends_where_the_template_ends_it(source: str, written: str) -> None:
    model = bigram_model("sentencepiece")
    ids = model.tokenizer.encode_chat(written, []).ids_T.tolist()
    chat = Chat(saying(model, [*ids, *ids]), template_of(source, "sentencepiece"))
    prompt = chat.prompt(TALK[1:2])
    settings = chat.settings(GenerationSettings(temperature=0.0, max_new_tokens=2 * len(ids)))
    (completion,) = generate(chat.model, [prompt], settings)
    assert chat.reply(completion)["content"].strip() == "in the hills"
    assert chat.reply(completion)["content"].rstrip() == chat.reply(completion)["content"]
    assert completion.finish == ("stop" if "User" in written else "eod")
    assert completion.prompt.messages == (TALK[1],)


def test_the_oldest_exchanges_leave_a_conversation_that_is_too_long() -> None:
    model = bigram_model("sentencepiece", max_positions=120)
    chat = open_chat(model, "tulu")
    talk = [TALK[0]]
    for number in range(6):
        talk += [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "yes"}]
    talk.append({"role": "user", "content": "the last"})
    prompt, num_left_out = chat.shortened(talk, max_new_tokens=20)
    assert num_left_out in (2, 4, 6, 8, 10), "whole exchanges"
    assert list(prompt.messages) == [talk[0], *talk[1 + num_left_out :]]
    assert len(prompt.ids) <= 100 < len(chat.prompt([talk[0], *talk[num_left_out - 1 :]]).ids)
    assert chat.shortened(talk[:4], max_new_tokens=1)[1] == 0
    long = [*talk[:-1], {"role": "user", "content": "why " * 200}]
    prompt, num_left_out = chat.shortened(long, max_new_tokens=20)
    assert (num_left_out, list(prompt.messages)) == (12, [long[0], long[-1]])
    with pytest.raises(ConfigError, match="takes at most 120"):
        list(generate(chat.model, [prompt], GenerationSettings()))


def test_templates_that_cannot_be_used(caplog: pytest.LogCaptureFixture) -> None:
    model = bigram_model("sentencepiece")
    with pytest.raises(TokenizerError, match="give --chat-template with one of alpaca"):
        open_chat(model)
    with pytest.raises(TokenizerError, match=r"--chat-template no\.jinja: cannot be read"):
        open_chat(model, "no.jinja")
    with pytest.raises(TokenizerError, match="does not show what the assistant says"):
        open_chat(dataclasses.replace(model, chat_template="nothing"))
    with pytest.raises(ConfigError, match="alpaca has no role tool; take another --chat-template"):
        open_chat(model, "alpaca").prompt([{"role": "tool", "content": "7"}])
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        open_chat(model, "alpaca").prompt([{"role": "user", "content": "a\udcff"}])
    taught = dataclasses.replace(model, chat_template=BARE_EOS, chat_template_name="mine")
    assert open_chat(taught).template.name == "mine"
    open_chat(taught, "tulu")
    assert "was taught another chat template (mine) than --chat-template tulu" in caplog.text
