"""The training loop: stages of Adam with a cosine schedule until a diagnostic is satisfied.

Knows no objective and no model by name: it gets a function that gives a loss, groups of parameters, and a function
that judges after every stage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

STAGES = (600, 900, 1500, 3000, 6000)
"""Steps of the stages of automatic training; each restarts the schedule."""
REPORT_EVERY = 25
SMOOTHING = 0.02


@dataclass(frozen=True)
class Optimizer:
    """How to train.

    Args:
        steps: Steps in all; None stops by itself.
        batch_tasks: Tasks a step, drawn uniformly.
        lr: Peak learning rate of the networks; None chooses 5e-3.
    """

    steps: int | None = None
    batch_tasks: int = 256
    lr: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("batch_tasks", self.batch_tasks), ("lr", self.lr)):
            kinds = (int, float) if name == "lr" else (int,)
            if value is not None and not (isinstance(value, kinds) and not isinstance(value, bool) and value > 0):
                wanted = "number" if name == "lr" else "whole number"
                raise ValueError(f"Optimizer: {name} must be a positive {wanted}, got {value!r}")

    def stages(self) -> Sequence[int]:
        """Lengths of the stages."""
        return STAGES if self.steps is None else (self.steps,)


@dataclass
class History:
    """What training went through: `steps` has one record every few steps, `stages` one a stage."""

    steps: list[dict[str, float]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)


LossFunction = Callable[[], Tensor]
Judge = Callable[[float], Mapping[str, Any]]
"""Called after a stage with the mean bound of its last quarter; its record's entry "done" says whether to stop."""


def train(
    loss: LossFunction,
    groups: Sequence[dict[str, Any]],
    *,
    optimizer: Optimizer,
    between: Callable[[], None],
    judge: Judge,
    progress: bool,
    history: History | None = None,
    finished: Callable[[History], None] | None = None,
) -> History:
    """Minimises a loss, given in nats a task.

    Args:
        loss: Computes the loss of one step.
        groups: Parameter groups of the optimiser, each with its peak "lr".
        optimizer: Steps and rates.
        between: Called before every stage.
        judge: Called after every stage.
        progress: Whether to show a bar with the bound, the diagnostic and the time left.
        history: Stages that an earlier run has finished; training goes on after them.
        finished: Called after every stage with all that training went through so far.

    Raises:
        ValueError: Something that is trained is not finite at the end of a stage.
    """
    history = History() if history is None else history
    behind = len(history.stages)
    start = time.perf_counter() - (history.stages[-1]["seconds"] if behind else 0.0)
    stages = optimizer.stages()
    shown = {"total": sum(stages[: behind + 1]), "initial": sum(stages[:behind]), "unit": "step", "leave": False}
    with tqdm(disable=not progress, **shown) as bar:
        for stage, steps in list(enumerate(stages))[behind:]:
            if history.stages and history.stages[-1]["done"]:
                break
            bar.total = sum(stages[: stage + 1])  # a later stage may not be needed
            between()
            bound = _run_stage(loss, groups, steps, history, bar, start)
            record = dict(judge(bound), stage=stage, steps=steps, seconds=time.perf_counter() - start)
            history.stages.append(record)
            if finished is not None:
                finished(history)
    return history


def _run_stage(
    loss: LossFunction, groups: Sequence[dict[str, Any]], steps: int, history: History, bar: Any, start: float
) -> float:
    groups = [g for g in groups if g["params"]]
    adam = torch.optim.Adam([dict(g) for g in groups], fused=True, betas=(0.9, 0.99))
    peaks = [g["lr"] for g in groups]
    report = _Report(steps, history, bar, start)
    for step in range(steps):
        factor = min(1.0, (step + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, peak in zip(adam.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        adam.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        adam.step()
        report(step, -float(value.detach()))
    _check_finite(groups)
    return report.bound()


def _check_finite(groups: Sequence[dict[str, Any]]) -> None:
    if not all(bool(parameter.isfinite().all()) for group in groups for parameter in group["params"]):
        raise ValueError(
            "what is trained is not finite after the last step of a stage, a gradient was not: training has stopped. "
            "Check for slopes of the model that are infinite, as that of sqrt at 0, or lower lr"
        )


class _Report:
    """Follows the bound of a stage: a running average for the bar and the history, the mean of the last quarter."""

    def __init__(self, steps: int, history: History, bar: Any, start: float) -> None:
        self._steps, self._history, self._bar, self._start = steps, history, bar, start
        self._ess = history.stages[-1]["ess"] if history.stages else math.nan
        self._average = math.nan
        self._last_quarter: list[float] = []

    def __call__(self, step: int, bound: float) -> None:
        """Takes note of a step."""
        if step >= int(0.75 * self._steps):
            self._last_quarter.append(bound)
        first = math.isnan(self._average)
        self._average = bound if first else (1 - SMOOTHING) * self._average + SMOOTHING * bound
        if step % REPORT_EVERY == 0 or step == self._steps - 1:
            self._record(step)
        self._bar.update(1)

    def _record(self, step: int) -> None:
        record = {"step": bar_position(self._history, step), "elbo": self._average, "ess": self._ess}
        self._history.steps.append(record | {"seconds": time.perf_counter() - self._start})
        ess = "?" if math.isnan(self._ess) else f"{self._ess:.2f}"
        self._bar.set_postfix(elbo=f"{self._average:.4g}", ess=ess, refresh=False)

    def bound(self) -> float:
        """The mean bound of the last quarter."""
        return sum(self._last_quarter) / len(self._last_quarter)


def bar_position(history: History, step: int) -> int:
    """The number of a step counted from the first stage."""
    return sum(int(s["steps"]) for s in history.stages) + step
