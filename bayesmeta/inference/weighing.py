"""Weighted candidates of task parameters, gates, and draws paired with θ.

Known tasks share one set of θ draws, so that one draw of all of them is a joint draw; new tasks are inferred one by
one, each re-weighting θ by its own evidence. The ladder calls this file once a rung.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import psis
from bayesmeta.inference.candidates import candidates, guide_draws, log_evidence, prior_noise
from bayesmeta.inference.correction import SharedDraws
from bayesmeta.inference.mixing import MAX_RHAT, MIN_ESS, Mixing
from bayesmeta.inference.objectives import Guides

COUNTS = (8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of candidates at one θ: few different ones, since each needs a graph of its own."""
MIN_CANDIDATES = COUNTS[0]
EFFECTIVE_CANDIDATES = 16
"""Among the candidates of one θ draw so many are effective: M × relative ESS ≥ 16."""
MAX_CANDIDATES = COUNTS[-1]
PILOT_THETA = 64
KEPT_NUMBERS = 2**28
"""Numbers among the candidates of known tasks that are kept (2 GiB; twice as much while they are drawn): of more
only the draws are."""
BLOCK_NUMBERS = 2**25
"""Numbers that candidates take up at once where they are not kept."""
_TOLD = ("khat", "ess", "method", "flag")
"""What is said of each task."""
SMOOTHED_TOGETHER = 2**18
"""Weights that are smoothed at once: temporary arrays of all tasks fall out of the cache."""


@dataclass
class TaskDraws:
    """Weighted candidates of T tasks, and equally weighted draws chosen among them.

    Attributes:
        theta: θ of each of K candidates `(K, d_theta)`.
        noise: Whitened task parameters `(K, T, d)`.
        log_weight: Normalised log weights of the candidates of a task `(K, T)`.
        index: The candidate that is draw s of task i `(S, T)`.
        khat, ess: Diagnostics `(T,)`.
        method: "exact", "psis", "laplace", "nuts", "amortized" or "prior" `(T,)`.
        flag: What is wrong, "" if nothing is `(T,)`.
        joint: Draw s of all tasks is one joint draw.
    """

    theta: Tensor
    noise: Tensor
    log_weight: np.ndarray
    index: np.ndarray
    khat: np.ndarray
    ess: np.ndarray
    method: list[str]
    flag: list[str]
    joint: bool

    def of(self, keep: np.ndarray) -> TaskDraws:
        """The draws of some of the tasks, `keep` `(T,)` says of which."""
        if keep.all():
            return self
        columns = np.flatnonzero(keep)
        return replace(
            self,
            noise=self.noise[:, columns],
            log_weight=self.log_weight[:, columns],
            index=self.index[:, columns],
            khat=self.khat[columns],
            ess=self.ess[columns],
            method=[self.method[i] for i in columns],
            flag=[self.flag[i] for i in columns],
        )

    def chosen(self, theta: Tensor) -> TaskDraws:
        """The equally weighted draws alone, those of the s-th θ `(S, d_theta)`."""
        noise = self.noise[torch.as_tensor(self.index.copy()), torch.arange(self.index.shape[1])]
        index, log_weight = _equal(*self.index.shape)
        return replace(self, theta=theta, noise=noise, log_weight=log_weight, index=index)

    def thinned(self, draws: int) -> TaskDraws:
        """The same candidates with fewer equally weighted draws, spread evenly over those that are there."""
        return replace(self, index=self.index[np.arange(draws) * len(self.index) // draws])


Parts = list[tuple[np.ndarray, TaskDraws]]
"""Positions of tasks, and their draws."""


def weigh_known(density: TaskDensity, guides: Guides, theta: Tensor, tasks: Tasks) -> TaskDraws:
    """Joint draws of θ and of training tasks.

    θ `(S, d_theta)` has already learned from these tasks: each task's parameters are chosen among M candidates at every
    θ_s. k̂ and the relative ESS are those of log w − log p̂₋(D_i | θ_s), p̂₋ without the candidate. Of very many tasks
    only the chosen candidates are kept. A task that no candidate of some θ_s makes possible is flagged.
    """
    if guides.task.method == "exact":
        return equal_draws(theta, candidates(density, guides, tasks, theta).noise, "exact", 0.0, "", joint=True)
    width = len(theta) * (density.structure.task_size + 2)
    needed = _candidates_needed(density, guides, tasks, theta)
    if width * int(needed.max()) * len(tasks) <= KEPT_NUMBERS:
        return _weigh_together(density, guides, theta, tasks, int(needed.max()))
    blocks = [
        (index, _weigh_together(density, guides, theta, tasks[index], per_theta).chosen(theta))
        for per_theta in np.unique(needed).tolist()
        for index in pieces(np.flatnonzero(needed == per_theta), width * per_theta)
    ]
    return _beside(blocks)


def pieces(index: np.ndarray, numbers: int) -> Iterator[np.ndarray]:
    """Pieces of an array of tasks whose candidates are not kept, `numbers` numbers a task."""
    size = max(1, BLOCK_NUMBERS // numbers)
    return (index[start : start + size] for start in range(0, len(index), size))


def _weigh_together(density: TaskDensity, guides: Guides, theta: Tensor, tasks: Tasks, per_theta: int) -> TaskDraws:
    draws = len(theta)
    pool = theta.repeat_interleave(per_theta, 0)
    drawn = candidates(density, guides, tasks, pool)
    raw = drawn.log_weight.reshape(draws, per_theta, len(tasks))
    possible = raw.amax(1).isfinite()
    within = (raw - raw.logsumexp(1, keepdim=True)).masked_fill(~possible.unsqueeze(1), -math.inf)
    chosen = _choose(within)
    offset = np.arange(draws)[:, None] * per_theta
    leave_one_out = raw - _log_mean_of_others(raw)
    khat, ess = _diagnose(leave_one_out.reshape(-1, len(tasks)).numpy())
    khat[~possible.all(0).numpy()] = math.inf
    log_weight = (within - math.log(draws)).reshape(-1, len(tasks)).numpy()
    flag = _flags(khat, ess, len(pool))
    method = [guides.task.method] * len(tasks)
    return TaskDraws(pool, drawn.noise, log_weight, offset + chosen, khat, ess, method, flag, joint=True)


def weigh_new(
    density: TaskDensity,
    guides: Guides,
    theta: Tensor,
    tasks: Tasks,
    *,
    replaced: Tasks | None = None,
) -> TaskDraws:
    """Independent inferences of tasks that θ has not learned from.

    Args:
        density: The model.
        guides: What was learned.
        theta: Draws of θ given the training tasks `(S, d_theta)`.
        tasks: The new tasks.
        replaced: The training tasks that `tasks` replace: their evidence is divided out of θ.
    """
    drawn = candidates(density, guides, tasks, theta)
    raw = drawn.log_weight
    if replaced is not None:
        raw = raw - log_evidence(density, guides, replaced, theta, per_theta=EFFECTIVE_CANDIDATES)
    return judged(theta, drawn.noise, raw, guides.task.method)


def judged(theta: Tensor, noise: Tensor, raw: Tensor, method: str) -> TaskDraws:
    """Candidates `(S, d_theta)` and `(S, T, d)` with their log weights `(S, T)`, smoothed, judged and drawn from."""
    log_weight, index, khat, ess = _smoothed(raw.numpy())
    flag = _flags(khat, ess, len(theta))
    if method == "exact":
        khat = np.where([not text for text in flag], 0.0, khat)
    return TaskDraws(theta, noise, log_weight, index, khat, ess, [method] * raw.shape[1], flag, joint=False)


def draw_empty(density: TaskDensity, guides: Guides, theta: Tensor, tasks: Tasks, *, joint: bool) -> TaskDraws:
    """Draws of the prior for tasks without rows."""
    noise = prior_noise(density, guides, tasks, theta)
    return equal_draws(theta, noise, "prior", 0.0, "", joint)


def resample(shared: SharedDraws, draws: int) -> Tensor:
    """Which draws of θ are `draws` equally weighted ones; those of chains stay in their order, thinned evenly."""
    if shared.chains and draws <= len(shared.theta) and np.ptp(shared.log_weight) == 0:
        return torch.as_tensor(np.arange(draws) * len(shared.theta) // draws)
    generator = np.random.default_rng(int(torch.randint(2**62, ())))
    return torch.as_tensor(psis.resample(shared.log_weight, draws, generator))


def resample_theta(shared: SharedDraws, draws: int) -> Tensor:
    """Equally weighted draws of θ `(draws, d_theta)`."""
    return shared.theta[resample(shared, draws)]


def of_chains(theta: Tensor, noise: Tensor, mixing: Mixing, positions: np.ndarray, *, total: int) -> TaskDraws:
    """Draws of training tasks that chains drew along with θ; flagged are tasks where these, or θ's, have not mixed.

    Args:
        theta: Draws `(S, d_theta)`.
        noise: Draws that belong to them, of the tasks `(S, T, d)`.
        mixing: Of θ's coordinates, then of those of all training tasks.
        positions: Of the T tasks among these.
        total: Number of draws of the chains; S of them are here.
    """
    size, dim = theta.shape[1], noise.shape[2]
    own = mixing.of(slice(size))
    rhat, ess = (values[size:].reshape(-1, dim)[positions] for values in mixing)
    drawn = equal_draws(theta, noise, "nuts", math.nan, "", joint=True)
    drawn.ess = np.minimum(1.0, ess.min(1) / total)
    rhat = np.maximum(rhat.max(1), own.rhat.max(initial=0))
    ess = np.minimum(ess.min(1), own.ess.min(initial=math.inf))
    flag = [
        f"the chains have not mixed: R-hat {r:.2f} (limit {MAX_RHAT}), {e:.0f} effective draws (limit {MIN_ESS:.0f})"
        for r, e in zip(rhat, ess, strict=True)
    ]
    drawn.flag = [text if bad else "" for text, bad in zip(flag, Mixing(rhat, ess).bad, strict=True)]
    return drawn


def draw_unchecked(density: TaskDensity, guides: Guides, theta: Tensor, tasks: Tasks, *, joint: bool) -> TaskDraws:
    """Draws of the guide as they are."""
    noise = guide_draws(density, guides, tasks, theta)
    return equal_draws(theta, noise, "amortized", math.nan, "not checked (refine='none')", joint)


def equal_draws(theta: Tensor, noise: Tensor, method: str, khat: float, flag: str, joint: bool) -> TaskDraws:
    """Equally weighted draws `(S, T, d)` of all tasks."""
    draws, count = noise.shape[:2]
    index, log_weight = _equal(draws, count)
    ones = np.ones(count)
    return TaskDraws(theta, noise, log_weight, index, khat * ones, ones, [method] * count, [flag] * count, joint=joint)


def _equal(draws: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and log weights `(S, T)` of candidates that are the draws."""
    index = np.broadcast_to(np.arange(draws)[:, None], (draws, count))
    return index, np.broadcast_to(np.float64(-math.log(draws)), (draws, count))


def _beside(blocks: Parts) -> TaskDraws:
    """Equally weighted draws of all tasks, at the same θ, in the order of the positions."""
    order = np.argsort(np.concatenate([index for index, _ in blocks]))
    parts = [drawn for _, drawn in blocks]
    noise = torch.cat([part.noise for part in parts], 1)[:, order]
    told = {name: np.concatenate([getattr(part, name) for part in parts])[order] for name in _TOLD}
    index, log_weight = _equal(*noise.shape[:2])
    texts = {name: told[name].tolist() for name in ("method", "flag")}
    return replace(parts[0], noise=noise, index=index, log_weight=log_weight, **(told | texts))


def _candidates_needed(density: TaskDensity, guides: Guides, tasks: Tasks, theta: Tensor) -> np.ndarray:
    """M of each task such that M × relative ESS ≥ 16, from a pilot `(T,)`."""
    pilot = theta[:PILOT_THETA].repeat_interleave(MIN_CANDIDATES, 0)
    ess = np.empty(len(tasks))
    for index in pieces(np.arange(len(tasks)), len(pilot) * (density.structure.task_size + 2)):
        some = tasks if len(index) == len(tasks) else tasks[index]
        raw = candidates(density, guides, some, pilot).log_weight.reshape(-1, MIN_CANDIDATES, len(some))
        ess[index] = _diagnose((raw - _log_mean_of_others(raw)).reshape(-1, len(some)).numpy())[1]
    enough = np.array(COUNTS)[:, None] * ess >= EFFECTIVE_CANDIDATES - 0.1
    return np.where(enough.any(0), np.array(COUNTS)[enough.argmax(0)], MAX_CANDIDATES)


def _log_mean_of_others(raw: Tensor) -> Tensor:
    """Log of the mean weight of the other candidates at the same θ: `(S, M, T)` -> `(S, M, T)`."""
    peak = raw.amax(1, keepdim=True)
    scaled = (raw - peak).exp()
    others = (scaled.sum(1, keepdim=True) - scaled).clamp(min=torch.finfo(raw.dtype).tiny)
    return others.log() + peak - math.log(raw.shape[1] - 1)


def _choose(log_share: Tensor) -> np.ndarray:
    """Draws one candidate of each θ and task: `(S, M, T)` -> `(S, T)`."""
    cumulative = log_share.exp().cumsum(1)
    point = torch.rand(log_share.shape[0], 1, log_share.shape[2], dtype=log_share.dtype)
    return (cumulative < point * cumulative[:, -1:]).sum(1).clamp(max=log_share.shape[1] - 1).numpy()


def _smoothed(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Smoothed log weights and resampled indices `(S, T)`, k̂ and relative ESS `(T,)` of log weights `(S, T)`."""
    generator = np.random.default_rng(int(torch.randint(2**62, ())))
    log_weight, index = np.empty(raw.shape[::-1]), np.empty(raw.shape[::-1], dtype=np.int64)
    khat, ess = np.empty((2, raw.shape[1]))
    for some, weights in _in_blocks(raw):
        log_weight[some], khat[some] = psis.smooth(weights)
        ess[some] = psis.relative_ess(weights)
        index[some] = psis.resample(log_weight[some], len(raw), generator)
    return log_weight.T, index.T, khat, ess


def _diagnose(log_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """k̂ and relative ESS of each task from log weights `(K, T)`."""
    khat, ess = np.empty((2, log_weight.shape[1]))
    for some, weights in _in_blocks(log_weight):
        khat[some] = psis.smooth(weights)[1]
        ess[some] = psis.relative_ess(weights)
    return khat, ess


def _in_blocks(log_weight: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Which tasks, and their log weights `(T', K)`, of log weights `(K, T)`."""
    together = max(1, SMOOTHED_TOGETHER // len(log_weight))
    for start in range(0, log_weight.shape[1], together):
        some = slice(start, start + together)
        yield some, np.ascontiguousarray(log_weight[:, some].T)


def _flags(khat: np.ndarray, ess: np.ndarray, count: int) -> list[str]:
    limit = psis.khat_limit(count)
    good = psis.accepted(khat, ess, count)
    return [
        "" if ok else f"importance sampling failed: k̂ {k:.2f} (limit {limit:.2f}), relative ESS {e:.3f} (limit 0.2)"
        for ok, k, e in zip(good, khat, ess, strict=True)
    ]
