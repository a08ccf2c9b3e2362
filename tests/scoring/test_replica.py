"""A prior that several processes hold together scores as in one, and none of them is waited for in vain."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path += [str(Path(__file__).resolve().parents[1] / "engine"), str(Path(__file__).resolve().parent)]

import contract
import replica_cases

from megatron_tokedit.errors import ConfigError
from megatron_tokedit.scoring.identity import PriorLayout
from megatron_tokedit.scoring.load import check_dtype, identify_prior, load_scorer, scoring_options
from megatron_tokedit.testing.models import tiny_gpt2, tiny_llama, tiny_model, write_hf_llama
from megatron_tokedit.testing.ranks import RankFailure

ONE, TP2, PP2, BOTH = (1, 1), (2, 1), (1, 2), (2, 2)
MODELS = {
    "llama": tiny_llama(init_method_std=0.5),
    "gpt2": tiny_gpt2(init_method_std=0.3),  # tied: the last stage has a copy of the embedding
    "mixtral": tiny_model("mixtral", init_method_std=0.5),  # sequences are cut among the ranks
    # a shard that is padding alone
    "padded": tiny_llama(init_method_std=0.5, make_vocab_size_divisible_by=192),
}
FEW = [(name, layout) for name in MODELS for layout in (TP2, PP2)]
MANY = [pytest.param(name, BOTH, marks=pytest.mark.stress) for name in MODELS]


@pytest.fixture(scope="module")
def folders(ranks, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for name, model in MODELS.items():
        ranks.run(replica_cases.save_checkpoint, root / name, model, world_size=1)
    return root


@pytest.fixture(scope="module")
def in_one_process(ranks, folders):
    found = {}

    def look(name, **settings):
        key = (name, *settings.items())
        if key not in found:
            (found[key],) = ranks.run(
                replica_cases.scores, str(folders / name), ONE, **settings, world_size=1
            )
        return found[key]

    return look


def in_replica(ranks, folder, layout, **settings):
    results = ranks.run(
        replica_cases.scores, str(folder), layout, **settings, world_size=layout[0] * layout[1]
    )
    assert [result is None for result in results].count(False) == 1
    return next(result for result in results if result is not None)


def assert_same(ours, theirs, tolerance):
    for name in replica_cases.REQUESTS:
        for a, b in zip(ours[name], theirs[name], strict=True):
            np.testing.assert_allclose(a.logprobs_T, b.logprobs_T, atol=tolerance, rtol=0)
            np.testing.assert_array_equal(a.candidate_positions_E, b.candidate_positions_E)
            np.testing.assert_array_equal(a.candidate_ids_EK, b.candidate_ids_EK)
            np.testing.assert_allclose(
                a.candidate_logprobs_EK, b.candidate_logprobs_EK, atol=tolerance, rtol=0
            )


@pytest.mark.parametrize(("name", "layout"), FEW + MANY)
def test_several_processes_score_as_one(ranks, folders, in_one_process, name, layout):
    want, fingerprint, size = in_one_process(name)
    got, same_fingerprint, same_size = in_replica(ranks, folders / name, layout)
    # stages change nothing at all, see PriorPlan.settings
    assert_same(got, want, 0.0 if layout == PP2 else 1e-4)
    assert same_fingerprint == fingerprint
    assert same_size.num_matmul_parameters == size.num_matmul_parameters
    assert same_size.attention_width == size.attention_width


@pytest.mark.parametrize(
    "settings",
    [
        {"deferred": True},  # as on a GPU
        {"columns": 4},  # several column blocks in a shard
        {"columns": 4, "logits_bytes": 1},  # one row at a time
        {"logits_bytes": 1 << 30},
        {"batch_tokens": 1},
    ],
    ids=str,
)
def test_budgets_change_nothing_under_tensor_parallelism(ranks, folders, in_one_process, settings):
    want, *_ = in_one_process("llama")
    got, *_ = in_replica(ranks, folders / "llama", TP2, **settings)
    assert_same(got, want, 1e-4)


def test_bfloat16_under_tensor_parallelism(ranks, folders, in_one_process):
    """It rounds, but not more than bfloat16 does in one process."""

    def logprobs(found):
        return np.concatenate([score.logprobs_T for score in found[0]["top_k"]])

    got = in_replica(ranks, folders / "llama", TP2, dtype="bfloat16")
    assert got[1] == in_one_process("llama", dtype="bfloat16")[1] != in_one_process("llama")[1]
    exact = logprobs(in_one_process("llama"))
    rounded = abs(logprobs(in_one_process("llama", dtype="bfloat16")) - exact).mean()
    assert 0 < abs(logprobs(got) - exact).mean() < 1.5 * rounded


@pytest.mark.parametrize("name", ["llama", pytest.param("padded", marks=pytest.mark.stress)])
def test_the_contract_under_tensor_parallelism(ranks, folders, name):
    results = ranks.run(replica_cases.run_contract, str(folders / name), world_size=2)
    assert results == [[check.__name__ for check in contract.CHECKS]] * 2


@pytest.fixture(scope="module")
def twins(ranks, tmp_path_factory):
    """A Hugging Face Llama and a checkpoint with its weights."""
    root = tmp_path_factory.mktemp("twins")
    fields = {"num_hidden_layers": 4, "initializer_range": 0.5, "max_position_embeddings": 32}
    write_hf_llama(root / "hf", vocab_size=90, **fields)
    model = tiny_llama(norm_epsilon=1e-6)
    ranks.run(replica_cases.save_checkpoint, root / "megatron", model, root / "hf", world_size=1)
    return root


@pytest.mark.parametrize("layout", [ONE, TP2, PP2, pytest.param(BOTH, marks=pytest.mark.stress)], ids=str)
def test_the_same_weights_score_as_in_transformers(ranks, twins, layout):
    scorer = load_scorer(identify_prior(str(twins / "hf")), contract.options(start_id=1), device="cpu")
    ids = replica_cases.documents(90)
    want = {name: scorer.score(ids, request) for name, request in replica_cases.requests().items()}
    got, *_ = in_replica(ranks, twins / "megatron", layout)
    assert_same(got, want, 1e-4)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("leading", ["the disk is on fire", "its leader failed: the disk is on fire"]),
        ("ids", ["token id 90 is outside", "its leader failed: token id 90"]),
    ],
)
def test_why_the_leader_failed_is_told_to_all(ranks, folders, tmp_path, where, words):
    told = ranks.run(replica_cases.fail, str(folders / "llama"), str(tmp_path / where), world_size=2)
    for message, word in zip(told, words, strict=True):
        assert word in message


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (
            "scoring",
            ["process 1 of replica 0 of the prior failed: the disk is on fire", "the disk is on fire"],
        ),
        *(
            pytest.param(where, words, marks=pytest.mark.stress)
            for where, words in (
                ("loading", ["process 1 of replica 0 of the prior failed: the disk", "the disk is on fire"]),
                ("memory", ["forward pass of a single window of", "forward pass of a single window of"]),
                ("meeting", [None, "the disk is on fire"]),  # ended by its watch
            )
        ),
    ],
)
def test_who_fails_in_a_call_says_why_and_ends_the_others(ranks, folders, tmp_path, where, words):
    with pytest.raises(RankFailure) as failure:
        ranks.run(
            replica_cases.fail,
            str(folders / "llama"),
            str(tmp_path / where),
            world_size=2,
            timeout_seconds=60,
        )
    assert str(failure.value).count("the process died") == 2
    for rank, word in enumerate(words):
        told = tmp_path / f"{where}.{rank}"
        assert word in told.read_text() if word else not told.exists()


@pytest.mark.parametrize("victim", ["follower", "leader"])
def test_a_process_that_is_killed_ends_the_other(ranks, folders, tmp_path, victim):
    with pytest.raises(RankFailure) as failure:
        ranks.run(
            replica_cases.die, str(folders / "llama"), str(tmp_path / "store"), victim, world_size=2,
            timeout_seconds=60,
        )  # fmt: skip
    assert "was told: another process of replica 0 of the prior ended without a word" in str(failure.value)
    assert "did not finish in time" not in str(failure.value)


@pytest.mark.parametrize(
    ("name", "layout", "words"),
    [
        ("llama", (3, 1), "prior_tensor_parallel=3, .* 3 does not divide model.num_attention_heads = 4"),
        ("llama", (1, 3), "prior_pipeline_parallel=3: 3 does not divide model.num_layers = 4"),
        ("mixtral", (8, 1), "8 does not divide model.num_attention_heads = 4"),
    ],
)
def test_sizes_that_do_not_divide_the_model_are_refused(folders, name, layout, words):
    identity = identify_prior(str(folders / name))
    check_dtype(identity, "float32", PriorLayout(2, 2))
    with pytest.raises(ConfigError, match=words):
        check_dtype(identity, "float32", PriorLayout(*layout))


@pytest.mark.parametrize(
    ("name", "layout", "victims", "settings"),
    [
        ("llama", TP2, (1,), {}),
        ("llama", TP2, (0,), {"where": "norm", "deferred": True}),
        ("gpt2", TP2, (1,), {"where": "attention"}),
        ("gpt2", PP2, (0,), {}),  # in front, far ahead of the one behind
        ("llama", PP2, (1,), {"where": "norm", "deferred": True}),
        ("mixtral", PP2, (0, 1), {"where": "attention"}),
        pytest.param("llama", BOTH, (1,), {}, marks=pytest.mark.stress),
        pytest.param("gpt2", BOTH, (3,), {"where": "norm"}, marks=pytest.mark.stress),
    ],
)
def test_memory_that_runs_out_in_one_process(ranks, folders, in_one_process, name, layout, victims, settings):
    """All of them score the batch in halves, and nobody waits for the one that could not."""
    want, *_ = in_one_process(name, batch_tokens=64)
    world_size = layout[0] * layout[1]
    results = ranks.run(
        replica_cases.scores_with_little_memory, str(folders / name), layout, victims, 33, **settings,
        world_size=world_size, timeout_seconds=60,
    )  # fmt: skip
    (found,) = [result[0] for result in results if result[0] is not None]
    assert_same(found, want, 1e-4)
    passes = [sorted(result[1]) for result in results]
    assert passes == [passes[0]] * world_size, "every process makes the same passes"
    assert max(rows * length for rows, length in passes[0]) > 33
    num_failed = [result[2] for result in results]
    assert [count > 0 for count in num_failed] == [rank in victims for rank in range(world_size)]
    said = [warning for result in results for warning in result[3]]
    assert said
    assert all("out of memory in the prior's forward pass of" in warning for warning in said)


@pytest.mark.parametrize(("layout", "victim"), [(TP2, 1), (PP2, 0)])
def test_a_window_that_fits_in_no_process_ends_all(ranks, folders, layout, victim):
    with pytest.raises(RankFailure) as failure:
        ranks.run(
            replica_cases.scores_with_little_memory, str(folders / "llama"), layout, (victim,), 3,
            world_size=2, timeout_seconds=60,
        )  # fmt: skip
    text = str(failure.value)
    assert text.count("PriorError: out of memory in the prior's forward pass of a single window of") >= 1
    assert "did not finish in time" not in text


def test_a_hugging_face_prior_is_not_divided(twins):
    identity = identify_prior(str(twins / "hf"))
    with pytest.raises(ConfigError, match=r"tools/convert_checkpoint.py --from hf --to megatron --input"):
        check_dtype(identity, "float32", PriorLayout(2, 1))
    assert scoring_options(identity, start_id=None, batch_tokens=1, logits_bytes=1).context_tokens == 32
