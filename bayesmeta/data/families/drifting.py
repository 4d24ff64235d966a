"""Sinusoids on a line that drifts: the environment "sin_20" of PACOH."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesmeta.data.families.base import Interval, check_intervals, check_positive, normal, uniform
from bayesmeta.data.families.curves import CurveFamily, Curves

REACH = 6.0
"""Standard deviations of the shift that the oracle integrates over, to both sides."""


@dataclass(frozen=True, kw_only=True)
class DriftingSinusoids(CurveFamily):
    """y = β x + a sin(f (x − b)) + c + noise ε. Truth: "drift" β, "amplitude" a, "shift" b, "level" c, `(task,)` each.

    Pairs are (mean, standard deviation) of normal distributions.

    Attributes:
        drift: Of β.
        amplitude: Interval of a, uniform.
        shift: Of b.
        level: Of c.
        frequency: f.
        noise: Standard deviation of labels.
        interval: Interval of inputs, uniform.
        context_rows: Rows of an episode's context.
        target_rows: Rows of an episode's target.

    Raises:
        ValueError: If an interval is empty, or a standard deviation or f not positive.

    References:
        Rothfuss et al.: PACOH: Bayes-Optimal Meta-Learning with PAC-Guarantees, 2021,
        https://arxiv.org/abs/2002.05551
    """

    drift: tuple[float, float] = (0.5, 0.2)
    amplitude: Interval = (0.7, 1.3)
    shift: tuple[float, float] = (0.0, 0.1)
    level: tuple[float, float] = (5.0, 0.1)
    frequency: float = 1.5
    noise: float = 0.1

    def __post_init__(self) -> None:
        check_intervals("DriftingSinusoids", amplitude=self.amplitude, interval=self.interval)
        sds = {f"the sd of the {name}": getattr(self, name)[1] for name in ("drift", "shift", "level")}
        check_positive("DriftingSinusoids", **sds, noise=self.noise, frequency=self.frequency)

    def labels(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draws tasks at inputs `(T, N, 1)`."""
        amplitude = uniform((len(x), 1), self.amplitude, generator)
        drift, shift, level = (
            mean + sd * normal((len(x), 1), generator) for mean, sd in (self.drift, self.shift, self.level)
        )
        wave = amplitude * (self.frequency * (x[..., 0] - shift)).sin()
        y = drift * x[..., 0] + wave + level + self.noise * normal(x.shape[:2], generator)
        truth = {"drift": drift, "amplitude": amplitude, "shift": shift, "level": level}
        return y, {name: value[:, 0] for name, value in truth.items()}

    @property
    def kinds(self) -> tuple[Curves]:
        """Waves on a line; given the shift, amplitudes are cut normal and the line is Gaussian."""
        mean, sd = self.shift
        curves = Curves(
            loadings=self._loadings,
            unknown=(mean - REACH * sd, mean + REACH * sd),
            coefficient=self.amplitude,
            noise=self.noise,
            frequency=self.frequency,
            log_prior=lambda shift: -0.5 * ((shift - mean) / sd).square() - 0.5 * math.log(2 * math.pi * sd**2),
            spread=(0.0, 0.0, self.drift[1], self.level[1]),
        )
        return (curves,)

    def _loadings(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        """The amplitude multiplies the wave; the line has its prior mean."""
        none, angle = torch.zeros_like(shift), self.frequency * shift
        wave = torch.stack([angle.cos(), -angle.sin(), none, none], -1)
        return wave, torch.stack([none, none, none + self.drift[0], none + self.level[0]], -1)
