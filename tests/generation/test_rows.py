"""The loop over rows: a text depends on nothing but its own key; when it ends; in what order it comes."""

from __future__ import annotations

import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from generation_cases import BigramDecoder, bigram_model

from megatron_tokedit.errors import ConfigError
from megatron_tokedit.generation import GenerationSettings, Prompt, generate

SETTINGS = GenerationSettings(max_new_tokens=30, temperature=0.8, top_p=0.95)


def texts_of(model, prompts, settings):
    return [
        (c.prompt_index, c.sample, tuple(c.ids), c.text, c.finish) for c in generate(model, prompts, settings)
    ]


def some_prompts(model, count=12):
    random = np.random.default_rng(2)
    lengths = random.integers(1, 9, count)
    return [Prompt([model.start_id, *random.integers(3, model.vocab_size, n).tolist()]) for n in lengths]


@pytest.mark.parametrize("can_join", [True, False])
def test_same_texts_whatever_the_batch(can_join):
    model = bigram_model(can_join=can_join)
    prompts = [dataclasses.replace(prompt, samples=range(3)) for prompt in some_prompts(model)]
    want = texts_of(model, prompts, dataclasses.replace(SETTINGS, batch_rows=1))
    assert [found[:2] for found in want] == list(itertools.product(range(12), range(3)))
    assert len({found[4] for found in want}) == 2
    for batch_rows in (2, 5, 64):
        assert texts_of(model, prompts, dataclasses.replace(SETTINGS, batch_rows=batch_rows)) == want
    alone = texts_of(model, [prompts[7]], SETTINGS)
    assert [found[2:] for found in alone] == [found[2:] for found in want if found[0] == 7]
    later = texts_of(model, [dataclasses.replace(prompts[7], samples=range(2, 3))], SETTINGS)
    assert later[0][1:] == alone[2][1:]


def test_seeds_and_samples_differ():
    model = bigram_model()
    prompt = [Prompt([model.start_id], range(4))]
    first, again, other = (
        texts_of(model, prompt, dataclasses.replace(SETTINGS, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len({found[2] for found in first}) == 4


def test_finished_rows_leave_and_others_take_their_places():
    made = []
    model = bigram_model(eod_bonus=6.0, made=made)
    settings = dataclasses.replace(SETTINGS, batch_rows=6)
    completions = list(generate(model, [Prompt([model.start_id], range(200))], settings))
    (decoder,) = made
    assert decoder.most_rows == 6
    assert not decoder.lengths
    longest = max(len(completion.ids) for completion in completions)
    num_tokens = sum(len(completion.ids) for completion in completions)
    assert decoder.num_steps < num_tokens / 6 + 3 * longest  # rows stay busy


def test_memory_does_not_grow_with_the_prompts():
    model = bigram_model(eod_bonus=8.0)
    settings = dataclasses.replace(SETTINGS, batch_rows=4, max_new_tokens=8)
    num_read = 0

    def prompts():
        nonlocal num_read
        for _ in range(3000):
            num_read += 1
            yield Prompt([model.start_id, 5], range(1))

    peaks = []
    tracemalloc.start()
    for number, _ in enumerate(generate(model, prompts(), settings), 1):
        assert num_read <= number + 8 * settings.batch_rows + 1
        if number in (500, 3000):
            peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert num_read == 3000
    assert peaks[1] < 1.2 * peaks[0]


def test_one_long_text_holds_back_a_bounded_number():
    """The first goes on and on, all others end at once: they wait for it, and few are begun meanwhile."""
    model = bigram_model(max_positions=500)
    logits = torch.full((model.vocab_size, model.vocab_size), -50.0)
    logits[:, model.tokenizer.eod] = 0.0
    logits[5] = logits[5].roll(5 - model.tokenizer.eod)
    made = []

    def make_decoder():
        made.append(BigramDecoder(logits))
        return made[0]

    num_read = 0

    def prompts():
        nonlocal num_read
        for index in range(100):
            num_read += 1
            yield Prompt([model.start_id if index else 5])

    settings = dataclasses.replace(SETTINGS, max_new_tokens=200, batch_rows=2)
    completions = generate(dataclasses.replace(model, make_decoder=make_decoder), prompts(), settings)
    assert len(next(completions).ids) == 200
    assert 8 < num_read <= 2 + 8 * 2
    assert [len(completion.ids) for completion in completions] == [1] * 99
    assert made[0].num_steps < 200 + 99


def test_ends():
    model = bigram_model(eod_bonus=3.0, max_positions=20)
    long = dataclasses.replace(SETTINGS, max_new_tokens=1000, top_p=None, temperature=1.0)
    found = list(generate(model, [Prompt([model.start_id, 9, 9], range(40))], long))
    ends = {completion.finish: completion for completion in found}
    assert ends.keys() == {"eod", "context"}
    assert ends["eod"].ids[-1] == model.tokenizer.eod
    assert model.tokenizer.decode([model.tokenizer.eod]) not in ends["eod"].text
    assert len(ends["context"].ids) == 20 + 1 - 3  # the last id is not put into the model any more
    on = list(generate(model, [Prompt([7], range(9))], dataclasses.replace(long, stop_at_eod=False)))
    assert {len(completion.ids) for completion in on} == {20}
    assert any(model.tokenizer.eod in completion.ids for completion in on)
    (short,) = generate(model, [Prompt([7])], dataclasses.replace(SETTINGS, max_new_tokens=1))
    assert len(short.ids) == 1


def test_stop_texts_end_a_text_before_them():
    model = bigram_model(eod_bonus=-9.0)
    (free,) = generate(model, [Prompt([model.start_id])], SETTINGS)
    stop = free.text[11:13]
    place = free.text.index(stop)
    settings = dataclasses.replace(SETTINGS, stop_texts=("never there", stop))
    told = []
    (stopped,) = generate(
        model, [Prompt([model.start_id])], settings, on_text=lambda prompt, i, s, text: told.append(text)
    )
    assert (stopped.text, stopped.finish) == (free.text[:place], "stop")
    assert stopped.ids == free.ids[: len(stopped.ids)]
    assert "".join(told) == stopped.text


def test_told_texts_add_up():
    model = bigram_model("byte level")
    prompts = [Prompt([model.start_id, 9 + i], range(2)) for i in range(6)]
    told = {}

    def on_text(prompt, index, sample, text):
        assert prompt is prompts[index]
        assert text
        told.setdefault((index, sample), []).append(text)

    completions = list(generate(model, prompts, SETTINGS, on_text=on_text))
    for completion in completions:
        parts = told.get((completion.prompt_index, completion.sample), [])
        assert "".join(parts) == completion.text
        ids = completion.ids[:-1] if completion.finish == "eod" else completion.ids
        assert model.tokenizer.decode([*completion.prompt.ids, *ids]).endswith(completion.text)
    assert any(len(parts) > 3 for parts in told.values())


def test_logprobs_are_the_models_own():
    model = bigram_model()
    settings = dataclasses.replace(SETTINGS, temperature=0.5, top_k=3, logprobs=True)
    logits = model.make_decoder().add([[i] for i in range(model.vocab_size)]).log_softmax(-1)
    for completion in generate(model, [Prompt([5], range(5))], settings):
        befores = [5, *completion.ids[:-1]]
        want = [logits[before, id_].item() for before, id_ in zip(befores, completion.ids, strict=True)]
        assert completion.logprobs == pytest.approx(want, abs=1e-5)


def test_prompts_that_cannot_be_continued():
    model = bigram_model(max_positions=8)
    with pytest.raises(ConfigError, match="prompt 1: there is nothing to continue"):
        list(generate(model, [Prompt([1]), Prompt([])], SETTINGS))
    with pytest.raises(ConfigError, match=r"prompt 0: has 9 tokens .* takes at most 8"):
        list(generate(model, [Prompt([1] * 9)], SETTINGS))
    (full,) = generate(model, [Prompt([1] * 8)], SETTINGS)
    assert len(full.ids) == 1
    assert not list(generate(model, [], SETTINGS))


def test_ids_that_the_tokenizer_lacks_are_not_drawn():
    model = bigram_model()
    small = dataclasses.replace(model, vocab_size=50)
    drawn = [i for c in generate(small, [Prompt([5], range(20))], SETTINGS) for i in c.ids]
    assert max(drawn) < 50 < model.vocab_size


@pytest.mark.parametrize("name", ["sentencepiece", "byte level"])
def test_ids_of_a_prompt(name):
    model = bigram_model(name)
    bare = model.tokenizer.encode("The river")
    assert model.prompt_ids("The river") == [model.tokenizer.eod, *bare]
    assert model.prompt_ids("The river", document_start=False) == bare
    assert model.prompt_ids("") == [model.tokenizer.eod]
    assert model.prompt_ids("", document_start=False) == []
