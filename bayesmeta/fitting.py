"""The front door: `fit` learns a model from tasks, `Fit` answers questions about it.

It wires the rooms together and holds no mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.hierarchy.tracing import Model
from bayesmeta.inference.amortized import Amortized, fit_amortized
from bayesmeta.inference.correction import SharedDraws
from bayesmeta.inference.ladder import TaskDraws, infer_empty, infer_known, infer_new, resample_theta
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.training import History
from bayesmeta.results.posterior import Posterior, Shared
from bayesmeta.results.prediction import Prediction

METHODS = {"amortized": Amortized}
REFINEMENTS = ("auto", "none")
Parts = list[tuple[np.ndarray, TaskDraws]]


def fit(
    model: Model,
    tasks: Tasks,
    *,
    method: str | Amortized = "amortized",
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    progress: bool = True,
) -> Fit:
    """Learns a hierarchical model from tasks.

    Args:
        model: Ordinary Pyro function of a `Batch`, or a `HierarchicalModel`.
        tasks: At least two tasks.
        method: "amortized", or `bm.Amortized(...)` with options.
        seed: Same seed, same machine: the same fit, bit by bit.
        device: "cpu".
        dtype: Floating dtype of the model's densities.
        progress: Whether to show a bar.

    Raises:
        ValueError: The data or the model cannot be used; the message says what was expected and the cure.
    """
    options = _options(method)
    if device != "cpu":
        raise ValueError(f"device must be 'cpu', got {device!r}")
    if len(tasks) < 2:
        raise ValueError(
            f"fit needs at least two tasks to learn what they share, got {len(tasks)}; with one task, fix the shared "
            "parameters in the model and use fit on simulated tasks, or use Pyro itself"
        )
    if hasattr(model, "check"):
        model.check(tasks)
    with seeded(seed):
        density = TaskDensity(model, tasks, dtype=dtype)
        _check_support(density, tasks)
        guides, shared, history = fit_amortized(density, tasks, options, progress=progress)
    return Fit(density, guides, shared, tasks, history, seed)


class Fit:
    """A learned model.

    Attributes:
        shared: Posterior of the shared parameters.
        history: What training went through.
        tasks: The training tasks.
    """

    def __init__(
        self, density: TaskDensity, guides: Guides, shared: SharedDraws, tasks: Tasks, history: History, seed: int
    ) -> None:
        self._density, self._guides, self._shared = density, guides, shared
        self.tasks, self.history, self.seed = tasks, history, seed
        self.shared = Shared(density, shared, seed=seed)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Copies of the model's registered modules with the learned weights."""
        return self._density.modules()

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
            refine: "auto" weighs the guide's draws and judges them; "none" takes them as they are, unchecked.
            shared: One θ to condition on, `{site: value}` for every shared site; None integrates over θ.
            updated: "error", or "replace": a training task with other data is inferred with those instead.
            seed: Of the draws.

        Raises:
            ValueError: Unknown options, columns or levels, or a training task with other data.
        """
        _check_choice("refine", refine, REFINEMENTS)
        _check_choice("updated", updated, ("error", "replace"))
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        tasks = tasks.aligned(self.tasks.schema)
        with seeded(seed), torch.no_grad():
            if shared is not None:
                theta = self._density.theta_of(shared).expand(draws, -1)
                parts = self._new(tasks, np.arange(len(tasks)), theta, refine)
            else:
                parts = self._parts(tasks, draws, refine, updated)
        return Posterior(self._density, tasks, parts, seed)

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
        if like is None and self.tasks.schema.task_columns:
            names = list(self.tasks.schema.task_columns)
            raise ValueError(f"the model has task columns {names}; say for which tasks with like=tasks")
        chosen = self.tasks.copies([0], names=["new task"]) if like is None else like.aligned(self.tasks.schema)
        empty, _ = chosen.context_target(context=0, seed=0)
        with seeded(seed), torch.no_grad():
            theta = resample_theta(self._shared, draws)
            drawn = infer_empty(self._density, self._guides, theta, empty, joint=True)
        return Posterior(self._density, empty, [(np.arange(len(empty)), drawn)], seed)

    def prior_predict(
        self, x: Any = None, columns: Any = None, *, like: Tasks | None = None, draws: int = 1000, **options: Any
    ) -> Prediction:
        """Predicts rows of a task not yet seen (arguments as in `prior` and `Posterior.predict`)."""
        return self.prior(draws, like=like).predict(x, columns, **options)

    def __repr__(self) -> str:
        stage = self.history.stages[-1] if self.history.stages else {"seconds": float("nan")}
        return f"Fit of {len(self.tasks)} tasks in {stage['seconds']:.1f} s\n{self.shared!r}"

    def _parts(self, tasks: Tasks, draws: int, refine: str, updated: str) -> Parts:
        known, changed, new = self._sort(tasks, updated)
        parts: Parts = []
        empty = np.asarray(tasks.sizes) == 0
        density, guides = self._density, self._guides
        filled = known[~empty[known]]
        if len(filled):
            drawn = infer_known(density, guides, self._shared, tasks[filled], draws=draws, refine=refine)
            parts.append((filled, drawn))
            theta = drawn.theta[torch.as_tensor(drawn.index[:, 0].copy())]
        else:
            theta = resample_theta(self._shared, draws)
        hollow = known[empty[known]]
        if len(hollow):
            parts.append((hollow, infer_empty(density, guides, theta, tasks[hollow], joint=True)))
        parts += self._new(tasks, new, resample_theta(self._shared, draws), refine)
        if len(changed):
            old = self.tasks[[self._position(identity) for identity in tasks[changed].identities()]]
            drawn = infer_new(density, guides, resample_theta(self._shared, draws), tasks[changed], refine=refine, replaced=old)
            parts.append((changed, drawn))
        return parts

    def _new(self, tasks: Tasks, index: np.ndarray, theta: Tensor, refine: str) -> Parts:
        parts: Parts = []
        empty = np.asarray(tasks.sizes)[index] == 0
        for some, without_rows in ((index[~empty], False), (index[empty], True)):
            if not len(some):
                continue
            if without_rows:
                drawn = infer_empty(self._density, self._guides, theta, tasks[some], joint=False)
            else:
                drawn = infer_new(self._density, self._guides, theta, tasks[some], refine=refine)
            parts.append((some, drawn))
        return parts

    def _position(self, identity: str) -> int:
        return self.tasks.identities().index(identity)

    def _sort(self, tasks: Tasks, updated: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions of known tasks, of training tasks with other data, and of new tasks."""
        training = dict(zip(self.tasks.identities(), self.tasks.fingerprints(), strict=True))
        known, changed, new = [], [], []
        for position, (identity, print_) in enumerate(zip(tasks.identities(), tasks.fingerprints(), strict=True)):
            before = training.get(identity)
            (new if before is None else known if before == print_ else changed).append(position)
        if changed and updated == "error":
            names = [tasks.names[i] for i in changed[:5]]
            raise ValueError(
                f"task(s) {names} were in the fit with other data; pass the same data, rename them if they are other "
                "tasks, or say updated='replace' to infer them from these data instead"
            )
        return np.array(known, dtype=int), np.array(changed, dtype=int), np.array(new, dtype=int)


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
    count = len(like) if n is None else n
    if count < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    copies = like.copies(np.arange(count) % len(like), names=[f"simulated {i + 1}" for i in range(count)])
    density = TaskDensity(model, copies)
    with seeded(seed):
        values, outcomes = density.simulate(copies.batch(np.arange(count)))
    batch = copies.batch(np.arange(count))
    labels = [outcomes[site] for site in density.structure.outcomes]
    if not labels:
        raise ValueError("the model has no observed site to simulate, only factors (pyro.factor)")
    drawn = labels[0] if len(labels) == 1 else torch.stack(labels, -1)
    simulated = copies.with_labels(drawn.reshape(batch.y.shape)[batch.mask].to(copies.y.dtype))
    return simulated, {name: value.numpy() for name, value in values.items()}


def _options(method: str | Amortized) -> Amortized:
    if isinstance(method, str):
        _check_choice("method", method, tuple(METHODS))
        return METHODS[method]()
    if not isinstance(method, tuple(METHODS.values())):
        raise ValueError(f"method must be one of {sorted(METHODS)} or an object of options, got {type(method).__name__}")
    return method


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def _check_support(density: TaskDensity, tasks: Tasks) -> None:
    """Refuses data outside the likelihood's support before training on them."""
    for index in np.array_split(np.arange(len(tasks)), max(1, len(tasks) // 1000)):
        outside = density.outside_support(tasks.batch(index), density.initial_theta())
        for site, rows in outside.items():
            bad = rows.any(-1).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"site {site!r}: data of task {tasks.names[index[bad[0]]]!r} (and {len(bad) - 1} more) lie outside "
                    "the support of the likelihood; check the labels, or choose a likelihood that allows them"
                )
