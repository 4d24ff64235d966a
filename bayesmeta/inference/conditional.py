"""Training of learners without task parameters: a module scored on held-out rows of random episodes.

A neural process and its like map a context to predictions; there is no density and no guide here. `fitting.py` calls
`fit_conditional`, `results/conditional.py` holds what it learned.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesmeta.data.episodes import Episode, Source
from bayesmeta.hierarchy.model import ConditionalModel
from bayesmeta.hierarchy.recording import Captured, model_context
from bayesmeta.hierarchy.tracing import cast_observed
from bayesmeta.inference.stopping import CHECK_EVERY, FEWEST_TO_HOLD_OUT, BestState
from bayesmeta.inference.training import History, Optimizer, train

LEARNING_RATE = 2e-3
HELD_OUT_EPISODES = 8
SETTLED = 0.01
"""Training stops when a stage has raised the score by less than this, in nats a row."""

ConditionalObjective = Callable[[ConditionalModel, Episode], tuple[Tensor, Mapping[str, Tensor]]]


def predictive(learner: ConditionalModel, episode: Episode) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The negative log density of held-out rows given a context, in nats a row; tasks count alike.

    References:
        Garnelo et al.: Conditional Neural Processes, 2018, https://arxiv.org/abs/1807.01613
    """
    target = episode.target
    labels: Any = learner(episode.context, target.x)
    kept = target.mask & target.observed.flatten(2).all(-1) if target.y.dim() > 2 else target.observed
    log_p = torch.where(kept, labels.log_prob(cast_observed(labels, target.y)), 0.0)
    log_p = log_p * target.tensors.get("weight", 1.0)
    rows = kept.sum(-1)
    per_task = log_p.sum(-1) / rows.clamp(min=1)
    share = target.tensors["task_weight"].squeeze(-1) * (rows > 0) if "task_weight" in target.tensors else rows > 0
    return -(per_task * share).sum() / share.sum().clamp(min=torch.finfo(per_task.dtype).tiny), {"log_p": per_task}


CONDITIONAL_OBJECTIVES: dict[str, ConditionalObjective] = {"predictive": predictive}


def fit_conditional(
    model: ConditionalModel,
    source: Source,
    *,
    optimizer: Optimizer,
    held_out: float,
    seed: int,
    dtype: torch.dtype,
    progress: bool,
) -> tuple[ConditionalModel, History]:
    """Trains a copy of a conditional model's module.

    Args:
        model: The model; its module stays as it is.
        source: What episodes are drawn from.
        optimizer: Steps, batch size and learning rate.
        held_out: Share of at least 20 tasks, or of a source's classes, that is held out to stop by; 0: none.
        seed: Of the episodes.
        dtype: Floating dtype of a module without parameters; any other is called in its own.
        progress: Whether to show a bar.

    Raises:
        ValueError: The objective is unknown, or the loss is not finite.
    """
    objective = _objective(model)
    learner = ConditionalModel(copy.deepcopy(model.module), objective=model.objective, context=model.context)
    with model_context(module_dtype(learner, dtype)):
        return learner, _Training(learner, objective, source, optimizer, held_out, seed).run(progress)


def module_dtype(learner: ConditionalModel, otherwise: torch.dtype) -> torch.dtype:
    """The floating dtype in which a learner's module is called: that of its parameters."""
    parameters = learner.module.parameters() if isinstance(learner.module, nn.Module) else ()
    return next((p.dtype for p in parameters if p.is_floating_point()), otherwise)


def _objective(model: ConditionalModel) -> ConditionalObjective:
    if not isinstance(model.objective, str):
        return model.objective
    if model.objective not in CONDITIONAL_OBJECTIVES:
        raise ValueError(
            f"ConditionalModel: objective must be one of {sorted(CONDITIONAL_OBJECTIVES)} or a function "
            f"(model, episode) -> (loss, info), got {model.objective!r}"
        )
    return CONDITIONAL_OBJECTIVES[model.objective]


class _Training:
    """One run: random episodes of a source, and the best state on those of what is held out."""

    def __init__(
        self,
        learner: ConditionalModel,
        objective: ConditionalObjective,
        source: Source,
        optimizer: Optimizer,
        share: float,
        seed: int,
    ) -> None:
        self._learner, self._objective, self._optimizer = learner, objective, optimizer
        self._generator = torch.Generator().manual_seed(seed)
        self._source, held_out = source, None
        if share > 0:
            self._source, held_out = source.hold_out(share, fewest=FEWEST_TO_HOLD_OUT, seed=seed)
        self._held_out = [] if held_out is None else [self._episode(held_out) for _ in range(HELD_OUT_EPISODES)]
        self._before, self._steps = -math.inf, 0
        self._best = BestState([learner.module] if isinstance(learner.module, nn.Module) else [])

    def run(self, progress: bool) -> History:
        """Trains, and leaves the module in its best state and in evaluation mode."""
        trained = self._trainable()
        history = History()
        if trained:
            lr = self._optimizer.lr or LEARNING_RATE
            history = train(
                self._loss,
                [{"params": trained, "lr": lr}],
                optimizer=self._optimizer,
                between=lambda: None,
                judge=self._judge,
                progress=progress,
            )
            self._best.warn_untrained(self._steps)
        if isinstance(self._learner.module, nn.Module):
            self._best.restore()
            self._learner.module.requires_grad_(False).eval()
        return history

    def _episode(self, source: Source) -> Episode:
        count = self._optimizer.batch_tasks
        episode = source.draw(count, context=self._learner.context, generator=self._generator)
        dtype = torch.get_default_dtype()
        return Episode(episode.context.to(dtype=dtype), episode.target.to(dtype=dtype))

    def _trainable(self) -> Sequence[nn.Parameter]:
        """Calls the module once, which shows wrong shapes and lazy parameters, and returns what is to be trained."""
        module, captured = self._learner.module, Captured({}, torch.get_default_dtype())
        episode = self._episode(self._source)
        with torch.no_grad():
            if isinstance(module, nn.Module):
                self._learner(episode.context, episode.target.x)
                return [p for p in module.parameters() if p.requires_grad]
            with captured:
                self._learner(episode.context, episode.target.x)
        if captured.unregistered:
            raise ValueError(
                f"ConditionalModel: the function uses {len(captured.unregistered)} trainable parameter(s) of a module "
                "that is not its own; write it as an nn.Module with forward(context, x)"
            )
        return []

    def _loss(self) -> Tensor:
        if self._held_out and self._steps % CHECK_EVERY == 0:
            self._check()
        self._steps += 1
        _set_mode(self._learner, training=True)
        episode = self._episode(self._source)
        loss, info = self._objective(self._learner, episode)
        if not bool(torch.isfinite(loss)):
            raise ValueError(_not_finite(episode, info))
        return loss

    def _check(self) -> float:
        """The score on the held-out tasks; keeps the state if it is the best."""
        _set_mode(self._learner, training=False)
        with torch.no_grad():
            scores = [-float(self._objective(self._learner, episode)[0]) for episode in self._held_out]
        score = sum(scores) / len(scores)
        self._best.offer(score, self._steps)
        return score

    def _judge(self, bound: float) -> dict[str, Any]:
        score = self._check() if self._held_out else bound
        settled = score - self._before < SETTLED
        self._before = score
        return {"ess": math.nan, "bound": bound, "held_out": score if self._held_out else math.nan, "done": settled}


def _set_mode(learner: ConditionalModel, *, training: bool) -> None:
    if isinstance(learner.module, nn.Module):
        learner.module.train(training)


def _not_finite(episode: Episode, info: Mapping[str, Tensor]) -> str:
    bad = (~torch.isfinite(info["log_p"])).nonzero().flatten().tolist() if "log_p" in info else []
    where = f"the log density of task {episode.target.names[bad[0]]!r} is" if bad else "the loss is"
    return (
        f"{where} not finite; training has stopped. Check that the labels lie inside the support of the module's "
        "distribution and that no scale can become 0 or inf, or lower lr"
    )
