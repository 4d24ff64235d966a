"""A model of readings one step ahead, written for the sensors: what a user's own likelihood looks like.

The next reading is the last one, plus weights times what changed before and times the hour, all of it shared, plus a
drift of each sensor's own. Noise is Student-t; the log of its scale is linear in how much readings have just moved and
in the hour, plus a term of each sensor's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor

import bayesmeta as bm

RESOLUTION = 0.005
"""Half of the step of the sensors' readings, °C."""
ROOM, UNIT = 20.0, 5.0
"""°C: temperatures count from ROOM in units of UNIT."""


def features(x: Tensor) -> tuple[Tensor, Tensor]:
    """What moves the next reading, and what moves its noise.

    Args:
        x: The readings before, latest first, °C, and the time of day in [0, 1) last, `(T, N, lags + 1)`.

    Returns:
        `(T, N, lags + 4)` and `(T, N, 6)`.
    """
    readings, clock = x[..., :-1], 2 * math.pi * x[..., -1:]
    day = torch.cat([clock.sin(), clock.cos(), (2 * clock).sin(), (2 * clock).cos()], -1)
    level = (readings[..., :1] - ROOM) / UNIT
    steps = readings[..., :-1] - readings[..., 1:]
    moved = torch.cat([steps.square().mean(-1, keepdim=True).sqrt(), steps[..., :1].abs()], -1)
    return (
        torch.cat([readings[..., :1] - readings[..., 1:], level, day], -1),
        torch.cat([(moved + RESOLUTION).log(), day], -1),
    )


def predictor(phi: Tensor, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
    """Location and log scale of the next reading, `(T, N, 2)`."""
    moves, noise = features(x)
    loc = x[..., 0] + phi[..., 0] + (moves * shared["weights"]).sum(-1)
    return torch.stack([loc, phi[..., 1] + (noise * shared["noise"]).sum(-1)], -1)


def likelihood(f: Tensor, shared: Mapping[str, Tensor]) -> dist.StudentT:
    """Student-t with more than one degree of freedom, so that it has a mean."""
    return dist.StudentT(1 + shared["tail"], f[..., 0], f[..., 1].exp())


def build(dim: int) -> bm.HierarchicalModel:
    """The model of tasks with `dim` inputs, the last of which is the time of day.

    Raises:
        ValueError: if there are fewer than two readings before.
    """
    if dim < 3:
        raise ValueError(f"sensors: expected at least two readings and the time of day as inputs, got {dim} inputs")
    lags = dim - 1
    return bm.HierarchicalModel(
        bm.priors.Gaussian(2, loc_scale=[0.1, 3.0], sd_scale=[0.05, 1.0]),
        predictor,
        likelihood,
        shared={
            "weights": dist.Normal(0.0, 0.5).expand([lags + 4]).to_event(1),
            "noise": dist.Normal(0.0, 1.0).expand([6]).to_event(1),
            "tail": dist.Gamma(2.0, 0.5),
        },
    )
