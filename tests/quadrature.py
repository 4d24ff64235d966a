"""Answers by quadrature to the models of `test_user_scripts.py`: data, posterior means and sds, predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.special import expit, log_softmax, ndtr
from scipy.stats import binom, norm
from torch import Tensor

from bayesmeta.data.tasks import Tasks

SPREAD = 1.5
READINGS = [[3, 4, 4], [1], [2, 0, 1, 1], [6, 5], [3], [2, 3, 3, 5]]
WINS = [[2, 0], [7], [1, 3, 0], [9, 8], [5], [0, 1]]
GAMES = [[9, 4], [10], [12, 9, 3], [11, 9], [12], [6, 5]]
NUGGET = 0.3


def theta_moments(log_theta: np.ndarray, means: list[Any], squares: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Averages conditional moments over a grid of θ; of the first two values, θ itself, squares are their own."""
    weight = np.exp(log_theta - log_theta.max())
    weight /= weight.sum()
    first = np.array([(weight * v).sum() for v in means])
    second = np.array([(weight * v).sum() for v in (means[0] ** 2, means[1] ** 2, *squares)])
    return first, np.sqrt(second - first**2)


def rounded_answer() -> tuple[np.ndarray, np.ndarray]:
    """Means and sds of (mu, noise, every phi) by quadrature; mu ~ N(0, 5), noise ~ HalfNormal(1)."""
    mu, noise, phi = np.linspace(-3, 8, 111), np.linspace(0.15, 4, 120), np.linspace(-5, 12, 341)
    prior = norm(mu[:, None], SPREAD).pdf(phi)
    log_theta = norm(0, 5).logpdf(mu)[:, None] - 0.5 * noise**2
    first, second = [], []
    for row in READINGS:
        off = np.array(row)[:, None, None] - phi
        likely = np.prod(ndtr((off + 0.5) / noise[:, None]) - ndtr((off - 0.5) / noise[:, None]), 0)
        evidence = prior @ likely.T
        log_theta = log_theta + np.log(evidence)
        first.append(prior @ (likely * phi).T / evidence)
        second.append(prior @ (likely * phi**2).T / evidence)
    return theta_moments(log_theta, [*np.meshgrid(mu, noise, indexing="ij"), *first], second)


def binomial_answer() -> tuple[np.ndarray, np.ndarray]:
    """Means and sds of (mu, tau, every phi) by quadrature; mu ~ N(0, 2), tau ~ HalfNormal(1)."""
    mu, tau = np.linspace(-4, 4, 161), np.linspace(1e-3, 5, 201)
    nodes, weights = hermegauss(80)
    m, s = np.meshgrid(mu, tau, indexing="ij")
    phi = m[..., None] + s[..., None] * nodes
    log_theta = norm(0, 2).logpdf(m) - 0.5 * s**2
    first, second = [], []
    for wins, games in zip(WINS, GAMES, strict=True):
        rows = sum(binom.logpmf(k, n, expit(phi)) for k, n in zip(wins, games, strict=True))
        terms = np.exp(rows) * weights
        evidence = terms.sum(-1)
        log_theta = log_theta + np.log(evidence)
        first.append((terms * phi).sum(-1) / evidence)
        second.append((terms * phi**2).sum(-1) / evidence)
    return theta_moments(log_theta, [m, s, *first], second)


def kernel(a: Any, b: Any, length: Any) -> Any:
    squared = ((a[..., :, None] - b[..., None, :]) / length) ** 2
    return torch.exp(-0.5 * squared) if isinstance(squared, Tensor) else np.exp(-0.5 * squared)


def process_answer(tasks: Tasks, new: np.ndarray) -> tuple[np.ndarray, ...]:
    """Means and sds of every level `(T,)` and of new rows `(T, M)`, by quadrature over the length; rest closed form."""
    grid = np.linspace(-2.5, 2.5, 161)
    log_weight = -0.5 * (grid / 0.5) ** 2
    rows = [(task.x[:, 0].numpy(), task.y.numpy()) for task in tasks]
    found = np.zeros((len(grid), 4, len(rows), len(new)))
    for g, length in enumerate(np.exp(grid)):
        for t, (x, y) in enumerate(rows):
            noise = NUGGET**2 * np.eye(len(x))
            # The level is Gaussian: integrated out, it adds 2² to the kernel.
            covariance = kernel(x, x, length) + noise + 4.0
            log_weight[g] -= 0.5 * (y @ np.linalg.solve(covariance, y) + np.linalg.slogdet(covariance)[1])
            level = 4.0 * np.ones_like(x) @ np.linalg.inv(covariance)
            cross = (kernel(x, new, length) + 4.0).T @ np.linalg.inv(covariance)
            rest = 1.0 + NUGGET**2 + 4.0 - np.einsum("mn,nm->m", cross, kernel(x, new, length) + 4.0)
            for k, value in enumerate((level @ y, 4.0 - 4.0 * level.sum(), cross @ y, rest)):
                found[g, k, t] = value
    weight = np.exp(log_weight - log_weight.max())
    weight = (weight / weight.sum())[:, None, None]
    mean, spread = ((weight * found[:, i]).sum(0) for i in (0, 2)), ((0, 1), (2, 3))
    means = list(mean)
    sds = [
        np.sqrt((weight * (found[:, v] + found[:, m] ** 2)).sum(0) - means[i] ** 2) for i, (m, v) in enumerate(spread)
    ]
    return means[0][:, 0], sds[0][:, 0], means[1], sds[1]


def halves(pictures: Any) -> Any:
    """Two features of a picture: its brightness on the left and at the top."""
    left, top = pictures[..., :, :4].sum((-1, -2)) / 8, pictures[..., :4, :].sum((-1, -2)) / 8
    return (torch.stack if isinstance(left, Tensor) else np.stack)([left, top], -1)


def classes_answer(task: Tasks, ahead: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means and sds of φ `(2,)`, and the chance of each class at new pictures `(M, 3)`."""
    grid = np.stack(np.meshgrid(*[np.linspace(-8, 8, 161)] * 2, indexing="ij"), -1).reshape(-1, 1, 2)

    def logits(x: Any) -> np.ndarray:
        scores = halves(np.asarray(x, dtype=float)) * grid
        return log_softmax(np.concatenate([np.zeros_like(scores[..., :1]), scores], -1), -1)

    rows = np.take_along_axis(logits(task.x), task.y.numpy()[None, :, None], -1)[..., 0].sum(1)
    weight = np.exp(rows - rows.max() - 0.5 * (grid[:, 0] ** 2).sum(-1) / tau**2)
    weight /= weight.sum()
    mean = weight @ grid[:, 0]
    sd = np.sqrt(weight @ grid[:, 0] ** 2 - mean**2)
    return mean, sd, np.einsum("g,gmk->mk", weight, np.exp(logits(ahead)))
