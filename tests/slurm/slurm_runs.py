"""A small run for the tests on a real Slurm, and what it leaves in its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from cluster import Cluster

from megatron_tokedit.testing.models import write_hf_llama

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "slurm" / "pretrain_edited.sh"
PREPROCESS = ROOT / "slurm" / "preprocess_edit.sh"
START_SECONDS = 120
"""For ranks to get to their first steps, on a busy machine."""
STEPS = 200
TASKS = 3


def write_config(folder: Path) -> Path:
    """TP2 on two nodes, one rank each; a prior edits 19 work units, validation text is left as it is."""
    example = ROOT / "examples" / "tiny_cpu"
    prior = write_hf_llama(folder / "prior", vocab_size=1024, seed=1)
    edit = {"edit_strategy": "up_revise", "prior": str(prior), "prior_device": "cpu", "workers": 1}
    config = {
        "run_dir": "run",
        "tokenizer": {"type": "SentencePieceTokenizer", "model": str(example / "tokenizer.model")},
        "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
                  "ffn_hidden_size": 64, "seq_length": 64},
        "parallel": {"tensor_model_parallel_size": 2},
        "precision": {"recipe": "fp32"},
        "optimizer": {"lr": 5e-3},
        "schedule": {"lr_decay_style": "cosine", "lr_warmup_steps": 5},
        "training": {"train_steps": STEPS, "micro_batch_size": 2, "global_batch_size": 2,
                     "eval_interval_steps": STEPS, "eval_steps": 2},
        "data": {
            "prepared_dir": "prepared",
            "train": [{"name": "docs", "input": [str(example / "corpus.jsonl")],
                       "edit": {**edit, "append_eod": True, "unit_documents": 5}}],
            "validation": [{"name": "heldout", "input": [str(example / "heldout.jsonl")],
                            "edit": {"edit_strategy": "none", "append_eod": True}}],
        },
        "checkpoint": {"save_interval_steps": 10 * STEPS},
        "logging": {"log_interval_steps": 10},
        "runtime": {"device": "cpu", "cpu_threads": 1},
        "slurm": {"preprocess": {"tasks": TASKS}, "train": {"nodes": 2}, "evaluate": {}},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


class Run:
    """One run folder; its jobs are submitted from the folder of the configuration."""

    def __init__(self, cluster: Cluster, config: Path, name: str, *overrides: str) -> None:
        self.cluster, self.config, self.work = cluster, config, config.parent
        self.folder = self.work / name
        self.overrides = [f"run_dir={name}", *overrides]
        self.log = self.work / f"{name}.log"

    def submit(self, script: Path = TRAIN, *, checks: bool = False, **options: object) -> str:
        """Submit a script of this run; its nodes are checked first only where asked for."""
        env = {"TOKEDIT_NODE_CHECK": str(int(checks))} | dict(options.pop("env", {}))  # type: ignore[call-overload]
        nodes = options.pop("nodes", 2 if script == TRAIN else 1)
        before = ("--merge",) if options.pop("merge", False) else ()
        arguments = (*before, self.config.name, *self.overrides)
        return self.cluster.submit(
            script, *arguments, cwd=self.work, log=self.log, env=env, nodes=nodes, **options
        )

    def metrics(self) -> list[dict[str, object]]:
        """The records of training steps."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return [record for record in records if record["kind"] == "train"]

    def losses(self) -> list[tuple[object, object]]:
        """Every step's number and loss, exact."""
        return [(record["step"], record["loss"]) for record in self.metrics()]

    def wait_for_step(self, step: int, job: str) -> int:
        """Wait until a step is done; returns the last one that is."""

        def reached() -> int:
            records = self.metrics()
            last = int(str(records[-1]["step"])) if records else 0
            return last if last >= step else 0

        return self.cluster.until(
            f"step {step} of {self.folder.name}", START_SECONDS, reached, job=job, log=self.log
        )

    def wait(self, job: str, *states: str, seconds: float = START_SECONDS) -> dict[str, str]:
        """Of the cluster, with this run's log."""
        return self.cluster.wait(job, *states, seconds=seconds, log=self.log)

    def wait_for_restart(self, job: str, restarts: int, seconds: float = 90) -> None:
        """Wait until the job runs again."""

        def runs() -> bool:
            facts = self.cluster.facts(job)
            return facts.get("JobState") == "RUNNING" and facts["Restarts"] == str(restarts)

        self.cluster.until(f"restart {restarts}", seconds, runs, job=job, log=self.log)

    def stays(self, job: str, state: str, seconds: float) -> None:
        """The job is in this state, and stays in it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.cluster.facts(job)["JobState"] == state, self.said()
            time.sleep(0.5)

    def said(self) -> str:
        """The job's log, all its starts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tensorboard_steps(self) -> list[int]:
        """The steps of the loss in TensorBoard's folder."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        return [event.step for event in events.Scalars("train/loss")]


def datasets(prepared: Path) -> dict[str, bytes]:
    """Every dataset file below a folder, by its name there."""
    files = [path for path in prepared.rglob("*_document.*") if path.suffix in (".bin", ".idx", ".edits")]
    return {str(path.relative_to(prepared)): path.read_bytes() for path in files}


def job_ids(folder: Path) -> dict[str, str]:
    """What tools/submit.py submitted last, by stage."""
    lines: Sequence[str] = (folder / "slurm" / "submitted.jsonl").read_text().splitlines()
    return {record["stage"]: record["job_id"] for record in map(json.loads, lines) if "stage" in record}
