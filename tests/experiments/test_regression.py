"""The regression theory: simulated errors against closed forms, bounds and an independent plain loop."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_tokedit.cli.collapse_experiment import main
from megatron_tokedit.errors import ConfigError
from megatron_tokedit.experiments import regression
from megatron_tokedit.experiments.regression import (
    Arm,
    Regression,
    Selection,
    accumulated_error,
    default_arms,
    inverse_square_trace,
    iterated_error,
    shrinking_bound,
    simulate,
    uniform_bound,
)
from megatron_tokedit.experiments.regression_report import as_table, verdicts

SMALL = Regression(num_samples=40, num_features=5, generations=8, trials=600)
SHAPES = [(40, 5, 1.0), (30, 10, 0.5), (200, 3, 2.0)]


@pytest.mark.parametrize(("samples", "features", "noise"), SHAPES)
def test_errors_follow_the_closed_forms(samples: int, features: int, noise: float) -> None:
    problem = Regression(samples, features, noise, generations=6, trials=1500)
    iterated, accumulated = simulate(problem, [Arm("iterated"), Arm("accumulated", accumulates=True)])
    for curve, expected_N in ((iterated, iterated_error(problem)), (accumulated, accumulated_error(problem))):
        assert np.all(np.abs(curve.mean_N - expected_N) < 3 * curve.standard_error_N)
        assert np.all(curve.standard_error_N < 0.1 * expected_N)  # so the line above says something
    assert iterated_error(problem)[5] == pytest.approx(
        6 * noise**2 * features / (samples - features - 1), rel=1e-12
    )


def plain_trial(problem: Regression, trial: int, arm: Arm) -> list[float]:
    """One trial with a true ``w*``, by numpy's own least squares, from the same random numbers."""
    generator = np.random.default_rng((problem.seed, trial))
    x = generator.standard_normal((problem.num_samples, problem.num_features))
    noise = problem.noise * generator.standard_normal((problem.generations, problem.num_samples))
    ranks = generator.random((problem.generations, problem.num_samples)).argsort(axis=-1)
    truth = np.linspace(-2.0, 3.0, problem.num_features)
    labels = [x @ truth + noise[0]]
    errors = []
    for n in range(problem.generations):
        xs, ys = (np.tile(x, (n + 1, 1)), np.concatenate(labels)) if arm.accumulates else (x, labels[-1])
        w = np.linalg.lstsq(xs, ys, rcond=None)[0]
        errors.append(float(((w - truth) ** 2).sum()))
        if n + 1 == problem.generations:
            break
        new = x @ w + noise[n + 1]
        if arm.selection is not None:
            edited = labels[-1].copy()
            size = math.floor(math.floor(arm.selection.share * len(x)) * arm.selection.shrink ** (2 * n))
            if arm.selection.kind == "predictable":
                chosen = np.argsort(np.abs(labels[-1] - x @ w))[:size]
            else:
                chosen = ranks[0 if arm.selection.kind == "fixed" else n + 1][:size]
            edited[chosen] = new[chosen]
            new = edited
        labels.append(new)
    return errors


@pytest.mark.parametrize("arm", default_arms(0.45, 0.8), ids=lambda arm: arm.name)
def test_every_arm_is_what_a_plain_loop_finds(arm: Arm) -> None:
    problem = Regression(num_samples=24, num_features=4, noise=0.7, generations=6, trials=5)
    expected = np.array([plain_trial(problem, trial, arm) for trial in range(problem.trials)])
    (curve,) = simulate(problem, [arm])
    np.testing.assert_allclose(curve.mean_N, expected.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(
        curve.standard_error_N, expected.std(axis=0, ddof=1) / math.sqrt(problem.trials), rtol=1e-9
    )


def test_an_edit_of_all_labels_is_the_iterated_arm_and_one_of_none_changes_nothing() -> None:
    everything, nothing, iterated = simulate(
        SMALL,
        [Arm("all", Selection("fresh", 1.0)), Arm("none", Selection("fixed", 0.0)), Arm("iterated")],
    )
    assert np.array_equal(everything.mean_N, iterated.mean_N)
    np.testing.assert_allclose(nothing.mean_N, nothing.mean_N[0], rtol=1e-12)


def test_memory_is_bounded_by_batches_which_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = simulate(SMALL, default_arms())
    monkeypatch.setattr(regression, "BATCH_BYTES", 50_000)
    told: list[int] = []
    for one, other in zip(whole, simulate(SMALL, default_arms(), on_trials=told.append), strict=True):
        np.testing.assert_allclose(one.mean_N, other.mean_N, rtol=1e-12)
    assert sum(told) == SMALL.trials
    assert max(told) < 20


def test_the_trace_of_the_second_bound_is_that_of_drawn_designs() -> None:
    generator = np.random.default_rng(7)
    x = generator.standard_normal((20_000, 16, 3))
    gram = np.linalg.inv(np.einsum("btd,bte->bde", x, x))
    drawn = np.trace(gram @ gram, axis1=1, axis2=2)
    assert abs(drawn.mean() - inverse_square_trace(16, 3)) < 4 * drawn.std() / math.sqrt(len(drawn))
    problem = Regression(16, 3, 2.0)
    selection = Selection("fresh", 0.5, 0.5)
    assert shrinking_bound(problem, selection) == pytest.approx(
        4 * 3 / 12 + 4 * math.sqrt(inverse_square_trace(16, 3) * 8) / 0.5
    )
    assert shrinking_bound(problem, Selection("fresh", 0.5)) == math.inf


def test_edits_that_shrink_stay_below_both_bounds_and_others_need_not() -> None:
    problem = Regression(generations=25, trials=400)
    curves = {curve.arm.name: curve for curve in simulate(problem, default_arms(0.3, 0.7))}
    held = {name: [verdict.holds for verdict in verdicts(problem, curve)] for name, curve in curves.items()}
    assert held == {
        "iterated": [True],
        "accumulated": [True],
        "edited, fresh": [False],
        "edited, fixed": [True],
        "edited, predictable": [False],
        "edited, fresh, shrinking": [True, True],
        "edited, predictable, shrinking": [True, True],
    }
    (fresh,) = verdicts(problem, curves["edited, fresh"])
    n = fresh.first_violated
    assert n is not None
    assert (
        curves["edited, fresh"].mean_N[n - 1] > uniform_bound(problem) > curves["edited, fresh"].mean_N[n - 3]
    )
    assert f"CONTRADICTED from generation {n} on" in as_table(problem, list(curves.values()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 21}, "num_samples > num_features \\+ 1"),
        ({"noise": 0.0}, "noise is 0.0"),
        ({"generations": 0, "trials": 1}, "generations is 0.*trials is 1"),
    ],
)
def test_impossible_problems_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Regression(**fields)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"share is 1\.5"):
        Selection("fixed", 1.5)


def test_the_command_prints_a_table_and_writes_figures_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "theory",
        "--trials",
        "50",
        "--generations",
        "4",
        "--quiet",
        "--output-dir",
        str(tmp_path / "a"),
    ]
    assert main(arguments) == 0
    assert "edited, predictable, shrinking" in capsys.readouterr().out
    found = json.loads((tmp_path / "a" / "theory.json").read_text())
    assert found["problem"]["trials"] == 50
    assert len(found["arms"]) == 7
    assert len(found["arms"][0]["mean_error"]) == 4
    assert (tmp_path / "a" / "theory.png").read_bytes().startswith(b"\x89PNG")
    assert main(["theory", "--samples", "10"]) == 1
    assert "num_samples" in capsys.readouterr().err
