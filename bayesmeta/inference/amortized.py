"""Amortized variational inference: q(θ) and q(φ | D, θ) learned together, then θ corrected by importance weights."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.chunks import like_sizes, padded_rows
from bayesmeta.inference.conflicts import CONFLICTS
from bayesmeta.inference.correction import CHECK_BUDGET, SharedDraws, correct_shared, reachable_ess
from bayesmeta.inference.flows import FlowGuide
from bayesmeta.inference.guides import NaturalGuide
from bayesmeta.inference.methods import Inferred
from bayesmeta.inference.objectives import OBJECTIVES, Guides, Objective, Step
from bayesmeta.inference.pac_bayes import PACBayes
from bayesmeta.inference.particles import ParticleShared
from bayesmeta.inference.pooled import PooledGuide
from bayesmeta.inference.predictive import DEFAULT_CONTEXT, EPISODIC
from bayesmeta.inference.protocols import Context, SharedPosterior, TaskGuide
from bayesmeta.inference.shared import LowRankShared, NormalShared, PointShared
from bayesmeta.inference.staged import StagedGuide
from bayesmeta.inference.stopping import HeldOut, hold_out
from bayesmeta.inference.threads import threads_for
from bayesmeta.inference.training import History, Optimizer, train

NETWORK_LR = 5e-3
SHARED_LR = 2e-2
CHECK_DRAWS = 400
FINAL_DRAWS = 4000
GOOD_SHARE = 0.6
"""Training stops at this share of the relative ESS that a perfect q(θ) would reach."""
SETTLED = 1e-3
"""Training also stops when a stage has raised the bound by less than this, in nats a task."""

THETAS = 8
"""Draws of θ a step."""
SEVERAL_DRAWS = ("iw", "predictive")
"""Objectives that are the log of a mean over draws."""
LEAST_POSTERIORS = 512
"""Draws of task posteriors a step, where there is no θ to draw and the tasks are many enough."""

HELD_OUT, MOST_HELD_OUT = 0.1, 0.5
"""Share of the tasks that is held out to stop by: the default, and the most."""

SHARED: dict[str, Callable[[Tensor, Tensor], SharedPosterior]] = {
    "normal": NormalShared,
    "lowrank": LowRankShared,
    "map": PointShared,
    "svgd": ParticleShared,
}

KNOWN_OBJECTIVES = {**OBJECTIVES, **CONFLICTS}
ENCODERS = ("natural", "deepset", "attention")
FAMILIES = ("normal", "flow")


@dataclass(frozen=True)
class Amortized:
    """Options of `method="amortized"`.

    Where more numbers are fitted as points (weights of modules, θ with "map" or "svgd") than there are labels, a tenth
    of at least 20 tasks, 64 at most, is held out: each stage of training ends at its best state on them, by the same
    objective every 100 steps, and `history.stages` has its score as "held_out". θ is corrected with all tasks, unless
    it is a point.

    Args:
        shared: Posterior of θ: "normal" (full covariance), "lowrank", "map" (a point, where the objective is best: the
            mode of the marginal as far as the guide is exact, off it towards θ at which the guide fits; not corrected)
            or "svgd" (particles, for several modes).
        objective: "elbo", "iw", "predictive" (score held-out rows given a context), "predictive-elbo" (a bound on that
            score, from the posterior given all rows), "pac-bayes" (the PAC-optimal hyper-posterior, or
            `bm.PACBayes(lam=…)`), "minimax" (the worst tasks count most), "pcgrad" (conflicts between tasks' gradients
            of trained weights are projected out), or a function `(density, guides, step) -> (loss, info)`.
        context: Smallest and largest context of the predictive objectives; None: (0, 10).
        guide: A `TaskGuide`, or None for the default one.
        encoder: How rows are pooled: "natural" (the default guide, additive; site after site where task sites hang
            together), "deepset", "attention", or a module
            `(rows (T, N, width), mask (T, N)) -> (T, k)`.
        embed: Module `(R, *dx) -> (R, k)` that turns images and the like into row inputs.
        family: "normal", or "flow" (extra `flows`) for posteriors that a Gaussian cannot follow.
        optimizer: Steps, batch size and learning rate.
        held_out: Share of the tasks with labels that is held out to stop by where networks would overfit; 0 trains on
            all tasks, as is done where weights belong to single tasks.
    """

    shared: str = "normal"
    objective: str | PACBayes | Objective = "elbo"
    context: tuple[int, int] | None = None
    guide: TaskGuide | None = None
    encoder: str | nn.Module = "natural"
    embed: nn.Module | None = None
    family: str = "normal"
    optimizer: Optimizer = field(default_factory=Optimizer)
    held_out: float = HELD_OUT

    def __post_init__(self) -> None:
        self._check_names()
        number = isinstance(self.held_out, int | float) and not isinstance(self.held_out, bool)
        if not (number and 0 <= self.held_out <= MOST_HELD_OUT):
            raise ValueError(f"Amortized: held_out must be a share from 0 to {MOST_HELD_OUT}, got {self.held_out!r}")
        if self.context is not None and self.objective not in EPISODIC:
            names = " or ".join(repr(name) for name in EPISODIC)
            raise ValueError(f"Amortized: context= belongs to objective={names}; give both or leave it out")
        if self.guide is not None and (self.encoder, self.family, self.embed) != ("natural", "normal", None):
            raise ValueError("Amortized: a guide of your own brings encoder, embed and family along; give only guide=")

    def _check_names(self) -> None:
        choices: dict[str, Iterable[str]] = {
            "shared": SHARED,
            "objective": (*KNOWN_OBJECTIVES, *EPISODIC, "pac-bayes"),
            "encoder": ENCODERS,
            "family": FAMILIES,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if isinstance(value, str) and value not in known:
                raise ValueError(f"Amortized: {name} must be one of {sorted(known)}, got {value!r}")

    def build(self, density: TaskDensity, tasks: Tasks) -> Guides:
        """Everything that training changes, as it is before the first step."""
        return build_guides(density, tasks, self)

    def learn(self, density: TaskDensity, tasks: Tasks, *, progress: bool, checkpoint: Any) -> Inferred:
        """Learns q(θ) and q(φ | D, θ); options stay as they are, their modules are copied."""
        own = copy.deepcopy(self)
        return Inferred(*fit_amortized(density, tasks, own, progress=progress, checkpoint=checkpoint))


class Checkpoint(Protocol):
    """Keeps the state between the stages of training."""

    def restore(self, guides: Guides) -> History:
        """Puts a stored state, if there is one, into the guides; returns the stages that it has behind it."""

    def store(self, guides: Guides, history: History) -> None:
        """Stores the state after a stage."""


def fit_amortized(
    density: TaskDensity,
    tasks: Tasks,
    options: Amortized,
    *,
    progress: bool,
    checkpoint: Checkpoint | None = None,
    shared: SharedPosterior | None = None,
) -> tuple[Guides, SharedDraws, History]:
    """Learns q(θ) and q(φ | D, θ) from all tasks; with a checkpoint, from its last stored state on.

    `shared` stands in for the q(θ) that the options name: an instance of `PriorShared` leaves θ at its prior.
    """
    guides = build_guides(density, tasks, options, shared)
    behind = History() if checkpoint is None else checkpoint.restore(guides)
    objective = _objective(options, tasks)
    share = _evidence_share(options, tasks)
    draws, limit = _draws(density, options, len(tasks)), options.optimizer.batch_tasks
    seen, held_out = hold_out(density, guides, tasks, objective, share=options.held_out, draws=draws, limit=limit)
    pieces = _pieces(density, seen, limit, draws)
    steps = (Step(context, len(seen), draws, pieces) for context in _contexts(density, seen, guides, limit))

    def between() -> None:
        guides.shared.recentre()
        held_out.begin()

    with threads_for(draws * _batch_numbers(tasks, limit)):
        history = train(
            _loss(density, guides, objective, steps, held_out),
            _groups(guides, options.optimizer.lr or NETWORK_LR),
            optimizer=options.optimizer,
            between=between,
            judge=_Judge(density, guides, tasks, behind, share, held_out),
            progress=progress,
            history=behind,
            finished=None if checkpoint is None else functools.partial(checkpoint.store, guides),
        )
    _settle(density, guides)
    with torch.no_grad():
        return guides, correct_shared(density, guides, tasks, draws=FINAL_DRAWS, share=share), history


def _loss(
    density: TaskDensity, guides: Guides, objective: Objective, steps: Iterator[Step], held_out: HeldOut
) -> Callable[[], Tensor]:
    """The loss of one step after the other."""

    def loss() -> Tensor:
        guides.task.follow(*guides.shared.centre())
        held_out.step()
        step = next(steps)
        value, info = objective(density, guides, step)
        if not torch.isfinite(value):
            raise ValueError(_not_finite(density, step.context, info))
        return value

    return loss


def _settle(density: TaskDensity, guides: Guides) -> None:
    """Ends training: the guide knows q(θ), learned values are plain numbers."""
    guides.task.follow(*guides.shared.centre())
    guides.values = {name: value.detach() for name, value in guides.values.items()}
    density.learned.values.update(guides.values)


def _draws(density: TaskDensity, options: Amortized, tasks: int) -> int:
    """How many θ a step draws; where nothing is shared, enough posteriors over all tasks of the batch.

    Only the ELBO is a mean over them: in other objectives their number is part of the bound, also at one θ.
    """
    if options.shared == "map" and options.objective not in SEVERAL_DRAWS:
        return 1
    if density.structure.shared_size or options.objective != "elbo":
        return THETAS
    return min(THETAS, max(2, LEAST_POSTERIORS // min(tasks, options.optimizer.batch_tasks)))


def _batch_numbers(tasks: Tasks, limit: int) -> int:
    """Numbers in the rows of a batch, about."""
    return int(min(1.0, limit / len(tasks)) * (tasks.x.numel() + tasks.y.numel()))


def _groups(guides: Guides, lr: float) -> list[dict[str, Any]]:
    """What is trained, with its learning rates."""
    return [
        {"params": list(guides.shared.parameters()), "lr": SHARED_LR * lr / NETWORK_LR},
        {"params": [*guides.task.parameters(), *guides.values.values()], "lr": lr},
    ]


def _objective(options: Amortized, tasks: Tasks) -> Objective:
    chosen = PACBayes() if options.objective == "pac-bayes" else options.objective
    if isinstance(chosen, PACBayes):
        return chosen.over(tasks)
    if not isinstance(chosen, str):
        return chosen
    return EPISODIC[chosen](options.context or DEFAULT_CONTEXT) if chosen in EPISODIC else KNOWN_OBJECTIVES[chosen]


def _evidence_share(options: Amortized, tasks: Tasks) -> float:
    """How much the tasks' evidence counts in q(θ): fully, but for the PAC-Bayesian hyper-posterior."""
    chosen = PACBayes() if options.objective == "pac-bayes" else options.objective
    return chosen.share(tasks) if isinstance(chosen, PACBayes) else 1.0


def build_guides(
    density: TaskDensity, tasks: Tasks, options: Amortized, shared: SharedPosterior | None = None
) -> Guides:
    """Everything that training changes, as it is before the first step."""
    shared = SHARED[options.shared](*density.prior_scale()) if shared is None else shared
    task = options.guide if options.guide is not None else _guide(density, options)
    task.attach(density, tasks)
    values = {name: value.clone().requires_grad_() for name, value in density.learned.values.items()}
    density.learned.values.update(values)  # a guide that follows the density must see them as they are trained
    return Guides(shared, task, values)


def _guide(density: TaskDensity, options: Amortized) -> TaskGuide:
    natural = options.encoder == "natural"
    if natural and options.family == "normal" and len(density.stages) > 1:
        return StagedGuide(density.stages, embed=options.embed)
    guide = NaturalGuide(embed=options.embed) if natural else PooledGuide(encoder=options.encoder, embed=options.embed)
    return FlowGuide(guide) if options.family == "flow" else guide


def _contexts(density: TaskDensity, tasks: Tasks, guides: Guides, limit: int) -> Iterator[Context]:
    """Batches of tasks, drawn uniformly; all tasks where they fit. Rows are encoded anew, their weights change."""
    draw = _Draw(np.asarray(tasks.sizes), limit, exact_size=density.structure.exact_size)
    fixed = _tensors(density, tasks, None, None) if draw.takes_all else None
    while True:
        yield guides.task.prepare(*(fixed or _tensors(density, tasks, *draw())))


def _pieces(density: TaskDensity, tasks: Tasks, limit: int, draws: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Where every step takes all tasks: the tasks in groups of like size, so that little padding is evaluated."""
    sizes = np.asarray(tasks.sizes)
    if not _Draw(sizes, limit, exact_size=density.structure.exact_size).takes_all:
        return []
    groups = like_sizes(sizes, draws=draws)
    return [(torch.as_tensor(index), _tensors(density, tasks, index, None)[1]) for index in groups]


def _tensors(
    density: TaskDensity, tasks: Tasks, index: np.ndarray | None, rows: int | None
) -> tuple[Batch, dict[str, Tensor]]:
    batch = tasks.batch(np.arange(len(tasks)) if index is None else index, rows=rows)
    return batch, density.tensors(batch)


class _Draw:
    """Draws tasks uniformly; where tasks may not be padded, tasks of one size, sizes in proportion to their tasks."""

    def __init__(self, sizes: np.ndarray, limit: int, *, exact_size: bool) -> None:
        self._sizes, self._limit = sizes, limit
        self._groups = [np.flatnonzero(sizes == n) for n in np.unique(sizes)] if exact_size else [np.arange(len(sizes))]
        self._share = torch.tensor([len(group) / len(sizes) for group in self._groups])
        self._exact = exact_size

    @property
    def takes_all(self) -> bool:
        """Whether one batch holds all tasks."""
        return len(self._groups) == 1 and len(self._sizes) <= self._limit

    def __call__(self) -> tuple[np.ndarray, int | None]:
        """Positions of the tasks of a batch, and the rows to pad them to."""
        pool = self._groups[int(torch.multinomial(self._share, 1))] if len(self._groups) > 1 else self._groups[0]
        index = pool[torch.randperm(len(pool))[: self._limit].numpy()]
        if self._exact:
            return index, None
        return index, min(padded_rows(int(self._sizes[index].max())), max(1, int(self._sizes.max())))


class _Judge:
    """Decides after a stage whether q is good enough: by the ESS of θ where it can be corrected, else by the bound."""

    def __init__(
        self,
        density: TaskDensity,
        guides: Guides,
        tasks: Tasks,
        behind: History,
        share: float,
        held_out: HeldOut,
    ) -> None:
        self._args, self._share, self._held_out = (density, guides, tasks), share, held_out
        self._bound = _reached(behind.stages[-1]) if behind.stages else -math.inf

    def __call__(self, bound: float) -> dict[str, Any]:
        guides = self._args[1]
        guides.task.follow(*guides.shared.centre())
        score = self._held_out.finish(first=self._bound == -math.inf)
        guides.task.follow(*guides.shared.centre())
        with torch.no_grad():
            drawn = correct_shared(*self._args, draws=CHECK_DRAWS, budget=CHECK_BUDGET, share=self._share, rounds=0)
        record = {"ess": drawn.ess, "khat": drawn.khat, "bound": bound, "held_out": score}
        settled = _reached(record) - self._bound < SETTLED
        self._bound = _reached(record)
        good = drawn.status == "corrected" and drawn.ess >= GOOD_SHARE * reachable_ess(drawn.theta.shape[1])
        return record | {"done": good or settled}


def _reached(stage: Mapping[str, Any]) -> float:
    """The bound of held-out tasks after a stage, where there are some, else that of training."""
    return float(stage["bound"] if math.isnan(stage.get("held_out", math.nan)) else stage["held_out"])


def _not_finite(density: TaskDensity, context: Context, info: Any) -> str:
    stopped = "the loss is not finite; training has stopped. "
    if not {"log_p", "theta", "noise"} <= set(info):
        return f"{stopped}Check the objective: its info names no log_p, theta and noise that would tell the task"
    log_p, theta, noise = (info[name].detach() for name in ("log_p", "theta", "noise"))
    if not bool(torch.cat([theta.flatten(), noise.flatten()]).isfinite().all()):
        return f"{stopped}The guide has diverged: a gradient of the step before was not finite, or lr is too large"
    bad = (~torch.isfinite(log_p)).nonzero()
    if not len(bad):
        return f"{stopped}Every task's log density is finite: the guide has diverged; lower lr"
    return _not_finite_at(density, context, theta, noise, bad[0])


def _not_finite_at(density: TaskDensity, context: Context, theta: Tensor, noise: Tensor, at: Tensor) -> str:
    draw, task = (int(i) for i in at)
    name = context.batch.names[task]
    try:
        terms = density.terms(context.batch, theta[draw], noise[draw])
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return (
            f"the log density of task {name!r} is not finite, a covariance has no Cholesky factor; training has "
            "stopped. Add a little to its diagonal, or take a narrower prior for what it is computed from"
        )
    sites = [site for site, values in terms.items() if not torch.isfinite(values[task])]
    return (
        f"the log density of task {name!r} is not finite at site(s) {sites or list(terms)}; "
        "training has stopped. Check that the data lie inside the likelihood's support and that no scale can become "
        "0 or inf"
    )
