"""No pooling and complete pooling of a hierarchical model, by the same inference as any other model: marginal, ladder.

Both keep the model's predictor and likelihood and replace its prior. x and y are standardised with the training
rows; predictions are in those units. `sharing.py` and `folds.py` compare them with the learned prior.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayesmeta.data.schema import COLUMN, TASK_COLUMN
from bayesmeta.data.tasks import Tasks
from bayesmeta.fitting import Fit, learn
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.likelihoods import Normal, StudentT
from bayesmeta.hierarchy.model import HierarchicalModel
from bayesmeta.hierarchy.priors import Custom
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.inference.candidates import BY_DRAW
from bayesmeta.inference.chunks import task_chunks, theta_chunks
from bayesmeta.inference.marginal import Marginal
from bayesmeta.inference.weighing import Parts, TaskDraws, equal_draws, judged
from bayesmeta.results.posterior import Posterior
from bayesmeta.results.prediction import Prediction
from bayesmeta.results.training_tasks import TrainingTasks

PRIOR_SD = 10.0
"""Of every task parameter around its centre, x and y standardised."""
THETA_DRAWS = 400
"""Draws of the noise: there are as many of φ as are asked for."""
ALL = "all tasks"


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
        shape = () if np.ndim(centre) == 0 else (1,)
        self._model.prior = Custom(dist.Normal(torch.as_tensor(centre), PRIOR_SD).to_event(len(shape)))
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

    def _learned(self, tasks: Tasks) -> Fit:
        return learn(self._model, tasks, Marginal("normal", chains=1, draws=THETA_DRAWS), seed=self.seed)

    def _standard(self, tasks: Tasks) -> Tasks:
        return self.units.tasks(tasks.aligned(self._tasks.schema))


class NoPooling(Baseline):
    """Every task on its own: φ_i ~ N(centre, 10² I) independently, the noise learned from all training tasks."""

    name = "no pooling"

    def _fitted(self) -> Fit:
        return self._learned(self._tasks)

    def posterior(self, context: Tasks) -> Posterior:
        """That of the fit."""
        return self.fit.posterior(self._standard(context), draws=self.draws, seed=self.seed + 1)


class CompletePooling(Baseline):
    """All tasks are one: the same φ ~ N(centre, 10² I) for all of them (τ = 0), uncertain; new tasks update it."""

    name = "complete pooling"

    def _fitted(self) -> Fit:
        return self._learned(self._tasks.merged(ALL))

    @cached_property
    def whole(self) -> Posterior:
        """The posterior of the one task that all training tasks are."""
        return self.fit.posterior(self.fit.tasks, draws=self.draws, seed=self.seed)

    @property
    def phi(self) -> np.ndarray:
        """Posterior mean of the one φ `(d,)`, in standard units."""
        return self.whole.mean("phi")[0]

    def posterior(self, context: Tasks) -> Posterior:
        """Draws of the one φ: as they are for training tasks, weighed by the likelihood of their rows for new ones."""
        tasks = self._standard(context)
        place = TrainingTasks(self._tasks).sort(tasks, updated="error")
        parts: Parts = []
        with seeded(self.seed + 1), torch.no_grad():
            if len(place.known):
                parts.append((place.known, self._as_it_is(len(place.known))))
            if len(place.new):
                parts.append((place.new, self._weighed(tasks[place.new])))
        return Posterior(self._density, tasks, parts, self.seed)

    def _as_it_is(self, tasks: int) -> TaskDraws:
        theta, noise = self._draws(tasks)
        return equal_draws(theta, noise, "psis", float(self.whole.khat[0]), str(self.whole.flag[0]), joint=True)

    def _weighed(self, tasks: Tasks) -> TaskDraws:
        theta, noise = self._draws(len(tasks))
        both, values = torch.cat([theta, noise[:, 0]], 1), dict(self._density.learned.values)
        log_weight = theta.new_empty(len(theta), len(tasks))
        for chunk in task_chunks(tasks, exact_size=self._density.structure.exact_size, draws=len(theta)):
            data, index = self._density.tensors(chunk.batch), torch.as_tensor(chunk.index)
            for draws, part in theta_chunks(both, chunk.batch):
                at, phi = part.split([theta.shape[1], noise.shape[2]], 1)
                phi = phi.unsqueeze(1).expand(-1, len(chunk.batch.names), -1)
                rows = self._density.log_parts.mapped(at, phi, data, values, in_dims=BY_DRAW)[1]
                log_weight[draws, index] = rows[: draws.stop - draws.start, : len(index)]
        return judged(theta, noise, log_weight, "psis")

    def _draws(self, tasks: int) -> tuple[Tensor, Tensor]:
        """θ `(S, d_theta)` and the one noise for some tasks `(S, T, d)`."""
        theta, noise = self.whole.paired()
        return theta[:, 0], noise.expand(-1, tasks, -1)


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
