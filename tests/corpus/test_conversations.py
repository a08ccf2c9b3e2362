"""Records of instruction data: every layout gives its messages, and what is wrong with a record is said."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_tokedit.corpus import BadRecord, ConversationLayout, Message, plan_units, read_unit
from megatron_tokedit.corpus.conversations import Conversation, num_utf8_bytes, parse_conversation
from megatron_tokedit.errors import DataFormatError

HI = (Message("user", "hi"), Message("assistant", "hello"))
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "hi", "response": "hello"},
        {"prompt": "hi", "completion": "hello", "id": 3},
        {"question": "hi", "answer": "hello"},
        {"instruction": "hi", "input": "", "output": "hello"},
        {"instruction": "hi", "output": "hello"},
        {"instruction": "hi", "instances": [{"input": "", "output": "hello"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                {"role": "assistant", "content": "hello"},
            ],
            "prompt": "the messages count",
        },
    ],
)
def test_layouts_are_told_by_their_keys(record):
    assert parse_conversation(record) == Conversation(HI)


def test_input_and_history_and_system_of_alpaca():
    record = {
        "instruction": "add",
        "input": "1 and 2",
        "output": "3",
        "system": "be exact",
        "history": [["hi", "hello"]],
    }
    assert parse_conversation(record).messages == (
        Message("system", "be exact"),
        *HI,
        Message("user", "add\n\n1 and 2"),
        Message("assistant", "3"),
    )


def test_tools_and_their_calls_are_kept():
    tools = [{"type": "function", "function": {"name": "add"}}]
    record = {
        "tools": json.dumps(tools),
        "messages": [
            {"role": "developer", "content": "you add"},
            {"role": "user", "content": "1+1"},
            {"role": "assistant", "content": None, "tool_calls": CALL},
            {"role": "tool", "content": "2", "tool_call_id": "x"},
            {"role": "assistant", "content": "two"},
        ],
    }
    conversation = parse_conversation(record)
    assert [message.role for message in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert conversation.messages[2] == Message("assistant", "", {"tool_calls": CALL})
    assert conversation.messages[2].says_something
    assert conversation.messages[3].fields == {"tool_call_id": "x"}
    assert conversation.tools == tools


def test_named_keys():
    record = {"q": "hi", "a": "hello", "s": "be brief", "context": "now"}
    keys = {"prompt": "q", "response": "a", "system": "s", "input": "context"}
    assert parse_conversation(record, keys=keys).messages == (
        Message("system", "be brief"),
        Message("user", "hi\n\nnow"),
        Message("assistant", "hello"),
    )
    turns = {"dialogue": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    assert parse_conversation(turns, keys={"messages": "dialogue"}).messages == HI


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "hi"}, "no known layout of a conversation; keys of this line: 'text'; name them"),
        ({"prompt": "hi"}, "no known layout"),
        ({"prompt": "hi", "response": 3}, "'response' must be a string, got a number"),
        ({"prompt": None, "response": "x"}, "no known layout"),
        ({"instruction": ["hi"], "output": "x"}, "'instruction' must be a string, got a list"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "hi"}, "'messages' must be a list of messages, got a string"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object, got a string"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no message of the assistant"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "wizard", "content": "b"}]},
            r"messages\[1\]: 'role' is 'wizard'; known roles are system, user",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, r"messages\[0\]: 'content' must be a str"),
        ({"messages": [{"content": "b"}]}, "'role' is None"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "has a part of type 'image'; only text",
        ),
        ({"conversations": [{"from": "gpt", "value": 1}]}, "'value' must be a string, got a number"),
        ({"instruction": "a", "instances": []}, "'instances' must be a list of one object, got 0"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "'history' must be a list of pairs"),
        ({"prompt": "a", "response": "b", "tools": "[{"}, "'tools' is a string that is not valid JSON"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(record, reason):
    with pytest.raises(BadRecord, match=reason):
        parse_conversation(record)


@pytest.mark.parametrize("where", ["content", "name", "tool_calls", "tools"])
def test_half_a_surrogate_pair_is_found_wherever_a_template_may_write_it(where):
    value = [{"function": {"name": "\ud800"}}] if where.startswith("tool") else "\ud800"
    message = {"role": "user", "content": "q"} | ({} if where == "tools" else {where: value})
    record = {"messages": [message, {"role": "assistant", "content": "a"}]}
    conversation = parse_conversation(record | ({"tools": value} if where == "tools" else {}))
    with pytest.raises(BadRecord, match="half of a surrogate pair"):
        num_utf8_bytes(conversation)


def test_a_forced_layout_is_not_guessed():
    record = {"messages": [{"role": "user", "content": "a"}], "prompt": "hi", "response": "hello"}
    assert parse_conversation(record, "prompt_response").messages == HI
    with pytest.raises(BadRecord, match="key 'instruction' is missing"):
        parse_conversation(record, "alpaca")


def read(path, layout=None):
    _, units = plan_units([str(path)])
    bad: list[str] = []
    layout = layout or ConversationLayout()
    documents = [
        document
        for unit in units
        for document in read_unit(unit, layout, on_bad=lambda line: bad.append(str(line)))
    ]
    return documents, bad


def test_lines_and_rows_are_read_alike(tmp_path):
    records = [
        {"messages": [{"role": "user", "content": "h\u00e9"}, {"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": "nobody answers"}]},
        {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "y"}]},
    ]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in records) + "[1]\n")
    rows = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), rows)
    from_lines, bad_lines = read(lines)
    from_rows, bad_rows = read(rows)
    assert [document.conversation for document in from_lines] == [each.conversation for each in from_rows]
    assert [document.line for document in from_lines] == [1, 3]
    assert from_lines[0].num_bytes == 4
    assert bad_lines == [
        f"{lines}:2: the conversation has no message of the assistant, so there is nothing to learn",
        f"{lines}:4: a JSON object is expected, got a list",
    ]
    assert bad_rows == [bad_lines[0].replace("jsonl", "parquet")]


def test_text_and_tables_without_conversations_are_refused(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one line that is certainly long enough to be taken for a document of its own, yes\n")
    with pytest.raises(DataFormatError, match=r"a\.txt: a text file holds no conversations"):
        read(text)
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"q": ["a"], "r": ["b"]}), table)
    with pytest.raises(DataFormatError, match="no column holds a conversation; its columns are q, r; name"):
        read(table)
    documents, _ = read(table, ConversationLayout(keys={"prompt": "q", "response": "r"}))
    assert documents[0].conversation.messages == (Message("user", "a"), Message("assistant", "b"))
