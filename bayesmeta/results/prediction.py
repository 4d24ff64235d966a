"""Predictions of new rows: draws, moments, intervals and log scores.

Each draw pairs one θ with one φ of a task; the model itself is run on the new rows with its observed site free.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.recording import Recorded, seeded
from bayesmeta.inference.chunks import CHUNK_ELEMENTS, Chunk, task_chunks
from bayesmeta.results.coupled import CoupledRows, coupled_rows
from bayesmeta.results.row_draws import RowDraws

BY_PAIR = (0, 0, 0, None)
BY_DRAW = (0, 0, None, None)
Draws = tuple[Tensor, Tensor]
"""θ `(S, T, d_theta)` and noise `(S, T, d)`."""


@dataclass
class Prediction(RowDraws):
    """Draws of new rows of T tasks.

    Attributes:
        names: Task names.
        draws: `(draw, task, M, *dy)`; NaN where a task has fewer than M rows.
        mask: Real rows `(task, M)`.
        site: The observed site.
        kind: "outcome" or "mean".
        labelled: Whether the new rows came with labels, as `Tasks`.
    """

    names: tuple[str, ...]
    draws: np.ndarray
    mask: np.ndarray
    site: str
    kind: str
    density: TaskDensity = field(repr=False)
    target: Tasks = field(repr=False)
    paired: Draws = field(repr=False)
    coupled: CoupledRows | None = field(default=None, repr=False)
    labelled: bool = True

    def __repr__(self) -> str:
        draws, tasks, rows = self.draws.shape[:3]
        return f"Prediction(site={self.site!r}, kind={self.kind!r}, {tasks} tasks, up to {rows} rows, {draws} draws)"

    def log_prob(self, y: Any = None, *, joint: bool = False) -> np.ndarray:
        """Log predictive density of outcomes: the log of the mean over draws.

        Args:
            y: Outcomes `(M, *dy)` for all tasks, `(task, M, *dy)` or a list with one array a task; None takes those of
                the `Tasks` given to `predict`.
            joint: Score the rows of a task together.

        Returns:
            `(task, M)`, NaN where there is no row; with `joint`, `(task,)`.

        Raises:
            ValueError: Shapes do not fit, or there are no outcomes: `predict` was given inputs alone.
        """
        labelled = scored(self.target, y, labelled=self.labelled)
        if self.coupled is not None:
            rows = self.coupled.log_prob(labelled, joint=joint)
        else:
            rows = log_rows(self.density, labelled, self.paired, site=self.site)
            rows = np.nansum(rows, 2) if joint else rows
        with np.errstate(invalid="ignore"):
            return np.logaddexp.reduce(rows, 0) - math.log(rows.shape[0])


def predict(
    density: TaskDensity,
    target: Tasks,
    paired: Draws,
    *,
    kind: str = "outcome",
    site: str | None = None,
    seed: int = 0,
    context: Tasks | None = None,
    joint: bool = False,
    labelled: bool = True,
) -> Prediction:
    """Draws the observed site at the rows of `target`.

    Args:
        density: The model.
        target: The tasks at their new rows.
        paired: Draws of θ and φ.
        kind: "outcome" or "mean".
        site: The observed site, needed where there are several.
        seed: Of the outcome noise.
        context: The tasks with their own rows, which new rows depend on where the likelihood couples them.
        joint: Coherent draws, row by row, where a `conditional` gives each row alone.
        labelled: Whether the labels of `target` are outcomes, not placeholders.

    Raises:
        ValueError: Unknown kind or site, several sites and none chosen, or nothing that can be predicted.
    """
    if kind not in ("outcome", "mean"):
        raise ValueError(f"kind must be 'outcome' or 'mean', got {kind!r}")
    site = choose_site(density, site)
    coupled = coupled_rows(density, context, target, paired, site)
    function = density.outcomes if kind == "outcome" else density.means
    with seeded(seed, "outcomes"):
        if coupled is not None:
            draws = coupled.draws(kind, joint=joint)
        else:
            draws = _over_pairs(density, target, paired, function, site)
    return Prediction(target.names, draws, row_mask(target), site, kind, density, target, paired, coupled, labelled)


def choose_site(density: TaskDensity, site: str | None) -> str:
    """The observed site to predict."""
    conditional = getattr(density.model, "conditional", None) is not None
    sites = density.structure.outcomes or (_scored(density) if conditional else ())
    if not sites:
        raise ValueError("the model has no observed site that can be predicted, only factors (pyro.factor)")
    return _chosen(sites, site)


def _scored(density: TaskDensity) -> tuple[str, ...]:
    """Observed sites of tasks, factors included."""
    return tuple(site.name for site in density.structure.observed if not site.shared)


def _chosen(sites: tuple[str, ...], site: str | None) -> str:
    if site is None and len(sites) > 1:
        raise ValueError(f"the model has several observed sites {list(sites)}; choose one with site=")
    if site is not None and site not in sites:
        raise ValueError(f"unknown observed site {site!r}; there are {list(sites)}")
    return sites[0] if site is None else site


def log_rows(density: TaskDensity, tasks: Tasks, paired: Draws, *, site: str | None) -> np.ndarray:
    """Log likelihood of every row under every draw: `(draw, task, rows)`, NaN where there is no row or label."""
    values = _over_pairs(density, tasks, paired, density.log_rows, _chosen(_scored(density), site))
    return np.where(_observed(tasks, values.shape[2]), values, np.nan)


def row_mask(tasks: Tasks) -> np.ndarray:
    """Where tasks have rows, `(task, M)`; M is at least 1."""
    sizes = np.asarray(tasks.sizes)
    return np.arange(max(1, int(sizes.max())))[None, :] < sizes[:, None]


def _observed(tasks: Tasks, rows: int) -> np.ndarray:
    batch = tasks.batch(np.arange(len(tasks)), rows=rows)
    return (batch.mask & batch.observed.flatten(2).any(-1) if batch.observed.dim() > 2 else batch.observed).numpy()


def scored(target: Tasks, y: Any, *, labelled: bool) -> Tasks:
    """The predicted rows with the outcomes to score: `y`, or by default the labels that they came with."""
    if y is not None:
        return target.with_labels(flat_labels(y, target))
    if not labelled:
        raise ValueError(
            "log_prob: expected outcomes, got none: predict was given inputs alone; pass y, or Tasks to predict"
        )
    return target


def flat_labels(y: Any, target: Tasks) -> Tensor:
    """Outcomes as one tensor over all rows, checked against the rows that were predicted."""
    parts = [np.asarray(part) for part in _parts(y, target)]
    if len(parts) != len(target):
        raise ValueError(f"y: expected {len(target)} arrays, one a task, got {len(parts)}")
    for name, part, n in zip(target.names, parts, target.sizes, strict=True):
        if part.shape != (n, *target.schema.y_shape):
            raise ValueError(f"y of task {name!r}: expected {(int(n), *target.schema.y_shape)}, got {part.shape}")
        if not np.isfinite(part.astype(float)).all():
            raise ValueError(f"y of task {name!r} has values that are not finite; score only observed rows")
    return torch.as_tensor(np.concatenate(parts)).to(target.y.dtype)


def _parts(y: Any, target: Tasks) -> list[Any]:
    """Outcomes task by task."""
    if isinstance(y, list | tuple):
        return list(y)
    y, dims = np.asarray(y), len(target.schema.y_shape)
    if y.ndim not in (1 + dims, 2 + dims):
        raise ValueError(f"y: expected (M, *dy) or (task, M, *dy) with dy {target.schema.y_shape}, got {y.shape}")
    return [y] * len(target) if y.ndim == 1 + dims else _real_rows(y, target.sizes)


def _real_rows(y: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """The rows that tasks have of padded outcomes `(task, M, *dy)`; those of a wrong number of tasks as they are."""
    return [part[:n] for part, n in zip(y, sizes, strict=True)] if len(y) == len(sizes) else list(y)


def _over_pairs(density: TaskDensity, tasks: Tasks, paired: Draws, function: Recorded, site: str) -> np.ndarray:
    """Runs a recorded function for every (draw, task) pair: `(S, T, M, …)`, NaN where a task has fewer rows."""
    rows = max(1, int(np.max(tasks.sizes)))
    found: np.ndarray | None = None
    for index, piece, values in _pieces(density, tasks, paired, function, site):
        if found is None:
            found = np.full((paired[0].shape[0], len(tasks), rows, *values.shape[2:]), np.nan)
        draw, task = piece // len(index), index[piece % len(index)]
        found[draw, task, : values.shape[1]] = values
    result = np.asarray(found)
    result[:, ~row_mask(tasks)] = np.nan
    return result


Pieces = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]


def _pieces(density: TaskDensity, tasks: Tasks, paired: Draws, function: Recorded, site: str) -> Pieces:
    """Yields (tasks of a chunk, pairs of the piece, values of the pairs `(pairs, rows, …)`)."""
    theta, noise = paired
    with torch.no_grad():
        for chunk in task_chunks(tasks, exact_size=density.structure.exact_size):
            data = density.tensors(chunk.batch)
            some = (theta[:, chunk.index], noise[:, chunk.index])
            cut = _by_draw if bool((some[0] == some[0][:, :1]).all()) else _by_pair
            yield from cut(chunk, data, some, functools.partial(_values, density, function, site))


def _values(density: TaskDensity, function: Recorded, site: str, theta: Any, noise: Any, data: Any, dims: Any) -> Any:
    """Values `(…, rows, *dy)` of the observed site, NumPy."""
    found = function.mapped(theta, noise, data, dict(density.learned.values), in_dims=dims)
    return found[site].double().numpy()


def _by_draw(chunk: Chunk, data: Any, paired: Draws, values: Any) -> Pieces:
    """All tasks at each draw, which have one θ: what depends on rows alone (a network of x) is computed once."""
    theta, noise = paired
    draws, count = noise.shape[:2]
    filled = torch.arange(len(chunk.batch.names)).clamp(max=count - 1)
    size = min(draws, max(1, CHUNK_ELEMENTS // chunk.batch.mask.numel()))
    for start in range(0, draws, size):
        place = torch.arange(start, start + size).clamp(max=draws - 1)
        found = values(theta[place, 0], noise[place][:, filled], data, BY_DRAW)
        kept = found[: min(size, draws - start), :count].reshape(-1, *found.shape[2:])
        yield chunk.index, start * count + np.arange(len(kept)), kept


def _by_pair(chunk: Chunk, data: Any, paired: Draws, values: Any) -> Pieces:
    """Pairs of a draw and a task, each with its own θ."""
    theta, noise = (part.reshape(-1, part.shape[-1]) for part in paired)
    pairs, count = len(theta), len(chunk.index)
    size = min(pairs, max(1, CHUNK_ELEMENTS // chunk.batch.mask.shape[1]))
    for start in range(0, pairs, size):
        piece = torch.arange(start, start + size).clamp(max=pairs - 1)
        rows = {key: value[piece % count].unsqueeze(1) for key, value in data.items()}
        found = values(theta[piece], noise[piece].unsqueeze(1), rows, BY_PAIR)
        keep = min(size, pairs - start)
        yield chunk.index, piece[:keep].numpy(), found[:keep].squeeze(1)
