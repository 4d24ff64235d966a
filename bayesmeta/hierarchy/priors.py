"""Priors of the task parameters: what distribution φ has, given the shared parameters.

A prior names its own shared parameters (`shared`) and gives the distribution of φ (`distribution`), both built inside
the call, in its dtype. Sampling them is ``model.py``'s work; whitening and densities are read from the finished model.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, final

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesmeta.data.batch import Batch
from bayesmeta.hierarchy.binding import as_pyro, bind, in_default_dtype


class Prior(abc.ABC):
    """p(φ | θ) of one task; override `distribution`, and `shared` if it has shared parameters of its own."""

    @property
    def shared(self) -> dict[str, Distribution]:
        """Priors of the shared parameters that this prior brings, by site name; none by default."""
        return {}

    @property
    def origin(self) -> np.ndarray | None:
        """Where φ lies before anything is learned `(d,)`; None where it is not known how many φ has."""
        return None

    @abc.abstractmethod
    def distribution(self, shared: Mapping[str, Tensor], batch: Batch) -> Distribution:
        """Distribution of φ.

        Args:
            shared: values of all shared parameters.
            batch: the tasks, for priors that read task columns.

        Returns:
            A distribution of event shape `(d,)` or `()` whose batch shape broadcasts to `(T, 1)`.
        """


def _scales(value: float | Sequence[float] | Tensor, d: int, name: str) -> tuple[float, ...]:
    scales = tuple(torch.as_tensor(value, dtype=torch.float64).reshape(-1).tolist())
    scales = scales * d if len(scales) == 1 else scales
    if len(scales) != d or not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise ValueError(f"Gaussian: expected {name} as a positive number or {d} of them, got {value!r}")
    return scales


@final
class Gaussian(Prior):
    """φ ~ N(μ, diag(τ) R diag(τ)), with R = I (`cov="diag"`) or R = L Lᵀ of its own (`cov="full"`).

    Shared sites: `mu` (d,) ~ Normal(0, `loc_scale`); `tau` (d,) ~ HalfNormal(`sd_scale`); with `cov="full"` also `corr`
    (d, d), the Cholesky factor L of the correlations, ~ LKJCholesky(1), which makes all correlation matrices equally
    likely. The defaults are weak for parameters of order one; for others give the scales in the units of φ.

    References:
        Generating random correlation matrices based on vines and extended onion method (2009),
        https://doi.org/10.1016/j.jmva.2009.04.008
    """

    def __init__(
        self,
        d: int,
        *,
        cov: Literal["diag", "full"] = "diag",
        loc_scale: float | Sequence[float] | Tensor = 10.0,
        sd_scale: float | Sequence[float] | Tensor = 2.5,
    ) -> None:
        """Describes the prior; no distribution is built yet.

        Args:
            d: number of task parameters.
            cov: "diag" for independent parameters, "full" to learn their correlations (d ≥ 2).
            loc_scale: sd of the prior of μ, one number or `(d,)`.
            sd_scale: scale of the half-normal prior of τ, one number or `(d,)`.

        Raises:
            ValueError: if d, cov or a scale is out of range.
        """
        if isinstance(d, bool) or not isinstance(d, int) or d < 1:
            raise ValueError(f"Gaussian: expected d, the number of task parameters, as an integer ≥ 1, got {d!r}")
        if cov not in ("diag", "full"):
            raise ValueError(f'Gaussian: expected cov="diag" or cov="full", got {cov!r}')
        if cov == "full" and d < 2:
            raise ValueError('Gaussian: cov="full" needs d ≥ 2, got d=1; one parameter has no correlations, use "diag"')
        self.d, self.cov = d, cov
        self.loc_scale = _scales(loc_scale, d, "loc_scale")
        self.sd_scale = _scales(sd_scale, d, "sd_scale")

    def __repr__(self) -> str:
        return f"Gaussian({self.d}, cov={self.cov!r}, loc_scale={self.loc_scale}, sd_scale={self.sd_scale})"

    @property
    def origin(self) -> np.ndarray:
        """0."""
        return np.zeros(self.d)

    @property
    def shared(self) -> dict[str, Distribution]:
        """Priors of `mu`, `tau` and, for a full covariance, `corr`."""
        sites: dict[str, Distribution] = {
            "mu": dist.Normal(torch.zeros(self.d), torch.tensor(self.loc_scale)).to_event(1),
            "tau": dist.HalfNormal(torch.tensor(self.sd_scale)).to_event(1),
        }
        if self.cov == "full":
            sites["corr"] = dist.LKJCholesky(self.d, torch.tensor(1.0))
        return sites

    def distribution(self, shared: Mapping[str, Tensor], batch: Batch) -> Distribution:
        """Normal(mu, tau) or MultivariateNormal(mu, diag(tau) corr), event shape `(d,)`."""
        if self.cov == "full":
            return dist.MultivariateNormal(shared["mu"], scale_tril=shared["tau"].unsqueeze(-1) * shared["corr"])
        return dist.Normal(shared["mu"], shared["tau"]).to_event(1)


@final
@dataclasses.dataclass(frozen=True)
class Custom(Prior):
    """A prior written as a function `(shared) -> Distribution`, or `(shared, batch)`, or a fixed Distribution."""

    function: Callable[..., Any] | Distribution
    _bound: Callable[..., Any] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.function, Distribution):
            bound = bind(self.function, role="prior", names=("shared", "batch"), positional=1)
            object.__setattr__(self, "_bound", bound)

    def distribution(self, shared: Mapping[str, Tensor], batch: Batch) -> Distribution:
        """The fixed distribution in the dtype of the call, or what the function returns."""
        if isinstance(self.function, Distribution):
            return in_default_dtype(self.function)
        return self._bound(shared=shared, batch=batch)


def one_phi_a_task(prior: Any, batch: Batch) -> Any:
    """Returns what a prior returned as a Pyro distribution, refused if it is not that of one φ for each task.

    Raises:
        ValueError: if it is no distribution, or its event shape is neither `(d,)` nor `()`, or its batch shape does not
            broadcast to `(T, 1)`.
    """
    phi = as_pyro(prior, role="prior")
    event, shape = tuple(phi.event_shape), tuple(phi.batch_shape)
    if len(event) > 1:
        raise ValueError(f"prior: expected event shape (d,) or (), got {event}; flatten φ")
    tasks = batch.mask.shape[0]
    if len(shape) > 2 or (1, *shape)[-1] != 1 or (1, 1, *shape)[-2] not in (1, tasks):
        raise ValueError(
            f"prior: expected batch shape () or ({tasks}, 1), one φ a task, got {shape}; declare the components of φ "
            "with .to_event(1)"
        )
    return phi


def as_prior(prior: Prior | Callable[..., Any] | Distribution) -> Prior:
    """Returns `prior` itself, or the function or Distribution it is as a `Custom` prior."""
    return prior if isinstance(prior, Prior) else Custom(prior)
