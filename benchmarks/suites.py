"""The suites of the table: training tasks, a fixed evaluation set, what is known to be the best, and the baselines.

`suites` names them. Training tasks and evaluation set of a suite are one draw each, the same for every learner,
whatever its seed. Inputs are vectors, labels numbers.

References:
    Nguyen, Grover: Transformer Neural Processes, 2022, https://arxiv.org/abs/2207.04179 ("gp-…")
    Bruinsma et al.: Autoregressive Conditional Neural Processes, 2023, https://arxiv.org/abs/2303.14468 ("eq")
    Rothfuss et al.: PACOH, 2021, https://arxiv.org/abs/2002.05551 ("cauchy", "sin20", "berkeley")
    Finn et al.: Model-Agnostic Meta-Learning, 2017, https://arxiv.org/abs/1703.03400 ("sinusoids")
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

import bayesmeta as bm
from bayesmeta.data.families import Family
from bayesmeta.data.families.rows import Rows
from bayesmeta.models.neural_processes.outputs import NormalMixture, Output
from benchmarks import pooling
from benchmarks.modes import BothKinds
from benchmarks.predictors import Direct
from benchmarks.scores import Judge, Predictor

families = bm.families
DATA = Path(__file__).parents[2] / "shared" / "data"
TRAINING, EVALUATION = 0, 1
"""Seeds of the tasks."""


@dataclass(frozen=True)
class Evaluation:
    """Tasks to be scored.

    Attributes:
        context: Rows that are given.
        target: Rows that are scored.
        oracle: What is known to be the best; None where it is not known.
        judge: The suite's own score.
    """

    context: bm.Tasks
    target: bm.Tasks
    oracle: Predictor | None = None
    judge: Judge | None = None


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks to learn from and to be scored on.

    Attributes:
        about: What the tasks are, in one line.
        training: `(number of tasks) -> training tasks`.
        evaluation: `(number of tasks) -> Evaluation`.
        pooling: `(training tasks) -> (no pooling, complete pooling)`.
        training_tasks: How many are learned from.
        tasks: How many are scored.
        context: Smallest and largest context to train with; None for all sizes.
        batch_tasks: Tasks a step of training.
        output: Labels of neural processes; None for normal ones.
        judged: What the judge finds, a heading.
        oracle: What the oracle knows, a heading.
        pooled: What the baselines are, in words.
    """

    about: str
    training: Callable[[int], bm.Tasks]
    evaluation: Callable[[int], Evaluation]
    pooling: Callable[[bm.Tasks], pooling.Pair]
    training_tasks: int
    tasks: int
    context: tuple[int, int] | None = None
    batch_tasks: int = 32
    output: Output | None = None
    judged: str = ""
    oracle: str = "oracle"
    pooled: str = "Gaussian processes, kernels and noise learned"


def of_family(
    family: Family, *, rows: int, scored: Family | None = None, judge: Judge | None = None
) -> dict[str, Callable[..., Any]]:
    """Training tasks with `rows` rows, and episodes of the same family or of another, with its oracle."""

    def evaluation(count: int) -> Evaluation:
        at = scored or family
        return Evaluation(*at.episodes(count, seed=EVALUATION), Direct(at.oracle, at.joint_log_prob), judge)

    return {"training": lambda count: family.simulate(count, rows=rows, seed=TRAINING)[0], "evaluation": evaluation}


@dataclass(frozen=True)
class KnownKernels:
    """Gaussian process regression by whoever is told the kernel of each task: more than a learner can know.

    Attributes:
        family: The family.
        truth: Its parameters, `(task,)` each.
        position: Of a task by name.
    """

    family: families.GaussianProcesses
    truth: Mapping[str, Tensor]
    position: Mapping[str, int]

    def function(self, context: bm.Batch, x: Tensor) -> Distribution:
        """The predictive of each row alone."""
        return self.family.predictive_given(self.family.known(self._of(context)), Rows.of(context), x)

    def joint_log_prob(self, context: bm.Batch, target: bm.Batch) -> Tensor:
        """Log density of the target's rows together, `(T,)`."""
        kernels, given = self.family.known(self._of(context)), Rows.of(context)
        both = given.joined(Rows.of(target))
        return (self.family.evidences(kernels, both) - self.family.evidences(kernels, given)).squeeze(-1)

    def _of(self, context: bm.Batch) -> dict[str, Tensor]:
        index = torch.tensor([self.position[name] for name in context.names])
        return {name: value[index] for name, value in self.truth.items()}


def known_kernels(family: families.GaussianProcesses, count: int) -> Evaluation:
    """Tasks cut into context and target of the recipe's sizes, and the predictor that knows their kernels."""
    given, new = family.sizes(count, torch.Generator().manual_seed(EVALUATION))
    tasks, truth = family.simulate(count, rows=(given + new).tolist(), seed=EVALUATION)
    place = torch.arange(len(tasks.y)) - tasks.offsets[:-1].repeat_interleave(given + new)
    context, target = tasks.split_rows(place < given.repeat_interleave(given + new))
    position = {name: index for index, name in enumerate(tasks.names)}
    known = KnownKernels(family, {name: torch.from_numpy(value) for name, value in truth.items()}, position)
    return Evaluation(context, target, Direct(known.function, known.joint_log_prob))


def berkeley(folder: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Temperatures of 46 sensors over four days, every fifth minute: inputs `(576, 11)` and labels `(576,)` of each.

    Inputs are the ten values before, half a minute apart, and the time of day in [0, 1).
    """
    from scipy.io import loadmat

    series = np.array(loadmat(folder / "berkeley" / "berkeley_data.mat")["berkeley_data"][0, 0]["data"], dtype=float)
    series = series if series.shape[1] == 46 else series.T
    series[4278, 6] = 0.5 * (series[4277, 6] + series[4279, 6])  # an outlier
    day, lags = len(series) // 5, 10
    clock = (np.arange(len(series)) % day) / day
    kept = np.arange(day, len(series))[::10]
    x = [np.stack([*(values[kept - k] for k in range(1, lags + 1)), clock[kept]], 1) for values in series.T]
    return x, [values[kept] for values in series.T]


def sensors(count: int, *, folder: Path, new: bool) -> bm.Tasks:
    """Two days of 36 sensors to learn from, or three days of the 10 others."""
    x, y = berkeley(folder)
    order = np.random.default_rng(TRAINING).permutation(len(y))
    chosen, day = (order[36:] if new else order[:36])[:count], len(y[0]) // 4
    rows = slice(day, None) if new else slice(0, 2 * day)
    names = [f"sensor {i}" for i in chosen]
    return bm.Tasks.from_arrays([x[i][rows] for i in chosen], [y[i][rows] for i in chosen], names=names)


def sensor_evaluation(count: int, *, folder: Path) -> Evaluation:
    """A day of new sensors is given, the two after it are scored."""
    tasks = sensors(count, folder=folder, new=True)
    place = torch.arange(len(tasks.y)) % int(tasks.sizes[0])
    return Evaluation(*tasks.split_rows(place < int(tasks.sizes[0]) // 3))


CURVES = "linear in the sine, cosine and line of the truth, noise learned from all training tasks"
GP = {"training_tasks": 40_000, "tasks": 3000, "context": (3, 46)}
EQ = {"training_tasks": 20_000, "tasks": 3000, "context": (0, 30), "pooling": pooling.gaussian_processes}


def _gp(kernel: str) -> Suite:
    family = families.GaussianProcesses(kernel=kernel)
    about = f"functions from Gaussian processes, {kernel} kernel, length and scale differ by task, 3 to 46 rows given"
    parts = functools.partial(Suite, about=about, **GP)
    if kernel != "periodic":
        pooled = functools.partial(pooling.gaussian_processes, kernel=kernel)
        return parts(pooling=pooled, **of_family(family, rows=49))
    training = of_family(family, rows=49)["training"]
    return parts(
        training=training,
        evaluation=lambda count: known_kernels(family, count),
        pooling=pooling.gaussian_processes,
        oracle="oracle (told each task's kernel)",
    )


def _eq(regime: str) -> Suite:
    inside = families.GaussianProcesses.suite("rbf")
    scored = families.GaussianProcesses.suite("rbf", regime=regime)
    about = f"functions from one Gaussian process, 0 to 30 rows given; trained on [-2, 2], scored {regime}"
    return Suite(about=about, **EQ, **of_family(inside, rows=60, scored=scored))


def _line_or_wave() -> Suite:
    family = families.SinusoidOrLine(context_rows=3, target_rows=50)
    return Suite(
        about="a sinusoid or a line, 3 rows given",
        pooling=pooling.curves,
        pooled=CURVES,
        training_tasks=10_000,
        tasks=1000,
        context=(3, 3),
        output=NormalMixture(10),
        judged="both kinds kept where ambiguous",
        **of_family(family, rows=25, judge=BothKinds(family)),
    )


def suites(data: Path = DATA) -> dict[str, Callable[[], Suite]]:
    """What builds each suite, by name; `data` is the folder that holds berkeley/."""
    return {
        "gp-rbf": lambda: _gp("rbf"),
        "gp-matern52": lambda: _gp("matern52"),
        "gp-periodic": lambda: _gp("periodic"),
        "eq": lambda: _eq("interpolation"),
        "eq-beyond": lambda: _eq("beyond"),
        "cauchy": lambda: Suite(
            about="a common surface with two bumps and deviations from it, 20 rows given, 20 training tasks",
            pooling=pooling.gaussian_processes,
            training_tasks=20,
            tasks=200,
            **of_family(families.Cauchy(), rows=20),
        ),
        "sin20": lambda: Suite(
            about="sinusoids on a drifting line, 5 rows given, 20 training tasks with 5 rows",
            pooling=functools.partial(pooling.curves, frequency=1.5),
            pooled=CURVES,
            training_tasks=20,
            tasks=200,
            **of_family(families.DriftingSinusoids(), rows=5),
        ),
        "sinusoids": lambda: Suite(
            about="sinusoids of unknown amplitude and phase, 5 rows given",
            pooling=functools.partial(pooling.curves, used=(0, 1, 3)),
            pooled=CURVES,
            training_tasks=10_000,
            tasks=1000,
            context=(5, 5),
            **of_family(families.Sinusoids(target_rows=50), rows=25),
        ),
        "sinusoid-or-line": _line_or_wave,
        "berkeley": lambda: Suite(
            about="temperatures of sensors from the ten before, one day given, 36 training sensors",
            training=functools.partial(sensors, folder=data, new=False),
            evaluation=functools.partial(sensor_evaluation, folder=data),
            pooling=pooling.linear,
            pooled="linear in x, noise learned from all training tasks",
            training_tasks=36,
            tasks=10,
            context=(0, 144),
            batch_tasks=8,
        ),
    }
