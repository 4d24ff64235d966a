"""A posterior of θ with several modes: a mixture of normals around particles that Stein variational gradients move."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bayesmeta.inference.gaussian import heavy_scale, normal_log_prob, student_t_log_prob
from bayesmeta.inference.laplace import mirrored
from bayesmeta.inference.shared import INITIAL_SD, WIDE, NormalShared
from bayesmeta.inference.svgd import kernel_shares

PARTICLES = 8
"""As many as a step draws θ: each step sees all."""
SPREAD = 0.3
"""Sd of the particles at the start, in units of the prior's sd."""


class ParticleShared(NormalShared):
    """q(θ) = Σ_m N(c + s·x_m, s L Lᵀ s) / M around M particles, with one full L.

    Particle m follows `Σ_j k_mj E ∇ (log p(θ_j) − log q(θ_j))`, θ_j a draw around particle j. k is the RBF kernel with
    the median heuristic in units of L, h ≤ d so that modes far from each other do not mix, its rows scaled to sum to
    one. By Stein's identity −∇ log q does on average what the gradient of the kernel does in Stein variational gradient
    descent: it keeps particles apart. The force is that of the objective, mixed by the kernel on its way back, so that
    objectives and training need not know. L follows the objective's own gradient; where one normal is enough, particles
    may move together and leave all the spread to L. Particles weigh alike, so that modes weigh as many particles as
    they have caught, until the correction weighs draws of θ.

    Args:
        loc: Prior location `(d,)` in unconstrained coordinates, around which particles start.
        scale: Prior scale `(d,)`, the unit of every parameter.
        particles: M.

    References:
        Liu, Wang: Stein Variational Gradient Descent, 2016, https://arxiv.org/abs/1608.04471
        Liu, Zhuo, Cheng, Zhang, Zhu, Carin: Understanding and Accelerating Particle-Based Variational Inference, 2019,
        https://arxiv.org/abs/1807.01750
    """

    def __init__(self, loc: Tensor, scale: Tensor, *, particles: int = PARTICLES) -> None:
        super().__init__(loc, scale)
        self.mean = nn.Parameter(SPREAD * mirrored(particles, len(loc), dtype=loc.dtype))

    def sample(self, count: int, *, wide: bool = False) -> Tensor:
        """Reparametrised draws `(count, d)`, as many around each particle as can be."""
        rounds = [torch.randperm(len(self.mean)) for _ in range(-(-count // len(self.mean)))]
        noise = torch.randn(count, self.mean.shape[1], dtype=self.mean.dtype)
        if wide:
            noise = WIDE * noise * heavy_scale((count, 1), noise)
        around = self._mixed()[torch.cat(rounds)[:count]]
        return self.origin + self.unit * (around + noise @ self.factor().mT)

    def log_prob(self, theta: Tensor, *, wide: bool = False) -> Tensor:
        """Log density `(S,)`, parameters held fixed."""
        with torch.no_grad():
            factor = WIDE * self.factor() if wide else self.factor()
            inverse = torch.linalg.solve_triangular(factor, self.unit.reciprocal().diag(), upper=False)
            log_det = inverse.diagonal().log().sum()
            loc = self.origin + self.unit * self.mean
        white = (theta.unsqueeze(1) - loc) @ inverse.mT
        density = student_t_log_prob if wide else normal_log_prob
        parts = density(white.square().sum(-1), log_det, theta.shape[-1])
        return parts.logsumexp(1) - math.log(len(loc))

    def recentre(self) -> None:
        """Moves origin and unit to the present q, so that an optimiser's steps are in units of a mode's sd."""
        loc, _ = self.centre()
        with torch.no_grad():
            unit = self.unit * self.factor().square().sum(-1).sqrt() / INITIAL_SD
            self.mean.copy_((self.origin + self.unit * self.mean - loc) / unit)
            self.log_diagonal.add_((self.unit / unit).log())
            self.origin.copy_(loc)
            self.unit.copy_(unit)

    def centre(self) -> tuple[Tensor, Tensor]:
        """Mean and marginal sd `(d,)` of the mixture, detached."""
        within, mean = self.factor().detach().square().sum(-1), self.mean.detach()
        between = (mean - mean.mean(0)).square().mean(0)
        return self.origin + self.unit * mean.mean(0), self.unit * (within + between).sqrt()

    def _mixed(self) -> Tensor:
        """The particles `(M, d)`; on the way back each takes the gradients of those near it."""
        still = self.mean.detach()
        white = torch.linalg.solve_triangular(self.factor().detach(), still.mT, upper=False).mT
        near, _ = kernel_shares(white, widest=max(1.0, white.shape[1]))
        return still + near.mT @ (self.mean - still)
