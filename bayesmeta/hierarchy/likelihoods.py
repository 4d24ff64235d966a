"""The built-in likelihoods: what distribution a label has, given the predictor's value `f` for its row.

Each names its own shared parameters (`shared`), gives the distribution of all labels (`distribution`) and says which
data lie outside its support (`requirements`). Any callable of `(f, batch, shared)` is a likelihood too: `Custom`.
Several likelihoods in one model are in `outcomes.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import logsigmoid

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy import likelihood_base as parts
from bayesmeta.hierarchy.likelihood_base import Custom, Likelihood, Requirement, Source
from bayesmeta.hierarchy.outcomes import Kinds, Outputs

__all__ = [
    "Bernoulli",
    "Beta",
    "Binomial",
    "Categorical",
    "Custom",
    "Gamma",
    "Kinds",
    "Likelihood",
    "LocationScale",
    "NegativeBinomial",
    "Normal",
    "OrderedLogistic",
    "Outputs",
    "Poisson",
    "Requirement",
    "StudentT",
]


@final
@dataclass(frozen=True)
class Normal(Likelihood):
    """y ~ Normal(f, σ).

    Args:
        scale: None to learn the shared site `sigma` ~ HalfNormal(`prior_scale`), a number, or the name of a column of
            known standard errors, one a row or a task.
        prior_scale: scale of that prior, default 2.5; give it in the units of y.
    """

    scale: Source | None = None
    prior_scale: float = dataclasses.field(default=2.5, kw_only=True)

    def __post_init__(self) -> None:
        parts.require_positive(self, prior_scale=self.prior_scale)
        if self.scale is not None:
            parts.require_source(self, scale=self.scale)

    @property
    def shared(self) -> dict[str, Distribution]:
        """`sigma`, if it is learned."""
        return {"sigma": dist.HalfNormal(self.prior_scale)} if self.scale is None else {}

    def distribution(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Distribution:
        """Normal(f, σ)."""
        scale = shared["sigma"] if self.scale is None else parts.value(batch, self.scale)
        return dist.Normal(parts.rowwise(f, batch, self), scale)

    def requirements(self, tasks: Tasks) -> Iterator[Requirement]:
        """Positive standard errors."""
        y, _ = parts.labels(tasks, self)
        if self.scale is not None:
            yield from parts.positive(tasks, self.scale, y)


@final
@dataclass(frozen=True)
class LocationScale(Likelihood):
    """y ~ Normal(f_0, exp f_1), f `(T, N, 2)`: the noise is part of the predictor, of each task's own for example."""

    width = 2

    def distribution(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Distribution:
        """Normal(f_0, exp f_1)."""
        both = parts.rowwise(f, batch, self, levels=2)
        return dist.Normal(both[..., 0], both[..., 1].exp())

    def requirements(self, tasks: Tasks) -> Iterator[Requirement]:
        """One output."""
        parts.labels(tasks, self)
        return iter(())


@final
@dataclass(frozen=True, kw_only=True)
class StudentT(Likelihood):
    """y ~ StudentT(ν, f, σ): outliers allowed.

    Args:
        prior_scale: shared site `sigma` ~ HalfNormal(`prior_scale`), default 2.5; give it in the units of y.
        prior_rate: shared site `nu` ~ Gamma(2, `prior_rate`), default 0.1.

    References:
        Prior choice for the degrees of freedom: Juárez and Steel, Model-based clustering of non-Gaussian panel data
        (2010), https://doi.org/10.1198/jbes.2009.07145
    """

    prior_scale: float = 2.5
    prior_rate: float = 0.1

    def __post_init__(self) -> None:
        parts.require_positive(self, prior_scale=self.prior_scale, prior_rate=self.prior_rate)

    @property
    def shared(self) -> dict[str, Distribution]:
        """`sigma` and `nu`."""
        return {"sigma": dist.HalfNormal(self.prior_scale), "nu": dist.Gamma(2.0, self.prior_rate)}

    def distribution(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Distribution:
        """StudentT(ν, f, σ)."""
        return dist.StudentT(shared["nu"], parts.rowwise(f, batch, self), shared["sigma"])

    def requirements(self, tasks: Tasks) -> Iterator[Requirement]:
        """One output."""
        parts.labels(tasks, self)
        return iter(())


@final
@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """y ∈ {0, 1} with log odds f."""

    def distribution(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Distribution:
        """Bernoulli(logits=f)."""
        return dist.Bernoulli(logits=parts.rowwise(f, batch, self))

    def requirements(self, tasks: Tasks) -> Iterator[Requirement]:
        """Labels 0 or 1."""
        y, missing = parts.labels(tasks, self)
        yield Requirement("y", y, (y == 0) | (y == 1) | missing, "as 0 or 1")


@final
@dataclass(frozen=True)
class Binomial(Likelihood):
    """y successes of `trials`, with log odds f.

    Args:
        trials: name of the column that holds the number of trials, or one number for all rows.
    """

    trials: int | str

    def __post_init__(self) -> None:
        parts.require_source(self, trials=self.trials)
        if not isinstance(self.trials, str) and self.trials != int(self.trials):
            raise ValueError(f"Binomial: expected trials as an integer or the name of a column, got {self.trials!r}")

    def distribution(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Distribution:
        """Binomial(trials, logits=f)."""
        return dist.Binomial(parts.value(batch, self.trials), logits=parts.rowwise(f, batch, self))

    def requirements(self, tasks: Tasks) -> Iterator[Requirement]:
        """Whole trials, and as many successes at most."""
        y, missing = parts.labels(tasks, self)
        trials = parts.rows(tasks, self.trials, y)
        if isinstance(self.trials, str):
            yield parts.counts(trials, torch.zeros_like(missing))._replace(source=f"column {self.trials!r}")
        yield parts.counts(y, missing)
        yield Requirement("y", y, (y <= trials) | missing, "≤ trials")


@final
@dataclass(frozen=True, kw_only=True)
class Poisson(Likelihood):
    """Counts y ~ Poisson(exposure · exp f).

    Args:
        exposure: name of a positive column, or a number; default 1.
    """

    exposure: Source = 1.0

    def __post_init__(self) -> None:
        parts.require_source(self, exposure=self.exposure)

    def distribution(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Distribution:
        """Poisson(exposure · exp f)."""
        return dist.Poisson(torch.exp(parts.rowwise(f, batch, self)) * parts.value(batch, self.exposure))

    def requirements(self, tasks: Tasks) -> Iterator[Requirement]:
        """Counts, and positive exposures."""
        y, missing = parts.labels(tasks, self)
        yield parts.counts(y, missing)
        yield from parts.positive(tasks, self.exposure, y)


@final
@dataclass(frozen=True, kw_only=True)
class NegativeBinomial(Likelihood):
    """Overdispersed counts: mean m = exposure · exp f, variance m + m²/κ, κ the shared site `concentration`.

    Args:
        exposure: name of a positive column, or a number; default 1.
        prior_rate: `concentration` ~ Gamma(2, `prior_rate`), default 0.1 (prior mean 20).
    """

    exposure: Source = 1.0
    prior_rate: float = 0.1

    def __post_init__(self) -> None:
        parts.require_positive(self, prior_rate=self.prior_rate)
        parts.require_source(self, exposure=self.exposure)

    @property
    def shared(self) -> dict[str, Distribution]:
        """`concentration`."""
        return {"concentration": dist.Gamma(2.0, self.prior_rate)}

    def distribution(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Distribution:
        """NegativeBinomial(κ, log odds f + log exposure − log κ)."""
        exposure = parts.value(batch, self.exposure)
        log_exposure = torch.log(exposure) if isinstance(exposure, Tensor) else math.log(exposure)
        logits = parts.rowwise(f, batch, self) + log_exposure - torch.log(shared["concentration"])
        return dist.NegativeBinomial(shared["concentration"], logits=logits)

    def requirements(self, tasks: Tasks) -> Iterator[Requirement]:
        """Counts, and positive exposures."""
        y, missing = parts.labels(tasks, self)
        yield parts.counts(y, missing)
        yield from parts.positive(tasks, self.exposure, y)


@final
@dataclass(frozen=True, kw_only=True)
class Categorical(Likelihood):
    """y ∈ {0, …, K−1} with logits f `(T, N, K)`.

    Args:
        levels: K; if given, labels and f are checked against it.
    """

    levels: int | None = None

    def __post_init__(self) -> None:
        parts.require_levels(self, self.levels)

    @property
    def width(self) -> int | None:  # type: ignore[override]
        """One number a level."""
        return self.levels

    def distribution(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Distribution:
        """Categorical(logits=f)."""
        return dist.Categorical(logits=parts.rowwise(f, batch, self, levels=self.levels or "K"))

    def requirements(self, tasks: Tasks) -> Iterator[Requirement]:
        """Whole labels below K."""
        y, missing = parts.labels(tasks, self)
        yield parts.counts(y, missing, self.levels)


@final
@dataclass(frozen=True)
class OrderedLogistic(Likelihood):
    """y ∈ {0, …, K−1} in order: P(y ≤ k) = sigmoid(c_k − f), with the shared site `cutpoints` c_0 < … < c_{K−2}.

    The first cutpoint is Normal(−(K − 2)/2, `prior_scale`), the gaps between cutpoints are LogNormal(0, 1).

    Args:
        levels: K ≥ 2.
        prior_scale: see above, default 2.5.
    """

    levels: int
    prior_scale: float = dataclasses.field(default=2.5, kw_only=True)

    def __post_init__(self) -> None:
        if self.levels is None:
            raise ValueError("OrderedLogistic: expected levels as an integer ≥ 2, got None")
        parts.require_levels(self, self.levels)
        parts.require_positive(self, prior_scale=self.prior_scale)

    @property
    def shared(self) -> dict[str, Distribution]:
        """`cutpoints` (K − 1,), increasing."""
        gaps = self.levels - 2
        base = dist.Normal(torch.tensor([-gaps / 2] + [0.0] * gaps), torch.tensor([self.prior_scale] + [1.0] * gaps))
        return {"cutpoints": dist.TransformedDistribution(base, [OrderedTransform()])}

    def distribution(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Distribution:
        """Categorical over the K levels."""
        return dist.Categorical(logits=_ordered_logits(parts.rowwise(f, batch, self), shared["cutpoints"]))

    def requirements(self, tasks: Tasks) -> Iterator[Requirement]:
        """Whole labels below K."""
        y, missing = parts.labels(tasks, self)
        yield parts.counts(y, missing, self.levels)


def _ordered_logits(f: Tensor, cutpoints: Tensor) -> Tensor:
    """Log probabilities `(…, K)`, from σ(b) − σ(a) = σ(b) σ(−a) (1 − e^{a − b}), which never cancels for a < b."""
    above = cutpoints - f.unsqueeze(-1)
    below_log, above_log = logsigmoid(above), logsigmoid(-above)
    gaps = torch.log(-torch.expm1(cutpoints[..., :-1] - cutpoints[..., 1:]))
    inner = below_log[..., 1:] + above_log[..., :-1] + gaps
    return torch.cat([below_log[..., :1], inner, above_log[..., -1:]], -1)


@final
@dataclass(frozen=True, kw_only=True)
class Gamma(Likelihood):
    """Positive y with mean exp f and variance exp(2 f)/κ, κ the shared site `concentration`.

    Args:
        prior_rate: `concentration` ~ Gamma(2, `prior_rate`), default 0.1 (prior mean 20).
    """

    prior_rate: float = 0.1

    def __post_init__(self) -> None:
        parts.require_positive(self, prior_rate=self.prior_rate)

    @property
    def shared(self) -> dict[str, Distribution]:
        """`concentration`."""
        return {"concentration": dist.Gamma(2.0, self.prior_rate)}

    def distribution(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Distribution:
        """Gamma(κ, κ exp(−f))."""
        return dist.Gamma(shared["concentration"], shared["concentration"] * torch.exp(-parts.rowwise(f, batch, self)))

    def requirements(self, tasks: Tasks) -> Iterator[Requirement]:
        """Positive labels."""
        y, missing = parts.labels(tasks, self)
        yield Requirement("y", y, (y > 0) | missing, "> 0")


class _Beta(dist.Beta):  # type: ignore[misc]
    """A Beta whose draws can be recorded and vmapped: torch's own go through an autograd function that cannot."""

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draws without gradient."""
        concentration = torch.stack([self.concentration1, self.concentration0], -1)
        with torch.no_grad():
            return torch._sample_dirichlet(concentration.expand(*self._extended_shape(sample_shape), 2))[..., 0]


@final
@dataclass(frozen=True, kw_only=True)
class Beta(Likelihood):
    """Proportions y ∈ (0, 1) with mean m = sigmoid f and variance m (1 − m)/(1 + κ), κ the site `concentration`.

    Args:
        prior_rate: `concentration` ~ Gamma(2, `prior_rate`), default 0.1 (prior mean 20).
    """

    prior_rate: float = 0.1

    def __post_init__(self) -> None:
        parts.require_positive(self, prior_rate=self.prior_rate)

    @property
    def shared(self) -> dict[str, Distribution]:
        """`concentration`."""
        return {"concentration": dist.Gamma(2.0, self.prior_rate)}

    def distribution(self, f: Tensor, batch: Batch, shared: Mapping[str, Tensor]) -> Distribution:
        """Beta(κ sigmoid f, κ sigmoid(−f))."""
        f = parts.rowwise(f, batch, self)
        return _Beta(shared["concentration"] * torch.sigmoid(f), shared["concentration"] * torch.sigmoid(-f))

    def requirements(self, tasks: Tasks) -> Iterator[Requirement]:
        """Labels strictly between 0 and 1."""
        y, missing = parts.labels(tasks, self)
        yield Requirement("y", y, ((y > 0) & (y < 1)) | missing, "strictly between 0 and 1")
