"""New rows where the likelihood couples the rows of a task: p(y* | φ, θ, the task's own rows) for every draw.

A multivariate normal site (a Gaussian process) is evaluated on the rows of the task and the new ones together and
conditioned exactly; any other coupling is predicted by the model's own `conditional`. `prediction.py` calls this, and
averages over draws.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesmeta.data.batch import Batch
from bayesmeta.data.schema import COLUMN
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.binding import as_pyro
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.latents import Fixed
from bayesmeta.hierarchy.recording import Recorded, model_context
from bayesmeta.hierarchy.tracing import trace_model

BY_PAIR = (0, 0, 0, None)
CHUNK_ELEMENTS = 2**20
"""Entries of the covariance matrices that are held at once."""
CHUNK_TASKS = 512
Tensors = dict[str, Tensor]
Draws = tuple[Tensor, Tensor]
"""θ `(S, T, d_theta)` and noise `(S, T, d)`."""

_COUPLED = (
    "the rows of site {site!r} depend on each other, so new rows need their conditional distribution; give it with "
    "bm.with_conditional(model, fn), fn(phi, shared, context, x) -> Distribution"
)


@dataclass(frozen=True)
class Piece:
    """Pairs of a draw and a task, P of them, all with n rows of their own and m new ones.

    Attributes:
        draw, task: Which pairs `(P,)`.
        theta, noise: `(P, d_theta)` and `(P, 1, d)`.
        context, target: Tensors of the batches, `(P, 1, n, …)` and `(P, 1, m, …)`.
    """

    draw: np.ndarray
    task: np.ndarray
    theta: Tensor
    noise: Tensor
    context: Tensors
    target: Tensors

    @property
    def rows(self) -> tuple[int, int]:
        """N and m."""
        return self.context["mask"].shape[2], self.target["mask"].shape[2]


class CoupledRows(ABC):
    """Predicts new rows of one observed site from paired draws and the rows of each task."""

    def __init__(self, density: TaskDensity, context: Tasks, target: Tasks, paired: Draws, site: str) -> None:
        if not bool(context.observed.all()):
            raise ValueError(
                f"site {site!r} couples the rows of a task, and some labels are missing; new rows can be predicted "
                "from complete tasks only: drop the rows whose label is missing"
            )
        self.density, self.context, self.target, self.paired, self.site = density, context, target, paired, site

    @abstractmethod
    def draw(self, piece: Piece, kind: str, joint: bool) -> Tensor:
        """Draws or means of the new rows, `(P, m, *dy)`."""

    @abstractmethod
    def score(self, piece: Piece, joint: bool) -> Tensor:
        """Log density of the new rows' labels, `(P, m)`, or `(P,)` of all rows together."""

    def draws(self, kind: str, *, joint: bool) -> np.ndarray:
        """Every draw's new rows `(S, T, M, *dy)`; NaN where a task has fewer rows."""
        return self._collect(self.target, functools.partial(self.draw, kind=kind, joint=joint), rows=True)

    def log_prob(self, labelled: Tasks, *, joint: bool) -> np.ndarray:
        """Every draw's log density of labels `(S, T, M)`, NaN where there is no row; with `joint` `(S, T)`."""
        if not bool(labelled.observed.all()):
            raise ValueError(f"site {self.site!r} couples rows: log_prob needs all labels; drop rows without one")
        return self._collect(labelled, functools.partial(self.score, joint=joint), rows=not joint)

    def _collect(self, target: Tasks, function: Any, *, rows: bool) -> np.ndarray:
        shape = (self.paired[0].shape[0], len(target))
        widest = max(1, int(target.sizes.max()))
        found = np.full((*shape, widest), np.nan) if rows else np.zeros(shape)
        for piece in self._pieces(target):
            values = function(piece).double().numpy()
            if not rows:
                found[piece.draw, piece.task] = values
                continue
            if found.ndim != values.ndim + 1:
                found = np.full((*shape, widest, *values.shape[2:]), np.nan)
            found[piece.draw, piece.task, : values.shape[1]] = values
        return found

    def _pieces(self, target: Tasks) -> Iterator[Piece]:
        theta, noise = self.paired
        with torch.no_grad():
            for index, context, new in _groups(self.density, self.context, target):
                total = context["mask"].shape[1] + new["mask"].shape[1]
                for draw, within in _pairs(theta.shape[0], len(index), CHUNK_ELEMENTS // total**2):
                    task = index[within]
                    yield Piece(
                        draw,
                        task,
                        theta[draw, task],
                        noise[draw, task].unsqueeze(1),
                        *({k: v[within].unsqueeze(1) for k, v in data.items()} for data in (context, new)),
                    )


def coupled_rows(
    density: TaskDensity, context: Tasks | None, target: Tasks, paired: Draws, site: str
) -> CoupledRows | None:
    """How the new rows of a coupled site are predicted; None where rows are independent given φ.

    Args:
        density: The model; its `conditional`, if it carries one, comes first.
        context: The tasks with their own rows.
        target: The same tasks at their new rows.
        paired: Draws of θ and φ.
        site: The observed site.

    Raises:
        ValueError: The site is neither multivariate normal nor has the model a `conditional`; labels are missing.
    """
    if site in density.structure.outcomes and site not in density.structure.coupled:
        return None
    if context is None:
        raise ValueError(_COUPLED.format(site=site))
    if getattr(density.model, "conditional", None) is not None:
        return ConditionalRows(density, context, target, paired, site)
    return NormalRows(density, context, target, paired, site)


class NormalRows(CoupledRows):
    """Rows that are multivariate normal given φ and θ, conditioned by the Cholesky factor of old and new rows."""

    def draw(self, piece: Piece, kind: str, joint: bool) -> Tensor:
        """Draws or means of the new rows, `(P, m)`."""
        loc, factor, _ = self._given(piece)
        if kind == "mean":
            return loc
        return loc + (factor @ torch.randn_like(loc).unsqueeze(-1)).squeeze(-1)

    def score(self, piece: Piece, joint: bool) -> Tensor:
        """Log density of the new rows' labels."""
        loc, factor, labels = self._given(piece)
        if not joint:
            return torch.distributions.Normal(loc, factor.square().sum(-1).sqrt(), validate_args=False).log_prob(labels)
        white = torch.linalg.solve_triangular(factor, (labels - loc).unsqueeze(-1), upper=False).squeeze(-1)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (white.square().sum(-1) + loc.shape[-1] * math.log(2 * math.pi)) - log_det

    def _given(self, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        """Location `(P, m)` and Cholesky factor `(P, m, m)` of the new rows given the old ones, and their labels."""
        n, _ = piece.rows
        data = join_rows(piece.context, piece.target)
        values = dict(self.density.learned.values)
        try:
            sites = self.density.normals.mapped(piece.theta, piece.noise, data, values, in_dims=BY_PAIR)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise ValueError(
                f"site {self.site!r}: the covariance of a task's rows together with the new ones is not positive "
                "definite; add a little noise to its diagonal, or leave out new rows that repeat others"
            ) from error
        if self.site not in sites:
            raise ValueError(_COUPLED.format(site=self.site))
        loc, factor, labels = (part.flatten(0, 2) for part in sites[self.site])
        white = torch.linalg.solve_triangular(
            factor[:, :n, :n], (labels[:, :n] - loc[:, :n]).unsqueeze(-1), upper=False
        )
        shifted = loc[:, n:] + (factor[:, n:, :n] @ white).squeeze(-1)
        return shifted, factor[:, n:, n:], labels[:, n:]


class ConditionalRows(CoupledRows):
    """Rows predicted by the model's `conditional(phi, shared, context, x)`.

    It gets one pair at a time: `phi` is the task's value `(1, 1, *event)`, or a dictionary where the model has several
    task values (sites and deterministic ones); `shared` a dictionary of `(*event)`; `context` a batch of the task's n
    rows; x `(1, M, *dx)`. It returns a distribution of batch shape `(1, M)`, or one whose event holds the rows.
    """

    def __init__(self, density: TaskDensity, context: Tasks, target: Tasks, paired: Draws, site: str) -> None:
        super().__init__(density, context, target, paired, site)
        self._functions = {kind: self._recorded(kind) for kind in ("outcome", "mean", "score")}

    def draw(self, piece: Piece, kind: str, joint: bool) -> Tensor:
        """Draws or means; with `joint`, a distribution with rows in its batch is drawn from row by row."""
        if not joint or kind == "mean":
            return self._call(kind, piece, piece.context, piece.target)
        context, drawn = piece.context, []
        for row in range(piece.rows[1]):
            new = take_rows(piece.target, row, row + 1)
            drawn.append(self._call(kind, piece, context, new))
            labels = drawn[-1].reshape(new["y"].shape).to(new["y"].dtype)
            context = join_rows(context, new | {"y": labels})
        return torch.cat(drawn, 1)

    def score(self, piece: Piece, joint: bool) -> Tensor:
        """Log density of each row alone or, by the chain rule where the rows are in the batch, of all together."""
        rows = range(piece.rows[1])
        single = [take_rows(piece.target, row, row + 1) for row in rows]
        if not joint:
            return torch.cat([self._call("score", piece, piece.context, new).reshape(-1, 1) for new in single], 1)
        whole = self._call("score", piece, piece.context, piece.target)
        if whole.dim() == 1:
            return whole
        terms = [
            self._call("score", piece, join_rows(piece.context, take_rows(piece.target, 0, row)), new).reshape(-1)
            for row, new in enumerate(single)
        ]
        return torch.stack(terms).sum(0)

    def _call(self, kind: str, piece: Piece, context: Tensors, target: Tensors) -> Tensor:
        density = self.density
        values = density.constrain.mapped(
            piece.theta, piece.noise, piece.target, dict(density.learned.values), in_dims=BY_PAIR
        )
        phi: Any = {name: value.unsqueeze(1) for name, value in values.items()}
        phi = next(iter(phi.values())) if len(phi) == 1 else phi
        shared = density.shared_values(piece.theta)
        args = (phi, shared, context, target["x"], target["y"])
        return self._functions[kind].mapped(*args, in_dims=(0,) * len(args))

    def _recorded(self, kind: str) -> Recorded:
        def function(phi: Any, shared: Tensors, context: Tensors, x: Tensor, y: Tensor) -> Tensor:
            return self._evaluate(kind, self._distribution(phi, shared, context, x), y)

        context = functools.partial(model_context, self.density.dtype)
        return Recorded(function, context=context, random=kind == "outcome", vary=2)

    def _distribution(self, phi: Any, shared: Tensors, context: Tensors, x: Tensor) -> Any:
        """Calls the user's function under the handler that puts the fit's parameters in place of his."""
        found: list[Distribution] = []

        def call(batch: Batch) -> None:
            found.append(self.density.model.conditional(phi, shared, batch, x))  # type: ignore[attr-defined]

        batch = Batch(context, ("task",), self.density.schema)
        trace_model(call, batch, Fixed(), self.density.learned, dtype=self.density.dtype)
        return as_pyro(found[0], role="conditional")

    def _evaluate(self, kind: str, labels: Any, y: Tensor) -> Tensor:
        rows, dims = y.shape[1], y.dim() - 2
        labels, y = _matched(labels, y)
        if kind == "score":
            score = labels.log_prob(y)
            return score.reshape(rows) if len(labels.event_shape) == dims else score.reshape(())
        drawn = labels.sample() if kind == "outcome" else labels.mean
        return drawn.reshape(rows, *drawn.shape[drawn.dim() - dims :])


def _matched(labels: Any, y: Tensor) -> tuple[Any, Tensor]:
    """Brings the user's distribution and the labels `(1, M, *dy)` to one shape: rows in the batch, or in the event.

    Raises:
        ValueError: If the distribution is of neither kind.
    """
    rows, dims = y.shape[1], y.dim() - 2
    batch, event = tuple(labels.batch_shape), tuple(labels.event_shape)
    if event == tuple(y.shape[2:]) and batch[-1:] in ((rows,), (1,), ()) and math.prod(batch[:-1]) == 1:
        return labels.expand((1, rows)), y
    if len(event) == dims + 1 and event[0] == rows and math.prod(batch) == 1:
        return labels, y.reshape(*batch, *event)
    raise ValueError(
        f"conditional: expected a distribution of batch shape (1, {rows}) and event shape "
        f"{tuple(y.shape[2:])}, or of batch shape (1,) and event shape {(rows, *y.shape[2:])}; got batch shape "
        f"{batch} and event shape {event}"
    )


def _groups(density: TaskDensity, context: Tasks, target: Tasks) -> Iterator[tuple[np.ndarray, Tensors, Tensors]]:
    """Tasks with equally many old and new rows, and the tensors of their unpadded batches."""
    sizes = np.stack([context.sizes, target.sizes], 1)
    for n, m in np.unique(sizes[sizes[:, 1] > 0], axis=0):
        members = np.flatnonzero((sizes == (n, m)).all(1))
        for start in range(0, len(members), CHUNK_TASKS):
            index = members[start : start + CHUNK_TASKS]
            old, new = (density.tensors(tasks.batch(index)) for tasks in (context, target))
            for key in ("weight", "task_weight"):
                old.pop(key, None)
            yield index, take_rows(old, 0, int(n), dim=1), new


def _pairs(draws: int, tasks: int, limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts pairs of a draw and a task into pieces of few different sizes, each of which needs a graph of its own.

    Groups of tasks with equal sizes are of all lengths: as many tasks as the limit allows go together, the rest alone.
    """
    together = max(1, limit // draws)
    whole = tasks // together * together
    for task in [*np.arange(whole).reshape(-1, together), *np.arange(whole, tasks).reshape(-1, 1)]:
        draw, within = (part.ravel() for part in np.meshgrid(np.arange(draws), task, indexing="ij"))
        size = max(1, limit)
        for start in range(0, len(draw), size):
            yield draw[start : start + size], within[start : start + size]


def _by_row(key: str) -> bool:
    return key in ("x", "y", "mask", "observed") or key.startswith(COLUMN)


def take_rows(data: Tensors, start: int, stop: int, *, dim: int = 2) -> Tensors:
    """Some rows of a batch's tensors, which lie along `dim`."""
    cut = {k: v.narrow(dim, start, stop - start) if _by_row(k) else v for k, v in data.items()}
    return cut | {"n": cut["mask"].sum(dim)}


def join_rows(first: Tensors, second: Tensors, *, dim: int = 2) -> Tensors:
    """The rows of both, along `dim`; whatever else is there comes from the second."""
    both = {k: torch.cat([first[k], v], dim) if _by_row(k) else v for k, v in second.items()}
    return both | {"n": both["mask"].sum(dim)}
