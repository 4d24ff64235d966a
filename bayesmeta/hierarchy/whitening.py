"""Whitening: each task site as a map of standard normal noise, `value = f(z; parameters of its prior)`.

A guide that works in `z` starts at the prior, whatever the prior is. Three kinds of map, chosen by `kind(fn)`:
`"normal"` (Normal, multivariate normal and bijections of them: their own base noise), `"icdf"` (univariate with an
inverse distribution function: F⁻¹∘Φ) and `"moments"` (everything else: location and scale in unconstrained space,
from the moments of the prior, smooth in its parameters). The first two are exact: the prior of z is standard normal.
`density.py`, `probing.py` and `tracing.py` call this file; nothing here reads traces.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

BATCH_DIMS = 2
"""A task site has batch shape (T, 1)."""

_WRAPPERS = (torch.distributions.Independent, dist.ExpandedDistribution)
_POSITIVE = (type(constraints.positive), type(constraints.nonnegative))
_MVN = (torch.distributions.MultivariateNormal, torch.distributions.LowRankMultivariateNormal)


def _strip(fn: dist.TorchDistribution) -> dist.TorchDistribution:
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn


def unvalidated(fn: Any) -> Any:
    """The distribution, or a copy, that does not look at values: what does cannot be recorded as a graph.

    One that was expanded outside the model keeps on validating whatever Pyro's switch says.
    """
    inner = {k: v for k, v in vars(fn).items() if isinstance(v, torch.distributions.Distribution)}
    changed = {k: quiet for k, v in inner.items() if (quiet := unvalidated(v)) is not v}
    if vars(fn).get("_validate_args", False):
        changed["_validate_args"] = False
    if not changed:
        return fn
    plain = copy.copy(fn)
    vars(plain).update(changed)
    return plain


def kind(fn: dist.TorchDistribution) -> str:
    """Names the map used for a prior: "normal", "icdf" (both exact) or "moments" (approximate)."""
    base = _strip(fn)
    if _is_normal(base):
        return "normal"
    return "icdf" if not base.event_shape and _has_icdf(base) else "moments"


def _is_normal(base: dist.TorchDistribution) -> bool:
    if isinstance(base, torch.distributions.TransformedDistribution):
        return (
            all(t.bijective for t in base.transforms)
            and base.base_dist.event_shape == bijection(base).inverse_shape(base.event_shape)
            and _is_normal(_strip(base.base_dist))
        )
    return isinstance(base, (torch.distributions.Normal, *_MVN))


def _has_icdf(base: dist.TorchDistribution) -> bool:
    try:
        base.icdf(torch.full(base.batch_shape, 0.5))
    except (NotImplementedError, AttributeError):
        return False
    return True


def support(fn: dist.TorchDistribution) -> Any:
    """The support of a distribution, a constraint; of a mixture, that of its components."""
    base = fn
    while isinstance(base, (*_WRAPPERS, dist.MaskedDistribution)):
        base = base.base_dist
    if not isinstance(base, torch.distributions.MixtureSameFamily):
        return fn.support
    inner: Any = base.component_distribution.support
    extra = fn.event_dim - inner.event_dim
    return constraints.independent(inner, extra) if extra else inner


def has_graded_bounds(support: Any) -> bool:
    """Whether the bounds of a constraint, or of what it is made of, depend on what gradients are recorded of."""
    if isinstance(support, Tensor):
        return support.requires_grad
    parts = support if isinstance(support, (list, tuple)) else getattr(support, "__dict__", {}).values()
    return any(has_graded_bounds(part) for part in parts)


def is_improper(fn: dist.TorchDistribution) -> bool:
    """Whether a prior is flat and has no integral."""
    return isinstance(_strip(fn), dist.ImproperUniform)


def is_even(fn: dist.TorchDistribution) -> bool:
    """Whether a prior on the positive half line is half of a smooth, even density (or flat)."""
    base = _strip(fn)
    if is_improper(fn):
        return is_positive(fn)
    return isinstance(base, (torch.distributions.HalfNormal, torch.distributions.HalfCauchy))


def is_positive(fn: dist.TorchDistribution) -> bool:
    """Whether a distribution lives on the positive half line."""
    inner: Any = support(fn)
    while isinstance(inner, constraints.independent):
        inner = inner.base_constraint
    return isinstance(inner, _POSITIVE)


def bijection(fn: dist.TorchDistribution) -> torch.distributions.Transform:
    """The map from unconstrained space onto the support of a site's distribution."""
    return biject_to(support(fn))


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """Log density of standard normal noise `(T, 1, *event)`, summed over the event: `(T, 1)`."""
    terms = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
    return terms.reshape(*z.shape[:BATCH_DIMS], -1).sum(-1)


def whiten(fn: dist.TorchDistribution, z: Tensor) -> tuple[Tensor, Tensor]:
    """Maps noise to a value of a task site.

    Args:
        fn: The site's prior, batch shape `(T, 1)`.
        z: Noise `(T, 1, *unconstrained event)`.

    Returns:
        The value `(T, 1, *event)` and the log prior density of z `(T, 1)`.
    """
    if kind(fn) == "moments":
        return _from_moments(fn, z)
    return _from_noise(fn, z), standard_normal_log_prob(z)


def log_jacobian(fn: dist.TorchDistribution, z: Tensor, value: Tensor) -> Tensor:
    """Log |dvalue/dz| of `whiten`, `(T, 1)`; with it a prior may be masked or scaled."""
    if kind(fn) != "moments":
        return standard_normal_log_prob(z) - fn.log_prob(value)
    loc, scale = unconstrained_moments(fn)
    return _moments_jacobian(fn, z, loc + scale * z, value, scale)


def unwhiten(fn: dist.TorchDistribution, value: Tensor) -> Tensor:
    """The inverse of `whiten` for the approximate kind: noise of a given value `(T, 1, *event)`."""
    loc, scale = unconstrained_moments(fn)
    return (bijection(fn).inv(value) - loc) / scale


def draw(fn: dist.TorchDistribution) -> Tensor:
    """Draws from a prior, where torch's own draws follow its density.

    Those of `LKJCholesky` do not beyond dimension two (torch 2.13 takes Beta(k - 1/2, ·) for Beta(k/2, ·) in row k of
    the onion method): here its independent partial correlations are drawn.
    """
    base = _strip(fn)
    if not isinstance(base, torch.distributions.LKJCholesky):
        return fn.sample()
    transform = bijection(fn)
    b = _partial_correlations(base).expand(transform.inverse_shape(fn.shape()))
    eps = torch.finfo(b.dtype).eps
    with torch.no_grad():
        return transform(torch.atanh((2 * dist.Beta(b, b).sample() - 1).clamp(eps - 1, 1 - eps)))


def interior(constraint: constraints.Constraint, shape: torch.Size) -> Tensor | None:
    """Values inside a constraint, of a given shape; None for the real line and where no rule is known."""
    inner = constraint
    while isinstance(inner, constraints.independent):
        inner = inner.base_constraint
    if isinstance(inner, type(constraints.real)):
        return None
    if inner.is_discrete:
        lowest = 0 if isinstance(inner, type(constraints.boolean)) else getattr(inner, "lower_bound", None)
        return None if lowest is None else torch.as_tensor(lowest).expand(shape)
    try:
        transform = biject_to(constraint)
    except NotImplementedError:
        return None
    return transform(torch.zeros(transform.inverse_shape(shape)))


def _from_noise(fn: dist.TorchDistribution, z: Tensor) -> Tensor:
    base = _strip(fn)
    if isinstance(base, torch.distributions.Normal):
        return base.loc + base.scale * z
    if isinstance(base, _MVN):
        return base.loc + (base.scale_tril @ z.unsqueeze(-1)).squeeze(-1)
    if kind(base) == "icdf":
        return _quantile(base, z)
    value = _from_noise(base.base_dist, z)
    for transform in base.transforms:
        value = transform(value)
    return value


def _quantile(base: dist.TorchDistribution, z: Tensor) -> Tensor:
    for family, quantile in _QUANTILES.items():
        if isinstance(base, family):
            return quantile(base, z)
    info = torch.finfo(z.dtype)
    return base.icdf(_ndtr(z).clamp(info.tiny, 1 - info.eps))


def _ndtr(z: Tensor) -> Tensor:
    """Φ(z) with all digits for negative z, unlike `torch.special.ndtr`."""
    return 0.5 * torch.erfc(-math.sqrt(0.5) * z)


def _log_ndtr(z: Tensor) -> Tensor:
    """Log Φ(z) with all digits in both tails; `torch.special.log_ndtr` has no batching rule for `vmap`."""
    low, high = z.clamp(max=-1.0), z.clamp(min=-1.0)
    lower = torch.log(0.5 * torch.special.erfcx(-math.sqrt(0.5) * low)) - 0.5 * low.square()
    return torch.where(z < -1, lower, torch.log1p(-0.5 * torch.erfc(math.sqrt(0.5) * high)))


def _odd(half: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """An odd function given by its values at z <= 0, where the lower tail has all its digits."""
    lower = half(torch.where(z < 0, z, -z))
    return torch.where(z < 0, lower, -lower)


def _half_normal(base: torch.distributions.HalfNormal, z: Tensor) -> Tensor:
    low, high = z.clamp(max=0.0), z.clamp(min=0.0)
    lower = math.sqrt(2) * torch.special.erfinv(_ndtr(low))
    return base.scale * torch.where(z < 0, lower, -torch.special.ndtri(0.5 * _ndtr(-high)))


def _half_cauchy(base: torch.distributions.HalfCauchy, z: Tensor) -> Tensor:
    low, high = z.clamp(max=0.0), z.clamp(min=0.0)
    lower = torch.tan(0.5 * math.pi * _ndtr(low))
    return base.scale * torch.where(z < 0, lower, _cotangent(_log_ndtr(-high) - math.log(2)))


def _cotangent(log_p: Tensor) -> Tensor:
    """cot(πp) of log p; its gradient stays finite where p² underflows."""
    p = log_p.exp()
    return torch.cos(math.pi * p) * torch.exp(-log_p) / (math.pi * torch.sinc(p))


def _kumaraswamy(base: torch.distributions.Kumaraswamy, z: Tensor) -> Tensor:
    return (-torch.expm1(_log_ndtr(-z) / base.concentration0)) ** (1 / base.concentration1)


_QUANTILES: dict[type, Callable[..., Tensor]] = {
    torch.distributions.HalfNormal: _half_normal,
    torch.distributions.HalfCauchy: _half_cauchy,
    torch.distributions.Exponential: lambda fn, z: -_log_ndtr(-z) / fn.rate,
    torch.distributions.Weibull: lambda fn, z: fn.scale * (-_log_ndtr(-z)) ** (1 / fn.concentration),
    torch.distributions.Pareto: lambda fn, z: fn.scale * torch.exp(-_log_ndtr(-z) / fn.alpha),
    torch.distributions.Gumbel: lambda fn, z: fn.loc - fn.scale * torch.log(-_log_ndtr(z)),
    torch.distributions.Laplace: lambda fn, z: fn.loc + fn.scale * _odd(lambda t: math.log(2) + _log_ndtr(t), z),
    torch.distributions.Cauchy: lambda fn, z: fn.loc + fn.scale * _odd(lambda t: -_cotangent(_log_ndtr(t)), z),
    torch.distributions.Kumaraswamy: _kumaraswamy,
    dist.Logistic: lambda fn, z: fn.loc + fn.scale * (_log_ndtr(z) - _log_ndtr(-z)),
}
"""F⁻¹∘Φ where it can keep its digits in both tails; other families go through their `icdf`."""


def _from_moments(fn: dist.TorchDistribution, z: Tensor) -> tuple[Tensor, Tensor]:
    loc, scale = unconstrained_moments(fn)
    transform = bijection(fn)
    u = loc + scale * z
    value = transform(u)
    return value, fn.log_prob(value) + _moments_jacobian(fn, z, u, value, scale)


def _moments_jacobian(fn: dist.TorchDistribution, z: Tensor, u: Tensor, value: Tensor, scale: Tensor) -> Tensor:
    log_scale = scale.log().expand(z.shape).reshape(*z.shape[:BATCH_DIMS], -1).sum(-1)
    terms = bijection(fn).log_abs_det_jacobian(u, value)
    return terms.reshape(*z.shape[:BATCH_DIMS], -1).sum(-1) + log_scale


def unconstrained_moments(fn: dist.TorchDistribution) -> tuple[Tensor, Tensor]:
    """Location and scale of a prior in unconstrained space, exact where a formula is known, else matched or (0, 1)."""
    base = _strip(fn)
    for family, moments in _FORMULAS.items():
        if isinstance(base, family):
            return moments(base)
    return _matched_moments(fn, base)


def _matched_moments(fn: dist.TorchDistribution, base: dist.TorchDistribution) -> tuple[Tensor, Tensor]:
    """Matches mean and variance of a real or positive prior; otherwise the unit scale at the origin."""
    like = bijection(fn).inverse_shape(fn.shape())
    zero, one = torch.zeros(like), torch.ones(like)
    inner = getattr(base, "component_distribution", base).support
    inner = getattr(inner, "base_constraint", inner)
    positive = isinstance(inner, _POSITIVE)
    if is_improper(fn) or not (positive or isinstance(inner, type(constraints.real))):
        return zero, one
    try:
        mean, variance = base.mean.expand(like), base.variance.expand(like)
    except (NotImplementedError, AttributeError):
        return zero, one
    if positive:
        variance = torch.log1p(variance / mean.square())
        mean = mean.log() - 0.5 * variance
    finite = torch.isfinite(mean) & torch.isfinite(variance) & (variance > 0)
    return torch.where(finite, mean, zero), torch.where(finite, variance, one).sqrt()


def _gamma(base: torch.distributions.Gamma) -> tuple[Tensor, Tensor]:
    return torch.digamma(base.concentration) - base.rate.log(), torch.polygamma(1, base.concentration).sqrt()


def _inverse_gamma(base: dist.InverseGamma) -> tuple[Tensor, Tensor]:
    loc, scale = _gamma(base.base_dist)
    return -loc, scale


def _beta(base: torch.distributions.Beta) -> tuple[Tensor, Tensor]:
    a, b = base.concentration1, base.concentration0
    return torch.digamma(a) - torch.digamma(b), (torch.polygamma(1, a) + torch.polygamma(1, b)).sqrt()


def _student_t(base: torch.distributions.StudentT) -> tuple[Tensor, Tensor]:
    return base.loc.expand(base.batch_shape), base.scale * (1 + 2 / base.df).sqrt()


def _dirichlet(base: torch.distributions.Dirichlet) -> tuple[Tensor, Tensor]:
    """The sticks of a Dirichlet are independent Beta(a_k, a_{k+1} + … + a_K)."""
    a = base.concentration
    rest = (a.sum(-1, keepdim=True) - a.cumsum(-1))[..., :-1]
    head = a[..., :-1]
    offset = torch.arange(a.shape[-1] - 1, 0, -1, dtype=a.dtype).log()
    loc = torch.digamma(head) - torch.digamma(rest) + offset
    return loc, (torch.polygamma(1, head) + torch.polygamma(1, rest)).sqrt()


def _partial_correlations(base: torch.distributions.LKJCholesky) -> Tensor:
    """Partial correlations of LKJ(η) are Beta(b, b) on (-1, 1), b = η + (D - 2 - column) / 2 (Lewandowski 2009)."""
    columns = torch.tril_indices(base.dim, base.dim, -1)[1]
    return base.concentration.unsqueeze(-1) + 0.5 * (base.dim - 2 - columns)


def _lkj(base: torch.distributions.LKJCholesky) -> tuple[Tensor, Tensor]:
    b = _partial_correlations(base)
    return torch.zeros_like(b), (0.5 * torch.polygamma(1, b)).sqrt()


_FORMULAS: dict[type, Callable[..., tuple[Tensor, Tensor]]] = {
    torch.distributions.Gamma: _gamma,
    dist.InverseGamma: _inverse_gamma,
    torch.distributions.Beta: _beta,
    torch.distributions.StudentT: _student_t,
    torch.distributions.Dirichlet: _dirichlet,
    torch.distributions.LKJCholesky: _lkj,
}
