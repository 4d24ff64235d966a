"""No pooling and complete pooling of a hierarchical model, by the same inference as any other model: marginal, ladder.

Both keep the model's predictor and likelihood and replace its prior. x and y are standardised with the training
rows; predictions are in those units. `sharing.py` and `folds.py` compare them with the learned prior.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bayesmeta.data.batch import Batch
from bayesmeta.data.schema import COLUMN, TASK_COLUMN
from bayesmeta.data.tasks import Tasks
from bayesmeta.fitting import Fit, learn
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.latents import split
from bayesmeta.hierarchy.likelihoods import Normal, StudentT
from bayesmeta.hierarchy.model import HierarchicalModel
from bayesmeta.hierarchy.priors import Custom, Prior
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.inference.candidates import BY_DRAW
from bayesmeta.inference.chunks import task_chunks, theta_chunks
from bayesmeta.inference.marginal import Marginal
from bayesmeta.inference.weighing import Parts, equal_draws, judged
from bayesmeta.results.posterior import Posterior
from bayesmeta.results.prediction import Prediction
from bayesmeta.results.training_tasks import TrainingTasks

PRIOR_SD = 10.0
"""Of every task parameter around its centre, x and y standardised."""
THETA_DRAWS = 400
"""Without pooling; of complete pooling there are as many of all as of a prediction."""
ALL = "all tasks"
TRIED, NEAR, ROUNDING = 3, 0.05, 1e-9
"""At so many φ within so many prior sds the merged rows must have the likelihood of all tasks, but for rounding."""
SAME = 1e-12
"""Sd between tasks of one φ."""


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
        draws: Draws of a posterior.
        seed: Of all draws.

    Attributes:
        fit: The model under the known prior, fitted by the marginal path.

    Raises:
        ValueError: The model is not one of components, its φ has no fixed size, or it has trainable modules.
    """

    name = ""

    def __init__(
        self, model: HierarchicalModel, known: Tasks, *, centre: np.ndarray, draws: int = 4000, seed: int = 0
    ) -> None:
        self.units, self.draws, self.seed = Units.of(model, known), draws, seed
        self._tasks = self.units.tasks(known)
        self._model = copy.copy(model)
        self._centre = centre
        self._model.prior = Custom(dist.Normal(torch.as_tensor(centre), PRIOR_SD).to_event(np.ndim(centre)))
        self._model.likelihood = self.units.likelihood(model.likelihood)
        self._density = TaskDensity(self._model, self._tasks)
        if self._density.learned.values:
            raise ValueError(
                "the predictor has trainable parameters, which no pooling and complete pooling do not train; pass the "
                "fitted ones, frozen: fit.modules['predictor'].requires_grad_(False)"
            )
        self.fit = self._fitted()

    def _fitted(self) -> Fit:
        raise NotImplementedError

    def posterior(self, context: Tasks) -> Posterior:
        """The posterior of known or new tasks, given in the user's units; in standard units."""
        raise NotImplementedError

    def predict(self, context: Tasks, target: Tasks) -> tuple[tuple[Prediction, ...], tuple[str, ...]]:
        """Predicts the rows of `target` given those of `context`, the same tasks; in standard units.

        Args:
            context: Tasks with the rows that are given: training tasks, or new ones.
            target: The same tasks with the rows to predict.

        Returns:
            A prediction for each observed site, and for each task what is wrong with its posterior ("" if nothing).
        """
        posterior = self.posterior(context)
        at = self._standard(target)
        found = tuple(posterior.predict(at, site=site) for site in posterior.density.structure.outcomes)
        return found, tuple(posterior.flag)

    def _learned(self, model: HierarchicalModel, tasks: Tasks, *, draws: int) -> Fit:
        return learn(model, tasks, Marginal("normal", chains=1, draws=draws), seed=self.seed)

    def _standard(self, tasks: Tasks) -> Tasks:
        return self.units.tasks(tasks.aligned(self._tasks.schema))


class NoPooling(Baseline):
    """Every task on its own: φ_i ~ N(centre, 10² I) independently, the noise learned from all training tasks."""

    name = "no pooling"

    def _fitted(self) -> Fit:
        return self._learned(self._model, self._tasks, draws=THETA_DRAWS)

    def posterior(self, context: Tasks) -> Posterior:
        """That of the fit."""
        return self.fit.posterior(self._standard(context), draws=self.draws, seed=self.seed + 1)


class CompletePooling(Baseline):
    """All tasks are one: the same φ ~ N(centre, 10² I) for all of them (τ = 0), uncertain; new tasks update it."""

    name = "complete pooling"

    def _fitted(self) -> Fit:
        """All rows as those of one task; where the rows of a task hang together, tasks with one φ that they share."""
        whole = self._tasks.merged(ALL)
        if self._adds_up(whole):
            return self._learned(self._model, whole, draws=self.draws)
        model = copy.copy(self._model)
        model.prior = _OnePhi(self._centre)
        return self._learned(model, self._tasks, draws=self.draws)

    def _adds_up(self, whole: Tasks) -> bool:
        """Whether the likelihood of all rows as one task is the product of the tasks' own, near the prior's centre."""
        sizes = (self._density.structure.shared_size, self._density.structure.task_size)
        with seeded(self.seed), torch.no_grad():
            theta, noise = (NEAR * torch.randn(TRIED, size, dtype=torch.float64) for size in sizes)
            apart = _log_likelihood(self._density, self._tasks, theta, noise).sum(1)
            together = _log_likelihood(TaskDensity(self._model, whole), whole, theta, noise)[:, 0]
        return torch.allclose(apart, together, rtol=ROUNDING, atol=ROUNDING)

    @cached_property
    def _whole(self) -> tuple[Tensor, Tensor]:
        """Draws of θ `(S, d_theta)` and of the noise of the one φ `(S, d)`."""
        if len(self.fit.tasks) == 1:
            return tuple(part[:, 0] for part in self._of_all.paired())  # type: ignore[return-value]
        flat = self._of_all.paired()[0][:, 0]
        parts = split(self._of_all.density.structure.shared, flat)
        noise = (parts.pop(_OnePhi.site) - torch.as_tensor(self._centre)) / PRIOR_SD
        theta = [part.reshape(len(flat), -1) for part in parts.values()]
        return torch.cat([flat[:, :0], *theta], 1), noise.reshape(len(flat), -1)

    @cached_property
    def _of_all(self) -> Posterior:
        """The posterior of the one task that all are; or draws of what all share."""
        if len(self.fit.tasks) == 1:
            return self.fit.posterior(self.fit.tasks, draws=self.draws, seed=self.seed)
        return self.fit.prior(self.draws, like=self._tasks[:1], seed=self.seed)

    @property
    def _trust(self) -> tuple[float, str]:
        """The larger k̂ of φ and θ, and what is wrong, "" if nothing."""
        shared, khat = self.fit.shared, max(float(self._of_all.khat[0]), self.fit.shared.khat)
        failed = f"complete pooling: θ's weights fail, k̂ {shared.khat:.2f}" if shared.status == "uncorrected" else ""
        return khat, str(self._of_all.flag[0]) or failed

    @property
    def phi(self) -> np.ndarray:
        """Posterior mean of the one φ `(d,)`, or `()`, in standard units."""
        return self._centre + PRIOR_SD * self._whole[1].mean(0).numpy().reshape(np.shape(self._centre))

    def posterior(self, context: Tasks) -> Posterior:
        """Draws of the one φ: as they are for training tasks, weighed by the likelihood of their rows for new ones."""
        tasks = self._standard(context)
        place = TrainingTasks(self._tasks).sort(tasks, updated="error")
        parts: Parts = []
        with seeded(self.seed + 1), torch.no_grad():
            theta, noise = self._whole
            if len(place.known):
                khat, said = self._trust
                everywhere = noise.unsqueeze(1).expand(-1, len(place.known), -1)
                parts.append((place.known, equal_draws(theta, everywhere, "psis", khat, said, joint=True)))
            if len(place.new):
                log_weight = _log_likelihood(self._density, tasks[place.new], theta, noise)
                everywhere = noise.unsqueeze(1).expand(-1, len(place.new), -1)
                parts.append((place.new, judged(theta, everywhere, log_weight, "psis")))
        return Posterior(self._density, tasks, parts, self.seed)


class _OnePhi(Prior):
    """φ ~ N(centre, 10² I), one for all tasks."""

    site = "phi_of_all"

    def __init__(self, centre: np.ndarray) -> None:
        self._centre = torch.as_tensor(centre)

    @property
    def shared(self) -> dict[str, Distribution]:
        """The one φ."""
        return {self.site: dist.Normal(self._centre, PRIOR_SD).to_event(self._centre.dim())}

    def distribution(self, shared: Mapping[str, Tensor], batch: Batch) -> Distribution:
        """It, to numerical precision."""
        return dist.Normal(shared[self.site], SAME).to_event(self._centre.dim())


def _log_likelihood(density: TaskDensity, tasks: Tasks, theta: Tensor, noise: Tensor) -> Tensor:
    """Log p(D_i | φ, θ_s) of the same φ for all tasks: θ `(S, d_theta)` and its noise `(S, d)` -> `(S, T)`."""
    both, values = torch.cat([theta, noise], 1), dict(density.learned.values)
    found = theta.new_empty(len(theta), len(tasks))
    for chunk in task_chunks(tasks, exact_size=density.structure.exact_size, draws=len(theta)):
        data, index = density.tensors(chunk.batch), torch.as_tensor(chunk.index)
        for draws, part in theta_chunks(both, chunk.batch):
            at, phi = part.split([theta.shape[1], noise.shape[1]], 1)
            phi = phi.unsqueeze(1).expand(-1, len(chunk.batch.names), -1)
            rows = density.log_parts.mapped(at, phi, data, values, in_dims=BY_DRAW)[1]
            found[draws, index] = rows[: draws.stop - draws.start, : len(index)]
    return found


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
