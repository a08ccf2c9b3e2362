"""``tools/generate.py --chat``: messages in, replies out, on a terminal and in JSON lines."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

from megatron_tokedit.cli.generate import main
from megatron_tokedit.corpus.conversations import parse_conversation
from megatron_tokedit.generation import load_text_model, open_chat
from megatron_tokedit.testing.models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "generation"))
TEMPLATES = ROOT / "megatron_tokedit" / "tokenizers" / "chat_templates"
TALK = {
    "messages": [
        {"role": "user", "content": "the river"},
        {"role": "assistant", "content": "in the hills"},
        {"role": "user", "content": "and then"},
    ]
}


def save(folder: str, more: dict) -> None:
    import generation_cases

    model = tiny_llama(init_method_std=0.3, seq_length=256)
    generation_cases.save_checkpoint(folder, model, "sentencepiece", more=more)


@pytest.fixture(scope="module")
def taught(ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was fine-tuned in a template."""
    folder = tmp_path_factory.mktemp("taught")
    state = {"chat_template": (TEMPLATES / "tulu.jinja").read_text(), "chat_template_name": "tulu"}
    ranks.run(save, str(folder), state, world_size=1)
    return folder


@pytest.fixture(scope="module")
def untaught(ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untaught")
    ranks.run(save, str(folder), {}, world_size=1)
    return folder


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    file = tmp_path / "talks.jsonl"
    mine = {"messages": [{"role": "system", "content": "my own"}, TALK["messages"][0]]}
    shared = {"conversations": [{"from": "human", "value": "what"}]}
    records = [{"prompt": "the river"}, TALK, mine, shared]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def answer(checkpoint: Path, *arguments: str, code: int = 0) -> None:
    command = ["--quiet", "--chat", "--checkpoint", str(checkpoint), "--max-new-tokens", "10", *arguments]
    assert main(command) == code


def test_conversations_of_a_file(taught: Path, talks: Path, tmp_path: Path) -> None:
    """Each with its reply, as records that preprocessing reads."""
    output = tmp_path / "out.jsonl"
    arguments = ["--prompt-file", str(talks), "--system", "be brief", "--output", str(output)]
    answer(taught, *arguments, "--num-samples", "2")
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(record["prompt_index"], record["sample"]) for record in records] == [
        (prompt, sample) for prompt in range(4) for sample in range(2)
    ]
    for record in records:
        *before, reply = parse_conversation(record).messages
        assert (reply.role, reply.content) == ("assistant", record["completion"])
        assert before[0].content == ("my own" if record["prompt_index"] == 2 else "be brief")
    assert records[2]["messages"][1:-1] == TALK["messages"]
    assert records[2]["prompt"] == (
        "<|system|>\nbe brief\n<|user|>\nthe river\n<|assistant|>\nin the hills</s>\n<|user|>\nand then\n"
        "<|assistant|>\n"
    )
    model = load_text_model(taught, device="cpu")
    prompt = open_chat(model).prompt(records[2]["messages"][:-1])
    assert prompt.text == records[2]["prompt"]
    assert len(prompt.ids) == records[2]["num_prompt_tokens"]
    assert prompt.ids[0] != model.start_id, "nothing stands before a conversation"


def test_a_stopped_file_goes_on_in_its_template_only(
    taught: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from megatron_tokedit.cli.generate_output import LinesFile

    output = tmp_path / "out.jsonl"
    arguments = ["--prompt-file", str(talks), "--output", str(output)]
    answer(taught, *arguments)
    whole = output.read_bytes()
    output.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(LinesFile, "finish", lambda self: None)
        answer(taught, *arguments)
    partial = tmp_path / "out.jsonl.partial"
    os.truncate(partial, 2 * len(whole) // 3)
    answer(taught, *arguments, "--chat-template", "alpaca", code=1)
    assert "was begun with other settings" in capsys.readouterr().err
    answer(taught, *arguments)
    assert output.read_bytes() == whole


def test_replies_on_standard_output(taught: Path, untaught: Path, capsys) -> None:
    answer(taught, "--prompt", "the river", "--temperature", "0")
    shown = capsys.readouterr().out
    answer(taught, "--prompt", "the river", "--temperature", "0", "--output", "-")
    record = json.loads(capsys.readouterr().out)
    assert record["messages"] == [
        {"role": "user", "content": "the river"},
        {"role": "assistant", "content": shown.removesuffix("\n")},
    ]
    answer(untaught, "--prompt", "the river", "--temperature", "0", "--chat-template", "tulu")
    assert capsys.readouterr().out == shown, "the same weights and template"
    answer(untaught, "--prompt", "the river", code=1)
    assert "records no chat template" in capsys.readouterr().err


def test_a_conversation(taught: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """What the model is given at every turn is what was said."""
    given: list[list[tuple[str, str]]] = []

    class Watching(open_chat.__globals__["Chat"]):
        def shortened(self, messages, max_new_tokens):
            given.append([(each["role"], each["content"]) for each in messages])
            return super().shortened(messages, max_new_tokens)

    monkeypatch.setitem(open_chat.__globals__, "Chat", Watching)
    said = (
        ":again\nthe river\nand\\nthen\n:again\n:system be brief\nwhy\n \n:set temperature 0\n:reset\nwhat\n"
    )
    long = "river " * 300 + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(said + long + "so\n:nonsense\n:quit\nnever\n"))
    answer(taught, "--interactive")
    shown = capsys.readouterr()
    assert "there is no message to answer yet" in shown.err
    assert [len(messages) for messages in given] == [1, 3, 3, 6, 2, 4, 4]
    assert given[1][::2] == [("user", "the river"), ("user", "and\nthen")]
    assert given[1] == given[2], ":again answers the same conversation"
    assert given[3][0] == ("system", "be brief")
    assert given[3][1:4] == given[2]
    assert given[3][4][0] == "assistant"
    assert given[3][5] == ("user", "why")
    assert given[4] == [("system", "be brief"), ("user", "what")], "after :reset"
    assert "takes at most 256" in shown.err
    assert given[6][-1] == ("user", "so")
    assert given[5][:3] == given[6][:3], "a message that does not fit is not in the conversation"
    assert "the oldest 2 messages are left out: the model takes 256 tokens" in shown.err
    assert shown.err.count(":reset") == 2
    assert "temperature" in shown.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": TALK["messages"][:2]}, "talks.jsonl:2: the last message is the assistant's"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "talks.jsonl:2: messages[0]: 'role' is 'robot'"),
        ({"messages": []}, "talks.jsonl:2: 'messages' is empty"),
        ({"text": "a"}, "talks.jsonl:2: has no text under the key 'prompt'"),
        ({"prompt": "river " * 300}, "prompt 1: has "),
    ],
)
def test_lines_that_are_no_conversation(taught: Path, talks: Path, capsys, line: dict, message: str) -> None:
    talks.write_text('{"prompt": "a"}\n' + json.dumps(line) + "\n")
    answer(taught, "--prompt-file", str(talks), code=1)
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", "a", "--system", "b"],
        ["--prompt", "a", "--chat-template", "tulu"],
        ["--chat", "--prompt", "a", "--ignore-eod"],
        ["--chat", "--prompt", "a", "--no-document-start"],
        ["--chat", "--interactive", "--num-samples", "2"],
        ["--chat", "--interactive", "--output", "x"],
    ],
)
def test_flags_that_contradict_each_other(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--checkpoint", "x", *arguments])
    assert end.value.code == 2
