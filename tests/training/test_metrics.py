"""Records survive kills and hold a step once; tracked runs go on across starts (fakes record the calls)."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_services import write_fake_services
from training_cases import RUN

from megatron_tokedit.config.load import load_config
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.errors import ConfigError, DataFormatError
from megatron_tokedit.training.metrics import MetricsWriter, open_metrics, read_metrics
from megatron_tokedit.training.metrics_file import MetricsFile, last_recorded_step, read_records

WANDB = {"logging.wandb.project": "edits", "logging.wandb.mode": "offline"}
MLFLOW = {"logging.mlflow.experiment_name": "edits"}


class Service:
    """The calls that a fake package has received."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def take(self, name: str) -> list[Any]:
        """The arguments of every call of this name since the last look; keywords alone if that is all."""
        found = [call[1:] for call in self.module.MADE if call[0] == name]
        self.module.MADE[:] = [call for call in self.module.MADE if call[0] != name]
        return [call[0] if len(call) == 1 else call for call in found]


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    folder = tmp_path / "packages"
    write_fake_services(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    importlib.invalidate_caches()
    yield Service(importlib.import_module("calls"))
    for name in ("wandb", "mlflow", "calls"):
        sys.modules.pop(name, None)


def configured(folder: Path, settings: dict[str, Any]) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(RUN.format(folder=folder))
    return load_config(
        path, [f"{key}={yaml.safe_dump(value).splitlines()[0]}" for key, value in settings.items()]
    )


def train_steps(config: RunConfig, steps: range, outcome: Any = "stopped", **extra: float) -> None:
    writer = open_metrics(config, first_step=steps.start, is_writer=True)
    for step in steps:
        writer.write("train", step, {"loss": 1.0 / step, "mfu": None, **extra})
    writer.close(outcome)


# ------------------------------------------------------------------------------------------- metrics.jsonl


def test_a_rerun_replaces_what_it_repeats(tmp_path: Path) -> None:
    for steps in (range(1, 8), range(4, 6), range(6, 11)):
        writer = MetricsWriter(tmp_path, first_step=steps.start, is_writer=True)
        for step in steps:
            writer.write("train", step, {"loss": float(step), "run": steps.stop})
        writer.write("validation", steps.stop - 1, {"held": {"loss": 2.0}})
        writer.close()
    assert [record["step"] for record in read_metrics(tmp_path, "train")] == list(range(1, 11))
    assert [record["run"] for record in read_metrics(tmp_path, "train")] == [8] * 3 + [6] * 2 + [11] * 5
    assert [record["step"] for record in read_metrics(tmp_path, "validation")] == [5, 10]


@pytest.mark.parametrize("first_step", [1, 2, 500, 3000, 3001, 9999])
def test_cutting_a_long_file(tmp_path: Path, first_step: int) -> None:
    """Longer than the blocks that it is read backwards in, with lines of all lengths."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": n, "text": "x" * (n % 97)}) + "\n" for n in range(1, 3001)]
    path.write_text("".join(lines) + '{"kind": "train", "st')
    assert last_recorded_step(path) == 3000
    MetricsFile(path, first_step=first_step).close()
    assert path.read_text() == "".join(lines[: first_step - 1])


def test_one_huge_line_and_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "samples": list(range(60_000))}) + "\n")
    assert last_recorded_step(path) == 1
    MetricsFile(path, first_step=2).close()
    assert len(read_records(path)[0]["samples"]) == 60_000
    MetricsFile(path, first_step=1).close()
    assert read_records(path) == []
    assert last_recorded_step(path) == 0
    assert last_recorded_step(tmp_path / "none") == 0


def test_kill_9_loses_no_complete_record(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from megatron_tokedit.training.metrics_file import MetricsFile\n"
        "file = MetricsFile(Path(sys.argv[1]), first_step=int(sys.argv[2]))\n"
        "for step in range(int(sys.argv[2]), 10**9):\n"
        "    file.append({'kind': 'train', 'step': step, 'loss': 1 / step})\n"
        "    print(step, flush=True)\n"
    )
    path, first_step = tmp_path / "metrics.jsonl", 1
    for _ in range(3):
        command = [sys.executable, "-c", script, str(path), str(first_step)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            written = [int(process.stdout.readline()) for _ in range(200)][-1]
            os.kill(process.pid, signal.SIGKILL)
            written = max([written, *map(int, process.stdout.read().split("\n")[:-1])])
        assert last_recorded_step(path) >= written
        first_step = written - 50  # the last checkpoint
    MetricsFile(path, first_step=first_step).close()
    assert [record["step"] for record in read_records(path)] == list(range(1, first_step))


def test_what_is_not_finite_is_text(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, first_step=1, is_writer=True)
    writer.write("train", 1, {"loss": math.nan, "grad_norm": math.inf, "held": {"loss": -math.inf}})
    writer.close()
    (record,) = read_metrics(tmp_path)
    assert (record["loss"], record["grad_norm"], record["held"]) == ("nan", "inf", {"loss": "-inf"})


def test_damaged_records_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[]\n{"step": 2}\n')
    with pytest.raises(DataFormatError, match=r"metrics\.jsonl:2: not a record"):
        read_records(path)
    with pytest.raises(DataFormatError, match="No such file"):
        read_records(tmp_path / "none")


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, first_step=1, is_writer=False)
    writer.write("train", 1, {"loss": 1.0})
    writer.event(1, "loss_spike", {})
    writer.sync()
    writer.close()
    assert not list(tmp_path.iterdir())


def test_tensorboard_has_every_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (range(1, 7), range(4, 9)):
        writer = MetricsWriter(tmp_path, first_step=steps.start, is_writer=True)
        for step in steps:
            writer.write("train", step, {"loss": float(step), "mfu": None})
        writer.sync()
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))


# ------------------------------------------------------------------------------------------------ services


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, service: Service) -> None:
    config = configured(tmp_path, {**WANDB, "logging.wandb.tags": ["a"]})
    train_steps(config, range(1, 7))
    (init,) = service.take("init")
    assert init == {
        "project": "edits", "entity": None, "id": init["id"], "name": "run", "dir": str(tmp_path / "run"),
        "mode": "offline", "resume": "allow", "tags": ["a"], "allow_val_change": True, "seed": 7,
    }  # fmt: skip
    assert service.take("log")[1] == ({"train/loss": 0.5}, {"step": 2})
    assert service.take("mark_preempting") == [{}]
    assert service.take("finish") == [{"exit_code": 1}]

    train_steps(config, range(4, 9), "finished")
    assert service.take("init")[0]["id"] == init["id"]
    assert [call[1]["step"] for call in service.take("log")] == [7, 8], "the first start has sent 4 to 6"
    assert service.take("mark_preempting") == []
    assert service.take("finish") == [{"exit_code": 0}]
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, 9))


def test_repeated_twice_is_sent_once(tmp_path: Path, service: Service) -> None:
    config = configured(tmp_path, WANDB)
    for steps in (range(1, 9), range(4, 6), range(4, 11)):
        train_steps(config, steps)
    assert [call[1]["step"] for call in service.take("log")] == list(range(1, 11))


def test_another_project_is_another_run(tmp_path: Path, service: Service) -> None:
    train_steps(configured(tmp_path, WANDB), range(1, 3))
    train_steps(configured(tmp_path, {**WANDB, "logging.wandb.project": "other"}), range(1, 3))
    first, second = service.take("init")
    assert first["id"] != second["id"]
    assert len(service.take("log")) == 4


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, service: Service) -> None:
    config = configured(tmp_path, MLFLOW)
    train_steps(config, range(1, 4), **{"odd name!": 1.0})
    assert service.take("set_tracking_uri") == [(f"sqlite:///{tmp_path}/run/mlflow.db", {})]
    artifacts = {"artifact_location": f"file://{tmp_path}/run/mlflow_artifacts"}
    assert service.take("create_experiment") == [("edits", artifacts)]
    assert service.take("set_experiment") == [("edits", {})]
    assert service.take("start_run") == [{"run_id": None, "run_name": "run"}]
    params: dict[str, str] = {}
    for call in service.take("log_params"):
        params |= call[0]
    assert params["optimizer.lr"] == "0.01"
    assert params["data.train.1.name"] == "second"
    values = {"train/loss": 1.0, "train/odd name_": 1.0}
    assert service.take("log_metrics")[0] == (values, {"step": 1, "synchronous": False})
    assert service.take("end_run") == [("KILLED", {})]

    train_steps(config, range(3, 6), "failed")
    assert service.take("start_run") == [{"run_id": "f" * 32, "run_name": "run"}]
    assert service.take("create_experiment") == service.take("log_params") == []
    assert [call[1]["step"] for call in service.take("log_metrics")] == [4, 5]
    assert service.take("flush_async_logging") == [{}, {}]
    assert service.take("end_run") == [("FAILED", {})]


def test_where_mlflow_is(tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    train_steps(configured(tmp_path, MLFLOW), range(1, 2))
    assert service.take("set_tracking_uri") == service.take("create_experiment") == []
    train_steps(configured(tmp_path, {**MLFLOW, "logging.mlflow.tracking_uri": "http://other"}), range(2, 3))
    assert service.take("set_tracking_uri") == [("http://other", {})]
    assert [call["run_id"] for call in service.take("start_run")] == [None, None], "two servers, two runs"


def test_both_services_at_once(tmp_path: Path, service: Service) -> None:
    train_steps(configured(tmp_path, {**WANDB, **MLFLOW}), range(1, 3))
    assert set(json.loads((tmp_path / "run" / "trackers.json").read_text())) == {"wandb", "mlflow"}
    assert len(service.take("log")) == len(service.take("log_metrics")) == 2


def test_missing_packages(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb") or importlib.util.find_spec("mlflow"):
        pytest.skip("the packages are installed here")
    config = configured(tmp_path, WANDB)
    with pytest.raises(ConfigError, match=r"logging\.wandb: .* pip install 'megatron_tokedit\[wandb\]'"):
        open_metrics(config, first_step=1, is_writer=True)
    open_metrics(config, first_step=1, is_writer=False).close()
    with pytest.raises(ConfigError) as error:
        open_metrics(configured(tmp_path, {**WANDB, **MLFLOW}), first_step=1, is_writer=True)
    assert "megatron_tokedit[wandb]" in str(error.value)
    assert "megatron_tokedit[mlflow]" in str(error.value)


def test_a_folder_of_logs_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="the package wandb is not installed"):
        open_metrics(configured(tmp_path, WANDB), first_step=1, is_writer=True)


def test_a_service_that_refuses_to_start(
    tmp_path: Path, service: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    from megatron_tokedit import log

    log.configure()
    config = configured(tmp_path, WANDB)
    service.module.BROKEN = True
    with pytest.raises(ConfigError, match=r"(?s)api_key not configured.*set logging\.wandb\.mode to offline"):
        open_metrics(config, first_step=1, is_writer=True)
    service.module.BROKEN = False
    train_steps(config, range(1, 3))
    (begun,) = service.take("init")
    service.module.BROKEN = True
    train_steps(config, range(3, 5))
    shown = capfd.readouterr().err
    assert "the tracked run cannot be started: RuntimeError: api_key" in shown
    assert f"or remove {tmp_path}/run/trackers.json to begin a new tracked run" in shown
    service.module.BROKEN = False
    train_steps(config, range(5, 7))
    assert service.take("init")[0]["id"] == begun["id"], "away for a while, and still the same run"
    assert [call[1]["step"] for call in service.take("log")] == [1, 2, 5, 6]
    assert len(read_metrics(tmp_path / "run")) == 6


def test_a_service_that_fails_on_the_way(
    tmp_path: Path, service: Service, capfd: pytest.CaptureFixture[str]
) -> None:
    from megatron_tokedit import log

    log.configure()
    writer = open_metrics(configured(tmp_path, WANDB), first_step=1, is_writer=True)
    for step in range(1, 5):
        service.module.BROKEN = step in (2, 3)
        writer.write("train", step, {"loss": 1.0})
    writer.close("finished")
    shown = capfd.readouterr().err
    assert shown.count("could not be sent: ConnectionError: no way out") == 1
    assert [call[1]["step"] for call in service.take("log")] == [1, 4]
    assert len(read_metrics(tmp_path / "run")) == 4
