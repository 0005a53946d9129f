"""How far finite networks are from their infinite-width limit, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr

from experiments.lib import infinite
from experiments.lib.data import Dataset
from experiments.lib.report import PowerLaw, fit_power_law
from experiments.lib.workdir import Arrays


@dataclass(frozen=True)
class Limit:
    """One infinite-width prediction: a Gaussian for every output.

    Attributes:
      name: which.
      mean: `(m, C)`, of the test outputs.
      std: `(m, 1)`, the same for every output.
      train_mse, test_mse: expected mean squared error of one network drawn from it.
      test_score: of the mean.
      one_test_score: expected of one network drawn from it.
      equilibrium_steps: of the kernel's solver.
      seconds: to compute it.
    """

    name: str
    mean: np.ndarray
    std: np.ndarray
    train_mse: float
    test_mse: float
    test_score: float
    one_test_score: float
    equilibrium_steps: int
    seconds: float


@dataclass(frozen=True)
class Ensemble:
    """Trained networks of one width; `steps` are those recorded.

    Attributes:
      width: how wide.
      mean, std: `(m, C)`, of the test outputs over the networks, after training.
      train_mse, test_mse: `(steps, seeds)`, of every network.
      test_score: of the mean of the networks.
      test_scores: `(seeds,)`, of every network.
      distances: `(steps, seeds)`, of every network from what gradient descent with the NTK makes of
        the same network's start: RMS over test inputs and outputs.
      mean_distance: RMS distance of the networks' mean from the limit's mean.
      equilibrium_steps: layers until the slowest input's equilibrium, over all networks.
      seconds: to train them.
    """

    width: int
    mean: np.ndarray
    std: np.ndarray
    train_mse: np.ndarray
    test_mse: np.ndarray
    test_score: float
    test_scores: np.ndarray
    distances: np.ndarray
    mean_distance: float
    equilibrium_steps: int
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """All that is reported.

    Attributes:
      score: what scores are: the accuracy of labels, `R²` of real targets.
      steps: recorded, the first 0.
      learning_rate, max_learning_rate: of gradient descent, and with which it still converges.
      nngp, ntk, ntk_inf: the posterior; gradient descent after the last step; after infinitely
        many.
      limit_train_mse, limit_test_mse: `(steps,)`, expected of one infinitely wide network.
      ensembles: by increasing width.
      fits: of distance against width, after every recorded step but 0.
      fit_widest: the last, of the two largest widths alone.
    """

    score: str
    steps: Sequence[int]
    learning_rate: float
    max_learning_rate: float
    nngp: Limit
    ntk: Limit
    ntk_inf: Limit
    limit_train_mse: np.ndarray
    limit_test_mse: np.ndarray
    ensembles: Sequence[Ensemble]
    fits: Sequence[PowerLaw]
    fit_widest: PowerLaw

    @property
    def times(self) -> np.ndarray:
        """Training time at the recorded steps."""
        return self.learning_rate * np.asarray(self.steps)

    def numbers(self) -> dict[str, Any]:
        """Everything but the predictions themselves, for JSON."""
        limits = {"nngp": self.nngp, "ntk": self.ntk, "ntk_inf": self.ntk_inf}
        return {
            "score": self.score,
            "steps": list(self.steps),
            "times": self.times.tolist(),
            "learning_rate": self.learning_rate,
            "max_learning_rate": self.max_learning_rate,
            "infinite": {key: _numbers(limit) for key, limit in limits.items()}
            | {
                "train_mse": self.limit_train_mse.tolist(),
                "test_mse": self.limit_test_mse.tolist(),
            },
            "finite": [_numbers(ensemble) for ensemble in self.ensembles],
            "slope": vars(self.fits[-1]),
            "slope_of_the_two_widest": vars(self.fit_widest),
            "slope_at_steps": [
                {"steps": step, **vars(fit)}
                for step, fit in zip(self.steps[1:], self.fits, strict=True)
            ],
        }


def _numbers(result: Limit | Ensemble) -> dict[str, Any]:
    numbers = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(result).items()
        if name not in ("mean", "std")
    }
    return numbers | {"test_std": rms(result.std)}


def rms(x: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(x))))


def analyse(
    data: Dataset, steps: Sequence[int], limit: Arrays, networks: Mapping[int, Arrays]
) -> Comparison:
    """Compares.

    Args:
      data: what was learned.
      steps: at which steps predictions were recorded.
      limit: what `infinite.predict` returned.
      networks: what `training.train` returned, by width.
    """
    n = len(data.y_train)
    targets = np.concatenate([data.targets_train, data.targets_test])

    def losses(mean, var):  # of networks drawn from a Gaussian
        errors = np.square(mean - targets).mean(-1) + var
        return errors[..., :n].mean(-1), errors[..., n:].mean(-1)

    def prediction(name, mean, var, seconds):
        train_mse, test_mse = losses(mean, var)
        return Limit(
            name=name,
            mean=mean[n:],
            std=np.sqrt(var[n:, None]),
            train_mse=float(train_mse),
            test_mse=float(test_mse),
            test_score=_score(data, mean[n:]),
            one_test_score=_expected_score(data, mean[n:], var[n:]),
            equilibrium_steps=int(limit["equilibrium_steps"]),
            seconds=float(seconds),
        )

    def ensemble(width, trained):
        outputs = trained["outputs"].astype(np.float64)  # (steps, seeds, n+m, C)
        errors = np.square(outputs - targets).mean(-1)
        final = outputs[-1, :, n:]
        expected = infinite.from_start(limit, data.targets_train, outputs[0], steps)
        return Ensemble(
            width=width,
            mean=final.mean(0),
            std=final.std(0, ddof=1),
            train_mse=errors[..., :n].mean(-1),
            test_mse=errors[..., n:].mean(-1),
            test_score=_score(data, final.mean(0)),
            test_scores=np.array([_score(data, outputs) for outputs in final]),
            distances=np.sqrt(np.square(outputs - expected)[:, :, n:].mean((2, 3))),
            mean_distance=rms(final.mean(0) - ntk.mean),
            equilibrium_steps=int(trained["equilibrium_steps"].max()),
            seconds=float(trained["seconds"]),
        )

    time = float(limit["learning_rate"]) * steps[-1]
    nngp = prediction("∞, NNGP", limit["nngp_mean"], limit["nngp_var"], limit["nngp_seconds"])
    ntk, ntk_inf = (
        prediction(f"∞, NTK, t = {t}", mean, var, limit["ntk_seconds"])
        for t, mean, var in (
            (f"{time:.4g}", limit["ntk_mean"][-1], limit["ntk_var"][-1]),
            ("∞", limit["ntk_mean_inf"], limit["ntk_var_inf"]),
        )
    )
    ensembles = [ensemble(width, networks[width]) for width in sorted(networks)]
    limit_train_mse, limit_test_mse = losses(limit["ntk_mean"], limit["ntk_var"])
    return Comparison(
        score="accuracy" if data.classes else "R²",
        steps=steps,
        learning_rate=float(limit["learning_rate"]),
        max_learning_rate=float(limit["max_learning_rate"]),
        nngp=nngp,
        ntk=ntk,
        ntk_inf=ntk_inf,
        limit_train_mse=limit_train_mse,
        limit_test_mse=limit_test_mse,
        ensembles=ensembles,
        fits=[_fit(ensembles, i) for i in range(1, len(steps))],
        fit_widest=_fit(ensembles[-2:], -1),
    )


def _fit(ensembles: Sequence[Ensemble], step: int) -> PowerLaw:
    points = [(e.width, distance) for e in ensembles for distance in e.distances[step]]
    return fit_power_law(*zip(*points, strict=True))


def _score(data: Dataset, outputs: np.ndarray) -> float:
    """Accuracy or R² of test outputs `(m, C)`."""
    if data.classes:
        return float((outputs.argmax(-1) == data.y_test).mean())
    return 1 - float(np.square(outputs - data.targets_test).mean()) / _spread(data)


def _spread(data: Dataset) -> float:
    """The variance of the test targets."""
    return float(data.targets_test.var(axis=0).mean())


def _expected_score(data: Dataset, mean: np.ndarray, var: np.ndarray) -> float:
    """The same of outputs that are independent and normal, of means `(m, C)`, variances `(m,)`.

    The output of an input's class is the largest, given that it is `σ u` above its mean, with
    probability `Π_c Φ((μ_y - μ_c)/σ + u)`, the product over the other classes.
    """
    if not data.classes:
        return 1 - float((np.square(mean - data.targets_test).mean(-1) + var).mean()) / _spread(
            data
        )
    rows, y = np.arange(len(mean)), data.y_test
    u, weights = np.polynomial.hermite_e.hermegauss(64)
    std = np.sqrt(np.maximum(var, np.finfo(np.float64).tiny))[:, None]
    above = ndtr(((mean[rows, y][:, None] - mean) / std)[..., None] + u)
    above[rows, y] = 1
    return float((above.prod(1) @ weights).mean() / weights.sum())
