"""Functions drawn from Gaussian processes whose kernels differ by task: the standard tables of neural processes.

The oracle integrates over length and scale on a grid that crowds, task by task, where their posterior is; given
these it is Gaussian process regression.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesmeta.data.families.base import (
    Family,
    Interval,
    check_dim,
    check_intervals,
    check_positive,
    draw_sizes,
    normal,
    uniform,
)
from bayesmeta.data.families.grids import cells, refined
from bayesmeta.data.families.kernels import KERNELS, PERIODIC, differences
from bayesmeta.data.families.mixtures import mixture_of_normals
from bayesmeta.data.families.regression import condition, predict
from bayesmeta.data.families.rows import Rows

ELEMENTS = 1 << 19
"""Entries of covariances that are held at once."""
REGIMES: dict[str, tuple[Interval, Interval]] = {
    "interpolation": ((-2.0, 2.0), (-2.0, 2.0)),
    "beyond": ((2.0, 6.0), (2.0, 6.0)),
    "extrapolation": ((-2.0, 2.0), (2.0, 6.0)),
}
"""Inputs of contexts and of targets."""
_LENGTHS = {"rbf": 0.25, "matern52": 0.25, "weakly_periodic": 0.5}


@dataclass(frozen=True)
class Kernels:
    """Kernels of tasks on a grid: K = L · S of them each.

    Attributes:
        length: `(T, L)`.
        scale: `(T, S)`.
        period: `(T,)`.
        log_prior: Log prior probabilities `(T, K)`.
    """

    length: Tensor
    scale: Tensor
    period: Tensor
    log_prior: Tensor

    def __getitem__(self, tasks: Tensor) -> Kernels:
        """Returns those of some tasks."""
        return Kernels(self.length[tasks], self.scale[tasks], self.period[tasks], self.log_prior[tasks])

    @property
    def count(self) -> int:
        """K."""
        return self.log_prior.shape[1]

    def variance(self) -> Tensor:
        """Prior variances of the function `(T, K)`."""
        return self.scale.square().unsqueeze(1).expand(-1, self.length.shape[1], -1).flatten(1)

    def covariance(self, kernel: str, first: Tensor, second: Tensor) -> Tensor:
        """Covariances `(T, K, N, M)` at inputs `(T, N, dim)` and `(T, M, dim)`."""
        length, period = self.length[..., None, None], self.period[:, None, None, None]
        correlation = KERNELS[kernel](differences(first, second).unsqueeze(1), length, period)
        scaled = correlation.unsqueeze(2) * self.scale.square()[:, None, :, None, None]
        return scaled.flatten(1, 2)


@dataclass(frozen=True, kw_only=True)
class GaussianProcesses(Family):
    """y = g(x) + noise ε, g a Gaussian process with its own length and scale in each task; the first numbers are TNP's.

    A hyper-parameter is an interval, from which tasks draw uniformly, or a number, which all have. Truth: "length",
    "scale" and, for periodic kernels, "period", `(task,)` each. `GaussianProcesses.suite` has fixed ones.

    Attributes:
        kernel: "rbf", "matern52", "periodic" or "weakly_periodic".
        length: Length l of the kernel.
        scale: Standard deviation s of the function.
        period: Period p of periodic kernels; the oracle wants a number.
        noise: Standard deviation of labels.
        dim: Inputs of a row.
        interval: Interval of each input of contexts, uniform.
        target_interval: Likewise of targets; None for the same.
        context_rows: Rows of an episode's context.
        target_rows: Rows of an episode's target.
        most_rows: Most rows of both together, to which the largest target is cut; None for any number.
        grid: Nodes in length and in scale over which the oracle integrates where they are intervals; with 12 its log
            scores are exact to .0002 on average.

    Raises:
        ValueError: If the kernel is unknown, or a number or interval out of range.

    References:
        Nguyen, Grover: Transformer Neural Processes, 2022, https://arxiv.org/abs/2207.04179

    Example:
        >>> tasks, truth = GaussianProcesses(kernel="matern52").simulate(4, rows=(5, 10))
        >>> len(tasks), sorted(truth)
        (4, ['length', 'scale'])
    """

    kernel: str = "rbf"
    length: float | Interval = (0.1, 0.6)
    scale: float | Interval = (0.1, 1.0)
    period: float | Interval = (0.1, 0.5)
    noise: float = 0.02
    dim: int = 1
    interval: Interval = (-2.0, 2.0)
    target_interval: Interval | None = None
    context_rows: int | tuple[int, int] = (3, 46)
    target_rows: int | tuple[int, int] = (3, 46)
    most_rows: int | None = 49
    grid: int = 12

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"GaussianProcesses: expected kernel as one of {list(KERNELS)}, got {self.kernel!r}")
        for name in ("length", "scale", "period"):
            value = getattr(self, name)
            low = value[0] if isinstance(value, tuple) else value
            check_positive("GaussianProcesses", **{name: low})
            if isinstance(value, tuple):
                check_intervals("GaussianProcesses", **{name: value})
        target = self.target_interval or self.interval
        check_intervals("GaussianProcesses", interval=self.interval, target_interval=target)
        check_positive("GaussianProcesses", noise=self.noise, grid=self.grid)
        check_dim("GaussianProcesses", self.dim)

    @classmethod
    def suite(cls, kernel: str, *, dim: int = 1, regime: str = "interpolation") -> GaussianProcesses:
        """The suite of the convolutional neural processes: fixed kernels, noise variance .05, three ranges of inputs.

        Args:
            kernel: "rbf" (called EQ there), "matern52" or "weakly_periodic".
            dim: Inputs of a row, 1 to 3; lengths grow with √dim, sizes with dim.
            regime: "interpolation", "beyond" (contexts and targets moved aside) or "extrapolation" (targets alone).

        Raises:
            ValueError: If the kernel or the regime is unknown.

        References:
            Bruinsma et al.: Autoregressive Conditional Neural Processes, 2023, https://arxiv.org/abs/2303.14468
        """
        if kernel not in _LENGTHS or regime not in REGIMES:
            raise ValueError(
                f"GaussianProcesses.suite: expected a kernel of {list(_LENGTHS)} and a regime of {list(REGIMES)}, got "
                f"{kernel!r} and {regime!r}"
            )
        check_dim("GaussianProcesses.suite", dim)
        interval, target_interval = REGIMES[regime]
        return cls(
            kernel=kernel,
            length=_LENGTHS[kernel] * math.sqrt(dim),
            scale=1.0,
            period=0.25 * math.sqrt(dim),
            noise=math.sqrt(0.05),
            dim=dim,
            interval=interval,
            target_interval=target_interval,
            context_rows=(0, 30 * dim),
            target_rows=50 * dim,
            most_rows=None,
        )

    def sizes(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws the sizes of n contexts, and of targets that leave no more than `most_rows` together."""
        given = draw_sizes(self.context_rows, n, generator)
        if self.most_rows is None or not isinstance(self.target_rows, tuple):
            return given, draw_sizes(self.target_rows, n, generator)
        low, high = self.target_rows
        widths = (self.most_rows - given).clamp(max=high) - low + 1
        if int(widths.min()) < 1:
            raise ValueError(
                f"GaussianProcesses: a context of {int(given.max())} rows leaves no {low} of most_rows="
                f"{self.most_rows} for the target; raise most_rows or lower context_rows"
            )
        return given, low + (torch.rand(n, generator=generator) * widths).long()

    def inputs(self, tasks: int, rows: int, generator: torch.Generator, *, target: bool = False) -> Tensor:
        """Draws inputs, uniform."""
        interval = (target and self.target_interval) or self.interval
        return uniform((tasks, rows, self.dim), interval, generator)

    def labels(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draws functions, with noise, at inputs `(T, N, dim)`."""
        names = ("length", "scale", *(("period",) if self.kernel in PERIODIC else ()))
        truth = {name: _draw(getattr(self, name), len(x), generator) for name in names}
        y, kernels = torch.empty(x.shape[:2], dtype=torch.float64), self.known(truth)
        for tasks in torch.arange(len(x)).split(max(1, ELEMENTS // x.shape[1] ** 2)):
            covariance = kernels[tasks].covariance(self.kernel, x[tasks], x[tasks])[:, 0]
            lower = torch.linalg.cholesky(covariance + self.noise**2 * torch.eye(x.shape[1], dtype=torch.float64))
            y[tasks] = (lower @ normal((*y[tasks].shape, 1), generator)).squeeze(-1)
        return y, truth

    def predictive(self, rows: Rows, x: Tensor) -> Distribution:
        """A mixture over the grid of Gaussian process regressions; with fixed hyper-parameters a `Normal`."""
        return self.predictive_given(self._grid(rows), rows, x)

    def evidence(self, rows: Rows) -> Tensor:
        """Log density of all rows of each task."""
        return self.evidences(self._grid(rows), rows).logsumexp(-1)

    def known(self, truth: Mapping[str, Tensor]) -> Kernels:
        """The kernels of tasks whose truth is known, each value `(T,)`."""
        none = torch.zeros_like(truth["length"])
        return Kernels(truth["length"][:, None], truth["scale"][:, None], truth.get("period", none), none[:, None])

    def predictive_given(self, kernels: Kernels, rows: Rows, x: Tensor) -> Distribution:
        """The predictive of each new row alone where the kernel is one of these."""
        shape = (len(rows), kernels.count)
        log_weight = torch.empty(shape, dtype=torch.float64)
        loc, sd = (torch.empty((shape[0], x.shape[1], shape[1]), dtype=torch.float64) for _ in range(2))
        widest = rows.mask.shape[1]
        for tasks in rows.chunks(kernels.count * widest * (widest + x.shape[1]), ELEMENTS):
            some, theirs = rows[tasks], kernels[tasks]
            covariance = theirs.covariance(self.kernel, some.x, some.x)
            log_evidence, *conditioned = condition(covariance, some.y, some, self.noise)
            cross, prior = theirs.covariance(self.kernel, some.x, x[tasks]), theirs.variance().unsqueeze(-1)
            log_weight[tasks] = log_evidence + theirs.log_prior
            loc[tasks], sd[tasks] = predict(cross, prior, (conditioned[0], conditioned[1]), some, self.noise)
        return mixture_of_normals(log_weight, loc, sd)

    def evidences(self, kernels: Kernels, rows: Rows) -> Tensor:
        """Log density of all rows of each task together with each kernel, `(T, K)`."""
        found = torch.empty((len(rows), kernels.count), dtype=torch.float64)
        for tasks in rows.chunks(kernels.count * rows.mask.shape[1] ** 2, ELEMENTS):
            some, theirs = rows[tasks], kernels[tasks]
            covariance = theirs.covariance(self.kernel, some.x, some.x)
            found[tasks] = condition(covariance, some.y, some, self.noise)[0] + theirs.log_prior
        return found

    def _grid(self, rows: Rows) -> Kernels:
        """Kernels for each task that crowd where its posterior is."""
        if self.kernel in PERIODIC and isinstance(self.period, tuple):
            raise ValueError(
                f"GaussianProcesses: the Bayes-optimal predictive of the kernel {self.kernel!r} is not known where the "
                f"period is an interval, {self.period}; give the period as a number"
            )
        length, scale = (_edges(value, self.grid).repeat(len(rows), 1) for value in (self.length, self.scale))
        kernels = self._kernels(length, scale)
        if kernels.count == 1:
            return kernels
        mass = self.evidences(kernels, rows).unflatten(1, (kernels.length.shape[1], -1))
        length = refined(length, mass.logsumexp(2)) if isinstance(self.length, tuple) else length
        scale = refined(scale, mass.logsumexp(1)) if isinstance(self.scale, tuple) else scale
        return self._kernels(length, scale)

    def _kernels(self, length: Tensor, scale: Tensor) -> Kernels:
        """Kernels at the middles of cells, weighed by their sizes; edges `(T, L + 1)` and `(T, S + 1)`."""
        (length, first), (scale, second) = _middles(length), _middles(scale)
        period = torch.full((len(length),), 1.0 if isinstance(self.period, tuple) else self.period, dtype=torch.float64)
        log_prior = (first.unsqueeze(-1) * second.unsqueeze(-2)).log().flatten(1)
        return Kernels(length, scale, period, log_prior)


def _draw(value: float | Interval, n: int, generator: torch.Generator) -> Tensor:
    if isinstance(value, tuple):
        return uniform((n,), value, generator)
    return torch.full((n,), value, dtype=torch.float64)


def _edges(value: float | Interval, count: int) -> Tensor:
    """Edges of `count` equal cells of an interval, or of one cell around a number."""
    if not isinstance(value, tuple):
        return torch.full((2,), value, dtype=torch.float64)
    return torch.linspace(*value, count + 1, dtype=torch.float64)


def _middles(edges: Tensor) -> tuple[Tensor, Tensor]:
    """Middles of cells `(T, K)` and their shares of the interval, 1 for a cell around a number."""
    middle, width = cells(edges)
    return middle, width / width.sum(-1, keepdim=True) if edges.shape[1] > 2 else torch.ones_like(width)
