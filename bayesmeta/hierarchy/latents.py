"""Where latent sites get their values: from flat vectors, from the prior, from given values, or from fixed noise.

Each class is one answer to `tracing.Latents`; `density.py` chooses among them. `Structure` says how flat vectors are
cut into sites. Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from bayesmeta.hierarchy import whitening
from bayesmeta.hierarchy.tracing import ObservedSite, Site


@dataclass(frozen=True)
class Structure:
    """What a model is made of.

    `exact_size`: padding changes the density, so tasks are batched by exact size. `coupled`: sites whose event covers
    the rows of a task. `unmasked`: observed sites whose log density counts padded rows.
    """

    shared: tuple[Site, ...]
    task: tuple[Site, ...]
    observed: tuple[ObservedSite, ...]
    shared_values: tuple[str, ...]
    task_values: tuple[str, ...]
    exact_size: bool = False
    coupled: tuple[str, ...] = ()
    unmasked: tuple[str, ...] = ()

    @property
    def shared_size(self) -> int:
        """Unconstrained dimension of θ."""
        return sum(site.size for site in self.shared)

    @property
    def task_size(self) -> int:
        """Unconstrained dimension of one task's φ."""
        return sum(site.size for site in self.task)

    @property
    def even(self) -> tuple[bool, ...]:
        """Which coordinates of θ are logarithms of positive numbers whose prior is even."""
        return tuple(site.even for site in self.shared for _ in range(site.size))

    @property
    def outcomes(self) -> tuple[str, ...]:
        """Observed sites that can be predicted."""
        return tuple(site.name for site in self.observed if not site.factor and not site.shared)


def split(sites: tuple[Site, ...], flat: Tensor) -> dict[str, Tensor]:
    """Cuts a flat vector `(..., size)` into `(..., *unconstrained)` a site."""
    parts = flat.split([site.size for site in sites], -1)
    return {s.name: p.reshape((*flat.shape[:-1], *s.unconstrained)) for s, p in zip(sites, parts, strict=True)}


def _constrain(fn: dist.TorchDistribution, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    transform = whitening.bijection(fn)
    value = transform(u)
    log_jacobian = transform.log_abs_det_jacobian(u, value)
    if whitening.is_improper(fn):
        return value, torch.zeros_like(log_jacobian), log_jacobian
    log_prob = fn.log_prob(value)
    extra = log_jacobian.dim() - log_prob.dim()
    return value, log_prob, log_jacobian.sum(tuple(range(-extra, 0))) if extra > 0 else log_jacobian


def _unconstrained_shape(fn: dist.TorchDistribution) -> torch.Size:
    return whitening.bijection(fn).inverse_shape(fn.shape())


class Flat:
    """Latents given by flat vectors. `whitened`: task coordinates are noise, else plain unconstrained space."""

    def __init__(self, structure: Structure, theta: Tensor, noise: Tensor, whitened: bool) -> None:
        self._theta = split(structure.shared, theta)
        self._noise = split(structure.task, noise.unsqueeze(1))
        self._whitened = whitened

    def shared(self, name: str, fn: dist.TorchDistribution) -> tuple[Tensor, Tensor, Tensor]:
        """Constrains the site's part of θ."""
        return _constrain(fn, self._theta[name])

    def task(self, name: str, fn: dist.TorchDistribution, plain: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Maps the site's noise to its value."""
        if not self._whitened:
            return _constrain(fn, self._noise[name])
        value, log_prior = whitening.whiten(fn, self._noise[name])
        if plain:
            return value, log_prior, torch.zeros_like(log_prior)
        return value, fn.log_prob(value), whitening.log_jacobian(fn, self._noise[name], value)


class Sampled(Flat):
    """Task sites drawn from their prior given θ; `drawn` collects their noise. Shared sites too if `theta` is None."""

    def __init__(self, structure: Structure, theta: Tensor | None) -> None:
        sizes = (structure.shared_size, structure.task_size)
        super().__init__(structure, torch.zeros(sizes[0]) if theta is None else theta, torch.zeros(1, sizes[1]), True)
        self._draw_shared = theta is None
        self.drawn: dict[str, Tensor] = {}

    def shared(self, name: str, fn: dist.TorchDistribution) -> tuple[Tensor, Tensor, Tensor]:
        """Takes θ as given or draws it."""
        if not self._draw_shared:
            return super().shared(name, fn)
        if whitening.is_improper(fn):
            raise ValueError(f"shared site {name!r} has a flat (improper) prior, which cannot be simulated from")
        value = whitening.draw(fn)
        self.drawn[name] = whitening.bijection(fn).inv(value)
        return value, torch.zeros(()), torch.zeros(())

    def task(self, name: str, fn: dist.TorchDistribution, plain: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Draws noise where the whitening is exact, a value otherwise."""
        if whitening.kind(fn) == "moments":
            value = whitening.draw(fn)
            noise = whitening.unwhiten(fn, value)
        else:
            noise = torch.randn(_unconstrained_shape(fn))
            value, _ = whitening.whiten(fn, noise)
        self.drawn[name] = noise.reshape(noise.shape[0], -1)
        return value, torch.zeros(noise.shape[0], 1), torch.zeros(noise.shape[0], 1)


class Fixed:
    """Latents of a trial run, whatever their shapes: coordinates around `centre`.

    The middle task of every batch has the same ones, its neighbours have others.
    """

    def __init__(self, centre: float = 0.0) -> None:
        self._centre = centre

    def _at(self, shape: torch.Size, batch_dims: int) -> Tensor:
        event = shape[batch_dims:]
        one = torch.linspace(0.5 * self._centre, 1.5 * self._centre, event.numel()).reshape(event)
        if not batch_dims:
            return one
        distance = (torch.arange(shape[0]) - shape[0] // 2).abs()
        return one * (1.0 + 0.5 * distance).reshape(-1, *[1] * (len(shape) - 1))

    def shared(self, name: str, fn: dist.TorchDistribution) -> tuple[Tensor, Tensor, Tensor]:
        """Constrains the fixed coordinates."""
        return _constrain(fn, self._at(_unconstrained_shape(fn), 0))

    def task(self, name: str, fn: dist.TorchDistribution, plain: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Maps the fixed noise."""
        value, log_prior = whitening.whiten(fn, self._at(_unconstrained_shape(fn), whitening.BATCH_DIMS))
        return value, log_prior, torch.zeros_like(log_prior)


class Given(Fixed):
    """Shared sites at given constrained values; `theta` collects their unconstrained coordinates."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = values
        self.theta: dict[str, Tensor] = {}

    def shared(self, name: str, fn: dist.TorchDistribution) -> tuple[Tensor, Tensor, Tensor]:
        """Takes the value as given."""
        value = self._values[name]
        if not bool(whitening.support(fn).check(value).all()):
            raise ValueError(f"shared: {name!r} = {value.tolist()} is outside its support {whitening.support(fn)}")
        self.theta[name] = whitening.bijection(fn).inv(value)
        return value, torch.zeros(()), torch.zeros(())


def shaped(site: Site, value: Any, dtype: torch.dtype) -> Tensor:
    """A given value of a shared site as a tensor.

    Raises:
        ValueError: Its shape is not the site's.
    """
    tensor = torch.as_tensor(value, dtype=dtype)
    if tuple(tensor.shape) != site.shape:
        raise ValueError(f"shared: {site.name!r} must have shape {site.shape}, got {tuple(tensor.shape)}")
    return tensor
