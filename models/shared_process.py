"""A Gaussian process that all tasks share, and one of each task's own around it.

y_ij = M(x_ij) + g_i(x_ij) + ε_ij with M ~ GP(m, k_M), g_i ~ GP(0, k_g), ε ~ N(0, σ²): two rows have the covariance
k_M(x, x') + [same task] k_g(x, x') + [same row] σ², the exchangeable prior of functions. Both kernels are the sum of a
level, a linear part and a smooth part; their numbers maximise the exact evidence of all training rows with a weak
prior, from several starts. Few tasks with few rows are enough: nothing is trained on episodes. A new task is predicted
given its own rows and all training rows; rows of a training task that are given again count twice.

Deviations from the paper: a linear part and a level; a prior over the kernels' numbers.

References:
    Hensman, Lawrence, Rattray: Hierarchical Bayesian modelling of gene expression time series across irregularly
    sampled replicates and clusters, 2013, https://doi.org/10.1186/1471-2105-14-252
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

import bayesmeta as bm
from bayesmeta.models.arguments import check_tasks

MOST_ROWS = 4000
JITTER = 1e-6
"""Of the labels' variance, beside the noise."""
SPREAD = 1.0
"""Prior sd of the logarithms of the kernels' numbers around `START`, in standard units of x and y."""
START = {
    "length": 0.0,
    "scale": 0.0,
    "linear": -1.0,
    "level": -3.0,
    "own_length": 0.0,
    "own_scale": -1.0,
    "own_linear": -2.0,
    "own_level": -2.0,
    "noise": -2.0,
    "period": 0.0,
}
PERIODS = (0.4, 0.7, 1.0, 1.5, 2.2)
"""Where searches for a period start, in sds of x; lengths start at the same."""
Smooth = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def rbf(x: Tensor, z: Tensor, length: Tensor, period: Tensor) -> Tensor:
    """exp(-|x - z|² / 2l²), `(…, N, M)` of inputs `(…, N, d)` and `(…, M, d)`."""
    return torch.exp(-0.5 * ((x.unsqueeze(-2) - z.unsqueeze(-3)) / length).square().sum(-1))


def periodic(x: Tensor, z: Tensor, length: Tensor, period: Tensor) -> Tensor:
    """exp(-2 Σ_k sin²(π (x_k - z_k) / p) / l²)."""
    wave = torch.sin(math.pi * (x.unsqueeze(-2) - z.unsqueeze(-3)) / period)
    return torch.exp(-2 * (wave / length).square().sum(-1))


KERNELS: dict[str, Smooth] = {"rbf": rbf, "periodic": periodic}


def build(tasks: bm.Tasks, *, kernel: str | None = None) -> bm.ConditionalModel:
    """A shared process, its kernels learned from tasks; `bm.fit(model, tasks)` has nothing left to train.

    Args:
        tasks: Training tasks, together 2 to 4,000 rows of real inputs and one real label.
        kernel: The smooth part of both kernels, "rbf" or "periodic"; None for "rbf", with one input for the one of the
            higher evidence.

    Raises:
        ValueError: The kernel is unknown, or the tasks do not fit.
    """
    _check(tasks, kernel)
    tried = [kernel] if kernel else list(KERNELS) if tasks.x.shape[1] == 1 else ["rbf"]
    found = [SharedProcess(tasks, name).learned() for name in tried]
    return bm.ConditionalModel(max(found, key=lambda module: float(module.log_evidence())))


def _check(tasks: bm.Tasks, kernel: str | None) -> None:
    if kernel is not None and kernel not in KERNELS:
        raise ValueError(f"shared_process: expected kernel as one of {sorted(KERNELS)} or None, got {kernel!r}")
    check_tasks("shared_process", tasks)
    shaped = tasks.y.dim() == 1 and tasks.x.dim() == 2 and tasks.x.shape[1] > 0
    if not (shaped and 1 < len(tasks.y) <= MOST_ROWS and bool(tasks.observed.all())):
        raise ValueError(
            f"shared_process: expected 2 to {MOST_ROWS} rows with inputs (row, d) and one label each, none missing, "
            f"got x {tuple(tasks.x.shape)} and y {tuple(tasks.y.shape)}; take fewer tasks, or another model"
        )


class SharedProcess(nn.Module):
    """The rows that were learned from and the kernels' numbers; everything in standard units."""

    x: Tensor
    y: Tensor
    task: Tensor
    units: Tensor
    label_units: Tensor
    log_numbers: Tensor
    kernel: Tensor

    def __init__(self, tasks: bm.Tasks, kernel: str) -> None:
        super().__init__()
        x, y = tasks.x.double(), tasks.y.double()
        sd = x.std(0)
        self.register_buffer("units", torch.stack([x.mean(0), torch.where(sd > 0, sd, 1.0)]))
        self.register_buffer("label_units", torch.stack([y.mean(), y.std().clamp(min=torch.finfo(y.dtype).tiny)]))
        self.register_buffer("x", (x - self.units[0]) / self.units[1])
        self.register_buffer("y", (y - y.mean()) / self.label_units[1])
        self.register_buffer(
            "task", torch.arange(len(tasks)).repeat_interleave(torch.as_tensor(np.asarray(tasks.sizes)))
        )
        self.register_buffer("log_numbers", torch.tensor(list(START.values()), dtype=torch.float64))
        # A number, so that a stored one comes back with the numbers that belong to it.
        self.register_buffer("kernel", torch.tensor(list(KERNELS).index(kernel)))

    def learned(self) -> SharedProcess:
        """The same with the numbers of the highest posterior density, from several starts."""
        best, start = -math.inf, self.log_numbers
        for period in PERIODS:
            numbers = start.clone()
            numbers[[0, 4, 9]] = math.log(period)
            value, numbers = self._ascended(numbers)
            if value > best:
                best, self.log_numbers = value, numbers
        if best == -math.inf:
            raise ValueError("shared_process: no start led to a finite evidence; check the labels' units")
        return self

    def log_evidence(self) -> Tensor:
        """Log density of the training labels, with the log prior of the kernels' numbers."""
        return self._objective(self.log_numbers)

    def forward(self, context: bm.Batch, x: Tensor) -> torch.distributions.Normal:
        """Each new row alone: `Normal` of batch shape `(T, M)`."""
        mean, covariance = self._prior(torch.cat([context.x, x], 1).double())
        given, n = context.mask & context.observed, context.x.shape[1]
        both = given.unsqueeze(-1) & given.unsqueeze(-2)
        inner = torch.where(both, covariance[:, :n, :n], torch.eye(n, dtype=torch.float64))
        left = torch.where(given, (context.y.double() - self.label_units[0]) / self.label_units[1] - mean[:, :n], 0.0)
        lower = torch.linalg.cholesky(inner)
        across = torch.linalg.solve_triangular(lower, covariance[:, :n, n:] * given.unsqueeze(-1), upper=False)
        white = torch.linalg.solve_triangular(lower, left.unsqueeze(-1), upper=False)
        loc = mean[:, n:] + (across * white).sum(-2)
        variance = covariance.diagonal(dim1=-2, dim2=-1)[:, n:] - across.square().sum(-2)
        loc, sd = self.label_units[0] + self.label_units[1] * loc, self.label_units[1] * variance.sqrt()
        return torch.distributions.Normal(loc.to(x.dtype), sd.to(x.dtype))

    def _prior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the training rows say of a new task: mean `(T, N)` and covariance `(T, N, N)` of its labels."""
        x = (x - self.units[0]) / self.units[1]
        lower = torch.linalg.cholesky(self._covariance(self.log_numbers))
        numbers = self._named(self.log_numbers)
        across = torch.linalg.solve_triangular(
            lower, self._shared(self.x.expand(len(x), -1, -1), x, numbers), upper=False
        )
        white = torch.linalg.solve_triangular(lower, self.y.unsqueeze(-1), upper=False)
        own = self._own(x, x, numbers) + numbers["noise"].square() * torch.eye(x.shape[1], dtype=torch.float64)
        return (across * white).sum(-2), self._shared(x, x, numbers) + own - across.mT @ across

    def _objective(self, log_numbers: Tensor) -> Tensor:
        lower, info = torch.linalg.cholesky_ex(self._covariance(log_numbers))
        if int(info) > 0:
            return log_numbers.sum() * 0 - math.inf
        white = torch.linalg.solve_triangular(lower, self.y.unsqueeze(-1), upper=False)
        off = (log_numbers - torch.tensor(list(START.values()), dtype=torch.float64)) / SPREAD
        size = 0.5 * len(self.y) * math.log(2 * math.pi)
        return -0.5 * white.square().sum() - lower.diagonal().log().sum() - 0.5 * off.square().sum() - size

    def _ascended(self, start: Tensor) -> tuple[float, Tensor]:
        numbers = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([numbers], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = -self._objective(numbers).clamp(min=-1e10)
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        value = float(self._objective(numbers.detach()))
        return (value if math.isfinite(value) else -math.inf), numbers.detach()

    def _covariance(self, log_numbers: Tensor) -> Tensor:
        """Of all training labels."""
        numbers = self._named(log_numbers)
        same = self.task.unsqueeze(-1) == self.task
        noise = (numbers["noise"].square() + JITTER) * torch.eye(len(self.y), dtype=torch.float64)
        return self._shared(self.x, self.x, numbers) + same * self._own(self.x, self.x, numbers) + noise

    def _shared(self, x: Tensor, z: Tensor, numbers: dict[str, Tensor]) -> Tensor:
        smooth = numbers["scale"].square() * self._smooth(x, z, numbers["length"], numbers["period"])
        return smooth + numbers["linear"].square() * x @ z.mT + numbers["level"].square()

    def _own(self, x: Tensor, z: Tensor, numbers: dict[str, Tensor]) -> Tensor:
        smooth = numbers["own_scale"].square() * self._smooth(x, z, numbers["own_length"], numbers["period"])
        return smooth + numbers["own_linear"].square() * x @ z.mT + numbers["own_level"].square()

    def _smooth(self, x: Tensor, z: Tensor, length: Tensor, period: Tensor) -> Tensor:
        return list(KERNELS.values())[int(self.kernel)](x, z, length, period)

    @staticmethod
    def _named(log_numbers: Tensor) -> dict[str, Tensor]:
        return dict(zip(START, log_numbers.exp().unbind(), strict=True))
