"""What the user holds: the posterior of task parameters, and of the shared ones.

`Posterior` and `SharedPosteriorDraws` present weighted draws that `inference/ladder.py` made; nothing is inferred here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.inference.candidates import BY_DRAW
from bayesmeta.inference.chunks import task_chunks, theta_chunks
from bayesmeta.inference.correction import SharedDraws
from bayesmeta.inference.weighing import TaskDraws, resample_theta
from bayesmeta.results.prediction import Prediction, log_rows, predict
from bayesmeta.results.weighted import weighted_mean, weighted_quantile, weighted_sd


def _known(name: str, names: Sequence[str], what: str) -> None:
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}; there are {sorted(names)}")


def by_chain(values: np.ndarray, chains: int) -> np.ndarray:
    """Draws `(draw, …)`, chain after chain, as `(chain, draw, …)`."""
    return values.reshape(chains, -1, *values.shape[1:])


class Shared:
    """The posterior of the shared parameters θ.

    Attributes:
        names: Shared sites and shared deterministic values.
        khat: Pareto k̂ of the correction (0 where there was none to make).
        ess: Relative effective sample size of the correction.
        status: "corrected", "uncorrected" (also chains that have not mixed), "plug-in" (a point: no uncertainty) or
            "sampled".
    """

    def __init__(self, density: TaskDensity, drawn: SharedDraws, *, seed: int, draws: int = 4000) -> None:
        self._density, self._drawn, self._seed, self._count = density, drawn, seed, draws
        self.names = density.structure.shared_values
        self.khat, self.ess, self.status = drawn.khat, drawn.ess, drawn.status
        self._values = {k: v.detach().numpy() for k, v in density.shared_values(drawn.theta).items()}

    def _of(self, name: str) -> np.ndarray:
        _known(name, self.names, "shared parameter")
        return self._values[name]

    def mean(self, name: str) -> np.ndarray:
        """Posterior mean `(*event)`."""
        return weighted_mean(self._of(name), self._drawn.log_weight)

    def sd(self, name: str) -> np.ndarray:
        """Posterior standard deviation `(*event)`; NaN for a point estimate."""
        if self.status == "plug-in":
            return np.full(self._of(name).shape[1:], np.nan)
        return weighted_sd(self._of(name), self._drawn.log_weight)

    def quantile(self, name: str, q: float | Sequence[float]) -> np.ndarray:
        """Posterior quantiles `(*q, *event)`."""
        return weighted_quantile(self._of(name), self._drawn.log_weight, q)

    def draws(self, name: str) -> np.ndarray:
        """Equally weighted draws `(draw, *event)`."""
        _known(name, self.names, "shared parameter")
        with seeded(self._seed):
            theta = resample_theta(self._drawn, len(self._drawn.theta) if self._drawn.chains else self._count)
        return self._density.shared_values(theta)[name].detach().numpy()

    def to_arviz(self) -> Any:
        """The draws as an ArviZ object, of chains with sample_stats, and their worst R-hat and ESS as remarks."""
        from bayesmeta.results.arviz_export import to_arviz

        chains = max(1, self._drawn.chains)
        groups = {"posterior": {name: by_chain(self.draws(name), chains) for name in self.names}}
        if self._drawn.stats:
            groups["sample_stats"] = self._drawn.stats
        return to_arviz(groups, attrs={"status": self.status, **self._mixing()})

    def _mixing(self) -> dict[str, float]:
        """Largest R-hat and least effective sample size of the chains of θ, where there are chains."""
        if self._drawn.mixing is None:
            return {}
        own = self._drawn.mixing.of(slice(self._drawn.theta.shape[1]))
        return {"max_rhat": float(own.rhat.max(initial=1)), "min_ess": float(own.ess.min(initial=math.inf))}

    def __repr__(self) -> str:
        note = " (a point estimate: the uncertainty of θ is missing)" if self.status == "plug-in" else ""
        rows = [
            f"  {name}: mean {np.round(self.mean(name), 3)}, sd {np.round(self.sd(name), 3)}" for name in self.names
        ]
        return "\n".join([f"Shared parameters, {self.status}{note}, k̂ {self.khat:.2f}, ESS {self.ess:.0%}", *rows])


@dataclass
class Posterior:
    """The posterior of the parameters of some tasks.

    Means, sds and quantiles are weighted over all candidates of a task, its draws are chosen among them; of very many
    known tasks the candidates are not kept, and moments are those of the draws.

    Attributes:
        names: Task names.
        khat: Pareto k̂ of each task `(task,)`: 0 for exact answers and the prior.
        ess: Relative effective sample size `(task,)`.
        method: How each task was inferred `(task,)`.
        flag: What is wrong with a task's posterior, "" if nothing is `(task,)`.
        joint: Draw s of all tasks is one joint draw (known tasks alone).
        chains: Number of Markov chains that the draws are, one after another; 0 for independent draws.
        chain_stats: Diagnostics of those chains, `{name: (chain, draw)}`.
    """

    density: TaskDensity = field(repr=False)
    tasks: Tasks = field(repr=False)
    parts: list[tuple[np.ndarray, TaskDraws]] = field(repr=False)
    seed: int = 0
    chains: int = 0
    chain_stats: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.names = self.tasks.names
        self.khat = self._gather(lambda part: part.khat)
        self.ess = self._gather(lambda part: part.ess)
        self.method = self._gather(lambda part: np.array(part.method, dtype=object))
        self.flag = self._gather(lambda part: np.array(part.flag, dtype=object))
        self.joint = all(part.joint for _, part in self.parts)
        self._cache: dict[tuple[int, str], np.ndarray] = {}

    def _gather(self, get: Any) -> np.ndarray:
        whole: np.ndarray | None = None
        for index, part in self.parts:
            values = get(part)
            whole = np.empty(len(self.tasks), dtype=values.dtype) if whole is None else whole
            whole[index] = values
        return np.asarray(whole)

    @property
    def sites(self) -> tuple[str, ...]:
        """Task sites and deterministic values of tasks."""
        return self.density.structure.task_values

    def mean(self, name: str) -> np.ndarray:
        """Posterior means `(task, *event)`."""
        return self._by_task(name, weighted_mean)

    def sd(self, name: str) -> np.ndarray:
        """Posterior standard deviations `(task, *event)`."""
        return self._by_task(name, weighted_sd)

    def quantile(self, name: str, q: float | Sequence[float]) -> np.ndarray:
        """Posterior quantiles `(*q, task, *event)`."""
        values = self._by_task(name, lambda v, w: np.moveaxis(weighted_quantile(v, w, q), np.ndim(q), 0))
        return np.moveaxis(values, 0, np.ndim(q))

    def draws(self, name: str) -> np.ndarray:
        """Equally weighted draws `(draw, task, *event)`."""
        _known(name, self.sites, "task parameter")
        parts = [(i, _take(self._values(k, name), part.index)) for k, (i, part) in enumerate(self.parts)]
        return self._join(parts, axis=1)

    @property
    def shared(self) -> dict[str, np.ndarray]:
        """The draws of θ paired with the task draws: `(draw, *event)` if joint, else `(draw, task, *event)`."""
        if self.joint:
            part = self.parts[0][1]
            paired = self.density.shared_values(part.theta[torch.as_tensor(part.index[:, 0].copy())])
            return {name: v.detach().numpy() for name, v in paired.items()}
        found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for index, part in self.parts:
            for name, values in self.density.shared_values(part.theta).items():
                found.setdefault(name, []).append((index, values.detach().numpy()[part.index]))
        return {name: self._join(parts, axis=1) for name, parts in found.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        """Same as `draws(name)`."""
        return self.draws(name)

    def predict(
        self, x: Any = None, columns: Any = None, *, kind: str = "outcome", site: str | None = None, joint: bool = False
    ) -> Prediction:
        """Predicts new rows of every task.

        Args:
            x: New inputs `(M, *dx)` for all tasks, a list with one array a task, or `Tasks`.
            columns: The columns that the likelihood needs, `{name: (M,) or list}`.
            kind: "outcome" (with observation noise) or "mean".
            site: The observed site, where there are several.
            joint: Draws are coherent across rows, also where a `conditional` gives each row alone.
        """
        return predict(
            self.density,
            self.tasks.at(x, columns),
            self.paired(),
            kind=kind,
            site=site,
            seed=self.seed,
            context=self.tasks,
            joint=joint,
            labelled=isinstance(x, Tasks),
        )

    def log_likelihood(self, site: str | None = None) -> np.ndarray:
        """Log likelihood of every row under every draw, `(draw, task, rows)`; padding is NaN."""
        theta, noise = self.paired()
        return log_rows(self.density, self.tasks, (theta, noise), site=site)

    def paired(self) -> tuple[Tensor, Tensor]:
        """The equally weighted draws in flat coordinates: θ `(S, T, d_theta)` and noise `(S, T, d)`."""
        draws = self.parts[0][1].index.shape[0]
        sizes = (self.density.structure.shared_size, self.density.structure.task_size)
        theta, noise = (torch.empty(draws, len(self.tasks), size, dtype=self.density.dtype) for size in sizes)
        for index, part in self.parts:
            chosen = torch.as_tensor(part.index.copy())
            theta[:, index] = part.theta[chosen]
            noise[:, index] = part.noise[chosen, torch.arange(len(index))]
        return theta, noise

    def prior(self) -> dict[str, np.ndarray]:
        """Draws of the learned prior of the same tasks, one at each draw of θ: `{site: (draw, task, *event)}`."""
        theta = self.paired()[0][:, 0]
        empty = theta.new_zeros(len(theta), len(self.tasks), self.density.structure.task_size)
        data = self.density.tensors(self.tasks.batch(np.arange(len(self.tasks))))
        with seeded(self.seed, "prior"), torch.no_grad():
            noise = self.density.prior_noise.mapped(
                theta, empty, data, dict(self.density.learned.values), in_dims=BY_DRAW
            )
        return constrained(self.density, self.tasks, theta, noise)

    def log_weight(self) -> np.ndarray:
        """Log weight of the candidate that each draw of a task is, `(draw, task)`."""
        parts = [(index, _take(part.log_weight, part.index)) for index, part in self.parts]
        return self._join(parts, axis=1)

    def summary(self) -> Any:
        """Mean, sd and 5/50/95 % quantiles of every task parameter with its diagnostics, as a pandas DataFrame."""
        from bayesmeta.results.summary import summary

        return summary(self)

    def to_arviz(self) -> Any:
        """Draws, log likelihood, predictions, data and diagnostics as an ArviZ object.

        Sites that couple the rows of a task (Gaussian processes) have no log likelihood and predictions of each row.
        """
        from bayesmeta.results.summary import to_arviz

        return to_arviz(self)

    def _by_task(self, name: str, reduce: Any) -> np.ndarray:
        _known(name, self.sites, "task parameter")
        parts = [(i, reduce(self._values(k, name), part.log_weight)) for k, (i, part) in enumerate(self.parts)]
        return self._join(parts, axis=0)

    def _join(self, parts: list[tuple[np.ndarray, np.ndarray]], axis: int) -> np.ndarray:
        if len(parts) == 1:
            return parts[0][1]
        order = np.argsort(np.concatenate([index for index, _ in parts]))
        return np.take(np.concatenate([values for _, values in parts], axis), order, axis)

    def _values(self, part: int, name: str) -> np.ndarray:
        """Constrained values of all candidates of a part `(K, T, *event)`."""
        if (part, name) not in self._cache:
            index, drawn = self.parts[part]
            values = constrained(self.density, self.tasks[index], drawn.theta, drawn.noise)
            self._cache |= {(part, key): value for key, value in values.items()}
        return self._cache[part, name]


def _take(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    return values[index, np.arange(index.shape[1])]


def constrained(density: TaskDensity, tasks: Tasks, theta: Tensor, noise: Tensor) -> dict[str, np.ndarray]:
    """Values of all task sites for draws θ `(K, d_theta)` and noise `(K, T, d)`: `{site: (K, T, *event)}`."""
    found: dict[str, np.ndarray] = {}
    values = dict(density.learned.values)
    by_rows = density.values_read_rows
    tasks = tasks if by_rows else tasks.without_rows()
    with torch.no_grad():
        for chunk in task_chunks(tasks, exact_size=by_rows, rounded=True):
            data = density.tensors(chunk.batch)
            filled = torch.as_tensor(np.pad(chunk.index, (0, len(chunk.batch.names) - len(chunk.index)), "edge"))
            for place, part in theta_chunks(theta, chunk.batch):
                keep = place.stop - place.start
                some = noise[place][:, filled]
                if keep < len(part):
                    some = torch.cat([some, some[-1:].expand(len(part) - keep, -1, -1)])
                for name, value in density.constrain.mapped(part, some, data, values, in_dims=BY_DRAW).items():
                    if name not in found:
                        found[name] = np.empty((len(theta), len(tasks), *value.shape[2:]))
                    found[name][place, chunk.index] = value[:keep, : len(chunk.index)].numpy()
    return found
