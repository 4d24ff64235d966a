"""Correcting q(θ): weighted draws of θ from the evidence of all tasks, by adaptive importance sampling."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import psis
from bayesmeta.inference.candidates import log_evidence
from bayesmeta.inference.gaussian import HEAVY_DF, heavy_scale, normal_log_prob, student_t_log_prob
from bayesmeta.inference.mixing import Mixing
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.protocols import SharedPosterior
from bayesmeta.inference.shared import WIDE, PointShared, PriorShared

PER_THETA = 8
"""Candidates a task in an estimate of its evidence, at the start."""
MAX_PER_THETA = 256
MAX_VARIANCE = 0.3
"""Variance of Σ log p̂ above which more candidates are drawn."""
CHECK_BUDGET = 500_000
FULL_BUDGET = 8_000_000
"""Bounds on draws × tasks × candidates: of a look between two stages of training, and of the final correction."""
PILOT_TASKS = 2000
ADAPTED_WIDTH = 1.1
SPOILT = 2.0
"""An adapted proposal whose weights spread so much more is not used: one t(5) over several modes of θ, or fitted to too
few draws for so many dimensions."""
ROUNDS, LEAST = 6, 20
"""Proposals tried one after another where q is far off; each is fitted to 20 draws a dimension."""
AGREE = 4.0
"""Standard errors by which means from two starts may differ."""
MIN_DRAWS = 200
MIN_ESS, MIN_EFFECTIVE = 0.05, 10
"""θ counts as corrected only if this share of its draws, and so many of them, are effective."""


@dataclass
class SharedDraws:
    """Weighted draws of θ.

    Attributes:
        theta: Unconstrained draws `(S, d_theta)`.
        log_weight: Normalised log weights `(S,)`.
        khat: Pareto k̂ of the weights.
        ess: Relative effective sample size.
        status: "corrected", "uncorrected" (also chains that have not mixed), "plug-in" or "sampled".
        chains: Number of Markov chains that the draws come from, one after another; 0: independent draws.
        stats: Diagnostics of the chains, `{name: (chain, draw)}`.
        noise: Whitened parameters of the training tasks drawn along `(S, T, d)`, where the method draws them.
        mixing: Of the chains in each coordinate of θ, then in those of `noise`, task after task.
    """

    theta: Tensor
    log_weight: np.ndarray
    khat: float
    ess: float
    status: str
    chains: int = 0
    stats: dict[str, np.ndarray] = field(default_factory=dict)
    noise: Tensor | None = None
    mixing: Mixing | None = None


def correct_shared(
    density: TaskDensity,
    guides: Guides,
    tasks: Tasks,
    *,
    draws: int,
    budget: int = FULL_BUDGET,
    share: float = 1.0,
    rounds: int = ROUNDS,
) -> SharedDraws:
    """Weighs draws of θ by prior(θ) (Π p̂(D_i | θ))^share / proposal(θ).

    The first proposal is a t(5) 1.5 times as wide as q; a second one is fitted to the weighted draws of the first,
    unless it is worse by far, as where θ has several modes. Where q is so far off that hardly a draw counts, up to
    `rounds` proposals fitted to flattened weights lead towards the posterior, once from q and once from the prior; the
    answer is "uncorrected" unless both arrive at the same, and another mode may have been missed. Where the evidence
    of all tasks together is too noisy to weigh draws, or fewer than 10 would count, as in hundreds of dimensions, q's
    own draws are returned as "uncorrected".

    References:
        Cappé, Guillin, Marin, Robert: Population Monte Carlo, 2004, https://doi.org/10.1198/106186004X12803
    """
    known = _needs_no_weights(density, guides.shared)
    if known is not None:
        return _equal(guides.shared.sample(draws), known, 0.0, 1.0)
    budget = int(budget / guides.task.cost)
    most = budget // (MIN_DRAWS * len(tasks))
    per_theta, variance = _enough_candidates(density, guides, tasks, most, share)
    affordable = budget // (len(tasks) * per_theta)
    if variance > 1 or affordable < MIN_DRAWS:
        return _equal(guides.shared.sample(draws), "uncorrected", math.inf, math.nan)
    score = functools.partial(_log_target, density, guides, tasks, per_theta, share)
    found = weigh_shared(guides.shared, score, draws=draws, affordable=affordable)
    if rounds and _is_far_off(found):
        found = _led(density, guides.shared, score, draws=draws, affordable=affordable, rounds=rounds) or found
    if not found.ess * len(found.theta) >= MIN_EFFECTIVE:
        return _equal(guides.shared.sample(draws), "uncorrected", found.khat, found.ess)
    return found


def _needs_no_weights(density: TaskDensity, shared: SharedPosterior) -> str | None:
    """The status of draws that are what they should be: of a point, of the prior, of no θ at all."""
    if density.structure.shared_size == 0 or isinstance(shared, PriorShared):
        return "sampled"
    return "plug-in" if isinstance(shared, PointShared) else None


def weigh_shared(
    shared: SharedPosterior, score: Callable[[Tensor], Tensor], *, draws: int, affordable: int, adapt: bool = True
) -> SharedDraws:
    """Weighs draws of θ by their log density `score` `(S, d_theta) -> (S,)`, twice: the first time to adapt."""
    first = _Sample.of(Wide(shared), score, max(MIN_DRAWS, min(draws // 4, affordable)))
    if not adapt or not first.usable:
        return weighed(first.theta, first.log_weight)
    return first.adapted(score, max(MIN_DRAWS, min(draws, affordable)))


def _is_far_off(found: SharedDraws) -> bool:
    return found.status == "uncorrected" and not _carries(found.ess * len(found.theta), found.theta.shape[1])


def _led(
    density: TaskDensity,
    shared: SharedPosterior,
    score: Callable[[Tensor], Tensor],
    *,
    draws: int,
    affordable: int,
    rounds: int,
) -> SharedDraws | None:
    """Weighed draws of a proposal that was led to the posterior from q; None where it does not arrive."""
    count = max(MIN_DRAWS, min(draws // 4, affordable))
    arrived = _arrived(Wide(shared), score, count, rounds)
    if arrived is None:
        return None
    found = arrived.adapted(score, max(MIN_DRAWS, min(draws, affordable)))
    improper = any(site.improper for site in density.structure.shared)
    again = None if improper else _arrived(PriorShared(density), score, count, rounds)
    if again is None or not _agree(found, weighed(again.theta, again.log_weight)):
        return replace(found, status="uncorrected")
    return found


def _arrived(start: Proposal, score: Callable[[Tensor], Tensor], count: int, rounds: int) -> _Sample | None:
    """Draws enough of which count, of a proposal fitted again and again to flattened weights."""
    sample = _Sample.of(start, score, count)
    for _ in range(rounds):
        least = LEAST * (sample.theta.shape[1] + 1)
        flat = flattened(sample.log_weight, least=least)
        if sample.usable or float(psis.relative_ess(flat.numpy())) * count < least:
            break
        sample = _Sample.of(Adapted(sample.theta, flat), score, count)
    return sample if sample.usable else None


def _agree(one: SharedDraws, two: SharedDraws) -> bool:
    """Whether weighted draws have the same means, within their Monte Carlo errors, and like sds."""
    moments = []
    for drawn in (one, two):
        weight, theta = torch.as_tensor(drawn.log_weight).exp(), drawn.theta.double()
        mean = weight @ theta
        moments.append((mean, (weight @ (theta - mean).square()).sqrt(), drawn.ess * len(theta)))
    (mean, sd, ess), (other, spread, fewer) = moments
    error = (sd.square() / ess + spread.square() / fewer).sqrt()
    same = ((mean - other).abs() < AGREE * error) & ((sd / spread).log().abs() < math.log(2))
    return bool(same.all())


def _carries(ess: float, dim: int) -> bool:
    """Whether so many effective draws carry a covariance."""
    return ess > 5 * dim


class Proposal(Protocol):
    """What draws of θ come from."""

    def sample(self, count: int) -> Tensor:
        """Draws `(count, d)`."""

    def log_prob(self, theta: Tensor) -> Tensor:
        """Log density `(S,)`."""


@dataclass(frozen=True)
class _Sample:
    """Draws of a proposal, their log densities under the target, and their log weights."""

    proposal: Proposal
    theta: Tensor
    log_target: Tensor
    log_weight: Tensor

    @classmethod
    def of(cls, proposal: Proposal, score: Callable[[Tensor], Tensor], count: int) -> _Sample:
        theta = proposal.sample(count)
        log_target = score(theta)
        return cls(proposal, theta, log_target, log_target - proposal.log_prob(theta))

    @property
    def effective(self) -> float:
        """How many draws count."""
        return float(psis.relative_ess(self.log_weight.numpy())) * len(self.log_weight)

    @property
    def usable(self) -> bool:
        """Whether enough draws count to fit a proposal to them."""
        return _carries(self.effective, self.theta.shape[1])

    def _optimism(self) -> float:
        """How much better, in nats, a normal fitted to these draws looks on them than it is: (d² + 3d) / 2n of n."""
        dim = self.theta.shape[1]
        return dim * (dim + 3) / (2 * self.effective)

    def adapted(self, score: Callable[[Tensor], Tensor], count: int) -> SharedDraws:
        """Weighs draws of a proposal fitted to these, or of the same one where the fitted one would be worse by far."""
        fitted = Adapted(self.theta, self.log_weight)
        one, two = (
            _log_spread(self.log_target, self.log_weight, q.log_prob(self.theta)) for q in (self.proposal, fitted)
        )
        spoilt = float(two - one) + self._optimism() > math.log(SPOILT)
        sample = _Sample.of(self.proposal if spoilt else fitted, score, count)
        return weighed(sample.theta, sample.log_weight)


class Wide:
    """The t(5) version of q(θ), or whatever it has for proposals.

    Args:
        shared: q(θ).
    """

    def __init__(self, shared: SharedPosterior) -> None:
        self._shared = shared

    def sample(self, count: int) -> Tensor:
        """Draws `(count, d)`."""
        return self._shared.sample(count, wide=True)

    def log_prob(self, theta: Tensor) -> Tensor:
        """Log density `(S,)`."""
        return self._shared.log_prob(theta, wide=True)


class Adapted:
    """A t(5) with the mean and covariance of weighted draws, in float64 whatever the draws are."""

    def __init__(self, theta: Tensor, log_weight: Tensor) -> None:
        self._dtype = theta.dtype
        usable = torch.nan_to_num(log_weight.double(), nan=-math.inf)
        weight, theta = usable.softmax(0), theta.double()
        self._mean = weight @ theta
        centred = theta - self._mean
        covariance = centred.mT @ (weight.unsqueeze(-1) * centred)
        self._factor = ADAPTED_WIDTH * torch.linalg.cholesky(covariance)

    def sample(self, count: int) -> Tensor:
        """Draws `(count, d)`."""
        noise = torch.randn(count, len(self._mean), dtype=self._mean.dtype)
        return (self._mean + noise * heavy_scale((count, 1), noise) @ self._factor.mT).to(self._dtype)

    def log_prob(self, theta: Tensor) -> Tensor:
        """Log density `(S,)`."""
        white = torch.linalg.solve_triangular(self._factor, (theta.double() - self._mean).mT, upper=False).mT
        log_det = -self._factor.diagonal().log().sum()
        return student_t_log_prob(white.square().sum(-1), log_det, theta.shape[1])


def flattened(log_weight: Tensor, *, least: int) -> Tensor:
    """Log weights raised to the largest power ≤ 1 that leaves `least` effective draws: a fit to few draws collapses."""
    usable = torch.nan_to_num(log_weight, nan=psis.NO_WEIGHT, neginf=psis.NO_WEIGHT)
    power = 1.0
    while power > 1e-4 and float(psis.relative_ess((power * usable).numpy())) * len(usable) < least:
        power *= 0.7
    return power * usable


def _log_spread(log_target: Tensor, log_weight: Tensor, log_proposal: Tensor) -> Tensor:
    """Log of E_p[p/q], the larger the smaller the ESS of a proposal q, from draws weighed towards p."""
    share = torch.nan_to_num(log_weight, nan=-math.inf).log_softmax(0)
    return (share + torch.nan_to_num(log_target - log_proposal, nan=-math.inf)).logsumexp(0)


def weighed(theta: Tensor, log_weight: Tensor) -> SharedDraws:
    """Draws of θ with their weights, judged."""
    smoothed, khat = psis.smooth(log_weight.numpy())
    ess = float(psis.relative_ess(smoothed))
    good = khat < psis.khat_limit(len(theta)) and ess * len(theta) >= MIN_EFFECTIVE and ess >= MIN_ESS
    return SharedDraws(theta, smoothed, float(khat), ess, "corrected" if good else "uncorrected")


def _equal(theta: Tensor, status: str, khat: float, ess: float) -> SharedDraws:
    return SharedDraws(theta, np.full(len(theta), -math.log(len(theta))), khat, ess, status)


def _log_target(
    density: TaskDensity, guides: Guides, tasks: Tasks, per_theta: int, share: float, theta: Tensor
) -> Tensor:
    evidence = log_evidence(density, guides, tasks, theta, per_theta=per_theta)
    return share * evidence.sum(1, dtype=torch.float64) + density.log_prior(theta, guides.values)


def _enough_candidates(
    density: TaskDensity, guides: Guides, tasks: Tasks, most: int, share: float
) -> tuple[int, float]:
    """The number of candidates, at most `most`, that keeps the variance of Σ log p̂ (as it counts) small, and that."""
    pilot = tasks
    if len(tasks) > PILOT_TASKS:
        pilot = tasks[np.sort(torch.randperm(len(tasks))[:PILOT_TASKS].numpy())]
    theta = guides.shared.sample(16)
    pair = [log_evidence(density, guides, pilot, theta, per_theta=PER_THETA) for _ in range(2)]
    variance = share**2 * float((pair[0] - pair[1]).square().mean() / 2) * len(tasks)
    if not math.isfinite(variance):
        return PER_THETA, math.inf
    needed = PER_THETA * max(1.0, variance / MAX_VARIANCE)
    per_theta = max(PER_THETA, min(MAX_PER_THETA, most, 2 ** math.ceil(math.log2(needed))))
    return per_theta, variance * PER_THETA / per_theta


@functools.cache
def reachable_ess(dim: int) -> float:
    """Relative ESS of a perfect Gaussian q(θ) under its t(5) proposal 1.5 times as wide, in `dim` dimensions."""
    generator = np.random.default_rng(0)
    count = 4000
    chi = generator.chisquare(HEAVY_DF, count)
    quadratic = torch.as_tensor(WIDE**2 * np.square(generator.standard_normal((count, dim))).sum(1) * HEAVY_DF / chi)
    zero = torch.zeros(count, dtype=torch.float64)
    log_weight = normal_log_prob(quadratic, zero, dim) - student_t_log_prob(quadratic / WIDE**2, zero, dim)
    return float(psis.relative_ess(log_weight.numpy()))
