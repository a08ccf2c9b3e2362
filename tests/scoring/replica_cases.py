"""What the tests of priors of several processes run on the ranks of the pool."""

from __future__ import annotations

import numpy as np

REQUESTS = {
    "top_k": (6, None),
    "more than a shard": (60, None),
    "bounded nucleus": (5, (0.9, 1.3)),
    "nucleus": (None, (0.95, 1.3)),
}


def save_checkpoint(folder, model, hf_folder=None):
    """Save a random model, or one with the weights of a Hugging Face Llama folder."""
    import engine_cases
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_tokedit.engine.model import unwrap

    if hf_folder is None:
        engine_cases.start(model).save(folder, 1)
        return
    theirs = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    run = engine_cases.start(model, vocab_size=theirs.config.vocab_size)
    state = copied_by_hand(theirs.state_dict(), model)
    parameters = dict(unwrap(run.model[0]).named_parameters())
    assert parameters.keys() == state.keys()
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter[: len(state[key])] = state[key]
    run.save(folder, 1)


def copied_by_hand(theirs, model):
    """A Llama's state dict under our names: queries, keys and values by group, gate above up."""
    import torch

    ours = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
        "output_layer.weight": theirs["lm_head.weight"],
    }
    for layer in range(model.num_layers):
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        parts = [theirs[f"{source}self_attn.{part}_proj.weight"] for part in "qkv"]
        by_group = [part.view(model.num_key_value_heads, -1, part.shape[1]) for part in parts]
        pair = [theirs[f"{source}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        ours |= {
            target + "input_layernorm.weight": theirs[source + "input_layernorm.weight"],
            target + "pre_mlp_layernorm.weight": theirs[source + "post_attention_layernorm.weight"],
            target + "self_attention.linear_qkv.weight": torch.cat(by_group, dim=1).flatten(0, 1),
            target + "self_attention.linear_proj.weight": theirs[source + "self_attn.o_proj.weight"],
            target + "mlp.linear_fc1.weight": torch.cat(pair),
            target + "mlp.linear_fc2.weight": theirs[source + "mlp.down_proj.weight"],
        }
    return ours


def requests():
    import contract

    from megatron_tokedit.scoring.base import CandidateRequest, Nucleus

    return {
        name: CandidateRequest(
            k, contract.EVERYTHING, contract.EXCLUDED, Nucleus(*nucleus) if nucleus else None
        )
        for name, (k, nucleus) in REQUESTS.items()
    }


def documents(vocab_size):
    import contract

    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, n).astype(np.int32) for n in contract.LENGTHS]


def make_replica(layout, store=None):
    import torch
    import torch.distributed as dist

    from megatron_tokedit.scoring.identity import PriorLayout
    from megatron_tokedit.scoring.replica_group import Replica

    store = dist.FileStore(store) if store else dist.HashStore()
    return Replica(PriorLayout(*layout), index=0, store=store, device=torch.device("cpu"))


def scores(folder, layout, *, deferred=False, dtype="float32", columns=1024, **changes):
    """Scores for every request from the process that leads; None from the others."""
    import contract

    from megatron_tokedit.scoring import head, replica
    from megatron_tokedit.scoring.load import identify_prior

    before, head._CPU_COLUMNS = head._CPU_COLUMNS, columns
    try:
        with make_replica(layout) as own:
            if not own.leads:
                replica.follow(own)
                return None
            identity = identify_prior(folder)
            options = contract.options(start_id=1, **changes)
            scorer = replica.load_scorer(own, identity, options, dtype=dtype, deferred=deferred)
            ids = documents(identity.vocab_size)
            found = {name: scorer.score(ids, request) for name, request in requests().items()}
            return found, scorer.fingerprint, scorer.backbone.size
    finally:
        head._CPU_COLUMNS = before


def run_contract(folder):
    """Every check of the contract by all tensor-parallel ranks at once; names of those that ran."""
    import contract
    import torch
    import torch.distributed as dist

    from megatron_tokedit.scoring import head
    from megatron_tokedit.scoring.identity import PriorLayout
    from megatron_tokedit.scoring.load import identify_prior
    from megatron_tokedit.scoring.megatron import MegatronBackbone, load_part
    from megatron_tokedit.scoring.scorer import CausalScorer

    identity, layout = identify_prior(folder), PriorLayout(dist.get_world_size())
    model = load_part(identity, dtype="float32", device=torch.device("cpu"), layout=layout)
    backbone = MegatronBackbone(identity, model, dtype="float32")

    @contract.remembered
    @torch.inference_mode()
    def logprobs(ids):
        hidden = model.hidden_states(torch.tensor([ids]))[0]
        own = hidden @ model.output_weight.T
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return torch.cat(parts, dim=1)[:, : model.vocab_size].log_softmax(-1).numpy()

    before = head._CPU_COLUMNS
    try:
        for head._CPU_COLUMNS, deferred in ((1024, False), (4, True)):

            def make(options, deferred=deferred):
                return CausalScorer(backbone, options, deferred=deferred)

            for check in contract.CHECKS:
                check(contract.Subject(make, logprobs, identity.vocab_size, tolerance=2e-4))
    finally:
        head._CPU_COLUMNS = before
    return [check.__name__ for check in contract.CHECKS]


def fail(folder, where):
    """What each of two processes says where one of them fails; where it does in a call it ends."""
    import os
    from pathlib import Path

    import contract

    from megatron_tokedit.engine import checkpoint
    from megatron_tokedit.errors import PriorError
    from megatron_tokedit.scoring import replica, replica_group
    from megatron_tokedit.scoring.load import identify_prior
    from megatron_tokedit.scoring.megatron import MegatronBackbone

    def broken(*args, **kwargs):
        raise PriorError("the disk is on fire")

    def no_memory(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    here = Path(where)
    replica_group._GRACE_SECONDS = 0.5 if here.name == "meeting" else 30.0
    try:
        with make_replica((2, 1), f"{where}.store") as own:
            if not own.leads:
                match here.name:
                    case "meeting":  # the leader waits for groups to be made
                        replica.load_part = broken
                    case "loading":
                        checkpoint.load = broken
                    case "scoring":
                        MegatronBackbone.hidden_states = broken
                replica.follow(own)
                return "well"
            identity = identify_prior(folder)
            scorer = replica.load_scorer(own, identity, contract.options(start_id=1))
            match here.name:
                case "leading":
                    broken()
                case "memory":
                    MegatronBackbone.hidden_states = no_memory
                case "ids":
                    scorer.score([np.array([5, 90], np.int32)])
            scorer.score(documents(identity.vocab_size))
            return "well"
    except PriorError as error:
        if here.name in ("leading", "ids"):
            return str(error)
        here.with_suffix(f".{own.rank}").write_text(str(error))
        os._exit(1)


def die(folder, store, victim):
    """A process is killed in the middle of a call; what the other says."""
    import os
    import signal

    import contract

    from megatron_tokedit.errors import PriorError
    from megatron_tokedit.scoring import replica
    from megatron_tokedit.scoring.load import identify_prior
    from megatron_tokedit.scoring.megatron import MegatronBackbone

    def killed(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        with make_replica((2, 1), store) as own:
            if own.leads == (victim == "leader"):
                MegatronBackbone.hidden_states = killed
            if not own.leads:
                replica.follow(own)
                return "well"
            identity = identify_prior(folder)
            scorer = replica.load_scorer(own, identity, contract.options(start_id=1))
            scorer.score(documents(identity.vocab_size))
            return "well"
    except PriorError as error:
        raise AssertionError(f"was told: {error}") from error


def scores_with_little_memory(folder, layout, victims, positions, *, deferred=False, where="mlp"):
    """Scores, warnings and shapes of passes where some ranks have memory for so many positions only."""
    import logging

    import contract
    import torch
    import torch.distributed as dist

    from megatron_tokedit.engine.inference import LanguageModel
    from megatron_tokedit.scoring import replica
    from megatron_tokedit.scoring.load import identify_prior

    failed, passes, warnings = [], [], []
    hidden_states = LanguageModel.hidden_states

    def limited(self, ids_BT):
        passes.append(tuple(ids_BT.shape))
        module = {
            "mlp": self.layers[-1].mlp,
            "norm": self.layers[0].input_layernorm,
            "attention": self.layers[-1].self_attention.linear_qkv,
        }[where]
        hook = module.register_forward_pre_hook(fail_where_large)
        try:
            return hidden_states(self, ids_BT)
        finally:
            hook.remove()

    def fail_where_large(module, inputs):
        if dist.get_rank() in victims and inputs[0].shape[:-1].numel() > positions:
            failed.append(tuple(inputs[0].shape))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    class Keeper(logging.Handler):
        def emit(self, record):
            warnings.append(record.getMessage())

    keeper = Keeper(logging.WARNING)
    logging.getLogger("megatron_tokedit").addHandler(keeper)
    LanguageModel.hidden_states = limited
    try:
        with make_replica(layout) as own:
            if not own.leads:
                replica.follow(own)
                return None, passes, len(failed), warnings
            identity = identify_prior(folder)
            options = contract.options(start_id=1, batch_tokens=64)
            scorer = replica.load_scorer(own, identity, options, deferred=deferred)
            ids = documents(identity.vocab_size)
            found = {name: scorer.score(ids, request) for name, request in requests().items()}
            return found, passes, len(failed), warnings
    finally:
        LanguageModel.hidden_states = hidden_states
        logging.getLogger("megatron_tokedit").removeHandler(keeper)
