"""The learners of the table: a new one joins by a line in `LEARNERS`.

A learner is `(suite, tasks, *, budget, seed) -> Predictor`: it learns from the tasks for about `budget` CPU seconds.
Most are made by `conditional`, for a `bm.ConditionalModel`, or `hierarchical`, for a model with task parameters; both
find out how many steps the budget allows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

import bayesmeta as bm
from bayesmeta import models
from bayesmeta.models import neural_processes
from benchmarks import sensors
from benchmarks.predictors import Conditional, Hierarchical
from benchmarks.scores import Predictor
from benchmarks.suites import Suite
from examples import sinusoid_or_line

T = TypeVar("T")
KERNEL_TASKS = 100
"""From how many tasks the prior of a kernel's two numbers is learned."""
WARM, SHORT, LONG = 3, 5, 35
"""Steps of the first runs from which the time of a step is told."""
LONGER = 4
"""A run that takes less than twice the time of the short one is followed by one of so many times the steps, ..."""
MEASURING = 0.5
"""... while less than this share of the budget is spent."""
TICK = 0.01
"""No difference of CPU seconds is told more finely."""


class Refused(Exception):
    """A model cannot be built for a suite's tasks."""


@contextlib.contextmanager
def building() -> Iterator[None]:
    """What a `build` refuses; other errors stay what they are."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from error


class Learner(Protocol):
    """Learns from tasks."""

    def __call__(self, suite: Suite, tasks: bm.Tasks, *, budget: float, seed: int) -> Predictor:
        """Learns.

        Args:
            suite: What the tasks are from: context sizes, tasks a step, kind of labels.
            tasks: Training tasks.
            budget: CPU seconds.
            seed: Seed.

        Raises:
            Refused: The model cannot be built for such tasks.
        """


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it started and that have ended, such as compilers."""
    return sum(os.times()[:4])


def within(budget: float, fit: Callable[[int], T]) -> T:
    """Runs a training of about as many steps as fit into the budget, and no fewer than `LONG`.

    Where two runs of no steps take half of the budget the time of a step is not told well, and fewer are run.

    Args:
        budget: CPU seconds, those of short runs that measure a step among them.
        fit: A training of so many steps.
    """
    begin = cpu_seconds()

    def seconds(steps: int) -> float:
        start = cpu_seconds()
        fit(steps)
        return cpu_seconds() - start

    seconds(WARM)
    short, steps = seconds(SHORT), LONG
    while (long := seconds(steps)) < 2 * short and cpu_seconds() - begin < MEASURING * budget:
        steps *= LONGER
    step = max(long - short, short / 2, TICK) / (steps - SHORT)
    fixed = max(0.0, short - SHORT * step)
    return fit(max(LONG, int((budget - (cpu_seconds() - begin) - fixed) / step)))


def conditional(
    build: Callable[..., bm.ConditionalModel], *, lr: float | None = None, batch_tasks: int | None = None
) -> Learner:
    """A learner from `build(tasks, output=, context=, seed=)`.

    Args:
        build: Makes the untrained model.
        lr: Peak learning rate; None for the default.
        batch_tasks: Tasks a step; None for the suite's number.
    """

    def learn(suite: Suite, tasks: bm.Tasks, *, budget: float, seed: int) -> Predictor:
        context = {} if suite.context is None else {"context": suite.context}
        with building():
            model = build(tasks, output=suite.output, seed=seed, **context)

        def fit(steps: int) -> bm.ConditionalFit:
            optimizer = bm.Optimizer(steps=steps, batch_tasks=batch_tasks or suite.batch_tasks, lr=lr)
            return bm.fit(model, tasks, method=bm.Amortized(optimizer=optimizer), seed=seed, progress=False)

        return Conditional(within(budget, fit))

    return learn


def hierarchical(
    build: Callable[[Suite, bm.Tasks, int], bm.HierarchicalModel],
    method: Callable[[Suite, int], bm.Amortized],
    *,
    refine: str = "auto",
) -> Learner:
    """A learner from a hierarchical model.

    Args:
        build: `(suite, tasks, seed)` -> the model.
        method: `(suite, steps)` -> how it is inferred; one that trains by steps.
        refine: As in `fit.posterior`.
    """

    def learn(suite: Suite, tasks: bm.Tasks, *, budget: float, seed: int) -> Predictor:
        with building():
            model = build(suite, tasks, seed)

        def fit(steps: int) -> bm.Fit:
            return bm.fit(model, tasks, method=method(suite, steps), seed=seed, progress=False)

        return Hierarchical(within(budget, fit), refine)

    return learn


def _network(suite: Suite, tasks: bm.Tasks, seed: int) -> bm.HierarchicalModel:
    """Heads on a shared network of two layers, their weights normal across tasks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = nn.Sequential(nn.Linear(tasks.x.shape[1], 40), nn.Tanh(), nn.Linear(40, 20), nn.Tanh())
    return bm.models.multitask(trunk, sharing=bm.models.sharing.Gaussian(by="coordinate"), standardize=tasks, seed=seed)


def _by_evidence(suite: Suite, steps: int) -> bm.Amortized:
    return bm.Amortized(shared="map", optimizer=bm.Optimizer(steps=steps, batch_tasks=suite.batch_tasks))


def _weights(module: Any) -> Learner:
    """A learner all of whose weights are a task's own; their posterior is taken as it is."""

    def method(suite: Suite, steps: int) -> bm.Amortized:
        return module.method(optimizer=bm.Optimizer(steps=steps, batch_tasks=suite.batch_tasks))

    return hierarchical(lambda suite, tasks, seed: module.build(tasks, seed=seed), method, refine="none")


def _pacoh_gp(suite: Suite, steps: int) -> bm.Amortized:
    return models.pacoh_gp.method(optimizer=bm.Optimizer(steps=steps, batch_tasks=suite.batch_tasks))


def _last_layer(suite: Suite, tasks: bm.Tasks, seed: int) -> bm.HierarchicalModel:
    return models.alpaca.build(dim=tasks.x.shape[1], features=10, seed=seed)


def _last_layer_exactly(suite: Suite, steps: int) -> bm.Amortized:
    optimizer = bm.Optimizer(steps=steps, batch_tasks=suite.batch_tasks)
    return bm.Amortized(shared="map", guide=bm.guides.Exact(), optimizer=optimizer)


def _by_marginal(build: Callable[[bm.Tasks], bm.HierarchicalModel], *, most: int | None = None) -> Learner:
    """A learner from `build(tasks)` whose θ is optimised on the evidence of at most so many tasks, without steps."""

    def learn(suite: Suite, tasks: bm.Tasks, *, budget: float, seed: int) -> Predictor:
        with building():
            model = build(tasks)
        method = bm.Marginal(shared="map", chains=1)
        return Hierarchical(bm.fit(model, tasks[:most], method=method, seed=seed, progress=False), "auto")

    return learn


def _two_kinds(suite: Suite, steps: int) -> bm.Amortized:
    optimizer = bm.Optimizer(steps=steps, batch_tasks=suite.batch_tasks, lr=0.01)
    return bm.Amortized(shared="map", encoder="attention", optimizer=optimizer)


def _hierarchical_gp(kernel: str) -> Learner:
    """The kernel of each task its own."""
    return _by_marginal(lambda tasks: models.hierarchical_gp.build(kernel, dim=tasks.x.shape[1]), most=KERNEL_TASKS)


def _deep_kernel(tasks: bm.Tasks) -> bm.HierarchicalModel:
    """One kernel for all tasks on two learned features of their inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = nn.Sequential(nn.Linear(tasks.x.shape[1], 20), nn.Tanh(), nn.Linear(20, 2))
    return models.hierarchical_gp.build(dim=2, hyper="shared", features=features)


def _coarse_conv_cnp(tasks: bm.Tasks, **settings: Any) -> bm.ConditionalModel:
    """Half the default's points: a length scale of "eq" still has seven, and a step takes half the time."""
    return neural_processes.conv_cnp.build(tasks, points=32, depth=5, **settings)


def _shared_process(suite: Suite, tasks: bm.Tasks, *, budget: float, seed: int) -> Predictor:
    """Exact: it takes the seconds it takes, and no seed."""
    return Conditional(bm.fit(bm.models.shared_process.build(tasks), tasks, seed=seed, progress=False))


LEARNERS: dict[str, Learner] = {
    "cnp": conditional(neural_processes.cnp.build),
    "latent-np": conditional(neural_processes.latent_np.build),
    "attentive-np": conditional(neural_processes.attentive_np.build),
    "tnp": conditional(neural_processes.tnp.build, lr=1e-3),
    "conv-cnp": conditional(_coarse_conv_cnp, lr=2e-3, batch_tasks=16),
    "shared-process": _shared_process,
    "hierarchical-gp": _hierarchical_gp("rbf"),
    "hierarchical-gp-matern52": _hierarchical_gp("matern52"),
    "deep-kernel": _by_marginal(_deep_kernel, most=KERNEL_TASKS),
    "alpaca": hierarchical(_last_layer, _last_layer_exactly),
    "pacoh-gp": hierarchical(lambda suite, tasks, seed: models.pacoh_gp.build(tasks, seed=seed), _pacoh_gp),
    "pacoh-nn": _weights(models.pacoh_nn),
    "abml": _weights(models.abml),
    "platipus": _weights(models.platipus),
    "bmaml": _weights(models.bmaml),
    "maml": conditional(models.maml.build),
    "two-kinds": hierarchical(lambda suite, tasks, seed: sinusoid_or_line.build(), _two_kinds),
    "sensors": _by_marginal(lambda tasks: sensors.build(tasks.x.shape[1])),
    "multi-head": hierarchical(_network, _by_evidence),
}
