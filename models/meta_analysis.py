"""Random-effects meta-analysis, exactly: many studies' effects with known standard errors, no fit and no draws.

The model: `y_i ~ N(phi_i, s_i²)` with s_i known, `phi_i ~ N(x_iᵀ beta, tau²)`, beta flat or normal, and any proper
prior of tau. Given tau everything is normal in closed form (`random_effects/given_tau.py`); tau is averaged over by
adaptive quadrature (`random_effects/tau_posterior.py`), so that moments, quantiles and the marginal likelihood are
right to 1e-6 and better.

Deviations from the R package of Röver: adaptive panels instead of a grid built to a given divergence; an improper prior
of tau is refused, because with it neither the marginal likelihood nor a Bayes factor exists.

References:
    Röver, Bayesian random-effects meta-analysis using the bayesmeta R package, 2020,
    https://doi.org/10.18637/jss.v093.i06
    Higgins and Thompson, Quantifying heterogeneity in a meta-analysis, 2002, https://doi.org/10.1002/sim.1186
    DuMouchel and Normand, Computer-modeling and graphical strategies for meta-analysis, 2000 (the default prior of tau)
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch.distributions import Distribution

from bayesmeta.models.random_effects.arguments import Normal, design_matrix, labels, normal_prior, numbers
from bayesmeta.models.random_effects.forest import draw_forest
from bayesmeta.models.random_effects.given_tau import NormalMixture, RandomEffects
from bayesmeta.models.random_effects.tau_posterior import Heterogeneity, TauPosterior
from bayesmeta.models.random_effects.tau_prior import Function, TauPrior

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIMITS = (0.025, 0.5, 0.975)


def meta_analysis(
    effects: Sequence[float] | np.ndarray,
    standard_errors: Sequence[float] | np.ndarray,
    *,
    tau_prior: Distribution | Function | None = None,
    mu_prior: Normal | None = None,
    covariates: np.ndarray | Mapping[str, Sequence[float]] | None = None,
    slope_prior: Normal | None = None,
    names: Sequence[str] | None = None,
) -> MetaAnalysis:
    """Posterior of a random-effects meta-analysis or meta-regression, by quadrature.

    Args:
        effects: Estimated effect of each study `(k,)`, on a scale where it is about normal (log odds ratios, mean
            differences). One study is enough for a posterior, hardly for a conclusion.
        standard_errors: Their standard errors `(k,)`, in the same units, taken as known.
        tau_prior: Prior of tau, the sd of true effects between studies, in the units of the effects: a scalar
            distribution with support in `[0, inf)` such as `dist.HalfNormal(0.5)`, `dist.HalfCauchy(5.)`,
            `dist.Uniform(0., 10.)` or `dist.LogNormal(0., 1.)`, or a function from an array of tau to normalised log
            densities. It must be proper. Default: `p(tau) = s / (s + tau)²`, s² the harmonic mean of the squared
            standard errors: half its mass lies below s, whatever the units. With two or three studies its heavy tail
            matters (the sd of mu may be infinite): say what is known instead.
        mu_prior: Mean and sd of a normal prior of mu, the mean of true effects (with covariates: where all are 0);
            default: flat.
        covariates: Of each study `(k,)` or `(k, p)`, or a mapping from names to `(k,)`; a column of ones, for mu, is
            added. Centre them where 0 means nothing.
        slope_prior: Mean and sd of independent normal priors of the slopes, numbers or `(p,)`; default: flat.
        names: Names of the studies; default "study 1", "study 2", ...

    Returns:
        The posterior.

    Raises:
        ValueError: If lengths differ, a number is not finite, a standard error is not positive, names repeat, the prior
            of tau is improper, or data and priors do not determine the coefficients.

    Example:
        >>> import bayesmeta as bm, pyro.distributions as dist
        >>> effect = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
        >>> error = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
        >>> found = bm.models.meta_analysis(effect, error, tau_prior=dist.HalfCauchy(5.0), mu_prior=(0.0, 5.0))
        >>> print(f"{found.mu.mean:.4f} {found.mu.sd:.4f} {found.tau.mean:.4f} {found.log_marginal_likelihood:.4f}")
        4.3968 3.3177 3.5977 -31.3113
        >>> print(found.new.quantile([0.05, 0.95]).round(2))
        [-4.63 13.09]
    """
    y = numbers("effects", effects)
    errors = numbers("standard_errors", standard_errors)
    if y.ndim != 1 or not len(y) or errors.shape != y.shape:
        raise ValueError(
            f"standard_errors: expected one a study, like effects, got effects of shape {y.shape} and "
            f"standard_errors of shape {errors.shape}"
        )
    studies = labels(names, len(y))
    for name, error in zip(studies, errors, strict=True):
        if error <= 0:
            raise ValueError(f"standard_errors: expected positive numbers, got {error:g} for {name!r}; leave it out")
    slopes, design = design_matrix(covariates, len(y))
    priors = [normal_prior("mu_prior", mu_prior, 1), normal_prior("slope_prior", slope_prior, len(slopes))]
    typical = math.sqrt(len(y) / float((errors**-2.0).sum()))
    given = tau_prior if tau_prior is not None else lambda tau: math.log(typical) - 2 * np.log(typical + tau)
    return MetaAnalysis(RandomEffects(y, errors, design, np.concatenate(priors)), TauPrior(given), studies, slopes)


class MetaAnalysis:
    """What the studies say together; made by `meta_analysis`.

    Every parameter has `mean`, `sd`, `quantile(q)`, `pdf(x)` and `cdf(x)`; `draws` gives joint draws of all. The
    verbs of a `bm.Posterior`, `mean(name)`, `sd(name)` and `quantile(name, q)`, work too.

    Attributes:
        names: Of the studies; their `effects` and `standard_errors` `(k,)`.
        coefficients: Names of beta: "mu", then the covariates.
        tau: Posterior of the sd of true effects between studies.
    """

    def __init__(self, model: RandomEffects, prior: TauPrior, names: Sequence[str], slopes: Sequence[str]) -> None:
        self.names, self.coefficients = tuple(names), ("mu", *slopes)
        self.effects, self.standard_errors = y, errors = model.effects, model.errors
        self._model = model
        scales = float(errors.min()) / 8, 8 * max(float(errors.max()), float(np.ptp(y)))
        self.tau = TauPosterior(model.log_likelihood, prior, scales=scales)

    @property
    def log_marginal_likelihood(self) -> float:
        """Log density of the effects, everything integrated out; a flat prior of a coefficient counts as density 1.

        With a flat prior only differences between analyses with the same flat coefficients mean something.
        """
        return self.tau.log_evidence

    @property
    def bayes_factor_tau0(self) -> float:
        """How much better tau = 0 (all true effects equal) predicts the studies than tau drawn from its prior.

        Above 1 it speaks for tau = 0. A flat prior of mu or a slope puts the same constant into both, and the factor is
        defined all the same; a wider prior of tau always moves it towards tau = 0 in the end.
        """
        return math.exp(float(self._model.log_likelihood(np.zeros(1))[0]) - self.log_marginal_likelihood)

    @cached_property
    def beta(self) -> NormalMixture:
        """Posterior of the coefficients `(1 + p,)`: mu, then the slopes."""
        return self._mixture(*self._model.linear(self.tau.tau, np.eye(len(self.coefficients))))

    @cached_property
    def mu(self) -> NormalMixture:
        """Posterior of the mean of true effects, where all covariates are 0."""
        mean, variance = self._model.linear(self.tau.tau, np.eye(len(self.coefficients))[:1])
        return self._mixture(mean[:, 0], variance[:, 0])

    @cached_property
    def phi(self) -> NormalMixture:
        """Posterior of the true effect of every study `(k,)`."""
        return self._mixture(*self._model.studies(self.tau.tau))

    @property
    def new(self) -> NormalMixture:
        """Prediction of the true effect of a study not yet made.

        Raises:
            ValueError: With covariates; use `predict`.
        """
        if len(self.coefficients) > 1:
            raise ValueError(f"new: expected the covariates {self.coefficients[1:]} of the new study; use predict(…)")
        return self._new

    @cached_property
    def _new(self) -> NormalMixture:
        mean, variance = self._model.linear(self.tau.tau, np.ones((1, 1)))
        return self._mixture(mean[:, 0], variance[:, 0] + self.tau.tau**2)

    def predict(
        self, covariates: np.ndarray | Mapping[str, Sequence[float]], *, kind: Literal["study", "mean"] = "study"
    ) -> NormalMixture:
        """Prediction at m rows of covariates `(m, p)`, `(m,)` for one covariate, or a mapping from names to `(m,)`.

        Args:
            covariates: As `meta_analysis` was given them.
            kind: "study": the true effect of a new study; "mean": the mean of true effects.

        Raises:
            ValueError: If covariates or kind are others.
        """
        if kind not in ("study", "mean"):
            raise ValueError(f"kind: expected 'study' or 'mean', got {kind!r}")
        given, rows = design_matrix(covariates, None)
        if given != self.coefficients[1:]:
            raise ValueError(f"covariates: expected {self.coefficients[1:]}, got {given}")
        mean, variance = self._model.linear(self.tau.tau, rows)
        return self._mixture(mean, variance + (self.tau.tau[:, None] ** 2 if kind == "study" else 0.0))

    @cached_property
    def i2(self) -> Heterogeneity:
        """Posterior of I², the share of the effects' variance that is between studies: tau² / (tau² + s̃²).

        s̃² is the typical variance within studies of Higgins and Thompson (2002, equation 9), with covariates its
        counterpart for regression, (k - p - 1) / trace(P).

        Raises:
            ValueError: If there are no more studies than coefficients: s̃² is not defined.
        """
        root = self._model.design / self._model.errors[:, None]
        free = len(root) - root.shape[1]
        if free <= 0:
            raise ValueError(f"i2: expected more studies than coefficients ({root.shape[1]}), got {len(root)}")
        basis = np.linalg.qr(root)[0]
        trace = ((1 - (basis**2).sum(1)) / self._model.errors**2).sum()
        return Heterogeneity(self.tau, math.sqrt(free / float(trace)))

    @cached_property
    def weights(self) -> np.ndarray:
        """What each study contributes to the posterior mean of mu, percent `(k,)`.

        They sum to 100 under flat priors; a normal prior has the rest. With covariates they can be negative.
        """
        return 100 * self.tau.weight @ self._model.shares(self.tau.tau)

    def mean(self, name: str) -> np.ndarray:
        """Posterior mean of "mu", "beta", "tau", "phi", "new" or "i2"."""
        return self._marginal(name).mean

    def sd(self, name: str) -> np.ndarray:
        """Posterior standard deviation, by the same names."""
        return self._marginal(name).sd

    def quantile(self, name: str, q: float | Sequence[float]) -> np.ndarray:
        """Posterior quantiles `(*q.shape, *event)`, by the same names."""
        return self._marginal(name).quantile(q)

    def draws(self, draws: int = 1000, *, seed: int = 0) -> dict[str, np.ndarray]:
        """Independent joint draws with equal weights, each by its name `(draw, *event)`; "new" without covariates only.

        Args:
            draws: How many.
            seed: Same seed, same draws; no global random state is used.
        """
        if draws < 1:
            raise ValueError(f"draws: expected at least 1, got {draws}")
        generator = np.random.default_rng(seed)
        tau = self.tau.quantile(np.clip(generator.random(draws), 1e-16, 1 - 1e-16))
        beta, phi = self._model.draw(tau, generator)
        out = {"mu": beta[:, 0], "beta": beta, "tau": tau, "phi": phi}
        if len(self.coefficients) == 1:
            out["new"] = beta[:, 0] + tau * generator.normal(size=draws)
        return out

    def shrinkage(self) -> Any:
        """One line a study: a pandas DataFrame.

        Its own `effect` and `standard_error`; `mean`, `sd` and 95 % interval (`lower`, `upper`) of its true effect;
        `shrinkage`, the posterior mean of s² / (s² + tau²): 0 keeps its own estimate, 1 takes the mean of all; and its
        `weight` in mu in percent.
        """
        import pandas

        lower, upper = self.phi.quantile((LIMITS[0], LIMITS[2]))
        columns = {"study": list(self.names), "effect": self._model.effects, "standard_error": self._model.errors}
        columns |= {"mean": self.phi.mean, "sd": self.phi.sd, "lower": lower, "upper": upper}
        pooled = self.tau.weight @ self._model.pooled(self.tau.tau)
        return pandas.DataFrame(columns | {"shrinkage": pooled, "weight": self.weights})

    def summary(self) -> Any:
        """Mean, sd, median and 95 % interval of the coefficients, tau, a new study and I²: a pandas DataFrame."""
        import pandas

        parts: list[tuple[Sequence[str], Any]] = [(self.coefficients, self.beta), (["tau"], self.tau)]
        if len(self.coefficients) == 1:
            parts.append((["new"], self.new))
        if len(self.names) > len(self.coefficients):
            parts.append((["i2"], self.i2))
        lines = []
        for parameters, part in parts:
            lower, median, upper = np.reshape(part.quantile(LIMITS), (3, -1))
            values = zip(parameters, np.ravel(part.mean), np.ravel(part.sd), median, lower, upper, strict=True)
            lines += list(values)
        return pandas.DataFrame(lines, columns=["parameter", "mean", "sd", "median", "lower", "upper"])

    def forest_plot(self, where: str | pathlib.Path | Axes | None = None, *, label: str = "effect") -> Figure:
        """Own estimates and posteriors of the studies, mu, and a new study, with 95 % intervals.

        Args:
            where: A path to write the picture to, or a matplotlib axis to draw on; default: a figure of its own.
            label: Of the axis, with units.

        Raises:
            ValueError: Without matplotlib (extra `plots`).
        """
        return draw_forest(self, where, label=label)

    def _marginal(self, name: str) -> Any:
        if name not in ("mu", "beta", "tau", "phi", "new", "i2"):
            raise ValueError(f"expected 'mu', 'beta', 'tau', 'phi', 'new' or 'i2', got {name!r}")
        return getattr(self, name)

    def _mixture(self, mean: np.ndarray, variance: np.ndarray) -> NormalMixture:
        return NormalMixture(self.tau.weight, self.tau.tail, mean, variance)

    def __repr__(self) -> str:
        mu, tau = self.mu, self.tau
        return (
            f"MetaAnalysis({len(self.names)} studies, mu = {mu.mean:.4g} ± {mu.sd:.4g}, "
            f"tau = {tau.mean:.4g} ± {tau.sd:.4g}, log marginal likelihood {self.log_marginal_likelihood:.4f})"
        )
