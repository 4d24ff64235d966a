"""Simulation-based calibration: is the posterior that comes out the posterior of the model that went in?

Parameters are drawn from the prior, data from the parameters, posterior draws from the data; the rank of a true value
among its posterior draws is then uniform. `sbc` asks it of the task posterior, one network for hundreds of data sets;
`refits.py` asks it of whole fits. The uniformity of ranks is judged by the simultaneous bands of `bands.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bayesmeta.checks import pictures
from bayesmeta.checks.alone import infer_alone
from bayesmeta.checks.bands import below, p_value
from bayesmeta.checks.encoders import train_encoder
from bayesmeta.checks.simulations import shells, simulate_each, values_of
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.hierarchy.tracing import Model
from bayesmeta.inference.amortized import Amortized
from bayesmeta.results.arguments import check_model, check_tasks, check_whole

TRAINING = 4096
"""Simulated tasks that the encoder is trained on."""
POOL = 20
"""Weighted draws for every equally weighted one."""
MIN_POOL = 1000
ALPHA = 0.05


@dataclass(frozen=True)
class Calibration:
    """Ranks of true values among posterior draws.

    Attributes:
        ranks: For every parameter, component by component, `(replicate,)` whole numbers 0 … draws.
        draws: Posterior draws of each replicate.
        sizes: Rows of the task of each replicate `(replicate,)`.
        flag: What the inference itself says is wrong with a replicate `(replicate,)`, "" if nothing. Flagged ones are
            left out of every test: they depend on the data and not on the true values, so that the ranks of the others
            stay uniform.
    """

    ranks: Mapping[str, np.ndarray]
    draws: int
    sizes: np.ndarray
    flag: np.ndarray

    @property
    def accepted(self) -> np.ndarray:
        """Which replicates are not flagged, bool `(replicate,)`."""
        return self.flag == ""

    @property
    def p(self) -> dict[str, float]:
        """For every parameter the probability that uniform ranks stray further, at any place, than its ranks do.

        Each is uniform by itself if the posterior is right, so that one in twenty is below 0.05. For all together see
        `inside`.
        """
        return {name: self._p(ranks, self.accepted) for name, ranks in self.ranks.items()}

    @property
    def inside(self) -> dict[str, bool]:
        """Whether the distribution function of each parameter's ranks stays inside its simultaneous band.

        The bands have probability 1 − 0.05 / (number of parameters): if all posteriors are right, the probability that
        any parameter at all is outside is at most 0.05, however the parameters depend on each other (Bonferroni).
        """
        return {name: p > ALPHA / len(self.ranks) for name, p in self.p.items()}

    @property
    def passed(self) -> bool:
        """Whether every parameter is inside its band."""
        return all(self.inside.values())

    def by_size(self) -> dict[int, dict[str, float]]:
        """p-values as `p`, for tasks of each size: with G sizes and P parameters compare them with 0.05 / (G P)."""
        found = {}
        for size in np.unique(self.sizes[self.accepted]):
            some = self.accepted & (self.sizes == size)
            found[int(size)] = {name: self._p(ranks, some) for name, ranks in self.ranks.items()}
        return found

    def _p(self, ranks: np.ndarray, some: np.ndarray) -> float:
        if not some.any():
            raise ValueError(
                f"calibration: all {len(some)} replicates are flagged ({self.flag[0]}); train longer, or with other "
                "options of method="
            )
        return p_value(ranks[some], self.draws)

    def counts(self, name: str) -> np.ndarray:
        """How many accepted replicates have a rank below k = 1 … draws: `(draws,)`."""
        return below(self.ranks[name][self.accepted], self.draws)

    def table(self) -> str:
        """A line a parameter: p-value, inside or outside, and the share of ranks in the lowest and highest tenth."""
        total, count = len(self.flag), int(self.accepted.sum())
        lines = [
            f"{count} of {total} replicates, {total - count} flagged and left out; {self.draws} draws",
            f"{'parameter':<24} {'p':>8}  {'band':<8} {'lowest 10 %':>12} {'highest 10 %':>13}",
        ]
        inside = self.inside
        for name, p in self.p.items():
            place = (self.ranks[name][self.accepted] + 0.5) / (self.draws + 1)
            low, high = (place < 0.1).mean(), (place > 0.9).mean()
            word = "inside" if inside[name] else "OUTSIDE"
            lines.append(f"{name:<24} {p:>8.4f}  {word:<8} {100 * low:>10.1f} % {100 * high:>11.1f} %")
        return "\n".join([*lines, *self._lines_by_size()])

    def _lines_by_size(self) -> list[str]:
        """A line for tasks of each size, where there are several: the parameter with the smallest p-value."""
        found = self.by_size()
        if len(found) < 2:
            return []
        lines = [f"{'tasks with':<14} {'replicates':>10}  {'smallest p':>10}  {'band':<8} parameter"]
        for size, p in found.items():
            name = min(p, key=p.__getitem__)
            word = "inside" if p[name] > ALPHA / (len(found) * len(p)) else "OUTSIDE"
            count = int((self.accepted & (self.sizes == size)).sum())
            lines.append(f"{size:>9} rows {count:>10}  {p[name]:>10.4f}  {word:<8} {name}")
        return lines

    def plot(self, path: str | os.PathLike[str], *, size: int | None = None) -> None:
        """Draws the ECDF difference of every parameter with its bands into a file (extra `plots`).

        Args:
            path: The file.
            size: Only tasks with so many rows; None all.

        Raises:
            ValueError: No accepted replicate has a task of that size.
        """
        some = self.accepted if size is None else self.accepted & (self.sizes == size)
        if size is not None and not some.any():
            there = sorted({int(one) for one in self.sizes[self.accepted]})
            raise ValueError(f"plot: expected the size of some accepted tasks, {there}, got {size}")
        counts = {name: below(ranks[some], self.draws) for name, ranks in self.ranks.items()}
        p = {name: self._p(ranks, some) for name, ranks in self.ranks.items()}
        probs = (1 - ALPHA, 1 - ALPHA / len(counts))
        pictures.rank_ecdfs(counts, int(some.sum()), probs=probs, p=p).savefig(path)


def sbc(
    model: Model,
    like: Tasks,
    *,
    truth: Model | None = None,
    replicates: int = 500,
    draws: int = 99,
    method: Amortized | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Simulation-based calibration of task posteriors: one data set a replicate, θ at its prior.

    Each replicate draws its own θ ~ p(θ), φ ~ p(φ | θ) and rows, and ranks the true θ, φ and log likelihood of the data
    among posterior draws given that data set alone, θ integrated out under its prior. One network, trained on
    simulations of the model, serves all of them; its draws are weighed as those of a fit are, and flagged alike.

    Args:
        model: Pyro function of a `Batch`, or a `HierarchicalModel`; it is what infers.
        like: Tasks that lend their x, columns and sizes, in turn; their labels are not used.
        truth: The model that simulates the replicates, by default `model`. Another one, with the same sites, shows
            whether the check would see its difference.
        replicates: Number of data sets.
        draws: Posterior draws L a replicate; ranks are 0 … L.
        method: Guide and optimizer, such as `bm.Amortized(family="flow")`; its `shared` and `objective` play no part.
        seed: Of everything.
        progress: Whether to show the bar of training.

    Returns:
        The ranks, by component: "phi[0]", "mu", "log likelihood".

    Raises:
        ValueError: A shared site has an improper prior (it cannot be simulated from), the tasks have weights, or the
            sites of `truth` differ.

    References:
        Talts et al.: Validating Bayesian Inference Algorithms with Simulation-Based Calibration, 2018,
        https://arxiv.org/abs/1804.06788
        Modrák et al.: Simulation-Based Calibration Checking for Bayesian Computation: The Choice of Test Quantities
        Shapes Sensitivity, 2023, https://doi.org/10.1214/23-BA1404
    """
    check_model(model)
    check_tasks("like", like)
    check_whole("replicates", replicates, 1)
    check_whole("draws", draws, 1)
    options = Amortized() if method is None else method
    with seeded(seed, "sbc"):
        learning, fresh = shells(like, TRAINING, name="simulated"), shells(like, replicates, name="replicate")
        density = TaskDensity(model, like)
        world = density if truth is None else same_sites(density, TaskDensity(truth, like))
        training = simulate_each(density, learning, density.draw_theta(TRAINING))
        guides = train_encoder(density, training, options, progress=progress)
        data = simulate_each(world, fresh, world.draw_theta(replicates))
        found = infer_alone(density, guides, data.tasks, draws=draws, pool=max(MIN_POOL, POOL * draws))
        drawn = values_of(density, data.tasks, found.theta, found.noise)
    return Calibration(ranked(drawn, data.values(world), seed=seed), draws, np.asarray(data.tasks.sizes), found.flag)


def same_sites(density: TaskDensity, other: TaskDensity) -> TaskDensity:
    """The other density, if the true values that it simulates can be ranked among draws of the first.

    Raises:
        ValueError: The sites differ.
    """
    mine, theirs = ({s.name: s.shape for s in d.structure.shared + d.structure.task} for d in (density, other))
    if mine != theirs:
        raise ValueError(f"truth: expected the sites of the model, {mine}, got {theirs}; give them the same sites")
    return other


def ranked(draws: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], *, seed: int) -> dict[str, np.ndarray]:
    """Ranks of true values among draws, component by component; ties are broken at random.

    Args:
        draws: `(draw, replicate, *event)`.
        truth: `(replicate, *event)`.
        seed: Of the ties.

    Returns:
        `(replicate,)` for every component but those that are known: the correlation of a thing with itself has no rank.
    """
    generator = np.random.default_rng(seed)
    found = {}
    for name in sorted(set(draws) & set(truth)):
        for place in np.ndindex(truth[name].shape[1:]):
            drawn, true = draws[name][:, :, *place], truth[name][:, *place]
            if (drawn != true).any():
                label = name + (f"[{','.join(map(str, place))}]" if place else "")
                ties = (drawn == true).sum(0)
                found[label] = (drawn < true).sum(0) + generator.integers(0, ties + 1)
    return found
