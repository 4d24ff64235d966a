"""The contracts between models and inference: what a guide, a task posterior, a shared posterior and a predictive owe.

Shapes: `theta (S, d_theta)` are S draws of the unconstrained shared parameters, `noise (S, T, d)` whitened task
parameters (see `hierarchy/whitening.py`). Nothing is implemented here but defaults.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity


@dataclass
class Context:
    """A batch as inference sees it: encoded once, conditioned on many θ.

    Attributes:
        batch: The tasks.
        data: `density.tensors(batch)`.
        summary: What the guide made of the batch (tensors), whatever it likes.
    """

    batch: Batch
    data: dict[str, Tensor]
    summary: dict[str, Tensor] = field(default_factory=dict)

    def detached(self) -> Context:
        """The same context cut off from the graph."""
        return Context(self.batch, self.data, pytree.tree_map(torch.detach, self.summary))


class TaskPosterior(Protocol):
    """q(φ_i | D_i, θ_s) of T tasks for S draws of θ, in whitened coordinates."""

    def sample(self, *, heavy: bool = False) -> Tensor:
        """One reparametrised draw for each θ and task, `(S, T, d)`; `heavy`: from its t(5) version."""

    def log_prob(self, noise: Tensor, *, heavy: bool = False) -> Tensor:
        """Log density of `(S, T, d)`: `(S, T)`."""


class TaskGuide(nn.Module, ABC):
    """Infers task parameters given θ: a network, gradient steps, particles or an exact formula.

    Subclasses implement `condition`; `attach` is called once by `fit`, `prepare` once a batch.
    """

    method: str = "psis"
    """What `Posterior.method` calls the weighted draws of this guide."""
    cost: float = 1.0
    """Of one draw with its density, relative to the default guide; the correction of θ draws so many times less."""
    rounded: bool = False
    """It is for some tasks, others at every call: their numbers are rounded so that few graphs are recorded."""

    def attach(self, density: TaskDensity, tasks: Tasks) -> None:
        """Meets the model and the training tasks; builds what depends on them. Default: keeps nothing."""

    def prepare(self, batch: Batch, data: dict[str, Tensor]) -> Context:
        """Encodes a batch; default: passes it on."""
        return Context(batch, data)

    @abstractmethod
    def condition(self, theta: Tensor, context: Context) -> TaskPosterior:
        """q(φ | D, θ) for each of S θ: `theta (S, d_theta)`, unconstrained."""

    def follow(self, loc: Tensor, scale: Tensor) -> None:
        """Learns where q(θ) is now, `(d_theta,)` each, before every step; default: does not care."""

    def forward(self, theta: Tensor, context: Context) -> TaskPosterior:
        """Same as `condition` (lets `torch.func.functional_call` swap parameters)."""
        return self.condition(theta, context)


class SharedPosterior(nn.Module, ABC):
    """q(θ) in unconstrained coordinates."""

    @abstractmethod
    def sample(self, count: int, *, wide: bool = False) -> Tensor:
        """Reparametrised draws `(count, d_theta)`; `wide`: from a t(5) 1.5 times as wide, for importance sampling."""

    @abstractmethod
    def log_prob(self, theta: Tensor, *, wide: bool = False) -> Tensor:
        """Log density `(S,)` with the posterior's own parameters held fixed."""

    def recentre(self) -> None:
        """Moves the parameters' origin and unit to the present q; default: keeps them."""

    @abstractmethod
    def centre(self) -> tuple[Tensor, Tensor]:
        """Location and scale `(d_theta,)`, detached: what networks standardise θ with."""


class Predictive(Protocol):
    """p(y* | θ, φ, D, x*): φ may be integrated out (None)."""

    def __call__(self, theta: Any, phi: Any, context: Batch, x: Tensor) -> torch.distributions.Distribution:
        """A distribution of batch shape `(T, M)`, or `(T,)` with the rows in the event."""
