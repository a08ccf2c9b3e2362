"""Model collapse and token editing in linear regression: the paper's theory as a simulation.

Human data are ``X`` ``[T, d]`` with rows ``N(0, I)`` and labels ``y_1 = X w* + e_1``, ``e ~ N(0, sigma^2)``.
Every generation fits least squares to its labels; the test error is ``|w_n - w*|^2`` (arXiv 2412.14689; the
iterated case is that of Dohmatob et al., arXiv 2402.07712, accumulation that of Gerstgrasser et al., arXiv
2404.01413). The design ``X`` stays, the labels change. With ``E_n = y_n - X w*``, the labels' errors:

- iterated: ``E_n = H E_{n-1} + e_n`` with the hat matrix ``H = X X^+``; all labels come from the last model;
- accumulated: as iterated, but every model is fitted to the labels of all generations, ``n`` copies of ``X``;
- edited: ``E_n = M (H E_{n-1} + e_n) + (I - M) E_{n-1}``; only the labels that the diagonal 0/1 matrix ``M``
  selects come from the last model.

Invariant: ``w*`` drops out (the error does not depend on it), so it is zero here; what a trial draws
depends on the seed and the trial's number alone, so more trials extend fewer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_tokedit.errors import ConfigError

Floats = npt.NDArray[np.float64]
Kind = Literal["fixed", "fresh", "predictable"]
BATCH_BYTES = 64 << 20
"""Memory of the designs of the trials that are simulated at once."""


@dataclass(frozen=True)
class Regression:
    """The problem, and how often it is drawn.

    Attributes:
        num_samples: ``T``, rows of the design.
        num_features: ``d``.
        noise: ``sigma``, standard deviation of every label's noise.
        generations: fits, the first to human labels.
        trials: independent designs and noises.
        seed: of the trials.
    """

    num_samples: int = 200
    num_features: int = 20
    noise: float = 1.0
    generations: int = 20
    trials: int = 1000
    seed: int = 1234

    def __post_init__(self) -> None:
        faults = []
        if self.num_features < 1:
            faults.append(f"num_features is {self.num_features}; it must be at least 1")
        if self.num_samples <= self.num_features + 1:
            faults.append(
                f"num_samples is {self.num_samples} with num_features {self.num_features}; the expected "
                "error is finite only where num_samples > num_features + 1"
            )
        if not (self.noise > 0 and math.isfinite(self.noise)):
            faults.append(f"noise is {self.noise}; it must be positive and finite")
        if self.generations < 1:
            faults.append(f"generations is {self.generations}; it must be at least 1")
        if self.trials < 2:
            faults.append(f"trials is {self.trials}; a standard error needs at least 2")
        if faults:
            raise ConfigError("; ".join(faults))

    @property
    def first_error(self) -> float:
        """Expected error of the fit to human labels, ``sigma^2 d / (T - d - 1)``."""
        return self.noise**2 * self.num_features / (self.num_samples - self.num_features - 1)


@dataclass(frozen=True)
class Selection:
    """Which labels an edit replaces: the matrices ``M_1, M_2, ...``.

    Attributes:
        kind: ``fixed``: a random set, the same in every generation (one that shrinks: a part of the last);
            ``fresh``: a random set, drawn anew; ``predictable``: the labels nearest to what the model
            predicts, the regression's counterpart of p >= threshold. Only the last depends on the noise.
        share: of the labels that the first edit replaces, from 0 to 1.
        shrink: ``eta`` of ``|M_i| = eta |M_{i-1}|``, from 0 to 1; 1: every edit replaces as many. The norm is
            read as Frobenius' (the spectral norm of a 0/1 matrix cannot shrink), so the number of replaced
            labels shrinks by ``eta^2``.
    """

    kind: Kind
    share: float
    shrink: float = 1.0

    def __post_init__(self) -> None:
        for name in ("share", "shrink"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")

    def sizes(self, num_samples: int, num_edits: int) -> list[int]:
        """Labels that each edit replaces; rounded down, so that the norm shrinks at least by ``shrink``."""
        first = int(self.share * num_samples + 1e-9)
        return [int(first * self.shrink ** (2 * i) + 1e-9) for i in range(num_edits)]


@dataclass(frozen=True)
class Arm:
    """One way to go from generation to generation.

    Attributes:
        name: in tables and pictures.
        selection: of an edited arm; ``None`` otherwise.
        accumulates: the labels of all generations are fitted; else those of the last.
    """

    name: str
    selection: Selection | None = None
    accumulates: bool = False


@dataclass(frozen=True)
class Curve:
    """What one arm measured.

    Attributes:
        arm: which.
        mean_N: mean test error of generation ``1 .. N`` over the trials.
        standard_error_N: of these means.
    """

    arm: Arm
    mean_N: Floats
    standard_error_N: Floats


def default_arms(share: float = 0.3, shrink: float = 0.7) -> list[Arm]:
    """Iterated, accumulated, and edited in four ways.

    Args:
        share: of the labels replaced by the first edit.
        shrink: of the arms whose edits shrink.

    Raises:
        ConfigError: a share or a shrinking factor out of range.
    """
    return [
        Arm("iterated"),
        Arm("accumulated", accumulates=True),
        Arm("edited, fresh", Selection("fresh", share)),
        Arm("edited, fixed", Selection("fixed", share)),
        Arm("edited, predictable", Selection("predictable", share)),
        Arm("edited, fresh, shrinking", Selection("fresh", share, shrink)),
        Arm("edited, predictable, shrinking", Selection("predictable", share, shrink)),
    ]


def simulate(
    problem: Regression, arms: Sequence[Arm], on_trials: Callable[[int], None] | None = None
) -> list[Curve]:
    """Test errors of all arms; they share designs and noises, so that they can be compared pairwise.

    Args:
        problem: what to draw.
        arms: one curve each.
        on_trials: called with a number of trials when they are done, for a progress bar.

    Returns:
        The curves, in the order of the arms.
    """
    row_bytes = 8 * problem.num_samples * (2 * problem.num_features + 4)
    batch = max(1, min(problem.trials, BATCH_BYTES // row_bytes))
    errors = np.empty((len(arms), problem.trials, problem.generations))
    for begin in range(0, problem.trials, batch):
        trials = range(begin, min(begin + batch, problem.trials))
        design = _Designs(problem, trials)
        for index, arm in enumerate(arms):
            errors[index, begin : trials.stop] = _run_arm(problem, arm, design)
        if on_trials is not None:
            on_trials(len(trials))
    spread = errors.std(axis=1, ddof=1) / math.sqrt(problem.trials)
    return [Curve(*fields) for fields in zip(arms, errors.mean(axis=1), spread, strict=True)]


class _Designs:
    """The designs of a batch of trials, factored: ``X = Q R``, so ``H = Q Q^T`` and ``X^+ = R^-1 Q^T``."""

    def __init__(self, problem: Regression, trials: range) -> None:
        size = (problem.num_samples, problem.num_features)
        self.generators = [np.random.default_rng((problem.seed, trial)) for trial in trials]
        self.q_BTD, r_BDD = np.linalg.qr(np.stack([g.standard_normal(size) for g in self.generators]))
        self.r_inverse_BDD = np.linalg.inv(r_BDD)
        self.noise_BNT = problem.noise * np.stack(
            [g.standard_normal((problem.generations, problem.num_samples)) for g in self.generators]
        )
        # of the selections that are drawn: a rank for every label, in every generation
        self.ranks_BNT = np.stack(
            [g.random((problem.generations, problem.num_samples)) for g in self.generators]
        ).argsort(axis=-1)

    def project(self, labels_BT: Floats) -> Floats:
        """``Q^T y`` of every trial: a fit, up to ``R``."""
        found: Floats = np.einsum("btd,bt->bd", self.q_BTD, labels_BT, optimize=True)
        return found

    def predict(self, fit_BD: Floats) -> Floats:
        """``X w`` of a fit."""
        found: Floats = np.einsum("btd,bd->bt", self.q_BTD, fit_BD, optimize=True)
        return found

    def test_error(self, fit_BD: Floats) -> Floats:
        """``|w - w*|^2`` of a fit."""
        w_BD = np.einsum("bde,be->bd", self.r_inverse_BDD, fit_BD, optimize=True)
        found: Floats = (w_BD**2).sum(axis=-1)
        return found


def _run_arm(problem: Regression, arm: Arm, designs: _Designs) -> Floats:
    """Test errors ``[trials, generations]`` of one arm on a batch of designs."""
    errors_BN = np.empty((len(designs.generators), problem.generations))
    sizes = arm.selection.sizes(problem.num_samples, problem.generations) if arm.selection else []
    labels_BT = designs.noise_BNT[:, 0]
    fit_BD = designs.project(labels_BT)
    errors_BN[:, 0] = designs.test_error(fit_BD)
    for n in range(1, problem.generations):
        predicted_BT = designs.predict(fit_BD)
        new_BT = predicted_BT + designs.noise_BNT[:, n]
        if arm.selection:
            mask_BT = _selected(arm.selection, sizes[n - 1], n, designs, labels_BT - predicted_BT)
            new_BT = np.where(mask_BT, new_BT, labels_BT)
        labels_BT = new_BT
        newest_BD = designs.project(labels_BT)
        # n + 1 stacked copies of X: the fit is the mean of the generations' own fits
        fit_BD = fit_BD + (newest_BD - fit_BD) / (n + 1) if arm.accumulates else newest_BD
        errors_BN[:, n] = designs.test_error(fit_BD)
    return errors_BN


def _selected(
    selection: Selection, size: int, generation: int, designs: _Designs, residuals_BT: Floats
) -> npt.NDArray[np.bool_]:
    """Diagonals of ``M``, ``[trials, T]``."""
    if selection.kind == "predictable":
        order_BT = np.abs(residuals_BT).argsort(axis=-1)
    else:
        order_BT = designs.ranks_BNT[:, 0 if selection.kind == "fixed" else generation]
    mask_BT = np.zeros(residuals_BT.shape, np.bool_)
    np.put_along_axis(mask_BT, order_BT[:, :size], True, axis=-1)
    return mask_BT


def iterated_error(problem: Regression) -> Floats:
    """``n sigma^2 d / (T - d - 1)``, exact for the iterated arm, ``[generations]``."""
    generations_N = np.arange(1, problem.generations + 1, dtype=np.float64)
    return problem.first_error * generations_N


def accumulated_error(problem: Regression) -> Floats:
    """``sigma^2 d / (T - d - 1) * sum_{i <= n} 1 / i^2``, exact for the accumulated arm."""
    inverse_squares_N: Floats = 1.0 / np.arange(1, problem.generations + 1, dtype=np.float64) ** 2
    return problem.first_error * np.cumsum(inverse_squares_N)


def uniform_bound(problem: Regression) -> float:
    """The paper's bound of the edited arm for every generation, ``2 sigma^2 d / (T - d - 1)``."""
    return 2.0 * problem.first_error


def shrinking_bound(problem: Regression, selection: Selection) -> float:
    """The paper's bound where edits shrink geometrically.

    ``sigma^2 d / (T - d - 1) + sigma^2 sqrt(E tr (X^T X)^-2) sqrt(E tr M_1) / (1 - eta)``. Infinite where the
    edits do not shrink or ``T <= d + 3``.
    """
    samples, features = problem.num_samples, problem.num_features
    if selection.shrink >= 1.0 or samples <= features + 3:
        return math.inf
    trace = inverse_square_trace(samples, features)
    first = selection.sizes(samples, 1)[0]
    return problem.first_error + problem.noise**2 * math.sqrt(trace) * math.sqrt(first) / (
        1 - selection.shrink
    )


def inverse_square_trace(num_samples: int, num_features: int) -> float:
    """``E tr (X^T X)^-2`` of ``X`` ``[T, d]`` with rows ``N(0, I)``, for ``T > d + 3``.

    ``d (T - 1) / ((T - d) (T - d - 1) (T - d - 3))``, the second moment of an inverse Wishart matrix.
    """
    free = num_samples - num_features
    return num_features * (num_samples - 1) / (free * (free - 1) * (free - 3))
