"""Few-shot sinusoids, and the ambiguous family in which a task is a sinusoid or a line.

A task is known when its parameters are: `curves.py` integrates over them exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.data.families.base import Interval, check_intervals, check_positive, normal, uniform
from bayesmeta.data.families.curves import CurveFamily, Curves


@dataclass(frozen=True, kw_only=True)
class Sinusoids(CurveFamily):
    """y = A sin(x − p) + noise ε, amplitude A and phase p uniform. Truth: "amplitude" and "phase", `(task,)` each.

    Attributes:
        amplitude: Interval of A.
        phase: Interval of p.
        noise: Standard deviation of labels.
        interval: Interval of inputs, uniform.
        context_rows: Rows of an episode's context.
        target_rows: Rows of an episode's target.

    Raises:
        ValueError: If an interval is empty or the noise not positive.

    References:
        Finn, Abbeel, Levine: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017,
        https://arxiv.org/abs/1703.03400; with noise .1 Patacchiola et al.: Bayesian Meta-Learning for the Few-Shot
        Setting via Deep Kernels, 2020, https://arxiv.org/abs/1910.05199

    Example:
        >>> tasks, truth = Sinusoids().simulate(3, rows=5)
        >>> tasks.sizes.tolist(), sorted(truth)
        ([5, 5, 5], ['amplitude', 'phase'])
    """

    amplitude: Interval = (0.1, 5.0)
    phase: Interval = (0.0, math.pi)
    noise: float = 0.1

    def __post_init__(self) -> None:
        check_intervals("Sinusoids", amplitude=self.amplitude, phase=self.phase, interval=self.interval)
        check_positive("Sinusoids", noise=self.noise)

    def labels(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draws sinusoids at inputs `(T, N, 1)`."""
        amplitude, phase = (uniform((len(x), 1), ends, generator) for ends in (self.amplitude, self.phase))
        y = amplitude * (x[..., 0] - phase).sin() + self.noise * normal(x.shape[:2], generator)
        return y, {"amplitude": amplitude[:, 0], "phase": phase[:, 0]}

    @property
    def kinds(self) -> tuple[Curves]:
        """Waves."""
        return (Curves(loadings=_wave, unknown=self.phase, coefficient=self.amplitude, noise=self.noise),)


@dataclass(frozen=True, kw_only=True)
class SinusoidOrLine(CurveFamily):
    """A task is a sinusoid y = A sin(x − p) or, as likely, a line y = a x + b; few rows leave open which.

    Truth: "kind" (0 sinusoid, 1 line), "amplitude", "phase", "slope" and "intercept", `(task,)` each; those of the
    other kind are 0.

    Attributes:
        amplitude: Interval of A, uniform.
        phase: Interval of p, uniform.
        slope: Interval of a, uniform.
        intercept: Interval of b, uniform.
        noise: Standard deviation of labels.
        interval: Interval of inputs, uniform.
        context_rows: Rows of an episode's context.
        target_rows: Rows of an episode's target.

    Raises:
        ValueError: If an interval is empty or the noise not positive.

    References:
        Finn, Xu, Levine: Probabilistic Model-Agnostic Meta-Learning, 2018, https://arxiv.org/abs/1806.02817

    Example:
        >>> family = SinusoidOrLine()
        >>> context, _ = family.episodes(2)
        >>> family.kind_probability(context.batch(slice(None))).shape
        torch.Size([2])
    """

    amplitude: Interval = (0.1, 5.0)
    phase: Interval = (0.0, math.pi)
    slope: Interval = (-3.0, 3.0)
    intercept: Interval = (-3.0, 3.0)
    noise: float = 0.3

    def __post_init__(self) -> None:
        names = ("amplitude", "phase", "slope", "intercept", "interval")
        check_intervals("SinusoidOrLine", **{name: getattr(self, name) for name in names})
        check_positive("SinusoidOrLine", noise=self.noise)

    def labels(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draws sinusoids and lines at inputs `(T, N, 1)`."""
        line = torch.rand(len(x), 1, generator=generator) < 0.5
        names = ("amplitude", "phase", "slope", "intercept")
        drawn = {name: uniform((len(x), 1), getattr(self, name), generator) for name in names}
        truth = {name: torch.where(line == (name in names[2:]), value, 0.0) for name, value in drawn.items()}
        curve = truth["amplitude"] * (x[..., 0] - truth["phase"]).sin() + truth["slope"] * x[..., 0]
        y = curve + truth["intercept"] + self.noise * normal(x.shape[:2], generator)
        return y, {"kind": line[:, 0].long()} | {name: value[:, 0] for name, value in truth.items()}

    def kind_probability(self, context: Batch) -> Tensor:
        """Posterior probability that each task is a sinusoid, `(T,)`: 0.5 without rows.

        Raises:
            ValueError: If shapes do not fit.
        """
        sinusoid, line = self.log_evidences(self._rows(context))
        return (sinusoid - line).sigmoid()

    @property
    def kinds(self) -> tuple[Curves, Curves]:
        """Waves and lines."""
        return (
            Curves(loadings=_wave, unknown=self.phase, coefficient=self.amplitude, noise=self.noise),
            Curves(loadings=_line, unknown=self.slope, coefficient=self.intercept, noise=self.noise),
        )


def _wave(phase: Tensor) -> tuple[Tensor, Tensor]:
    """A sin(x − p) = A (cos p sin x − sin p cos x)."""
    none = torch.zeros_like(phase)
    return torch.stack([phase.cos(), -phase.sin(), none, none], -1), torch.stack([none] * 4, -1)


def _line(slope: Tensor) -> tuple[Tensor, Tensor]:
    """The intercept multiplies 1, the slope x."""
    none = torch.zeros_like(slope)
    return torch.stack([none, none, none, none + 1], -1), torch.stack([none, none, slope, none], -1)
