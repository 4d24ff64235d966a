"""The front door: `fit` learns a model from tasks, `Fit` answers questions about it, `load` brings a fit back.

It wires the rooms together and holds no mathematics.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from bayesmeta.data.episodes import Source, TaskSource
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity, read
from bayesmeta.hierarchy.model import ConditionalModel, HierarchicalModel
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.hierarchy.tracing import Model
from bayesmeta.inference.amortized import Amortized
from bayesmeta.inference.chunks import task_chunks
from bayesmeta.inference.conditional import fit_conditional
from bayesmeta.inference.ladder import LEAST_DRAWS, REFINEMENTS, climb
from bayesmeta.inference.marginal import Marginal
from bayesmeta.inference.methods import Method
from bayesmeta.inference.nuts import NUTS
from bayesmeta.inference.weighing import Parts, draw_empty, of_chains, resample, resample_theta
from bayesmeta.results.arguments import check_arguments, check_choice, check_model, check_tasks, check_whole, numbers
from bayesmeta.results.conditional import ConditionalFit, load_conditional
from bayesmeta.results.fit_storage import FileCheckpoint, FitState, load_fit, save_fit
from bayesmeta.results.posterior import Posterior, Shared
from bayesmeta.results.prediction import Prediction
from bayesmeta.results.training_tasks import TrainingTasks

METHODS: dict[str, type[Any]] = {"amortized": Amortized, "marginal": Marginal, "nuts": NUTS}


@overload
def fit(
    model: ConditionalModel,
    tasks: Tasks | Source,
    *,
    method: str | Method = ...,
    seed: int = ...,
    device: str = ...,
    dtype: torch.dtype = ...,
    progress: bool = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
) -> ConditionalFit: ...
@overload
def fit(
    model: Model,
    tasks: Tasks,
    *,
    method: str | Method = ...,
    seed: int = ...,
    device: str = ...,
    dtype: torch.dtype = ...,
    progress: bool = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
) -> Fit: ...
def fit(
    model: Any,
    tasks: Any,
    *,
    method: str | Method = "amortized",
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Fit | ConditionalFit:
    """Learns a hierarchical model from tasks.

    Args:
        model: Ordinary Pyro function of a `Batch`, a `HierarchicalModel`, or a `ConditionalModel` (no task parameters).
        tasks: At least two `Tasks`; for a `ConditionalModel` also a `Source` that draws episodes without end.
        method: "amortized", "marginal" or "nuts", or options: `bm.Amortized(…)`, `bm.Marginal(…)`, `bm.NUTS(…)`;
            a `ConditionalModel` takes `bm.Amortized(optimizer=…)` alone.
        seed: Same seed, same machine: the same fit, bit by bit.
        device: "cpu".
        dtype: Floating dtype of the model's densities, torch.float64 or torch.float32.
        progress: Whether to show a bar.
        checkpoint: A file that keeps the state after every stage of training. Called again with the same arguments, an
            interrupted fit goes on after the last stage that was finished, and ends with what it would have been
            without the interruption, bit by bit on the same machine; the stage that was cut off starts again.

    Raises:
        ValueError: The data or the model cannot be used, or the checkpoint belongs to another fit; the message says
            what was expected and the cure.
    """
    options = _options(method)
    check_arguments(model, tasks, seed, device, dtype)
    if isinstance(model, ConditionalModel):
        _check_conditional(options, checkpoint)
        source = TaskSource(tasks) if isinstance(tasks, Tasks) else tasks
        with seeded(seed):
            learner, history = fit_conditional(
                model,
                source,
                optimizer=options.optimizer,
                held_out=options.held_out,
                seed=seed,
                dtype=dtype,
                progress=progress,
            )
        return ConditionalFit(learner, tasks.schema, history, seed=seed, dtype=dtype)
    if hasattr(model, "check"):
        model.check(tasks)
    return learn(model, tasks, options, seed=seed, dtype=dtype, progress=progress, checkpoint=checkpoint)


def learn(
    model: Model,
    tasks: Tasks,
    options: Method,
    *,
    seed: int,
    dtype: torch.dtype = torch.float64,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Fit:
    """What `fit` does once its arguments are checked; here a single task will do."""
    training = TrainingTasks(tasks)
    with seeded(seed):
        density = read(model, tasks, dtype=dtype)
        _check_support(density, tasks)
        file = None if checkpoint is None else FileCheckpoint(checkpoint, density, training, options, seed)
        found = options.learn(density, tasks, progress=progress, checkpoint=file)
    return Fit(FitState(density, found.guides, found.shared, training, found.history, options, seed))


@overload
def load(path: str | os.PathLike[str], model: ConditionalModel) -> ConditionalFit: ...
@overload
def load(path: str | os.PathLike[str], model: Model, *, method: Method | None = None) -> Fit: ...
def load(path: str | os.PathLike[str], model: Any, *, method: Method | None = None) -> Fit | ConditionalFit:
    """Reads a fit that `Fit.save` wrote; it gives the same draws and predictions, bit by bit on the same machine.

    Args:
        path: The file.
        model: The model that was fitted: functions are not stored, only what was learned.
        method: The options of the fit, needed only where they hold objects that cannot be stored (a guide, an
            embedding, an objective of one's own).

    Raises:
        ValueError: The file is missing, damaged or not a fit, or it belongs to another model or other options.
    """
    check_model(model)
    if isinstance(model, ConditionalModel):
        return load_conditional(path, model)
    return Fit(load_fit(path, model, kinds=METHODS, options=copy.deepcopy(method)))


class Fit:
    """A learned model.

    Attributes:
        shared: Posterior of the shared parameters.
        history: What training went through.
        seed: The seed of the fit.
    """

    def __init__(self, state: FitState) -> None:
        self._state, self._training = state, state.training
        self._density, self._guides, self._shared = state.density, state.guides, state.shared
        self.history, self.seed = state.history, state.seed
        self.shared = Shared(state.density, state.shared, seed=state.seed)

    @property
    def tasks(self) -> Tasks:
        """The training tasks.

        Raises:
            ValueError: The fit was loaded from a file without its data.
        """
        return self._training.data

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Copies of the model's registered modules with the learned weights."""
        return self._density.modules()

    def save(self, path: str | os.PathLike[str], *, data: bool = True) -> None:
        """Writes the fit to one file, complete or not at all.

        Args:
            path: The file; its folder must exist.
            data: Whether the training tasks are stored. Without them the file holds their names, sizes, fingerprints
                and one example row; known tasks are still recognised, only `updated="replace"` is lost.

        Raises:
            ValueError: The folder does not exist, or the data are asked for and not there.
        """
        save_fit(path, self._state, data=data)

    def posterior(
        self,
        tasks: Tasks,
        *,
        draws: int = 1000,
        refine: str = "auto",
        shared: Mapping[str, Any] | None = None,
        updated: str = "error",
        seed: int = 0,
    ) -> Posterior:
        """Infers the parameters of tasks, training tasks or new ones.

        Args:
            tasks: Any tasks with the columns of the training tasks.
            draws: Equally weighted draws.
            refine: "auto" weighs the guide's draws, judges them, and mends what fails: in closed form, by Laplace
                proposals, by Markov chains; "none" takes the guide's draws as they are, unchecked; "laplace" and
                "nuts" take every task to that rung.
            shared: One θ to condition on, `{site: value}` for every shared site; None integrates over θ.
            updated: "error", or "replace": a training task with other data is inferred with those instead.
            seed: Of the draws.

        Raises:
            ValueError: Unknown options, columns or levels, a training task with other data, or its replacement where
                the fit was saved without the data.
        """
        check_choice("refine", refine, REFINEMENTS)
        check_choice("updated", updated, ("error", "replace"))
        check_whole("draws", draws, 1)
        check_whole("seed", seed, 0)
        check_tasks("posterior", tasks)
        tasks = tasks.aligned(self._training.schema)
        if isinstance(self._density.model, HierarchicalModel):
            self._density.model.check(tasks)
        enough = max(draws, LEAST_DRAWS)
        with seeded(seed), torch.no_grad():
            if shared is not None:
                theta = self._density.theta_of(numbers(shared)).expand(enough, -1)
                parts = self._climbed(tasks, np.arange(len(tasks)), theta, refine, known=False)
            else:
                parts = self._parts(tasks, enough, refine, updated)
        chains = self._shared.chains if draws == len(self._shared.theta) and shared is None else 0
        parts = [(index, part.thinned(draws)) for index, part in parts]
        return Posterior(self._density, tasks, parts, seed, chains=chains, chain_stats=self._shared.stats)

    def predict(self, context: Tasks, x: Any = None, columns: Any = None, **options: Any) -> Prediction:
        """Predicts new rows of tasks given their context: `posterior(context).predict(x, columns, **options)`."""
        return self.posterior(context).predict(x, columns, **options)

    def prior(self, draws: int = 1000, *, like: Tasks | None = None, seed: int = 0) -> Posterior:
        """The learned prior: parameters of a task not yet seen.

        Args:
            draws: Number of draws.
            like: Tasks whose task columns to use; needed where the model reads task columns.
            seed: Of the draws.
        """
        check_whole("draws", draws, 1)
        check_whole("seed", seed, 0)
        schema = self._training.schema
        if like is None and schema.task_columns:
            names = list(schema.task_columns)
            raise ValueError(f"the model has task columns {names}; say for which tasks with like=tasks")
        if like is not None:
            check_tasks("like", like)
        chosen = self._training.table.copies([0], names=["new task"]) if like is None else like.aligned(schema)
        empty = chosen.without_rows()
        with seeded(seed), torch.no_grad():
            theta = resample_theta(self._shared, draws)
            drawn = draw_empty(self._density, self._guides, theta, empty, joint=True)
        return Posterior(self._density, empty, [(np.arange(len(empty)), drawn)], seed)

    def prior_predict(
        self, x: Any = None, columns: Any = None, *, like: Tasks | None = None, draws: int = 1000, **options: Any
    ) -> Prediction:
        """Predicts rows of a task not yet seen (arguments as in `prior` and `Posterior.predict`)."""
        return self.prior(draws, like=like).predict(x, columns, **options)

    def __repr__(self) -> str:
        stage = self.history.stages[-1] if self.history.stages else {"seconds": float("nan")}
        return f"Fit of {len(self._training.table)} tasks in {stage['seconds']:.1f} s\n{self.shared!r}"

    def _parts(self, tasks: Tasks, draws: int, refine: str, updated: str) -> Parts:
        place = self._training.sort(tasks, updated=updated)
        parts = self._known(tasks, place.known, resample(self._shared, draws), refine)
        parts += self._climbed(tasks, place.new, resample_theta(self._shared, draws), refine, known=False)
        if len(place.changed):
            old = self._training.before(tasks[place.changed])
            theta = resample_theta(self._shared, draws)
            parts += self._climbed(tasks, place.changed, theta, refine, known=False, replaced=old)
        return parts

    def _known(self, tasks: Tasks, index: np.ndarray, chosen: Tensor, refine: str) -> Parts:
        """Joint draws of training tasks; those that a sampler drew together with θ are there already."""
        theta, drawn, mixing = self._shared.theta[chosen], self._shared.noise, self._shared.mixing
        if drawn is None or mixing is None or refine not in ("auto", "none") or not len(index):
            return self._climbed(tasks, index, theta, refine, known=True)
        at, total = self._training.positions(tasks[index]), len(drawn)
        return [(index, of_chains(theta, drawn[chosen][:, at], mixing, at, total=total))]

    def _climbed(
        self, tasks: Tasks, index: np.ndarray, theta: Tensor, refine: str, *, known: bool, replaced: Tasks | None = None
    ) -> Parts:
        """The draws of some tasks, those without rows from the prior."""
        empty = np.asarray(tasks.sizes)[index] == 0 if replaced is None else np.zeros(len(index), dtype=bool)
        parts: Parts = []
        density, guides = self._density, self._guides
        if (~empty).any():
            filled = index[~empty]
            if not known:
                _check_support(density, tasks[filled])
            found = climb(density, guides, theta, tasks[filled], known=known, refine=refine, replaced=replaced)
            parts += [(filled[positions], drawn) for positions, drawn in found]
        if empty.any():
            parts.append((index[empty], draw_empty(density, guides, theta, tasks[index[empty]], joint=known)))
        return parts


def _options(method: str | Method) -> Any:
    if isinstance(method, str):
        check_choice("method", method, tuple(METHODS))
        return METHODS[method]()
    if not isinstance(method, tuple(METHODS.values())):
        raise ValueError(
            f"method must be one of {sorted(METHODS)} or an object of options, got {type(method).__name__}"
        )
    return method


def _check_conditional(options: Method, checkpoint: Any) -> None:
    default = Amortized()
    taken: dict[str, Any] = {"optimizer": default.optimizer, "held_out": default.held_out}
    plain = isinstance(options, Amortized) and replace(options, **taken) == default
    if not plain or checkpoint is not None:
        raise ValueError(
            "a ConditionalModel has no task parameters to infer: expected method=bm.Amortized(optimizer=…, held_out=…) "
            "without more options and no checkpoint; its objective and context sizes are those of bm.ConditionalModel"
        )


def _check_support(density: TaskDensity, tasks: Tasks) -> None:
    """Refuses data outside the likelihood's support before anything is learned or inferred from them."""
    found: dict[str, list[int]] = {}
    for chunk in task_chunks(tasks, exact_size=density.structure.exact_size):
        outside = density.outside_support(chunk.batch, density.initial_theta())
        for site, rows in outside.items():
            bad = rows[: len(chunk.index)].any(-1).nonzero().flatten()
            found.setdefault(site, []).extend(chunk.index[bad.numpy()].tolist())
    for site, positions in found.items():
        if positions:
            others = f" (and {len(positions) - 1} more)" if len(positions) > 1 else ""
            raise ValueError(
                f"site {site!r}: data of task {tasks.names[min(positions)]!r}{others} lie outside "
                "the support of the likelihood; check the labels, or choose a likelihood that allows them"
            )
