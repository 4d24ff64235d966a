"""The marginal path: every task's parameters integrated out, θ sampled, optimised or fitted; near-exact.

For few parameters a task and up to many tasks. `evidence.py` integrates, `approximation.py` says how far that is off;
the tasks' own posteriors come afterwards, at the draws of θ, from the ladder.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.approximation import TOLERATED, assess, mended
from bayesmeta.inference.collected import in_double, rows
from bayesmeta.inference.correction import MIN_DRAWS, SharedDraws, weigh_shared
from bayesmeta.inference.evidence import Evidence, kind_of, points_of
from bayesmeta.inference.exact import all_gaussian
from bayesmeta.inference.methods import Inferred
from bayesmeta.inference.mode import Mode
from bayesmeta.inference.nuts import check_samplable, from_chains, laplace_guides
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.options import check_lengths
from bayesmeta.inference.sampling import Lengths, sample
from bayesmeta.inference.threads import threads_for
from bayesmeta.inference.training import History

SHARED = ("nuts", "normal", "map")
MODE_CALLS = 200
"""About how often the marginal is called until its mode is found from one start."""
MISPLACED = 3.0
"""Nats that the evidence of a point estimate is off, over draws of θ around it, or noise of that: more is warned of.
The mode moves by up to so many posterior sds of θ, by a third of it where the error lies in the tails."""
WEIGHED_ELEMENTS = 4_000_000_000
"""Bound on draws of θ × rows × points a task, where a normal is corrected."""


@dataclass(frozen=True)
class Marginal:
    """Options of `method="marginal"`.

    Of the modes that a task's log joint has at one θ (mixtures of kinds of tasks, phases) the best that several starts
    find is integrated around. What that and the approximation leave is measured by importance sampling around all
    modes, at θ near the answer: draws of θ are weighed by it, and a point estimate that it may move is warned of. Not
    seen is another mode of θ itself, far off (`starts`), nor are learned values judged where θ has no parameters.

    Args:
        shared: How θ is inferred from its marginal posterior: "nuts" (sampled), "normal" (a normal at its mode,
            corrected by importance weights), or "map" (the mode, in unconstrained coordinates with the Jacobian).
        chains: Number of chains of "nuts".
        warmup: Transitions of adaptation, a chain.
        draws: Draws kept, a chain.
        starts: From how many θ the mode is looked for, the prior's centre and draws of the prior. Priors with clusters,
            odd tasks and tasks with several modes give θ several: there 8 is not too many.
    """

    shared: str = "nuts"
    chains: int = 4
    warmup: int = 1000
    draws: int = 1000
    starts: int = 1

    def __post_init__(self) -> None:
        if self.shared not in SHARED:
            raise ValueError(f"Marginal: shared must be one of {sorted(SHARED)}, got {self.shared!r}")
        check_lengths("Marginal", chains=self.chains, warmup=self.warmup, draws=self.draws, starts=self.starts)

    def build(self, density: TaskDensity, tasks: Tasks) -> Guides:
        """Guides that infer tasks given draws of θ; a stored state fills them."""
        return laplace_guides(density, tasks, density.initial_theta().expand(2, -1))

    def learn(self, density: TaskDensity, tasks: Tasks, *, progress: bool, checkpoint: Any) -> Inferred:
        """Infers θ with the tasks' parameters integrated out.

        Raises:
            ValueError: The model has parameters to be trained and θ is to be sampled, no mode is found, nutpie is
                missing, or a checkpoint is asked for.
        """
        check_samplable("marginal", density, checkpoint, trains=self.shared != "nuts")
        start = time.perf_counter()
        record: dict[str, Any] = {"stage": 0, "steps": 0, "kind": "no shared parameters", "error": 0.0, "noise": 0.0}
        if density.structure.shared_size + len(density.learned.values) == 0:
            shared = _equal(torch.zeros(self.chains * self.draws, 0, dtype=density.dtype), "sampled")
        else:
            with threads_for(rows(tasks) * points_of(density.structure.task_size)):
                shared, found = self._infer(density, tasks, progress)
            record |= found
        point = shared.status == "plug-in"
        done = shared.status != "uncorrected" and not (point and record["error"] > TOLERATED)
        if point and max(record["error"], record["noise"]) > MISPLACED:
            _warn_of_point(record)
        record |= {"ess": shared.ess, "seconds": time.perf_counter() - start, "done": done}
        return Inferred(laplace_guides(density, tasks, shared.theta), shared, History(stages=[record]))

    def _infer(self, density: TaskDensity, tasks: Tasks, progress: bool) -> tuple[SharedDraws, dict[str, Any]]:
        precise = in_double(density, tasks)
        evidence = self._evidence(precise, tasks)
        mode = Mode(precise, evidence)
        mode.find(starts=self.starts)
        for one in (precise, density):
            one.learned.values.update({name: value.to(one.dtype) for name, value in mode.values.items()})
        tried: SharedDraws | None = None
        if self.shared == "nuts":
            shared = self._sampled(precise, evidence, mode, progress)
        else:
            shared, tried = self._fitted(evidence, mode)
        shared, error = self._judged(precise, evidence, tasks, shared, tried or shared)
        return replace(shared, theta=shared.theta.to(density.dtype)), {"kind": evidence.kind, **error}

    def _judged(
        self, density: TaskDensity, evidence: Evidence, tasks: Tasks, shared: SharedDraws, around: SharedDraws
    ) -> tuple[SharedDraws, dict[str, float]]:
        """The draws of θ, mended where the evidence is approximate, and its error at the draws `around`."""
        if evidence.kind == "closed form":
            return shared, {"error": 0.0, "noise": 0.0}
        if not density.structure.shared_size:
            return shared, {"error": math.nan, "noise": math.nan}
        found = assess(density, evidence, tasks, around, point=self.shared == "map")
        approximate = evidence.kind == "Laplace" or found["error"] > TOLERATED
        if approximate and shared.status not in ("plug-in", "uncorrected"):
            shared = mended(density, evidence, tasks, shared)
        return shared, found

    def _evidence(self, density: TaskDensity, tasks: Tasks) -> Evidence:
        kind = kind_of(density.structure.task_size, gaussian=all_gaussian(density, tasks))
        until_mode = self.starts * MODE_CALLS
        calls = {"nuts": None, "normal": until_mode + self.chains * self.draws, "map": until_mode}
        return Evidence(density, tasks, kind=kind, calls=calls[self.shared])

    def _sampled(self, density: TaskDensity, evidence: Evidence, mode: Mode, progress: bool) -> SharedDraws:
        signed = Signed(density)

        def make() -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
            own = evidence.again()
            return lambda position: signed.log_density(own, position)

        lengths = Lengths(self.chains, self.warmup, self.draws)
        starts = mode.shared().sample
        drawn = sample(make, lambda: signed.position(starts(1)[0]), lengths, progress=progress, view=signed.view)
        return from_chains(torch.as_tensor(drawn.draws).flatten(0, 1), drawn)

    def _fitted(self, evidence: Evidence, mode: Mode) -> tuple[SharedDraws, SharedDraws | None]:
        """The draws of θ, and others at which a point estimate's evidence is looked at."""
        count, values = self.chains * self.draws, list(mode.values.values())
        if self.shared == "map":
            exact = evidence.kind == "closed form"
            around = None if exact else _equal(mode.shared().sample(count).detach(), "sampled")
            return _equal(mode.theta.expand(count, -1), "plug-in"), around

        def score(theta: Tensor) -> Tensor:
            return torch.stack([evidence(at, values)[0] for at in theta])

        with torch.no_grad():
            if not len(mode.theta):
                return _equal(mode.theta.expand(count, -1), "sampled"), None
            most = WEIGHED_ELEMENTS // evidence.elements
            adapt = most >= 2 * MIN_DRAWS
            return weigh_shared(mode.shared(), score, draws=count, affordable=most, adapt=adapt), None


def _warn_of_point(record: dict[str, Any]) -> None:
    if math.isfinite(record["error"]):
        found = f"is off by {record['error']:.1f} ± {record['noise']:.1f} nats (limit {MISPLACED:.0f}), and the mode "
        found += "by up to as many posterior sds"
    else:
        found = "is not finite at some θ near it, so that its error is not known"
    warnings.warn(
        f"the point estimate of the shared parameters may be off: the evidence of the tasks ({record['kind']}, around "
        f"one mode each) {found}. Try starts=8, method='amortized', or shared='nuts' or 'normal', whose draws are "
        "weighed by what the evidence is off",
        stacklevel=2,
    )


def _equal(theta: Tensor, status: str) -> SharedDraws:
    return SharedDraws(theta, np.full(len(theta), -math.log(len(theta))), 0.0, 1.0, status)


class Signed:
    """Positive parameters with an even prior as σ = |t|: smooth through 0 where log σ has a funnel."""

    def __init__(self, density: TaskDensity) -> None:
        self._even = torch.tensor(density.structure.even, dtype=torch.bool)

    def position(self, theta: Tensor) -> np.ndarray:
        """θ as a sampler's position."""
        return torch.where(self._even, theta.exp(), theta).detach().numpy()

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
        value, gradient, _ = evidence(theta)
        total = float(value) - float(theta[self._even].sum())
        slope = torch.where(self._even, (gradient - 1) / at, gradient)
        return total, slope.numpy()
