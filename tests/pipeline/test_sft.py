"""Preprocessing conversations: masks token for token, edits of responses alone, restarts, undo, refusals."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipeline_cases import VOCAB_SIZE, WORDS
from sft_cases import (
    CONTEXT,
    SUFFIXES,
    documents,
    editing,
    files,
    reference,
    sft,
    talk,
    write_conversations,
)
from transformers import AutoModelForCausalLM

from megatron_tokedit.cli.inspect_dataset import main as inspect_main
from megatron_tokedit.config.preprocess import preprocess_config
from megatron_tokedit.dataset import (
    DROPPED,
    IndexedDataset,
    Journal,
    read_manifest,
    undo_dataset,
    verify_dataset,
)
from megatron_tokedit.dataset.undo import undo_document
from megatron_tokedit.errors import ConfigError, DataFormatError, PlanError, TokenizerError
from megatron_tokedit.pipeline import inspect_job, run
from megatron_tokedit.testing.models import write_hf_llama


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return write_hf_llama(
        tmp_path_factory.mktemp("p") / "llama", vocab_size=VOCAB_SIZE, max_position_embeddings=256
    )


@pytest.fixture
def folder(tmp_path):
    write_conversations(tmp_path / "talks.jsonl")
    return tmp_path


def job(folder, name, changes=None, **options):
    run(preprocess_config(sft(folder, name, **(changes or {}))), **options)
    return f"{folder}/{name}_sft_document"


def statistics(prefix):
    return orjson.loads(Path(f"{prefix}.stats.json").read_bytes())


def write(folder, *records):
    (folder / "talks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_ids_and_masks_token_for_token_in_every_layout(tmp_path):
    messages = [
        {"role": "system", "content": "be the river"},
        {"role": "user", "content": "who counts \U0001f600 stones ?"},
        {"role": "assistant", "content": "nobody Caf\u00e9 \U0001f600 counts"},
        {"role": "tool", "content": "hills"},
        {"role": "assistant", "content": "falls"},
    ]
    pair = [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "def add"}]
    exchange = {"prompt": "the sea", "response": "def add"}
    write(
        tmp_path,
        {"messages": messages},
        {"conversations": [{"from": each["role"], "value": each["content"]} for each in messages]},
        exchange,
        {"instruction": "the sea", "input": "", "output": "def add"},
    )
    found = documents(job(tmp_path, "a"))
    for (ids, mask), expected in zip(found, [messages, messages, pair, pair], strict=True):
        expected_ids, expected_mask, _ = reference(expected)
        assert ids.tolist() == expected_ids
        assert mask.tolist() == expected_mask
        assert 0 < mask.sum() < len(mask)


def test_what_is_counted(folder, caplog):
    with caplog.at_level(logging.WARNING):
        prefix = job(folder, "a")
    report = verify_dataset(prefix)
    stats = statistics(prefix)
    assert stats["documents"] == {
        "in": 24,
        "out": 22,
        "dropped": {"bad_line": 0, "no_response": 1, "too_long": 1},
        "unedited": {},
    }
    assert report.num_documents == 22
    counted = stats["conversations"]
    found = documents(prefix)
    assert counted["loss_tokens"] == sum(int(mask.sum()) for _, mask in found)
    assert sum(role["tokens"] for role in counted["roles"].values()) == report.num_tokens
    assert counted["messages_cut_after"] == 1
    assert counted["roles"]["assistant"]["tokens"] + counted["responses"] <= counted["loss_tokens"] + 5
    manifest = read_manifest(prefix)
    assert manifest.counts["num_loss_tokens"] == counted["loss_tokens"]
    assert manifest.conversation.chat_template_name == "tulu"
    assert "<|" in manifest.conversation.chat_template
    assert "1 of 24 conversations have an empty response; dropped" in caplog.text
    assert "1 of 24 conversations are longer than the limit (--sft-max-tokens" in caplog.text
    assert "1 messages after the last response" in caplog.text


def test_truncation_cuts_whole_turns_from_the_left(tmp_path, caplog):
    rng = random.Random(3)
    long = talk(rng, 9, system=True)
    alone = [{"role": "user", "content": "the " * 150}, {"role": "assistant", "content": "sea"}]
    write(tmp_path, {"messages": long}, {"messages": alone}, {"messages": talk(rng, 1)})
    prefix = job(tmp_path, "a", {"sft_too_long": "truncate", "sft_max_tokens": 120})
    (ids, mask), _ = documents(prefix)
    # the longest tail of exchanges that fits, with the system message
    for begin in range(3, len(long), 2):
        expected_ids, expected_mask, _ = reference([long[0], *long[begin:]])
        if len(expected_ids) <= 120:
            break
    assert begin < len(long) - 2
    assert ids.tolist() == expected_ids
    assert mask.tolist() == expected_mask
    stats = statistics(prefix)
    assert stats["documents"]["dropped"] == {"bad_line": 0, "too_long_even_truncated": 1}
    assert stats["conversations"]["truncated"] == 1
    assert stats["conversations"]["messages_cut_before"] == begin - 1


def test_edits_touch_responses_alone_and_are_undone(folder, prior):
    plain, edited = job(folder, "plain"), job(folder, "edited", editing(prior))
    touched = 0
    spoken = [reference(each)[2] for each in conversations(folder)]
    for (before, before_mask), (after, after_mask), response in zip(
        documents(plain), documents(edited), spoken, strict=True
    ):
        assert before_mask.tolist() == after_mask.tolist()
        different = np.flatnonzero(before != after)
        assert all(response[position] for position in different)
        touched += len(different)
    assert touched > 40
    assert verify_dataset(edited).checksums_verified
    undo_dataset(edited, f"{folder}/undone_sft_document")
    assert files(folder, "undone") == files(folder, "plain")
    verify_dataset(f"{folder}/undone_sft_document")
    edit = statistics(edited)["edit"]
    assert edit["tokens"] == sum(map(sum, spoken))
    assert edit["changed"] == touched
    assert edit["scored"] == edit["tokens"]
    assert sum(edit["p_histogram_10"]) == edit["tokens"]


def conversations(folder):
    """The messages that the job ``plain`` writes, by an obvious way."""
    found = []
    for line in (folder / "talks.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "messages" in record:
            messages = record["messages"]
        elif "conversations" in record:
            messages = [{"role": each["from"], "content": each["value"]} for each in record["conversations"]]
        else:
            prompt, response = record.get("prompt", record.get("instruction")), record.get("response")
            response = response or record.get("output", "")
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        if messages[-1]["role"] == "user":
            messages = messages[:-1]
        if messages[-1]["content"].strip() and len(reference(messages)[0]) <= CONTEXT:
            found.append(messages)
    return found


def test_dropped_tokens_leave_the_mask_aligned(folder, prior):
    plain = job(folder, "plain")
    changes = editing(prior, edit_strategy="low_drop_up_revise", edit_low_threshold=0.0028)
    edited = job(folder, "edited", changes | {"edit_generations": 2})
    first = f"{folder}/edited_sft_generation1_document"
    assert statistics(first)["edit"]["dropped"] > 0
    for prefix in (first, edited):
        journal = Journal(f"{prefix}.edits")
        for index, ((before, before_mask), (after, after_mask)) in enumerate(
            zip(documents(plain), documents(prefix), strict=True)
        ):
            entries = journal.entries(index)
            assert undo_document([after], entries)[0].tolist() == before.tolist()
            kept = np.ones(len(before), bool)
            kept[entries.positions[entries.kinds == DROPPED]] = False
            assert before_mask[kept].tolist() == after_mask.tolist()
        verify_dataset(prefix)
        undo_dataset(prefix, f"{prefix}_undone")
        undone = [Path(f"{prefix}_undone{suffix}").read_bytes() for suffix in SUFFIXES]
        assert undone == files(folder, "plain")


def logprobs(prior, ids):
    model = AutoModelForCausalLM.from_pretrained(prior).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[1, *ids[:-1]]])).logits[0]  # 1: BOS, which the prior's tokenizer has
    return torch.log_softmax(logits.double(), -1)[range(len(ids)), ids].numpy()


@pytest.mark.parametrize("alone", [False, True])
def test_p_of_a_response_is_that_of_the_forward_pass(tmp_path, prior, alone):
    """Given the whole conversation; or, where that is asked for, of the response by itself."""
    messages = talk(random.Random(5), 3, system=True)
    write(tmp_path, {"messages": messages})
    prefix = job(tmp_path, "a", editing(prior, sft_score_without_prompt=alone))
    ids, _, response = reference(messages)
    numbered = np.cumsum(np.diff([0, *map(int, response)]) == 1) * response
    expected = logprobs(prior, ids)[np.array(response)]
    apart = np.concatenate([logprobs(prior, list(np.array(ids)[numbered == each])) for each in (1, 2, 3)])
    assert np.abs(expected - apart).max() > 0.01
    stats = statistics(prefix)["edit"]
    wanted = apart if alone else expected
    assert stats["scored"] == len(wanted)
    assert stats["perplexity"] == pytest.approx(float(np.exp(-wanted.mean())), rel=1e-5)
    histogram = np.bincount(np.minimum((np.exp(wanted) * 100).astype(int), 99), minlength=100)
    assert np.abs(histogram - stats["p_histogram_100"]).sum() <= 2
    first_of_each = np.array([np.flatnonzero(numbered == each)[0] for each in (1, 2, 3)])
    eligible = np.exp(wanted) >= 0.003
    places = np.flatnonzero(response)
    if alone:
        eligible &= ~np.isin(places, first_of_each)
    assert stats["eligible"] == int(eligible.sum())
    assert read_manifest(prefix).edit["score_without_prompt"] is alone
    roles = statistics(prefix)["conversations"]["roles"]
    assert roles["assistant"]["perplexity"] == pytest.approx(stats["perplexity"], rel=1e-5)
    assert (roles["user"]["perplexity"] is None) == alone


def test_scoring_with_and_without_the_prompt_edits_differently(folder, prior):
    job(folder, "given", editing(prior))
    job(folder, "alone", editing(prior, sft_score_without_prompt=True))
    given_it, alone = files(folder, "given"), files(folder, "alone")
    assert given_it[0] != alone[0]
    assert given_it[1:] == alone[1:]
    verify_dataset(f"{folder}/alone_sft_document")


def test_workers_units_and_restarts_give_the_same_bytes(folder, prior):
    changes = editing(prior, edit_strategy="low_drop_up_revise", edit_low_threshold=0.0028)
    suffixes = (*SUFFIXES, ".edits")
    job(folder, "one", changes)
    job(folder, "two", changes | {"workers": 2})
    job(folder, "big", changes | {"unit_documents": 1000})
    assert files(folder, "one", (*suffixes, ".manifest.json")) == files(
        folder, "two", (*suffixes, ".manifest.json")
    )
    assert files(folder, "one", suffixes) == files(folder, "big", suffixes)
    job(folder, "again", changes, stage="edit")
    units = sorted(folder.glob("again.work/units/*/*.json"))
    assert len(units) == 5
    for part in units[2].parent.glob(f"{units[2].stem}_*"):
        part.unlink()
    units[2].unlink()
    job(folder, "again", changes)
    assert files(folder, "again", suffixes) == files(folder, "one", suffixes)


def test_a_damaged_mask_is_found(folder, prior, capsys):
    prefix = job(folder, "a", editing(prior))
    mask = np.fromfile(f"{prefix}_loss_mask.bin", np.uint8)
    mask[:] = 0
    mask.tofile(f"{prefix}_loss_mask.bin")
    with pytest.raises(DataFormatError) as caught:
        verify_dataset(prefix)
    assert "_loss_mask.bin: SHA-256 is" in str(caught.value)
    assert "document 0 has no token that counts in the loss" in str(caught.value)
    Path(f"{prefix}_loss_mask.idx").unlink()
    with pytest.raises(DataFormatError, match=r"_loss_mask\.idx: is missing, but the manifest names it"):
        verify_dataset(prefix)
    with pytest.raises(DataFormatError, match=r"_loss_mask\.bin, .*: there already, and nothing is"):
        undo_dataset(prefix, prefix)
    assert inspect_main(["verify", prefix]) == 1


def test_merged_and_shown(folder, prior, capsys):
    a, b = job(folder, "a", editing(prior)), job(folder, "b", editing(prior, unit_documents=3))
    assert inspect_main(["merge", f"{folder}/ab", a, b]) == 0
    assert inspect_main(["verify", f"{folder}/ab"]) == 0
    assert len(documents(f"{folder}/ab")) == 44
    both = orjson.loads((folder / "ab.stats.json").read_bytes())["conversations"]
    assert both["loss_tokens"] == 2 * statistics(a)["conversations"]["loss_tokens"]
    assert both["roles"]["assistant"]["perplexity"] == pytest.approx(statistics(a)["edit"]["perplexity"])
    capsys.readouterr()
    assert inspect_main(["show", a]) == 0
    assert "template    tulu; conversations of up to 200 tokens, else drop" in capsys.readouterr().out
    plain = job(folder, "plain")
    assert inspect_main(["show", plain, "--document", "0"]) == 0
    shown = capsys.readouterr().out
    first = conversations(folder)[0]
    assert f">>>{first[-1]['content']}</s><<<" in shown
    assert f"<|user|>\n{first[-2]['content']}\n" in shown
    assert inspect_main(["show", plain, "--document", "0", "--tokens"]) == 0
    marked = [line for line in capsys.readouterr().out.splitlines() if line.startswith(" |")]
    assert len(marked) == int(documents(plain)[0][1].sum())
    text = folder / "text.jsonl"
    text.write_text('{"text": "the river rises in hills"}\n')
    changes = {"input": [str(text)], "output_prefix": str(folder / "text"), "format": "text"}
    of_text = {key: value for key, value in sft(folder, "t").items() if not key.startswith("sft_")} | changes
    run(preprocess_config(of_text))
    assert inspect_main(["merge", f"{folder}/mixed", a, f"{folder}/text_text_document"]) == 1
    assert "cannot be one dataset" in capsys.readouterr().err


def test_a_template_that_lacks_a_role_stops_the_job_at_the_line(tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role + m.content }}{% endif %}{% endfor %}"
    )
    rng = random.Random(1)
    write(tmp_path, {"messages": talk(rng, 1)}, {"messages": talk(rng, 1, system=True)})
    changes = {"sft_chat_template": str(template)}
    with pytest.raises(DataFormatError) as caught:
        job(tmp_path, "a", changes)
    assert (
        f"{tmp_path}/talks.jsonl:2: the chat template {template} does not show messages of the role system"
        in (str(caught.value))
    )
    prefix = job(tmp_path, "b", changes | {"max_bad_lines": 1})
    stats = statistics(prefix)
    assert stats["documents"]["in"] == 2
    assert stats["documents"]["dropped"]["bad_line"] == 1
    assert stats["bytes"]["in"] == stats["bytes"]["out"] + sum(stats["bytes"]["dropped"].values())
    assert IndexedDataset(prefix).num_documents == 1


def test_control_tokens_in_messages(tmp_path):
    write(tmp_path, {"prompt": "the <sep> river", "response": "rises <sep> in hills"})
    plain = job(tmp_path, "encode")
    ((ids, _),) = documents(plain)
    assert (ids == 4).sum() == 2
    assert statistics(plain)["special_tokens_in_text"] == {"<sep>": 2}
    with pytest.raises(
        DataFormatError, match=r"talks.jsonl:1: a message of the role user spells the control "
    ):
        job(tmp_path, "error", {"special_tokens_in_text": "error"})
    with pytest.raises(TokenizerError, match="user-defined pieces"):
        job(tmp_path, "split", {"special_tokens_in_text": "split"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"append_eod": True}, "append_eod: with format sft the chat template ends the responses"),
        ({"json_keys": ["prompt"]}, "json_keys: format sft reads whole records"),
        ({"sft_keys": {"prompt": "a"}}, "expected messages=KEY, or both prompt=KEY and response=KEY"),
        ({"sft_keys": {"question": "a"}}, "'question' is no part of a conversation"),
        (
            {"sft_keys": {"prompt": "a", "response": "b"}, "sft_format": "alpaca"},
            "sft_format=alpaca: sft_keys takes its place",
        ),
        ({"sft_score_without_prompt": True}, "edit_strategy none scores nothing"),
        ({"format": "text", "json_keys": ["text"]}, "sft_chat_template: is for format sft"),
        (
            {
                "output_tokenizer_type": "SentencePieceTokenizer",
                "output_tokenizer_model": "x",
                "edit_strategy": "up_revise",
                "prior": "p",
            },
            "format sft writes the ids that the prior read",
        ),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        preprocess_config(sft(tmp_path, "a", **changes))


def test_a_limit_beyond_the_prior_and_a_changed_template_are_refused(folder, prior):
    with pytest.raises(ConfigError, match="sft_max_tokens=201: the prior sees 200 tokens at a time"):
        job(folder, "a", editing(prior, sft_max_tokens=201))
    job(folder, "a")
    with pytest.raises(PlanError, match=r"conversation\.chat_template: recorded '"):
        job(folder, "a", {"sft_chat_template": "alpaca"})


def test_a_dry_run_shows_the_first_conversation(folder, prior):
    report = inspect_job(preprocess_config(sft(folder, "a", **editing(prior))))
    assert not report.problems
    shown = "\n".join(report.lines)
    first = conversations(folder)[0]
    assert f">>>{first[-1]['content']}</s><<<" in shown
    assert f"{folder}/a_sft_document_loss_mask.{{bin,idx}}" in shown
    assert "response tokens" in shown
    assert not list(folder.glob("a*"))
    chatml = inspect_job(preprocess_config(sft(folder, "a", sft_chat_template="chatml")))
    assert "no control token of this tokenizer" in "\n".join(chatml.lines)


def test_bos_is_never_doubled(tmp_path, prior):
    """A template that writes BOS: the prior gets none in front of it."""
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    )
    write(tmp_path, {"prompt": "the river", "response": "rises in hills and falls"})
    prefix = job(tmp_path, "a", editing(prior, sft_chat_template=str(template)))
    ((ids, _),) = documents(prefix)
    assert ids[:2].tolist().count(1) == 1
    assert read_manifest(prefix).prior["start_id"] is None
    job(tmp_path, "b", editing(prior))
    assert read_manifest(f"{tmp_path}/b_sft_document").prior["start_id"] == 1
    alone = editing(prior, sft_chat_template=str(template), sft_score_without_prompt=True)
    assert read_manifest(job(tmp_path, "c", alone)).prior["start_id"] == 1


TEXT = st.lists(st.sampled_from([*WORDS, "\U0001f600", "\u4e2d", "\n", "</s>", "<|user|>"]), max_size=6)
TURNS = st.lists(st.tuples(TEXT.map(" ".join), TEXT.map(" ".join)), min_size=1, max_size=3)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talks=st.lists(TURNS, min_size=1, max_size=4), strategy=st.sampled_from(["up_revise", "filtering"]))
def test_whatever_the_conversation_nothing_outside_of_responses_changes(tmp_path, prior, talks, strategy):
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    write(
        tmp_path,
        *(
            {
                "conversations": [
                    {"from": who, "value": text}
                    for pair in turns
                    for who, text in zip(("human", "gpt"), pair, strict=True)
                ]
            }
            for turns in talks
        ),
    )
    changes = editing(prior, edit_strategy=strategy, edit_low_threshold=0.0028)
    plain, edited = job(tmp_path, "plain"), job(tmp_path, "edited", changes)
    for (before, before_mask), (after, after_mask) in zip(documents(plain), documents(edited), strict=True):
        assert before[before_mask == 0].tolist() == after[after_mask == 0].tolist()
        ends = before[(before == 2)]
        assert (after == 2).sum() == len(ends)
    undo_dataset(edited, f"{tmp_path}/undone_sft_document")
    assert files(tmp_path, "undone") == files(tmp_path, "plain")
