"""Packages ``wandb`` and ``mlflow`` that record the calls they get in a module ``calls``."""

from __future__ import annotations

from pathlib import Path

FAKE_WANDB = '''
"""Records its calls; signatures as in wandb 0.17 and later."""
import calls

class Run:
    def __init__(self, id):
        self.id = id
    def log(self, data, step=None, commit=None):
        if calls.BROKEN:
            raise ConnectionError("no way out")
        calls.add("log", dict(data), step=step)
    def mark_preempting(self):
        calls.add("mark_preempting")
    def finish(self, exit_code=None, quiet=None):
        calls.add("finish", exit_code=exit_code)

def init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
         config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None, job_type=None,
         mode=None, force=None, reinit=None, resume=None, settings=None):
    if calls.BROKEN:
        raise RuntimeError("api_key not configured (no-tty)")
    calls.add("init", project=project, entity=entity, id=id, name=name, dir=dir, mode=mode, resume=resume,
              tags=tags, allow_val_change=allow_val_change, seed=config["seed"])
    return Run(id)
'''
FAKE_MLFLOW = '''
"""Records its calls; signatures as in mlflow 2.14 to 3."""
import calls
from types import SimpleNamespace

EXPERIMENTS, ACTIVE, NEXT = {}, [], ["f" * 32]

def set_tracking_uri(uri):
    calls.add("set_tracking_uri", uri)

def get_experiment_by_name(name):
    return EXPERIMENTS.get(name)

def create_experiment(name, artifact_location=None, tags=None):
    EXPERIMENTS[name] = name
    calls.add("create_experiment", name, artifact_location=artifact_location)

def set_experiment(experiment_name=None, experiment_id=None):
    calls.add("set_experiment", experiment_name)

def start_run(run_id=None, experiment_id=None, run_name=None, nested=False, parent_run_id=None, tags=None,
              description=None, log_system_metrics=None):
    assert not ACTIVE, "Run is already active"
    ACTIVE.append(run_id or NEXT[0])
    calls.add("start_run", run_id=run_id, run_name=run_name)
    return SimpleNamespace(info=SimpleNamespace(run_id=ACTIVE[0]))

def log_params(params, synchronous=None, run_id=None):
    assert len(params) <= 100 and all(isinstance(value, str) for value in params.values())
    calls.add("log_params", dict(params))

def log_metrics(metrics, step=None, synchronous=None, run_id=None, timestamp=None):
    assert all(isinstance(value, float) for value in metrics.values())
    calls.add("log_metrics", dict(metrics), step=step, synchronous=synchronous)

def flush_async_logging():
    calls.add("flush_async_logging")

def end_run(status="FINISHED"):
    ACTIVE.clear()
    calls.add("end_run", status)
'''
CALLS = """
MADE, BROKEN = [], False

def add(name, /, *args, **kwargs):
    MADE.append((name, *args, kwargs))
"""


def write_fake_services(folder: Path) -> None:
    """Write the packages into a new folder, for ``sys.path``."""
    folder.mkdir()
    for name, text in (("wandb", FAKE_WANDB), ("mlflow", FAKE_MLFLOW), ("calls", CALLS)):
        (folder / f"{name}.py").write_text(text)
