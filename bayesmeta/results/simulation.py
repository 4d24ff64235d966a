"""Simulated tasks: parameters and labels drawn from a model's prior."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.model import ConditionalModel, HierarchicalModel
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.hierarchy.tracing import Model
from bayesmeta.results.arguments import check_model, check_tasks, check_whole


def simulate(model: Model, *, like: Tasks, n: int | None = None, seed: int = 0) -> tuple[Tasks, dict[str, np.ndarray]]:
    """Simulates tasks from a model's prior.

    Args:
        model: Pyro function of a `Batch`.
        like: Tasks that lend their x, columns and sizes, in turn.
        n: Number of tasks; None as many as `like`.
        seed: Of the simulation.

    Returns:
        Tasks with simulated labels, and the true value of every site (`(*event)` shared, `(task, *event)` per task).
    """
    check_model(model)
    if isinstance(model, ConditionalModel):
        raise ValueError(
            "a ConditionalModel has no prior to simulate from; write a Pyro function of a batch or a HierarchicalModel"
        )
    check_tasks("like", like)
    check_whole("n", len(like) if n is None else n, 1)
    check_whole("seed", seed, 0)
    count = len(like) if n is None else int(n)
    copies = like.copies(np.arange(count) % len(like), names=[f"simulated {i + 1}" for i in range(count)])
    with seeded(seed):
        density = TaskDensity(model, copies)
        batch = copies.batch(np.arange(count))
        values, outcomes = density.simulate(batch)
    drawn = simulated_labels(density, batch, outcomes)
    simulated = copies.with_labels(drawn[batch.mask].to(copies.y.dtype))
    return simulated, {name: value.numpy() for name, value in values.items()}


def simulated_labels(density: TaskDensity, batch: Batch, outcomes: Mapping[str, Tensor]) -> Tensor:
    """Outcomes in the shape of the batch's labels; several sites are several outputs.

    Raises:
        ValueError: The model has no observed site, or its sites have another shape than the labels.
    """
    sites = density.structure.outcomes
    if not sites:
        raise ValueError("the model has no observed site to simulate, only factors (pyro.factor)")
    if isinstance(density.model, HierarchicalModel) and len(sites) > 1:
        return density.model.likelihood.assemble(outcomes, batch)
    labels = torch.broadcast_tensors(*(outcomes[site] for site in sites))
    drawn = labels[0] if len(labels) == 1 else torch.stack(labels, -1)
    if drawn.numel() != batch.y.numel():
        raise ValueError(
            f"the observed sites {list(sites)} give labels of shape {tuple(drawn.shape)} (tasks, rows, …), the "
            f"tasks have {tuple(batch.y.shape)}; simulate from a model with one observed site an output"
        )
    return drawn.reshape(batch.y.shape)
