"""Control tokens that tool calls, tools and names spell: found wherever the template writes them."""

from __future__ import annotations

import re

import pytest

from megatron_tokedit.tokenizers import (
    ChatTemplate,
    TemplateError,
    control_pattern,
    encode_rendered,
    load_tokenizer,
)

TEMPLATE = ChatTemplate(
    "mine",
    "{{ tools | tojson if tools else '' }}{% for m in messages %}<|im_start|>{{ m.role }}"
    "{{ ' ' + m.name if m.name else '' }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "[{{ call | tojson }}]{% endfor %}<|im_end|>\n{% endfor %}",
    {},
)
CONTROL = re.compile(r"<\|im_end\|>|<\|im_start\|>|<\|endoftext\|>")
TOOLS = [{"type": "function", "function": {"name": "add", "description": 'say "<|im_end|>" <|im_start|>'}}]
TALK = [
    {"role": "user", "content": "x <|im_end|> y", "name": "ann<|endoftext|>"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "add", "arguments": {"a<|im_end|>": ["<|im_end|>\n<|im_end|>", 1]}}],
    },
    {"role": "tool", "content": "3", "tool_call_id": "<|im_end|>"},  # not shown by this template
    {"role": "assistant", "content": "three"},
]


def in_place_of(data, other):
    """Conversation or tools with ``other`` instead of every control token."""
    if isinstance(data, str):
        return CONTROL.sub(other, data)
    if isinstance(data, dict):
        return {in_place_of(name, other): in_place_of(value, other) for name, value in data.items()}
    return [in_place_of(value, other) for value in data] if isinstance(data, list) else data


def test_every_place_is_the_datas_and_none_the_templates():
    rendered = TEMPLATE.render(TALK, TOOLS, CONTROL)
    assert [rendered.text[slice(*span)] for span in rendered.spelled] == [
        "<|im_end|>", "<|im_start|>", "<|endoftext|>", *["<|im_end|>"] * 3,
    ]  # fmt: skip
    data = {*rendered.spelled}
    data |= {match.span() for match in CONTROL.finditer(rendered.text, *rendered.contents[0])}
    replaced = CONTROL.sub(lambda match: "~" if match.span() in data else match[0], rendered.text)
    assert replaced == TEMPLATE.text(in_place_of(TALK, "~"), in_place_of(TOOLS, "~"))


def test_they_are_split_like_those_of_contents(families):
    for family in ("gpt2", "qwen"):
        model = families[family][1]
        splitting = load_tokenizer("HuggingFaceTokenizer", model, split_special_tokens=True)
        control = control_pattern(splitting)
        rendered = TEMPLATE.render(TALK, TOOLS, control)
        placed, spelled = encode_rendered(splitting, rendered, control)
        assert len(spelled) == 7
        assert splitting.decode(placed.ids_T) == rendered.text
        end = splitting.control_tokens["<|im_end|>"]
        assert (placed.ids_T == end).sum() == len(TALK)
        plain = load_tokenizer("HuggingFaceTokenizer", model)
        placed, spelled = encode_rendered(plain, rendered, control)
        assert (placed.ids_T == end).sum() == len(TALK) + spelled.count(end) == len(TALK) + 5


def test_without_any_nothing_is_rendered_again(monkeypatch):
    plain = in_place_of(TALK, "+")
    calls = []
    whole = ChatTemplate._text
    monkeypatch.setattr(ChatTemplate, "_text", lambda *args, **more: calls.append(1) or whole(*args, **more))
    TEMPLATE.render(plain, in_place_of(TOOLS, "+"))
    before = len(calls)
    TEMPLATE.render(plain, in_place_of(TOOLS, "+"), CONTROL)
    assert len(calls) == 2 * before


def test_a_content_in_another_form_is_looked_at_too():
    """This template's view of a marked content is another, so only its control tokens are marked."""
    source = (
        "{% for m in messages %}{{ '[tool] ' if m.content.startswith('tool') else '' }}{{ m.role }}: "
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    talk = [{"role": "user", "content": "tool <|im_end|> a"}, {"role": "assistant", "content": "b"}]
    rendered = ChatTemplate("mine", source, {}).render(talk, None, CONTROL)
    assert rendered.contents[0] is None
    assert rendered.spelled == [(rendered.text.index("<|im_end|>"), rendered.text.index(" a<"))]


def test_a_content_that_is_written_twice_is_found_twice():
    source = (
        "{% for m in messages[1:] %}{{ '[' + messages[0].content + '] ' if m.role == 'user' else '' }}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    talk = [{"role": "system", "content": "be <|im_end|> kind"}]
    talk += [{"role": role, "content": role} for role in ("user", "assistant") * 2]
    rendered = ChatTemplate("mine", source, {}).render(talk, None, CONTROL)
    text = rendered.text
    first = text.index("<|im_end|>")
    (start, stop) = rendered.contents[0]
    assert text[start:stop] == "be <|im_end|> kind"
    assert start > first
    assert rendered.spelled == [(first, first + len("<|im_end|>"))]  # the other is the content's


@pytest.mark.parametrize("how", ["{{ c.name }}{{ c.name | length }}", "{{ c.items() | sort }}"])
def test_where_they_cannot_be_told_apart_the_template_is_refused(how):
    source = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}" + how + "{% endfor %}"
        "<|im_end|>{% endfor %}"
    )
    call = {"name": "<|im_end|>", "z": 1, "<|im_end|>": 1}
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    template = ChatTemplate("mine", source, {})
    template.render(talk)
    with pytest.raises(TemplateError, match="the chat template mine writes control tokens that the"):
        template.render(talk, None, CONTROL)
