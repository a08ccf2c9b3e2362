"""Local tasks, tiny models for them, and lm-eval models to compare with, for the ranks of the pool too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests" / "conversion")]
CONTEXT = 64

CHOICES = [
    # last tokens that differ, whole texts that differ, a space at the end of the context, an empty context
    {"question": "The river rises in the", "choices": [" hills", " sea", " house", " town"], "answer": 0},
    {"question": "It falls into the sea ", "choices": ["and", "and then", "or the lake"], "answer": 2},
    {"question": "   ", "choices": ["one", "two"], "answer": 1},
    {"question": "", "choices": ["one", "The end of it", "na\u00efve \u4f60\u597d"], "answer": 0},
    {"question": "Question:\n\tWhich? Answer:", "choices": [" A", " B", " C", " D"], "answer": 3},
    {"question": "Question:\n\tWhat? Answer:", "choices": [" A", " B", " C", " D"], "answer": 1},
    {"question": "far too long for the model " * 30, "choices": [" yes", " no", " yes and no"], "answer": 1},
    {"question": "nearly " * 24, "choices": [" too long or so", " too long", " not"], "answer": 1},
]
CHOICES_FOR_HF = [case for case in CHOICES if case["question"] != "   "]
"""Without what `hf` fails at with an assertion: a context of spaces, for a tokenizer without BOS."""
TEXTS = ["One text.", "Two  words\n", "\u4f60\u597d \U0001f600", "Some text that goes on and on. " * 12, "a"]
STARTS = ["The river", "It falls into the", "Long ago, " * 40, "x"]


def write_tasks(folder: Path, choices: list[dict[str, Any]] = CHOICES) -> Path:
    """Three tasks: choices, texts, and texts to be written."""
    folder.mkdir()
    rows: dict[str, list[dict[str, Any]]] = {
        "choices": choices,
        "texts": [{"text": text} for text in TEXTS],
        "starts": [{"start": text} for text in STARTS],
    }
    for name, records in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_task(
        folder,
        "choices",
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        target_delimiter="",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    write_task(
        folder,
        "texts",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    write_task(
        folder,
        "starts",
        output_type="generate_until",
        doc_to_text="{{start}}",
        doc_to_target="{{start}}",
        generation_kwargs={"until": ["e", " the"], "max_gen_toks": 12},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    return folder


def write_task(folder: Path, name: str, **fields: Any) -> Path:
    """A task file over NAME.jsonl; JSON is YAML."""
    path = folder / f"{name}.yaml"
    content = {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **fields,
    }
    path.write_text(json.dumps(content))
    return path


def evaluate(path: Path, tasks: Path, *, rank_store: str | None = None, **options: Any) -> dict[str, Any]:
    """Answers and metrics of the project's adapter; with ``rank_store`` in all ranks of the process group."""
    from contextlib import ExitStack

    from megatron_tokedit.evaluation.tasks.model import ModelOptions, follow_tasks, load_task_model

    with ExitStack() as stack:
        replica = None
        if rank_store is not None:
            replica = stack.enter_context(_replica(rank_store))
            if not replica.leads:
                follow_tasks(replica)
                return {}
        model = load_task_model(str(path), ModelOptions(**{"batch_tokens": 200, **options}), replica)
        return run(adapter(model), tasks)


def adapter(model: Any, folder: Path | None = None) -> Any:
    from megatron_tokedit.evaluation.tasks.adapter import ProjectLM
    from megatron_tokedit.evaluation.tasks.answers import AnswerLog

    return ProjectLM(model, answers=AnswerLog(folder, model.fingerprint))


def run(lm: Any, tasks: Path, **changes: Any) -> dict[str, Any]:
    """Metrics, and a task's contexts and answers: a list a document."""
    from megatron_tokedit.evaluation.tasks.catalog import load_tasks
    from megatron_tokedit.evaluation.tasks.harness import prepare, run_tasks, silence
    from megatron_tokedit.evaluation.tasks.settings import TaskSettings

    with silence():
        loaded = load_tasks([str(tasks)])
    settings = TaskSettings(**{"bootstrap_iters": 100, **changes})
    prepare(loaded, settings)
    outcome = run_tasks(lm, loaded, settings)
    assert outcome is not None
    return {
        "scores": {(t.task, s.metric): (s.value, s.stderr) for t in outcome.tasks for s in t.scores},
        "contexts": {
            task: {sample["doc_id"]: sample["arguments"] for sample in samples}
            for task, samples in outcome.samples.items()
        },
        "answers": {
            task: [[r[0] for r in sample["resps"]] for sample in sorted(samples, key=lambda s: s["doc_id"])]
            for task, samples in outcome.samples.items()
        },
    }


def _replica(store: str) -> Any:
    import torch
    import torch.distributed as dist

    from megatron_tokedit.scoring.identity import PriorLayout
    from megatron_tokedit.scoring.replica_group import Replica

    layout = PriorLayout(tensor=dist.get_world_size())
    return Replica(layout, index=0, store=dist.FileStore(store), device=torch.device("cpu"))


def reference(path: Path, **changes: Any) -> Any:
    """lm-eval's own encoding and transformers' own model, a request at a time; see ``lm_eval.api.model``."""
    import torch
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    limit = changes.get("context", model.config.max_position_embeddings)

    class ReferenceLM(TemplateLM):  # type: ignore[misc]
        eot_token_id = tokenizer.eos_token_id
        prefix_token_id = tokenizer.bos_token_id or tokenizer.eos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            more = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            if add_special_tokens is None and string.startswith(tokenizer.decode(self.prefix_token_id)):
                more = {"add_special_tokens": False}
            return tokenizer.encode(string, **more)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            ids, more = super()._encode_pair(context, continuation)
            return (ids, more) if ids else ([self.prefix_token_id], more)  # where `hf` fails

        @torch.inference_mode()
        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            answers = []
            for _, context, continuation in requests:
                ids = torch.tensor([(context + continuation)[-(limit + 1) :]])
                logprobs = model(ids[:, :-1]).logits[0].float().log_softmax(-1)[-len(continuation) :]
                wanted = ids[0, -len(continuation) :]
                value = logprobs.gather(1, wanted[:, None]).sum().item()
                answers.append((value, bool((logprobs.argmax(-1) == wanted).all())))
            return answers

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            values = []
            for request in requests:
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=limit,
                    context_len=1,
                )
                pairs = [(None, *make_disjoint_window(window)) for window in windows]
                values.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
            return values

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            texts = []
            for request in requests:
                context, wanted = request.args
                ids = self.tok_encode(context)[-(limit - wanted["max_gen_toks"]) :]
                made = model.generate(
                    torch.tensor([ids]),
                    max_new_tokens=wanted["max_gen_toks"],
                    do_sample=False,
                    pad_token_id=tokenizer.eos_token_id,
                )
                text = tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
                for stop in [*wanted["until"], tokenizer.eos_token]:
                    text = text.split(stop)[0]
                texts.append(text)
            return texts

    return ReferenceLM()
