"""The evidence of tasks at draws of θ, and what is known of θ without a task.

`misfits.py` and `cross_validation.py` call it; it is the one place of this room that looks inside a fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.fitting import Fit
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import psis
from bayesmeta.inference.candidates import log_evidence
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.weighing import resample_theta

PER_THETA = 16
"""Candidates a task and θ in an estimate of the evidence of a training task."""


@dataclass(frozen=True)
class Inside:
    """What a fit has learned: its density, its guides, and S equally weighted draws of θ `(S, d_theta)`."""

    density: TaskDensity
    guides: Guides
    theta: Tensor

    def log_evidence(self, tasks: Tasks, *, per_theta: int) -> np.ndarray:
        """Estimates log p(D_i | θ_s) with so many candidates each: `(S, task)`."""
        with torch.no_grad():
            found = log_evidence(self.density, self.guides, tasks, self.theta, per_theta=per_theta)
        return found.double().numpy()


def look_inside(fit: Fit, draws: int) -> Inside:
    """The parts of a fit, with `draws` draws of θ from its posterior.

    Raises:
        ValueError: No fit, or one without task parameters.
    """
    if not isinstance(fit, Fit):
        raise ValueError(
            f"expected a Fit of a model with task parameters, got {type(fit).__name__}: bm.fit(model, tasks)"
        )
    with torch.no_grad():
        theta = resample_theta(fit._shared, draws)
    return Inside(fit._density, fit._guides, theta)


def known_tasks(fit: Fit, tasks: Tasks) -> tuple[Tasks, np.ndarray]:
    """The tasks as the fit encodes them, and which of them it has learned from, bool `(task,)`.

    Raises:
        ValueError: Unknown columns or levels, or a training task with other data.
    """
    aligned = tasks.aligned(fit._training.schema)
    known = np.zeros(len(aligned), dtype=bool)
    known[fit._training.sort(aligned, updated="error").known] = True
    return aligned, known


def left_out(log_evidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log weights of θ draws given all training tasks but one: 1 / p(D_i | θ_s), smoothed.

    Args:
        log_evidence: Of each training task at draws of θ given all of them, `(S, task)`.

    Returns:
        Normalised log weights `(S, task)` and k̂ `(task,)`.

    References:
        Vehtari, Gelman, Gabry: Practical Bayesian Model Evaluation Using Leave-One-Out Cross-Validation and WAIC, 2017,
        https://doi.org/10.1007/s11222-016-9696-4
    """
    smoothed, khat = psis.smooth(-log_evidence.T)
    return smoothed.T, khat
