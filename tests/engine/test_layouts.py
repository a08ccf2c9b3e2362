"""The same model under every layout: same loss, same gradient norm, and checkpoints that move."""

from __future__ import annotations

import itertools

import engine_cases
import pytest

from megatron_tokedit.testing.models import tiny_llama, tiny_model

SEQUENCE = {"sequence_parallel": True}
CHUNKS = {"virtual_pipeline_model_parallel_size": 2}
EXPERTS = {"expert_model_parallel_size": 2}


def layout(tp, pp, dp, **fields):
    return {"tp": tp, "pp": pp, "world_size": tp * pp * dp, "layout": fields}


LAYOUTS = {
    "111": layout(1, 1, 1),
    "211": layout(2, 1, 1),
    "121": layout(1, 2, 1),
    "112": layout(1, 1, 2),
    "221": layout(2, 2, 1),
    "212": layout(2, 1, 2),
    "122": layout(1, 2, 2),
    "211-sequence": layout(2, 1, 1, **SEQUENCE),
    "221-sequence": layout(2, 2, 1, **SEQUENCE),
    "212-sequence": layout(2, 1, 2, **SEQUENCE),
    "121-chunks": layout(1, 2, 1, **CHUNKS),
    "221-chunks-sequence": layout(2, 2, 1, **CHUNKS, **SEQUENCE),
    "112-overlap": layout(1, 1, 2, overlap_grad_reduce=True, overlap_param_gather=True),
    "122-chunks-overlap": layout(1, 2, 2, **CHUNKS, overlap_grad_reduce=True, overlap_param_gather=True),
    "112-experts": layout(1, 1, 2, **EXPERTS),
    "122-experts": layout(1, 2, 2, **EXPERTS),
    "212-experts-sequence": layout(2, 1, 2, **EXPERTS, **SEQUENCE),
}
EXPERT_LAYOUTS = [name for name in LAYOUTS if "experts" in name]
DENSE_LAYOUTS = [name for name in LAYOUTS if name not in EXPERT_LAYOUTS]
MIXTURE_LAYOUTS = ["112", "211-sequence", "121-chunks", *EXPERT_LAYOUTS]
CASES = [
    *(("llama", name) for name in DENSE_LAYOUTS),
    *itertools.product(("gpt2",), ("112", "122", "211-sequence", "221-chunks-sequence")),
    *(("mixtral", name) for name in MIXTURE_LAYOUTS),
    *itertools.product(("qwen2", "qwen3", "olmo"), ("221-sequence", "121-chunks")),
]
REPLICATED = [
    *(("llama", name) for name in DENSE_LAYOUTS if "overlap" not in name),
    ("mixtral", "221-sequence"),
]


def with_stress(cases, quick):
    """All cases, those that ``quick`` does not take marked for the long run."""
    marks = {True: (), False: (pytest.mark.stress,)}
    return [pytest.param(*case, marks=marks[quick(case)]) for case in cases]


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """One checkpoint a family after two steps on one rank, and what follows it there; made when asked for."""
    known = {}

    def of(family, distributed=True):
        key = (family, distributed)
        if key not in known:
            folder, model = tmp_path_factory.mktemp(family), tiny_model(family)
            one = {"world_size": 1, "distributed": distributed}
            ranks.run(engine_cases.train_and_save, folder, model, 2, **one)
            known[key] = (folder, ranks.run(engine_cases.load_and_train, folder, model, 2, **one)[0])
        return known[key]

    return of


def assert_same(results, expected, tolerance=1e-5):
    for result in results:
        for got, want in zip(result, expected, strict=True):
            assert got == pytest.approx(want, rel=tolerance)


QUICK = {
    ("llama", "111"),
    ("llama", "211-sequence"),
    ("llama", "212"),
    ("llama", "121-chunks"),
    ("llama", "122-chunks-overlap"),
    ("llama", "221-sequence"),
    ("gpt2", "112"),
    ("gpt2", "221-chunks-sequence"),
    ("mixtral", "211-sequence"),
    ("mixtral", "212-experts-sequence"),
    ("qwen2", "221-sequence"),
    ("qwen3", "221-sequence"),
    ("olmo", "121-chunks"),
}


@pytest.mark.parametrize(("family", "name"), with_stress(CASES, lambda case: case in QUICK))
def test_same_weights_same_loss_and_gradient_norm(ranks, saved, family, name):
    folder, expected = saved(family)
    assert_same(
        ranks.run(engine_cases.load_and_train, folder, tiny_model(family), 2, **LAYOUTS[name]), expected
    )


@pytest.mark.parametrize(
    ("family", "name"),
    with_stress(REPLICATED, lambda case: case[1] in ("112", "221-sequence") and case[0] == "llama"),
)
def test_the_same_with_a_replicated_optimizer(ranks, saved, family, name):
    folder, expected = saved(family, distributed=False)
    results = ranks.run(
        engine_cases.load_and_train, folder, tiny_model(family), 2, distributed=False, **LAYOUTS[name]
    )
    assert_same(results, expected)


MOVES = ["111", "211", "112-overlap", "121-chunks", "221-sequence", "212-sequence", "122"]
QUICK_MOVES = [("221-sequence", ["112-overlap", "121-chunks"]), ("122", ["112-overlap", "221-sequence"])]


@pytest.fixture(scope="module")
def saved_under(ranks, tmp_path_factory):
    """A checkpoint under a layout of MOVES, and what follows it there; made when asked for."""
    known = {}

    def of(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            ranks.run(engine_cases.train_and_save, folder, tiny_llama(), 2, **LAYOUTS[name])
            after = ranks.run(engine_cases.load_and_train, folder, tiny_llama(), 1, **LAYOUTS[name])[0]
            known[name] = (folder, after)
        return known[name]

    return of


@pytest.mark.parametrize(
    ("target", "sources"),
    [*QUICK_MOVES, *(pytest.param(target, MOVES, marks=pytest.mark.stress) for target in MOVES)],
)
def test_checkpoint_of_every_layout_loads_under_every_other(ranks, saved_under, target, sources):
    folders = {source: saved_under(source)[0] for source in sources}
    for results in ranks.run(engine_cases.load_each_and_train, folders, tiny_llama(), 1, **LAYOUTS[target]):
        for source, result in results.items():
            assert_same([result], saved_under(source)[1])


@pytest.mark.parametrize("target", ["111", pytest.param("212-experts-sequence", marks=pytest.mark.stress)])
def test_spread_experts_move(ranks, tmp_path, target):
    model = tiny_model("mixtral")
    ranks.run(engine_cases.train_and_save, tmp_path, model, 2, **LAYOUTS["122-experts"])
    expected = ranks.run(engine_cases.load_and_train, tmp_path, model, 2, **LAYOUTS["122-experts"])[0]
    assert_same(ranks.run(engine_cases.load_and_train, tmp_path, model, 2, **LAYOUTS[target]), expected)


@pytest.mark.parametrize("recipe", [pytest.param("fp32", marks=pytest.mark.stress), "bf16"])
def test_optimizer_moves_between_layouts(ranks, tmp_path, recipe):
    model = tiny_llama()
    ranks.run(engine_cases.train_and_save, tmp_path, model, 3, tp=2, recipe=recipe, world_size=4)
    same = ranks.run(engine_cases.load_and_train, tmp_path, model, 3, tp=2, recipe=recipe, world_size=4)
    other = ranks.run(engine_cases.load_and_train, tmp_path, model, 3, pp=2, recipe=recipe, world_size=2)
    assert_same(other[:1], same[0], tolerance=1e-5 if recipe == "fp32" else 1e-2)


def evaluate_between_steps(model, **layout):
    run = engine_cases.start(model, **layout)
    return [*run.steps(2), (run.evaluate(), 0.0), *run.steps(1)]


def test_evaluation_sees_an_update_that_is_still_to_be_gathered(ranks):
    (expected,) = ranks.run(evaluate_between_steps, tiny_llama(), world_size=1)
    assert_same(ranks.run(evaluate_between_steps, tiny_llama(), **LAYOUTS["112-overlap"]), expected)


RECOMPUTED = {
    "uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "core_attn": {"recompute_granularity": "selective"},
    "layernorm": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "layernorm"]},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


def recomputed_steps(model, fields):
    """Two steps, and how often the first norm and the first attention ran a microbatch."""
    from megatron_tokedit.engine.attention import SdpaCoreAttention
    from megatron_tokedit.engine.model import unwrap

    run = engine_cases.start(model, layout=fields)
    decoder = unwrap(run.model[0]).decoder
    calls = []
    for kind in (decoder.layers[0].input_layernorm, decoder.layers[0].self_attention.core_attention):
        kind.register_forward_hook(lambda module, *_: calls.append(isinstance(module, SdpaCoreAttention)))
    results = run.steps(2)
    microbatches = 2 * engine_cases.NUM_MICROBATCHES
    return results, (len(calls) - sum(calls)) / microbatches, sum(calls) / microbatches


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputation_changes_nothing_but_the_work(ranks, name):
    model = tiny_model("mixtral" if name == "moe" else "llama", hidden_dropout=0.1, attention_dropout=0.1)
    ((plain, *once),) = ranks.run(recomputed_steps, model, {}, world_size=1)
    ((results, *times),) = ranks.run(recomputed_steps, model, RECOMPUTED[name], world_size=1)
    assert once == [1, 1]
    again = {"uniform": [2, 2], "block": [2, 2], "core_attn": [1, 2], "layernorm": [2, 2]}
    assert times == again.get(name, [1, 1])
    for got, want in zip(results, plain, strict=True):
        assert got == pytest.approx(want, rel=1e-6)
