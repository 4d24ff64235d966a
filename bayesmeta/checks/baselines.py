"""No pooling and complete pooling of a hierarchical model, inferred as exactly as the learned prior.

Both keep the model's predictor and likelihood and replace its prior. x and y are standardised with the training
rows; predictions are in those units. `sharing.py` compares them with the learned prior; nothing is trained here.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayesmeta.checks.adaptive import adaptive_draws
from bayesmeta.checks.laplace import laplace, log_likelihood
from bayesmeta.data.schema import COLUMN, TASK_COLUMN
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.likelihoods import Normal, StudentT
from bayesmeta.hierarchy.model import HierarchicalModel
from bayesmeta.hierarchy.priors import Custom
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.inference import psis
from bayesmeta.inference.correction import SharedDraws
from bayesmeta.results.prediction import Prediction, predict

PRIOR_SD = 10.0
"""Of every task parameter around its centre, x and y standardised."""
THETA_DRAWS = 1000
HEAVY_SHARE = 0.5
"""Share of proposals from the t(5) version of a task's Gaussian; the others come from the Gaussian."""


@dataclass(frozen=True)
class Units:
    """Standardisation of x and, where the likelihood has a location and a scale, of y.

    Attributes:
        x_loc, x_scale: `(*dx)`; a constant input keeps its scale.
        y_loc, y_scale: Of y; 0 and 1 for counts, classes and likelihoods that are not built in.
        scale_column: Column of known standard errors, in units of y.
    """

    x_loc: np.ndarray
    x_scale: np.ndarray
    y_loc: float
    y_scale: float
    scale_column: str | None

    @classmethod
    def of(cls, model: HierarchicalModel, tasks: Tasks) -> Units:
        """The units of training tasks; those of a module's inputs, and of what its weights give, are left alone."""
        module = model.predictor if isinstance(model.predictor, nn.Module) else None
        if module is not None and module.state_dict():
            return cls(np.asarray(0.0), np.asarray(1.0), 0.0, 1.0, None)
        x, y = tasks.x.double().numpy(), tasks.y[tasks.observed].double().numpy()
        scale = x.std(0)
        source = getattr(model.likelihood, "scale", None)
        column = source if isinstance(source, str) else None
        moments = (float(y.mean()), float(y.std()) or 1.0)
        y_loc, y_scale = moments if isinstance(model.likelihood, Normal | StudentT) else (0.0, 1.0)
        if module is not None:
            return cls(np.asarray(0.0), np.asarray(1.0), y_loc, y_scale, column)
        return cls(x.mean(0), np.where(scale > 0, scale, 1.0), y_loc, y_scale, column)

    def tasks(self, tasks: Tasks) -> Tasks:
        """The same tasks in standardised units."""
        x = (tasks.x.double() - torch.as_tensor(self.x_loc)) / torch.as_tensor(self.x_scale)
        changed = {"x": x, "y": (tasks.y.double() - self.y_loc) / self.y_scale} if self.changing else {}
        for kind, columns in ((COLUMN, tasks.columns), (TASK_COLUMN, tasks.task_columns)):
            if self.scale_column in columns:
                changed[f"{kind}{self.scale_column}"] = columns[self.scale_column] / self.y_scale
        return tasks.with_values(changed)

    @property
    def changing(self) -> bool:
        """Whether they differ from the user's."""
        return bool(np.any(self.x_loc != 0) or np.any(self.x_scale != 1) or self.y_loc != 0 or self.y_scale != 1)

    def likelihood(self, likelihood: Any) -> Any:
        """The same likelihood for standardised labels."""
        if not isinstance(likelihood, Normal | StudentT):
            return likelihood
        changes: dict[str, Any] = {"prior_scale": likelihood.prior_scale / self.y_scale}
        if isinstance(likelihood, Normal) and isinstance(likelihood.scale, int | float):
            changes["scale"] = likelihood.scale / self.y_scale
        return dataclasses.replace(likelihood, **changes)


class Baseline:
    """What no pooling and complete pooling share: the model under a known prior N(centre, 10² I), in standard units.

    Args:
        model: Components; its prior is replaced.
        known: Training tasks.
        centre: Centre of the prior `(d,)` in standard units.
        draws: Draws of a prediction.
        seed: Of all draws.

    Attributes:
        density: The model under the known prior.
        shared: Weighted draws of what all tasks share.

    Raises:
        ValueError: The model is not one of components, its φ has no fixed size, or it has trainable modules.
    """

    name = ""

    def __init__(
        self, model: HierarchicalModel, known: Tasks, *, centre: np.ndarray, draws: int = 4000, seed: int = 0
    ) -> None:
        self.units, self.draws, self.seed = Units.of(model, known), draws, seed
        self._schema, self._centre = known.schema, centre
        tasks = self.units.tasks(known)
        variant = copy.copy(model)
        shape = () if np.ndim(centre) == 0 else (1,)
        variant.prior = Custom(dist.Normal(torch.as_tensor(centre), PRIOR_SD).to_event(len(shape)))
        variant.likelihood = self.units.likelihood(model.likelihood)
        self.density = TaskDensity(variant, tasks)
        if self.density.learned.values:
            raise ValueError(
                "the predictor has trainable parameters, which no pooling and complete pooling do not train; pass the "
                "fitted ones, frozen: fit.modules['predictor'].requires_grad_(False)"
            )
        with seeded(seed), torch.no_grad():
            self.shared = self._infer(tasks)

    def _infer(self, tasks: Tasks) -> SharedDraws:
        raise NotImplementedError

    def _pairs(self, context: Tasks, known: bool) -> tuple[Tensor, Tensor, list[str]]:
        raise NotImplementedError

    def predict(
        self, context: Tasks, target: Tasks, *, known: bool = False
    ) -> tuple[tuple[Prediction, ...], tuple[str, ...]]:
        """Predicts the rows of `target` given those of `context`, the same tasks; in standard units.

        Args:
            context: Tasks with the rows that are given.
            target: The same tasks with the rows to predict.
            known: Whether they are the training tasks: what is shared has learned from their rows already.

        Returns:
            A prediction for each observed site, and for each task what is wrong with its weights ("" if nothing).
        """
        context, target = (self.units.tasks(tasks.aligned(self._schema)) for tasks in (context, target))
        with seeded(self.seed + 1), torch.no_grad():
            pairs = self._pairs(context, known)
        at = context.at(target)
        sites = self.density.structure.outcomes
        found = tuple(predict(self.density, at, pairs[:2], site=site, seed=self.seed) for site in sites)
        return found, tuple(pairs[2])

    def _log_prior(self, theta: Tensor) -> Tensor:
        return self.density.log_prior(theta) if theta.shape[1] else theta.new_zeros(len(theta))


class NoPooling(Baseline):
    """Every task on its own: φ_i ~ N(centre, 10² I) independently, the noise learned from all training tasks.

    The evidence of a training task is Laplace's, which is exact for linear Gaussian tasks; new tasks are corrected by
    importance weights in any case.
    """

    name = "no pooling"

    def _infer(self, tasks: Tasks) -> SharedDraws:
        def log_target(theta: Tensor) -> Tensor:
            found = laplace(self.density, tasks, theta, strict=False)
            return self._log_prior(theta) + found.log_evidence.sum(1)

        return adaptive_draws(log_target, *self.density.prior_scale(), draws=THETA_DRAWS)

    def _pairs(self, context: Tasks, known: bool) -> tuple[Tensor, Tensor, list[str]]:
        theta = _resampled(self.shared, self.draws)
        found = laplace(self.density, context, theta)
        posterior = found.posterior
        light, heavy = posterior.sample(), posterior.sample(heavy=True)
        pick = torch.rand(light.shape[:2], dtype=light.dtype).unsqueeze(-1)
        noise = torch.where(pick < HEAVY_SHARE, heavy, light)
        log_proposal = torch.logaddexp(
            posterior.log_prob(noise, heavy=True) + math.log(HEAVY_SHARE),
            posterior.log_prob(noise) + math.log(1 - HEAVY_SHARE),
        )
        log_prior = dist.Normal(0.0, 1.0).log_prob(noise).sum(-1)
        log_weight = log_prior + log_likelihood(self.density, context, theta, noise) - log_proposal
        log_weight = log_weight - found.log_evidence if known else log_weight
        index, flags = _choose(log_weight)
        every = torch.arange(len(context))
        return theta[index], noise[index, every], flags


class CompletePooling(Baseline):
    """All tasks are one: the same φ ~ N(centre, 10² I) for all of them (τ = 0), uncertain; new tasks update it."""

    name = "complete pooling"

    def _infer(self, tasks: Tasks) -> SharedDraws:
        dim = self.density.structure.task_size

        def log_target(both: Tensor) -> Tensor:
            theta, noise = both[:, :-dim], both[:, -dim:]
            everywhere = noise.unsqueeze(1).expand(-1, len(tasks), -1)
            log_prior = self._log_prior(theta) + dist.Normal(0.0, 1.0).log_prob(noise).sum(-1)
            return log_prior + log_likelihood(self.density, tasks, theta, everywhere).sum(1)

        loc, scale = self.density.prior_scale()
        loc, scale = torch.cat([loc, loc.new_zeros(dim)]), torch.cat([scale, scale.new_ones(dim)])
        return adaptive_draws(log_target, loc, scale, draws=max(THETA_DRAWS, self.draws))

    @property
    def phi(self) -> np.ndarray:
        """Posterior mean of the one φ `(d,)`, in standard units."""
        noise = self.shared.theta[:, -self.density.structure.task_size :].numpy()
        return self._centre + PRIOR_SD * (np.exp(self.shared.log_weight) @ noise)

    def _pairs(self, context: Tasks, known: bool) -> tuple[Tensor, Tensor, list[str]]:
        dim = self.density.structure.task_size
        both = _resampled(self.shared, self.draws).unsqueeze(1).expand(-1, len(context), -1)
        theta, noise = both[..., :-dim], both[..., -dim:]
        if known:
            good = self.shared.status == "corrected"
            said = "" if good else f"complete pooling: θ's weights fail, k̂ {self.shared.khat:.2f}"
            return theta, noise, [said] * len(context)
        index, flags = _choose(log_likelihood(self.density, context, theta[:, 0], noise))
        every = torch.arange(len(context))
        return theta[index, every], noise[index, every], flags


def origin_of(model: Any) -> np.ndarray:
    """Where the task parameters of a model lie before anything is learned `(d,)`.

    Raises:
        ValueError: The model is not one of components, or its prior does not say it.
    """
    if not isinstance(model, HierarchicalModel):
        raise ValueError(
            f"no pooling and complete pooling need a bm.HierarchicalModel, whose prior they replace, got "
            f"{type(model).__name__}; write the predictor and the likelihood as components"
        )
    origin = model.prior.origin
    if origin is None:
        raise ValueError(
            f"expected a prior that says how many task parameters there are, bm.priors.Gaussian(d) or one of "
            f"bm.models.sharing, got {type(model.prior).__name__}; a prior of your own has to define `origin`"
        )
    return origin


def baselines(model: HierarchicalModel, known: Tasks, *, draws: int = 4000, seed: int = 0) -> tuple[Baseline, Baseline]:
    """(no pooling, complete pooling) of a model of components; no pooling is centred on φ̂ of complete pooling.

    Args:
        model: Components with a linear, fixed or frozen predictor.
        known: Training tasks.
        draws: Draws of a prediction.
        seed: Of all draws.
    """
    origin = origin_of(model)
    pooled = CompletePooling(model, known, centre=origin, draws=draws, seed=seed)
    return NoPooling(model, known, centre=pooled.phi, draws=draws, seed=seed), pooled


def _resampled(shared: SharedDraws, draws: int) -> Tensor:
    generator = np.random.default_rng(int(torch.randint(2**62, ())))
    return shared.theta[torch.as_tensor(psis.resample(shared.log_weight, draws, generator))]


def _choose(log_weight: Tensor) -> tuple[Tensor, list[str]]:
    """Resamples the draws of each task by their weights `(S, T)`: indices `(S, T)`, and flags."""
    raw = log_weight.numpy().T
    smoothed, khat = psis.smooth(raw)
    ess = psis.relative_ess(raw)
    generator = np.random.default_rng(int(torch.randint(2**62, ())))
    index = np.stack([psis.resample(row, raw.shape[1], generator) for row in smoothed], 1)
    good = psis.accepted(khat, ess, raw.shape[1])
    flags = ["" if ok else f"k̂ {k:.2f}, relative ESS {e:.2f}" for ok, k, e in zip(good, khat, ess, strict=True)]
    return torch.as_tensor(index), flags
