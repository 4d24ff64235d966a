"""What the user holds of a learner without task parameters: a fit that predicts, and its predictions.

The learner maps a context to a distribution of each new row alone; rows that hang together (`joint=True`) are drawn and
scored one by one, each joining the context of the next.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from bayesmeta.data.batch import Batch
from bayesmeta.data.schema import Schema, dtype_of
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.model import ConditionalModel
from bayesmeta.hierarchy.recording import model_context, seeded
from bayesmeta.hierarchy.tracing import cast_observed
from bayesmeta.inference.conditional import module_dtype
from bayesmeta.inference.training import History
from bayesmeta.results import storage
from bayesmeta.results.coupled import join_rows, take_rows
from bayesmeta.results.prediction import row_mask, scored
from bayesmeta.results.row_draws import RowDraws

CHUNK_TASKS = 4096
KIND = "conditional fit"


@dataclass
class ConditionalPrediction(RowDraws):
    """Draws of new rows of T tasks, given the rows of a context.

    Attributes:
        names: Task names.
        draws: `(draw, task, M, *dy)`; NaN where a task has fewer than M rows. With `kind="mean"` one draw, the mean.
        mask: Real rows `(task, M)`.
        kind: "outcome" or "mean".
        joint: Whether rows were drawn together.
        labelled: Whether the new rows came with labels, as `Tasks`.
    """

    names: tuple[str, ...]
    draws: np.ndarray
    mask: np.ndarray
    kind: str
    joint: bool
    fit: ConditionalFit = field(repr=False)
    context: Tasks = field(repr=False)
    target: Tasks = field(repr=False)
    labelled: bool = True

    def log_prob(self, y: Any = None, *, joint: bool = False) -> np.ndarray:
        """Log predictive density of outcomes, exactly as the learner gives it.

        Args:
            y: Outcomes `(M, *dy)` for all tasks, `(task, M, *dy)` or a list with one array a task; None takes those of
                the `Tasks` given to `predict`.
            joint: Score the rows of a task together: by the chain rule after `predict(joint=True)`, otherwise the sum.

        Returns:
            `(task, M)`, NaN where there is no row or label; with `joint`, `(task,)`.

        Raises:
            ValueError: Shapes do not fit, or there are no outcomes: `predict` was given inputs alone.
        """
        labelled = scored(self.target, y, labelled=self.labelled)
        rows = self.fit._score(self.context, labelled, chained=joint and self.joint)
        return np.nansum(rows, 1) if joint else rows


class ConditionalFit:
    """A learned learner without task parameters.

    Attributes:
        model: The model with the learned copy of its module.
        schema: Names, shapes and levels of the training tasks.
        history: What training went through.
        seed: The seed of the fit.
    """

    def __init__(
        self, model: ConditionalModel, schema: Schema, history: History, *, seed: int, dtype: torch.dtype
    ) -> None:
        self.model, self.schema, self.history, self.seed = model, schema, history, seed
        self._dtype = module_dtype(model, dtype)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """A copy of the learned module, by the name "module"."""
        return {"module": copy.deepcopy(self.model.module)} if isinstance(self.model.module, nn.Module) else {}

    def posterior(self, *args: object, **options: object) -> NoReturn:
        """There is no φ to have a posterior.

        Raises:
            ValueError: Always; it says what to do.
        """
        self.model.posterior()

    def predict(
        self,
        context: Tasks,
        x: Any = None,
        columns: Any = None,
        *,
        kind: str = "outcome",
        joint: bool = False,
        draws: int = 1000,
        seed: int = 0,
    ) -> ConditionalPrediction:
        """Predicts new rows of tasks given their context.

        Args:
            context: The tasks with their own rows, known or new.
            x: New inputs `(M, *dx)` for all tasks, a list with one array a task, or `Tasks`.
            columns: The columns of the training tasks at the new rows.
            kind: "outcome" or "mean".
            joint: Draw rows one after the other, each in the context of the next, so that they hang together.
            draws: Number of draws.
            seed: Of the draws.

        Raises:
            ValueError: Unknown kind, columns or levels, or a distribution without a mean.
        """
        if kind not in ("outcome", "mean"):
            raise ValueError(f"kind must be 'outcome' or 'mean', got {kind!r}")
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        context = context.aligned(self.schema)
        target = context.at(x, columns)
        with seeded(seed), torch.no_grad(), model_context(self._dtype):
            values = self._draws(context, target, kind, 1 if kind == "mean" else draws, joint)
        mask, labelled = row_mask(target), isinstance(x, Tasks)
        return ConditionalPrediction(target.names, values, mask, kind, joint, self, context, target, labelled)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the fit to one file, complete or not at all.

        Raises:
            ValueError: The folder does not exist.
        """
        module = self.model.module
        tensors = dict(module.state_dict()) if isinstance(module, nn.Module) else {}
        meta = {
            "kind": KIND,
            "schema": self.schema.to_json(),
            "history": {"steps": self.history.steps, "stages": self.history.stages},
            "seed": self.seed,
            "dtype": str(self._dtype).removeprefix("torch."),
        }
        storage.save(path, tensors=tensors, meta=meta)

    def __repr__(self) -> str:
        score = self.history.stages[-1] if self.history.stages else {"bound": float("nan"), "seconds": 0.0}
        return f"ConditionalFit, trained {score['seconds']:.1f} s to {score['bound']:.3f} nats a row"

    def _draws(self, context: Tasks, target: Tasks, kind: str, draws: int, joint: bool) -> np.ndarray:
        widest = max(1, int(target.sizes.max()))
        found = np.full((draws, len(target), widest, *target.schema.y_shape), np.nan)
        chained = joint and kind == "outcome"
        for index, old, new in self._chunks(context, target, limit=CHUNK_TASKS // draws if chained else CHUNK_TASKS):
            if chained:
                values = self._chain(_repeated(old, draws), _repeated(new, draws))[0]
                values = values.reshape(draws, len(index), *values.shape[1:])
            else:
                labels: Any = self.model(old, new.x)
                values = labels.sample((draws,)) if kind == "outcome" else _mean(labels).unsqueeze(0)
            found[:, index, : values.shape[2]] = values.double().numpy()
        found[:, ~row_mask(target)] = np.nan
        return found

    def _score(self, context: Tasks, labelled: Tasks, *, chained: bool) -> np.ndarray:
        """Log densities of labels `(task, M)`, NaN where there is none."""
        found = np.full((len(labelled), max(1, int(labelled.sizes.max()))), np.nan)
        with torch.no_grad(), model_context(self._dtype):
            for index, old, new in self._chunks(context, labelled):
                if chained:
                    values = self._chain(old, new, score=True)[1]
                else:
                    labels: Any = self.model(old, new.x)
                    values = labels.log_prob(cast_observed(labels, new.y))
                seen = new.observed.flatten(2).all(-1) if new.y.dim() > 2 else new.observed
                found[index, : values.shape[1]] = np.where(seen.numpy(), values.double().numpy(), np.nan)
        return found

    def _chain(self, context: Batch, target: Batch, *, score: bool = False) -> tuple[Tensor, Tensor]:
        """Row by row, each in the context of the next: draws, or the given labels, and their log densities."""
        old, drawn, terms = dict(context.tensors), [], []
        for row in range(target.mask.shape[1]):
            new = take_rows(target.tensors, row, row + 1, dim=1)
            labels: Any = self.model(context.replace(old), new["x"])
            value = cast_observed(labels, new["y"]) if score else labels.sample()
            drawn.append(value)
            terms.append(labels.log_prob(value))
            old = join_rows(old, new | {"y": value.to(new["y"].dtype)}, dim=1)
        return torch.cat(drawn, 1), torch.cat(terms, 1)

    def _chunks(
        self, context: Tasks, target: Tasks, *, limit: int = CHUNK_TASKS
    ) -> Iterator[tuple[np.ndarray, Batch, Batch]]:
        """Positions of some tasks, their context and their new rows, floating tensors in the module's dtype."""
        size = max(1, limit)
        for start in range(0, len(target), size):
            index = np.arange(start, min(start + size, len(target)))
            old, new = (tasks.batch(index).to(dtype=self._dtype) for tasks in (context, target))
            yield index, old, new


def _repeated(batch: Batch, times: int) -> Batch:
    tensors = {k: v.repeat(times, *[1] * (v.dim() - 1)) for k, v in batch.tensors.items()}
    return Batch(tensors, batch.names * times, batch.schema)


def _mean(labels: Any) -> Tensor:
    try:
        mean = labels.mean
    except NotImplementedError as error:
        raise ValueError(f"{type(labels).__name__} gives no mean; use kind='outcome'") from error
    if bool(mean.isnan().any()):
        raise ValueError(f"the mean of {type(labels).__name__} is not a number; use kind='outcome'")
    return mean


def load_conditional(path: str | os.PathLike[str], model: ConditionalModel) -> ConditionalFit:
    """Reads what `ConditionalFit.save` wrote.

    Args:
        path: The file.
        model: The model that was fitted; its module gets the stored weights in a copy.

    Raises:
        ValueError: The file cannot be read, holds another kind of fit, or belongs to another module.
    """
    tensors, meta = storage.load(path)
    if meta.get("kind") != KIND:
        raise ValueError(
            f"cannot load {path}: expected a fit of a ConditionalModel, the file holds a {meta.get('kind')}; give the "
            "model that was fitted"
        )
    module = copy.deepcopy(model.module)
    if isinstance(module, nn.Module):
        try:
            module.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"cannot load {path}: the module is not the one that was fitted. {error}") from error
        module.requires_grad_(False).eval()
    learner = ConditionalModel(module, objective=model.objective, context=model.context)
    history = History(**meta["history"])
    return ConditionalFit(
        learner, Schema.from_json(meta["schema"]), history, seed=meta["seed"], dtype=dtype_of(meta["dtype"])
    )
