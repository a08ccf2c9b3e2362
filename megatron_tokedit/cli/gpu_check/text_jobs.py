"""What a trained model is taken for afterwards: it continues texts, and leaves as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_tokedit.cli.gpu_check.data_jobs import HELD_OUT_TEXT, TOKENIZER
from megatron_tokedit.cli.gpu_check.sizes import Scale
from megatron_tokedit.cli.gpu_check.training_jobs import run_folder

CONVERTED = "converted"
_PROMPT_TOKENS = (1, 2, 5, 9, 14, 20, 27, 31)
"""Of rows of one batch, so that each is at another position."""
_CHECK_TOKENS = 2048


def continue_texts(folder: Path, scale: Scale, *, run: str, dtype: str) -> dict[str, Any]:
    """Continue held-out texts greedily with the key/value cache, and judge each id by a pass without one.

    Args:
        folder: the work folder.
        scale: sizes.
        run: name of the run whose newest checkpoint writes.
        dtype: ``float32`` or ``bfloat16``.

    Returns:
        ``tokens`` that were written; ``otherwise``: those that the pass without a cache, over the same ids,
        would not have chosen; ``largest_gap``: by how much it prefers another one to them, at most;
        ``largest_difference`` of the log-probabilities of what was written; all in nats.
    """
    import torch

    from megatron_tokedit.engine.inference import load_language_model
    from megatron_tokedit.generation import GenerationSettings, Prompt, generate
    from megatron_tokedit.generation.load import RECIPES, from_language_model
    from megatron_tokedit.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("SentencePieceTokenizer", str(folder / TOKENIZER))
    model = load_language_model(run_folder(folder, run), precision=RECIPES[dtype])
    writer = from_language_model(model, tokenizer, start_id=tokenizer.eod)
    lines = (folder / HELD_OUT_TEXT).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[: len(_PROMPT_TOKENS)]]
    lengths = _PROMPT_TOKENS[: len(texts)]
    prompts = [Prompt(writer.prompt_ids(text)[:length]) for text, length in zip(texts, lengths, strict=True)]
    settings = GenerationSettings(
        max_new_tokens=model.max_context_tokens - max(lengths),
        temperature=0.0,
        stop_at_eod=False,
        logprobs=True,
    )
    tokens = otherwise = 0
    gaps, differences = [0.0], [0.0]
    for completion in generate(writer, prompts, settings):
        prompt = completion.prompt.ids
        ids_T = torch.tensor([*prompt, *completion.ids], device=model.device)
        with torch.inference_mode():
            hidden_TH = model.hidden_states(ids_T[None])[0, len(prompt) - 1 : -1]
            logits_TV = torch.nn.functional.linear(hidden_TH, model.output_weight).float()
        logits_TV = logits_TV[:, : writer.vocab_size]
        chosen_T1 = ids_T[len(prompt) :, None]
        gap_T = logits_TV.amax(dim=1) - logits_TV.gather(1, chosen_T1)[:, 0]
        logprobs_T = logits_TV.log_softmax(dim=1).gather(1, chosen_T1)[:, 0]
        assert completion.logprobs is not None
        cached_T = torch.tensor(completion.logprobs, device=model.device)
        tokens += len(completion.ids)
        otherwise += int((gap_T > 0).sum())
        gaps.append(gap_T.max().item())
        differences.append((logprobs_T - cached_T).abs().max().item())
    return {
        "tokens": tokens,
        "otherwise": otherwise,
        "largest_gap": max(gaps),
        "largest_difference": max(differences),
    }


def convert_run(folder: Path, scale: Scale, *, run: str, dtype: str) -> dict[str, Any]:
    """Make a Hugging Face folder of a run's newest checkpoint, and compare the two token by token.

    Raises:
        CheckpointError: they differ by more than ``tools/convert_checkpoint.py --check`` lets pass.
    """
    from megatron_tokedit.cli.convert_check import check_conversion
    from megatron_tokedit.conversion.to_huggingface import open_trained, write_hugging_face_folder

    source, output = run_folder(folder, run), folder / CONVERTED
    output.mkdir()
    trained = open_trained(source)
    write_hugging_face_folder(trained, output, on_bytes=lambda num_bytes: None)
    check_conversion(
        source,
        output,
        trained.tokenizer,
        start_id=trained.start_id,
        text_file=None,
        num_tokens=_CHECK_TOKENS,
        context_tokens=_CHECK_TOKENS,
        tolerance=None,
        dtype=dtype,
    )
    return {"bytes": trained.num_bytes, "tokens": _CHECK_TOKENS}
