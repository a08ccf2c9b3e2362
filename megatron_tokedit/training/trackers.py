"""Runs in Weights & Biases and MLflow: one tracked run a run folder, however often the run is started again.

The id of the tracked run is kept in ``RUN_DIR/trackers.json``. Invariant: rank 0 alone talks to a service; a
step that was sent before a kill is not sent again when it is repeated.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatron_tokedit.config.record import to_mapping
from megatron_tokedit.config.sections import RunConfig
from megatron_tokedit.config.training import LoggingConfig, MlflowConfig, WandbConfig
from megatron_tokedit.dataset.atomic import atomic_write_bytes
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)

FILE_NAME = "trackers.json"
Outcome = Literal["finished", "stopped", "failed"]
"""How a start of a run ended: all steps done, to be gone on with, or with an error."""
_Start = Callable[[str | None, int], "Tracker"]
"""From the id of the tracked run (None: a new one) and the last step sent."""


class Tracker(ABC):
    """A run in a tracking service.

    Attributes:
        name: of the service, as in the configuration.
        run_id: of the tracked run; None until the service has made one.
        sent_step: the last step that an earlier start has sent.
    """

    name: str

    def __init__(self, run_id: str | None, sent_step: int) -> None:
        self.run_id, self.sent_step = run_id, sent_step

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the numbers of a step, without waiting for the service."""

    @abstractmethod
    def close(self, outcome: Outcome) -> None:
        """Send what is left and end the tracked run."""


class WandbTracker(Tracker):
    """A run in Weights & Biases."""

    name = "wandb"

    def __init__(self, settings: WandbConfig, config: RunConfig, run_id: str | None, sent_step: int) -> None:
        super().__init__(run_id or secrets.token_hex(4), sent_step)
        import wandb

        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or Path(config.run_dir).name,
            group=settings.group,
            tags=settings.tags or None,
            mode=settings.mode,
            id=self.run_id,
            resume="allow",
            dir=config.run_dir,
            config=to_mapping(config),
            allow_val_change=True,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the numbers of a step; a background process does it."""
        self._run.log(dict(values), step=step)

    def close(self, outcome: Outcome) -> None:
        """End the run; one that is to be gone on with is shown as preempted."""
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


class MlflowTracker(Tracker):
    """A run in MLflow."""

    name = "mlflow"

    _STATUS: Mapping[Outcome, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    _MAX_PARAMS = 100  # in one request

    def __init__(self, settings: MlflowConfig, config: RunConfig, run_id: str | None, sent_step: int) -> None:
        super().__init__(run_id, sent_step)
        import mlflow

        self._mlflow = mlflow
        name = settings.experiment_name
        if uri := _tracking_uri(settings, config):
            mlflow.set_tracking_uri(uri)
        if uri == _local_uri(config) and mlflow.get_experiment_by_name(name) is None:
            # else its artifacts would go to the folder that the run was started from
            mlflow.create_experiment(name, artifact_location=_absolute(config, "mlflow_artifacts").as_uri())
        mlflow.set_experiment(name)
        run = mlflow.start_run(run_id=run_id, run_name=settings.run_name or Path(config.run_dir).name)
        self.run_id = run.info.run_id
        if run_id is None:  # the parameters of a run cannot be changed
            params = list(_flat_settings(to_mapping(config)))
            for first in range(0, len(params), self._MAX_PARAMS):
                mlflow.log_params(dict(params[first : first + self._MAX_PARAMS]))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the numbers of a step; a background thread does it."""
        self._mlflow.log_metrics(
            {_mlflow_name(name): value for name, value in values.items()}, step=step, synchronous=False
        )

    def close(self, outcome: Outcome) -> None:
        """Wait until all is sent and end the run."""
        self._mlflow.flush_async_logging()
        self._mlflow.end_run(self._STATUS[outcome])


def missing_packages(logging: LoggingConfig) -> list[str]:
    """A problem for every service that is asked for and whose package is not installed; no import is made."""
    wanted = [name for name in ("wandb", "mlflow") if getattr(logging, name) is not None]
    return [
        f"logging.{name}: the package {name} is not installed here; pip install 'megatron_tokedit[{name}]', "
        f"or leave logging.{name} out"
        for name in wanted
        if not _installed(name)
    ]


def check_packages(logging: LoggingConfig) -> None:
    """Refuse services whose packages are missing, before anything is started.

    Raises:
        ConfigError: with every one of them.
    """
    if problems := missing_packages(logging):
        raise ConfigError("\n  - ".join(["run tracking:", *problems]) if problems[1:] else problems[0])


def open_trackers(config: RunConfig, *, last_step: int) -> list[Tracker]:
    """Start, or go on with, the tracked runs of a run folder; on rank 0 only.

    A service that cannot go on with its run costs a warning: a run of weeks is not to end because a service
    is away when it is queued again.

    Args:
        config: resolved.
        last_step: the last step that earlier starts have recorded.

    Raises:
        ConfigError: a package is not installed, or a service does not begin a new run.
    """
    check_packages(config.logging)
    path = Path(config.run_dir) / FILE_NAME
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    trackers: list[Tracker] = []
    for name, place, start in _wanted(config):
        known = recorded.get(name, {})
        known = known if known.get("place") == place else {}
        sent_step = max(known["sent_step"], last_step) if known else 0
        try:
            tracker = start(known.get("id"), sent_step)
        except Exception as error:  # the services' errors share no base class
            if not known:
                raise ConfigError(f"{_refusal(name, error)}, or leave logging.{name} out") from error
            logger.warning("%s, or remove %s to begin a new tracked run", _refusal(name, error), path)
            continue
        logger.info("%s: %s run %s", name, "going on with" if known else "new", tracker.run_id)
        recorded[name] = {"id": tracker.run_id, "place": place, "sent_step": sent_step}
        atomic_write_bytes(path, (json.dumps(recorded, indent=1) + "\n").encode())
        trackers.append(tracker)
    return trackers


def _wanted(config: RunConfig) -> Iterator[tuple[str, list[str | None], _Start]]:
    """The services asked for, where in them the run is (elsewhere its id means nothing), how to start."""
    wandb, mlflow = config.logging.wandb, config.logging.mlflow
    if wandb is not None:
        yield "wandb", [wandb.entity, wandb.project], partial(WandbTracker, wandb, config)
    if mlflow is not None:
        uri = _tracking_uri(mlflow, config) or os.environ["MLFLOW_TRACKING_URI"]
        # a run folder may be moved, and its own database with it
        place = [None if uri == _local_uri(config) else uri, mlflow.experiment_name]
        yield "mlflow", place, partial(MlflowTracker, mlflow, config)


def _refusal(name: str, error: Exception) -> str:
    """What to do about a service that does not start a run."""
    offline = ", set logging.wandb.mode to offline" if name == "wandb" else ""
    return (
        f"logging.{name}: the tracked run cannot be started: {type(error).__name__}: {error}\n"
        f"  Mend that{offline}"
    )


def _tracking_uri(settings: MlflowConfig, config: RunConfig) -> str | None:
    """What MLflow must be told; None where its environment variable says it."""
    if settings.tracking_uri is None and os.environ.get("MLFLOW_TRACKING_URI"):
        return None
    return settings.tracking_uri or _local_uri(config)


def _local_uri(config: RunConfig) -> str:
    return f"sqlite:///{_absolute(config, 'mlflow.db')}"


def _absolute(config: RunConfig, name: str) -> Path:
    return Path(config.run_dir).absolute() / name


def _installed(package: str) -> bool:
    """Whether it can be imported; a folder of that name with logs in it is not a package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _mlflow_name(name: str) -> str:
    """MLflow takes letters, digits and ``_-. :/`` only."""
    return re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name)


def _flat_settings(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """``(section.field, text)`` of every setting that is given."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _flat_settings(item, f"{prefix}.{key}" if prefix else str(key))
    elif value is not None:
        yield _mlflow_name(prefix), str(value)
