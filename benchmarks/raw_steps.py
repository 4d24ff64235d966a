"""Training steps written by hand in raw PyTorch, no Pyro: what `benchmarks.step_time` compares the engine with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

LOG_2PI = math.log(2 * math.pi)
Tasks = tuple[Tensor, Tensor]


class RawShared(nn.Module):
    """q(θ), a normal with full covariance in units of the prior."""

    def __init__(self, inputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        dim = 2 * inputs + 1
        self.unit = torch.cat([torch.full((inputs,), 5.0), torch.ones(inputs + 1)]).to(dtype)
        self.mean = nn.Parameter(torch.zeros(dim, dtype=dtype))
        self.log_diagonal = nn.Parameter(torch.full((dim,), math.log(0.1), dtype=dtype))
        self.lower = nn.Parameter(torch.zeros(dim, dim, dtype=dtype))
        self.eye = torch.eye(dim, dtype=dtype)

    def forward(self, draws: int) -> tuple[Tensor, Tensor]:
        """Draws of θ and their log density with the parameters held fixed."""
        factor = self.log_diagonal.exp().unsqueeze(-1) * (self.lower.tril(-1) + self.eye)
        noise = torch.randn(draws, len(self.mean), dtype=self.mean.dtype)
        theta = self.unit * (self.mean + noise @ factor.mT)
        held, mean = factor.detach(), self.mean.detach()
        white = torch.linalg.solve_triangular(held, (theta / self.unit - mean).mT, upper=False)
        log_det = held.diagonal().log().sum() + self.unit.log().sum()
        return theta, -0.5 * (white.square().sum(0) + len(mean) * LOG_2PI) - log_det

    def centre(self) -> tuple[Tensor, Tensor]:
        """Mean and sds."""
        with torch.no_grad():
            factor = self.log_diagonal.exp().unsqueeze(-1) * (self.lower.tril(-1) + self.eye)
            return self.unit * self.mean, self.unit * factor.square().sum(-1).sqrt()


def log_joint(theta: Tensor, noise: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """log p(θ) + Σ_i log p(φ_i, D_i | θ) of the regression in unconstrained, whitened coordinates, `(S,)`."""
    inputs = x.shape[-1]
    mu, log_tau, log_sigma = theta.split([inputs, inputs, 1], -1)
    tau, sigma = log_tau.exp(), log_sigma.exp()
    prior = (-0.5 * (mu / 5).square() - math.log(5) - 0.5 * LOG_2PI).sum(-1)
    for scale, log_scale in ((tau, log_tau), (sigma, log_sigma)):
        prior = prior + (-0.5 * scale.square() + math.log(2) - 0.5 * LOG_2PI + log_scale).sum(-1)
    beta = mu.unsqueeze(1) + tau.unsqueeze(1) * noise
    tasks = -0.5 * (noise.square() + LOG_2PI).sum((-1, -2))
    mean = (x * beta.unsqueeze(2)).sum(-1)
    white = (y - mean) / sigma.unsqueeze(-1)
    rows = -0.5 * white.square().sum((-1, -2)) - y.numel() * (log_sigma.squeeze(-1) + 0.5 * LOG_2PI)
    return prior + tasks + rows


class RawDeepSet(nn.Module):
    """5-32-32, mean over the rows, 32-32-8; returns Σ log q of a draw, the parameters held fixed."""

    def __init__(self, inputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.inputs, self.dtype = inputs, dtype
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in ((inputs + 1, 32), (32, 32), (32, 32), (32, 2 * inputs))
        )
        self.to(dtype)

    def forward(self, theta: Tensor, data: Tasks, centre: Tasks) -> tuple[Tensor, Tensor]:
        """Draws of φ `(S, T, d)` and Σ_i log q `(S,)`."""
        first, second, third, fourth = self.layers
        rows = torch.cat([data[0], data[1].unsqueeze(-1)], -1)
        loc, log_sd = fourth(silu(third(second(silu(first(rows))).mean(1)))).chunk(2, -1)
        noise = loc + log_sd.exp() * torch.randn(len(theta), *loc.shape, dtype=self.dtype)
        white = (noise - loc.detach()) * (-log_sd.detach()).exp()
        log_q = -0.5 * (white.square() + LOG_2PI).sum((-1, -2)) - log_sd.detach().sum()
        return noise, log_q


class RawNatural(nn.Module):
    """The algorithm of `bayesmeta.inference.guides.NaturalGuide` for rows that all tasks have the same number of."""

    def __init__(self, inputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        width, theta_dim, hidden, features, directions = inputs + 2, 2 * inputs + 1, 32, 24, 12
        self.dim, self.dtype = inputs, dtype
        self.pairs = torch.triu_indices(width, width)
        count = self.pairs.shape[1]
        sums = features + count
        self.row_sizes = [features, directions, 1]
        self.sizes = [sums, directions, width]
        self.summed = [sums, directions, width * width]
        self.rows = nn.ModuleList(nn.Linear(a, b) for a, b in ((width, 32), (32, 32), (32, features + directions + 1)))
        self.constant = nn.Parameter(0.1 * torch.randn(inputs, sum(self.sizes)))
        self.theta_first = nn.Linear(theta_dim, 2 * hidden)
        self.theta_second = nn.Linear(2 * hidden, inputs * sum(self.sizes))
        self.residual_task = nn.Linear(sums + directions + 1, hidden)
        self.residual_theta = nn.Linear(theta_dim, hidden, bias=False)
        self.residual_out = nn.Linear(hidden, inputs + inputs * (inputs + 1) // 2)
        for layer in (self.theta_second, self.residual_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.place = torch.tril_indices(inputs, inputs)

    def summaries(self, data: Tasks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encodes the rows and sums them."""
        x, y = data[0].float(), data[1].float()
        rows = torch.cat([torch.ones_like(y).unsqueeze(-1), x, y.unsqueeze(-1)], -1)
        hidden = rows
        for layer in self.rows[:-1]:
            hidden = silu(layer(hidden))
        features, gates, gate = self.rows[-1](hidden).split(self.row_sizes, -1)
        gates, gate = -logsigmoid(-gates), -logsigmoid(-gate)
        products = rows[..., self.pairs[0]] * rows[..., self.pairs[1]]
        sums = torch.cat([features, products], -1).mean(1)
        gated = gates.mean(1)
        outer = torch.einsum("tni,tnj->tij", rows * gate, rows) / y.shape[1]
        count = torch.full((len(y), 1), math.log1p(y.shape[1]))
        return sums, gated, outer, self.residual_task(torch.cat([sums, gated, count], -1))

    def forward(self, theta: Tensor, data: Tasks, centre: Tasks) -> tuple[Tensor, Tensor]:
        """Draws of φ `(S, T, d)` and Σ_i log q `(S,)` with the sticking-the-landing gradient."""
        sums, gated, outer, known = self.summaries(data)
        standard = 3 * torch.tanh(((theta - centre[0]) / centre[1]).float() / 3)
        joint = self.constant + self.theta_second(silu(self.theta_first(standard))).unflatten(-1, self.constant.shape)
        weights, directions, linear = joint.split(self.sizes, -1)
        eta = (weights @ sums.mT).mT
        precision = (directions.unsqueeze(1) * gated.unsqueeze(1)) @ directions.mT.unsqueeze(1)
        precision = precision + linear.unsqueeze(1) @ outer @ linear.mT.unsqueeze(1)
        factor = torch.linalg.cholesky(precision.to(self.dtype) + torch.eye(self.dim, dtype=self.dtype))
        out = self.residual_out(silu(known + self.residual_theta(standard).unsqueeze(1)))
        out = (out * (data[1].shape[1] / (data[1].shape[1] + 1))).to(self.dtype)
        shift, lower = out.split([self.dim, out.shape[-1] - self.dim], -1)
        bend = torch.zeros(*out.shape[:-1], self.dim, self.dim, dtype=self.dtype)
        bend[..., self.place[0], self.place[1]] = lower
        bend = bend.tril(-1) + torch.diag_embed(bend.diagonal(dim1=-2, dim2=-1).clamp(-5, 5).exp())
        half = torch.linalg.solve_triangular(factor, eta.to(self.dtype).unsqueeze(-1), upper=False)
        loc = torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(-1) + shift
        scale = factor @ bend
        noise = torch.randn_like(loc).unsqueeze(-1)
        drawn = loc + torch.linalg.solve_triangular(scale.mT, noise, upper=True).squeeze(-1)
        return drawn, self.held(loc, scale, drawn, theta)

    def held(self, loc: Tensor, scale: Tensor, drawn: Tensor, theta: Tensor) -> Tensor:
        """Σ log q `(S,)` as a function of φ and θ only."""
        at = drawn.detach().requires_grad_()
        white = ((at - loc).unsqueeze(-2) @ scale).squeeze(-2)
        log_det = scale.diagonal(dim1=-2, dim2=-1).log().sum((-1, -2))
        log_q = log_det - 0.5 * (white.square() + LOG_2PI).sum((-1, -2))
        by_drawn, by_theta = torch.autograd.grad(log_q.sum(), [at, theta], retain_graph=True)
        moved = (by_drawn * (drawn - at.detach())).sum((-1, -2)) + (by_theta * (theta - theta.detach())).sum(-1)
        return log_q.detach() + moved


def raw_step(guide: nn.Module, x: Tensor, y: Tensor, draws: int) -> Callable[[], None]:
    """One training step by hand."""
    shared = RawShared(x.shape[-1], x.dtype)
    adam = torch.optim.Adam([*shared.parameters(), *guide.parameters()], lr=1e-3, fused=True)

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        theta, log_q_theta = shared(draws)
        noise, log_q = guide(theta, (x, y), shared.centre())
        loss = -(log_joint(theta, noise, x, y) - log_q_theta - log_q).mean() / len(x)
        loss.backward()
        adam.step()
        float(loss.detach())

    return step
