from __future__ import annotations

import itertools

import engine_cases
import pytest

from megatron_tokedit.testing.models import tiny_gpt2, tiny_llama


def loss_and_reference(model):
    """Loss of a global batch with uneven masks, and the same from the logits by plain torch."""
    import torch

    from megatron_tokedit.engine.model import unwrap
    from megatron_tokedit.engine.step import evaluate_loss

    run = engine_cases.start(model)
    batches = list(itertools.islice(run.batches, 4))
    batches[1]["loss_mask"][:] = 0.0
    batches[2]["loss_mask"][:, : model.seq_length // 2] = 0.0
    got = evaluate_loss(run.model, iter(batches), run.ctx, **run.shapes)
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            logits = unwrap(run.model[0]).eval()(batch["tokens"], batch["position_ids"], None)
            nll = torch.nn.functional.cross_entropy(
                logits[..., : engine_cases.VOCAB_SIZE].flatten(0, 1).double(),
                batch["labels"].flatten(),
                reduction="none",
            )
            total += (nll * batch["loss_mask"].flatten()).sum()
    num_tokens = sum(int(batch["loss_mask"].sum()) for batch in batches)
    return got.loss_sum, got.num_tokens, total.item(), num_tokens, run.model[0].training


@pytest.mark.parametrize("model", [tiny_llama(), tiny_gpt2()], ids=["llama", "gpt2"])
def test_loss_is_the_mean_over_unmasked_tokens_of_the_real_vocabulary(ranks, model):
    ((loss_sum, num_tokens, want_sum, want_tokens, training),) = ranks.run(
        loss_and_reference, model, world_size=1
    )
    assert num_tokens == want_tokens
    assert loss_sum == pytest.approx(want_sum, rel=1e-6)
    assert training  # evaluate_loss restores the mode


def uneven_steps(tp, pp):
    """Two steps where data-parallel ranks and microbatches hold different numbers of unmasked tokens."""
    run = engine_cases.start(tiny_llama(), tp=tp, pp=pp)
    plain = run.batches

    def masked():
        for index, batch in enumerate(plain):
            batch["loss_mask"][:, : 3 * (index * run.ctx.dp_size + run.ctx.dp_rank)] = 0.0
            yield batch

    run.batches = masked()
    return run.steps(1)


def test_uneven_masks_weigh_tokens_not_ranks(ranks):
    (one,) = ranks.run(uneven_steps, 1, 1, world_size=1)
    for result in ranks.run(uneven_steps, 1, 1, world_size=2) + ranks.run(uneven_steps, 2, 1, world_size=2):
        assert result[0] == pytest.approx(one[0], rel=1e-5)


def poisoned(layout):
    import torch

    from megatron_tokedit.engine.step import train_step

    run = engine_cases.start(tiny_llama(), **layout)
    run.steps(1)
    before = [parameter.clone() for parameter in run.model[0].parameters()]
    if run.ctx.rank == 0:
        hook = next(run.model[0].parameters()).register_hook(lambda gradient: gradient * float("nan"))
    result = train_step(run.model, run.optimizer, run.scheduler, run.batches, run.ctx, **run.shapes)
    same = all(torch.equal(a, b) for a, b in zip(before, run.model[0].parameters(), strict=True))
    if run.ctx.rank == 0:
        hook.remove()
    after = run.steps(1)
    return result.skipped, result.grad_norm, same, after[0][0]


@pytest.mark.parametrize("layout", [{}, {"pp": 2}, {"distributed": False}], ids=["dp2", "pp2", "replicated"])
def test_step_with_a_bad_gradient_anywhere_is_skipped_everywhere(ranks, layout):
    for skipped, grad_norm, same, loss_after in ranks.run(poisoned, layout, world_size=2):
        assert skipped
        assert grad_norm != grad_norm
        assert same
        assert loss_after < 10.0


def document_masked():
    """Logits of two documents packed into one sequence under an attention mask, and of each alone."""
    import torch

    from megatron_tokedit.engine.model import unwrap

    run = engine_cases.start(tiny_llama())
    gpt = unwrap(run.model[0]).eval()
    tokens = torch.randint(0, engine_cases.VOCAB_SIZE, (1, 32))
    allowed = torch.ones(32, 32).tril()
    allowed[20:, :20] = 0
    positions = torch.arange(32)[None]
    with torch.no_grad():
        packed = gpt(tokens, positions, allowed[None, None] < 0.5)
        first = gpt(tokens[:, :20], positions[:, :20], None)
        second = gpt(tokens[:, 20:], positions[:, :12], None)
    return (packed - torch.cat((first, second), dim=1)).abs().max().item()


def test_attention_mask_separates_documents(ranks):
    (difference,) = ranks.run(document_masked, world_size=1)
    assert difference < 1e-5  # RoPE is relative, so a shifted document has the same logits
