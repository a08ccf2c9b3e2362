"""Chat templates: the text and the ids are transformers' own, and the responses are where they should be."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_tokedit.errors import TokenizerError
from megatron_tokedit.tokenizers import ChatTemplate, TemplateError, load_chat_template, load_tokenizer
from megatron_tokedit.tokenizers.chat_template import TEMPLATE_NAMES

DATA = Path(__file__).resolve().parents[1] / "data"
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": " How are you? "}
ASSISTANT = {"role": "assistant", "content": "Fine,\n\nthank you. \U0001f600 "}
BYE = [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye"}]
TALK = [SYSTEM, USER, ASSISTANT, *BYE]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
QWEN_LIKE = (  # earlier thoughts are left out
    "{% for m in messages %}<{{ m['role'] }}>{% if loop.last %}{{ m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def shipped(name: str) -> ChatTemplate:
    return load_chat_template(name, None, TOKENS, "the tokenizer")


def without_marks(template: ChatTemplate) -> ChatTemplate:
    source = re.sub(r"\{%-? (end)?generation -?%\}", "", template.source)
    return ChatTemplate("unmarked", source, template.special_tokens)


@pytest.mark.parametrize(
    ("name", "expected", "learned"),
    [
        (
            "tulu",
            "<|system|>\nBe brief.\n<|user|>\n How are you? \n<|assistant|>\nFine,\n\nthank you. "
            "\U0001f600 </s>\n<|user|>\nBye\n<|assistant|>\nBye</s>\n",
            ["Fine,\n\nthank you. \U0001f600 </s>", "Bye</s>"],
        ),
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n How are you? <|im_end|>\n"
            "<|im_start|>assistant\nFine,\n\nthank you. \U0001f600 <|im_end|>\n<|im_start|>user\nBye"
            "<|im_end|>\n<|im_start|>assistant\nBye<|im_end|>\n",
            ["Fine,\n\nthank you. \U0001f600 <|im_end|>", "Bye<|im_end|>"],
        ),
        (
            "alpaca",
            "Be brief.\n\n### Instruction:\n How are you? \n\n### Response:\nFine,\n\nthank you. \U0001f600 "
            "</s>\n\n### Instruction:\nBye\n\n### Response:\nBye</s>\n\n",
            ["Fine,\n\nthank you. \U0001f600 </s>", "Bye</s>"],
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\nHow are you?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
            "Fine,\n\nthank you. \U0001f600<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nBye<|eot_id|>",
            ["Fine,\n\nthank you. \U0001f600<|eot_id|>", "Bye<|eot_id|>"],
        ),
    ],
)
def test_shipped_templates(name, expected, learned):
    rendered = shipped(name).render(TALK)
    assert rendered.text == expected
    assert [rendered.text[slice(*span)] for span in rendered.turns.values()] == learned
    assert [rendered.text[slice(*span)] for span in rendered.contents] == [
        message["content"].strip() for message in TALK
    ]
    # what marks find is what rendering turn by turn finds, but for the line end that belongs to the template
    unmarked = without_marks(shipped(name)).render(TALK)
    assert (unmarked.text, unmarked.contents) == (rendered.text, rendered.contents)
    assert [span[0] for span in unmarked.turns.values()] == [span[0] for span in rendered.turns.values()]
    assert [unmarked.text[slice(*span)].rstrip("\n") for span in unmarked.turns.values()] == learned


def test_every_shipped_template_is_listed():
    folder = Path(load_chat_template.__code__.co_filename).parent / "chat_templates"
    assert sorted(path.stem for path in folder.iterdir()) == sorted(TEMPLATE_NAMES)


def test_a_template_without_prompt_for_the_response():
    rendered = ChatTemplate("mistral", MISTRAL, TOKENS).render([USER, ASSISTANT, *BYE])
    assert rendered.text == (
        "<s> [INST]  How are you?  [/INST] Fine,\n\nthank you. \U0001f600 </s> [INST] Bye [/INST] Bye</s>"
    )
    assert [rendered.text[slice(*span)] for span in rendered.turns.values()] == [
        "Fine,\n\nthank you. \U0001f600 </s>",
        "Bye</s>",
    ]


@pytest.mark.parametrize(
    ("source", "talk", "words"),
    [
        (MISTRAL, TALK, "refuses a conversation of system, user, assistant.*roles must alternate"),
        (
            "{% for m in messages %}{% if m['role'] in ['user', 'assistant'] %}{{ m['content'] }}"
            "{% endif %}{% endfor %}",
            TALK,
            r"does not show messages of the role system \(message 0\)",
        ),
        (
            "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}",
            [{"role": "system", "content": "Fin"}, USER, ASSISTANT],  # the response begins with it
            r"does not show messages of the role system \(message 0\)",
        ),
        (
            "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}",
            [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}],
            r"does not show tool calls of the role assistant \(message 1\)",
        ),
        (
            QWEN_LIKE,
            [USER, {"role": "assistant", "content": "<think>hm</think>Fine"}, *BYE],
            r"writes earlier turns differently when more follow \(turn 1, of the assistant\)",
        ),
        (
            "{% for m in messages %}{{ m['role'] + m['content'] | reverse }}{% endfor %}",
            [USER, ASSISTANT],
            "changes the text of the assistant's turn 1",
        ),
        ("{% for m in messages %}{{ m['speaker'] + 1 }}{% endfor %}", TALK, "refuses a conversation"),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}x{% endgeneration %}",
            TALK,
            "marks 1 generations in 2 turns of the assistant",
        ),
    ],
)
def test_templates_that_cannot_show_a_conversation_say_why(source, talk, words):
    with pytest.raises(TemplateError, match=f"the chat template mine .*{words}"):
        ChatTemplate("mine", source, TOKENS).render(talk)


def test_tools_must_be_shown():
    tools = [{"type": "function", "function": {"name": "add"}}]
    with pytest.raises(TemplateError, match="does not show the tools"):
        shipped("tulu").render([USER, ASSISTANT], tools)
    shows = "{{ tools | tojson if tools else '' }}" + MISTRAL
    rendered = ChatTemplate("mine", shows, TOKENS).render([USER, ASSISTANT], tools)
    assert rendered.text.startswith('[{"type": "function", "function": {"name": "add"}}]<s> [INST]')


@pytest.mark.parametrize(
    ("given", "source", "words"),
    [
        (None, None, "MODEL has no chat template; give --sft-chat-template with one of alpaca, chatml"),
        ("nonsense", None, "--sft-chat-template nonsense: cannot be read"),
        (None, "{% for %}", "the chat template tokenizer, line 1: "),
        (None, "{{ strftime_now('%d') }}", "writes the current date"),
        (None, "{{ pad_token }}", "writes pad_token, which MODEL does not have"),
    ],
)
def test_unusable_templates_are_refused(given, source, words):
    with pytest.raises(TokenizerError, match=words):
        load_chat_template(given, source, TOKENS, "MODEL")


def fast_tokenizers(families: dict[str, tuple[str, str]]) -> list[str]:
    return [model for kind, model in families.values() if kind == "HuggingFaceTokenizer"]


@pytest.mark.parametrize("name", ["tulu", "chatml", "alpaca"])
def test_ids_and_mask_are_those_of_transformers(families, name):
    seen = 0
    for model in fast_tokenizers(families):
        ours, theirs = load_tokenizer("HuggingFaceTokenizer", model), AutoTokenizer.from_pretrained(model)
        template = load_chat_template(name, None, ours.special_tokens, model)
        expected = theirs.apply_chat_template(
            TALK, chat_template=template.source, return_dict=True, return_assistant_tokens_mask=True
        )
        rendered = template.render(TALK)
        placed = ours.encode_chat(rendered.text, [])
        assert placed.ids_T.tolist() == expected["input_ids"]
        written_T = np.zeros(len(placed.ids_T), bool)
        for start, stop in rendered.turns.values():
            written_T |= (placed.ends_T > start) & (placed.ends_T <= stop)
        assert written_T.astype(int).tolist() == expected["assistant_masks"]
        seen += 1
    assert seen >= 4


def test_a_message_that_spells_control_tokens_is_split_as_transformers_does(families):
    talk = [{"role": "user", "content": "say <|im_end|> and\n<|endoftext|>!"}, ASSISTANT]
    for family in ("gpt2", "qwen"):
        model = families[family][1]
        theirs = AutoTokenizer.from_pretrained(model)
        splitting = load_tokenizer("HuggingFaceTokenizer", model, split_special_tokens=True)
        template = load_chat_template("chatml", None, splitting.special_tokens, model)
        rendered = template.render(talk)
        foreign = [
            match.span()
            for match in re.finditer(r"<\|im_end\|>|<\|endoftext\|>", rendered.text)
            if rendered.contents[0][0] <= match.start() < rendered.contents[0][1]
        ]
        assert len(foreign) == 2
        placed = splitting.encode_chat(rendered.text, foreign)
        expected = theirs.apply_chat_template(
            talk, chat_template=template.source, return_dict=True, sanitize_control_tokens=True
        )
        assert placed.ids_T.tolist() == expected["input_ids"]
        assert (np.diff(placed.starts_T) >= 0).all()
        assert splitting.decode(placed.ids_T) == rendered.text
        plain = load_tokenizer("HuggingFaceTokenizer", model).encode_chat(rendered.text, foreign)
        assert (
            plain.ids_T.tolist()
            == theirs.apply_chat_template(talk, chat_template=template.source, return_dict=True)["input_ids"]
        )
        assert plain.ids_T.tolist() != placed.ids_T.tolist()


def test_sentencepiece_makes_the_templates_control_pieces_tokens_and_leaves_those_of_a_message():
    tokenizer = load_tokenizer("SentencePieceTokenizer", str(DATA / "tiny_sentencepiece.model"))
    template = load_chat_template("tulu", None, tokenizer.special_tokens, "tiny")
    rendered = template.render([{"role": "user", "content": "a </s> b"}, ASSISTANT, *BYE])
    start = rendered.text.index("</s>")
    placed = tokenizer.encode_chat(rendered.text, [(start, start + 4)])
    ends = [rendered.text[:stop] for stop in placed.ends_T[placed.ids_T == tokenizer.eod]]
    assert len(ends) == 2
    assert [text.count("</s>") for text in ends] == [2, 3]
    assert tokenizer.decode(placed.ids_T) == rendered.text
    assert (placed.ends_T >= placed.starts_T).all()
    assert placed.ends_T[-1] == len(rendered.text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("ab \n\u00e9\u4e2d\U0001f600<|>/s"), min_size=1, max_size=40))
def test_places_cover_the_text(families, text):
    for kind, model in [
        *families.values(),
        ("SentencePieceTokenizer", str(DATA / "tiny_sentencepiece.model")),
    ]:
        if "word_piece" in model:
            continue  # leaves white space out
        placed = load_cached(kind, model).encode_chat(text, [])
        assert (np.diff(placed.starts_T) >= 0).all()
        assert (placed.starts_T >= 0).all()
        assert (placed.ends_T <= len(text)).all()
        covered = np.zeros(len(text), bool)
        for start, stop in zip(placed.starts_T, placed.ends_T, strict=True):
            covered[start:stop] = True
        missed = [character for character, is_covered in zip(text, covered, strict=True) if not is_covered]
        assert not [character for character in missed if not character.isspace()], model


_LOADED: dict[str, object] = {}


def load_cached(kind, model):
    if model not in _LOADED:
        _LOADED[model] = load_tokenizer(kind, model)
    return _LOADED[model]


def test_the_template_beside_a_sentencepiece_model_is_found(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((DATA / "tiny_sentencepiece.model").read_bytes())
    assert load_tokenizer("SentencePieceTokenizer", str(tmp_path)).chat_template is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "config"}')
    assert load_tokenizer("SentencePieceTokenizer", str(tmp_path)).chat_template == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    model = str(tmp_path / "tokenizer.model")
    assert load_tokenizer("SentencePieceTokenizer", model).chat_template == "file"
