"""The marginal path: every task's parameters integrated out, θ sampled, optimised or fitted; near-exact.

For few parameters a task and up to many tasks. `evidence.py` integrates; the tasks' own posteriors come afterwards, at
the draws of θ, from the ladder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.collected import Collected
from bayesmeta.inference.correction import SharedDraws, correct_shared
from bayesmeta.inference.evidence import Evidence
from bayesmeta.inference.exact import are_gaussian
from bayesmeta.inference.methods import Inferred
from bayesmeta.inference.nuts import check_lengths, check_samplable, from_chains, laplace_guides, sample
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.shared import NormalShared
from bayesmeta.inference.training import History

SHARED = ("nuts", "normal", "map")
OPTIMISER_STEPS = 300
TRIED = 0.3
"""θ at which tasks are tested for being Gaussian are normal around the prior's centre with this sd, in prior units."""


@dataclass(frozen=True)
class Marginal:
    """Options of `method="marginal"`.

    Args:
        shared: How θ is inferred from its marginal posterior: "nuts" (sampled), "normal" (a normal at its mode,
            corrected by importance weights), or "map" (the mode, in unconstrained coordinates with the Jacobian).
        chains: Number of chains of "nuts".
        warmup: Transitions of adaptation, a chain.
        draws: Draws kept, a chain.
    """

    shared: str = "nuts"
    chains: int = 4
    warmup: int = 1000
    draws: int = 1000

    def __post_init__(self) -> None:
        if self.shared not in SHARED:
            raise ValueError(f"Marginal: shared must be one of {sorted(SHARED)}, got {self.shared!r}")
        check_lengths("Marginal", self.chains, self.warmup, self.draws)

    def build(self, density: TaskDensity, tasks: Tasks) -> Guides:
        """Guides that infer tasks given draws of θ; a stored state fills them."""
        return laplace_guides(density, tasks, density.initial_theta().expand(2, -1))

    def learn(self, density: TaskDensity, tasks: Tasks, *, progress: bool, checkpoint: Any) -> Inferred:
        """Infers θ with the tasks' parameters integrated out.

        Raises:
            ValueError: The model has parameters to be trained and θ is to be sampled, or no mode is found.
        """
        if self.shared == "nuts":
            check_samplable("marginal", density, checkpoint)
        if density.structure.shared_size + len(density.learned.values) == 0:
            theta = torch.zeros(self.chains * self.draws, 0, dtype=density.dtype)
            shared = SharedDraws(theta, np.full(len(theta), -math.log(len(theta))), 0.0, 1.0, "sampled")
            return Inferred(laplace_guides(density, tasks, theta), shared, History())
        evidence = Evidence(Collected(density, tasks), gaussian=_all_gaussian(density, tasks))
        mode = _Mode(density, evidence)
        start = mode.find()
        if self.shared == "nuts":
            shared = self._sampled(density, evidence, start, progress)
        else:
            shared = self._fitted(density, tasks, mode, start)
        return Inferred(laplace_guides(density, tasks, shared.theta), shared, History())

    def _sampled(self, density: TaskDensity, evidence: Evidence, start: Tensor, progress: bool) -> SharedDraws:
        signed = Signed(density)

        def make() -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
            own = evidence.again()
            return lambda position: signed.log_density(own, position)

        lengths = {"chains": self.chains, "warmup": self.warmup, "draws": self.draws}
        drawn = sample(make, signed.position(start), progress=progress, view=signed.view, **lengths)
        return from_chains(torch.as_tensor(drawn.draws).flatten(0, 1).to(density.dtype), drawn)

    def _fitted(self, density: TaskDensity, tasks: Tasks, mode: _Mode, start: Tensor) -> SharedDraws:
        density.learned.values.update(mode.values)
        count = self.chains * self.draws
        if self.shared == "map":
            theta = start.expand(count, -1)
            return SharedDraws(theta, np.full(count, -math.log(count)), 0.0, 1.0, "plug-in")
        guides = laplace_guides(density, tasks, start.expand(2, -1))
        guides.shared = normal_at(start, mode.covariance(start))
        return correct_shared(density, guides, tasks, draws=count)


def _all_gaussian(density: TaskDensity, tasks: Tasks) -> bool:
    location, scale = density.prior_scale()
    theta = location + TRIED * scale * torch.randn(3, len(location), dtype=density.dtype)
    return bool(are_gaussian(density, tasks, theta).all())


class Signed:
    """Positive parameters with an even prior as σ = |t|: smooth through 0 where log σ has a funnel."""

    def __init__(self, density: TaskDensity) -> None:
        self._even = torch.tensor(density.structure.even, dtype=torch.bool)

    def position(self, theta: Tensor) -> np.ndarray:
        """θ as a sampler's position."""
        return torch.where(self._even, theta.exp(), theta).double().numpy()

    def view(self, positions: np.ndarray) -> np.ndarray:
        """Positions `(chain, draw, d)` as θ."""
        return self.theta(torch.as_tensor(positions)).numpy()

    def theta(self, position: Tensor) -> Tensor:
        """Positions `(S, d)` as θ."""
        return torch.where(self._even, position.abs().log(), position)

    def log_density(self, evidence: Evidence, position: np.ndarray) -> tuple[float, np.ndarray]:
        """Log density of a position and its gradient: d log σ / dt = 1 / t, and no Jacobian of log σ."""
        at = torch.as_tensor(position)
        theta = self.theta(at)
        value, gradient, _ = evidence(theta.to(evidence.dtype))
        total = float(value) - float(theta[self._even].sum())
        slope = torch.where(self._even, (gradient.double() - 1) / at, gradient.double())
        return total, slope.numpy()


def normal_at(theta: Tensor, covariance: Tensor) -> NormalShared:
    """q(θ) with a given mean and covariance."""
    factor = torch.linalg.cholesky(covariance)
    diagonal = factor.diagonal()
    shared = NormalShared(theta, torch.ones_like(theta))
    with torch.no_grad():
        shared.log_diagonal.copy_(diagonal.log())
        shared.lower.copy_((factor / diagonal.unsqueeze(-1)).tril(-1))
    return shared


class _Mode:
    """The mode of θ and of the learned values, by L-BFGS on the marginal."""

    def __init__(self, density: TaskDensity, evidence: Evidence) -> None:
        self._evidence, self._scale = evidence, density.prior_scale()[1]
        self._start = density.prior_scale()[0].clone()
        self.values = {name: value.clone() for name, value in evidence.values.items()}

    def find(self) -> Tensor:
        """The mode `(d_theta,)`; learned values are left in `values`.

        Raises:
            ValueError: The log density is not finite at the start, or where the search ended.
        """
        white = torch.zeros_like(self._start).requires_grad_()
        values = [value.requires_grad_() for value in self.values.values()]
        search = torch.optim.LBFGS([white, *values], max_iter=OPTIMISER_STEPS, line_search_fn="strong_wolfe")

        def closure() -> float:
            total, gradient, others = self._evidence(self._theta(white.detach()), [v.detach() for v in values])
            white.grad = -gradient * self._scale
            for value, other in zip(values, others, strict=True):
                value.grad = -other
            return -float(total) if math.isfinite(float(total)) else 1e100

        search.step(closure)
        self.values = {name: value.detach() for name, value in self.values.items()}
        theta = self._theta(white.detach())
        if not bool(torch.isfinite(self._evidence(theta, list(self.values.values()))[0])):
            raise ValueError(
                "the marginal density of the shared parameters is not finite: some tasks have no mode that Newton's "
                "steps find; check the data and the priors, or use method='nuts' or method='amortized'"
            )
        return theta

    def _theta(self, white: Tensor) -> Tensor:
        return self._start + self._scale * white

    def covariance(self, theta: Tensor) -> Tensor:
        """The inverse of the negative Hessian at the mode, by differences of the gradient, at most the prior's."""
        values, step = list(self.values.values()), 1e-4
        columns = []
        for unit in torch.diag(self._scale):
            up, down = (self._evidence(theta + sign * step * unit, values)[1] for sign in (1, -1))
            columns.append(-(up - down) * self._scale / (2 * step))
        precision = torch.stack(columns)
        roots, vectors = torch.linalg.eigh((precision + precision.mT) / 2)
        half = vectors / roots.clamp(min=1.0).sqrt()
        return self._scale.unsqueeze(-1) * (half @ half.mT) * self._scale
