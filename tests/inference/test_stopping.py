"""Stopping by held-out tasks: the best state is kept, networks do not overfit few tasks, regressions lose none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta.inference import stopping, training
from bayesmeta.inference.objectives import elbo
from bayesmeta.inference.stopping import FEWEST_TO_HOLD_OUT, BestState
from bayesmeta.models import alpaca, pacoh_gp


def fitted(model: bm.HierarchicalModel, tasks: bm.Tasks, steps: int, **options: object) -> bm.Fit:
    method = bm.Amortized(shared="map", optimizer=bm.Optimizer(steps=steps), **options)
    return bm.fit(model, tasks, method=method, progress=False)


def curves(count: int, rows: int = 10, *, seed: int = 0) -> bm.Tasks:
    return bm.families.Cauchy().simulate(count, rows=rows, seed=seed)[0]


class Counter(nn.Linear):
    """A module with state that is no tensor."""

    count = 0

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state


def test_the_best_state_is_put_back_in_place() -> None:
    module, value = Counter(2, 1), torch.zeros(())
    best = BestState([module], [value])
    weight, first = module.weight, module.weight.detach().clone()
    best.restore()
    assert torch.equal(module.weight, first)
    for at, (score, number) in enumerate([(-3.0, 5), (-1.0, 1), (math.nan, 2), (-2.0, 3)]):
        nn.init.constant_(module.weight, number)
        module.count = number
        value.fill_(number)
        best.offer(score, at)
    best.restore()
    assert module.weight is weight and torch.equal(weight, torch.ones(1, 2)) and (best.score, best.at) == (-1.0, 1)
    assert module.count == 1 and float(value) == 1.0


def test_more_training_of_a_network_on_few_tasks_is_not_worse() -> None:
    """Without held-out tasks the mean log density of a new row falls below -100."""
    tasks, new = curves(FEWEST_TO_HOLD_OUT), curves(60, 30, seed=1)
    context, target = new.context_target(context=10, seed=0)
    scores = []
    for steps in (300, 2000):
        fit = fitted(alpaca.build(dim=2, features=10), tasks, steps, guide=bm.guides.Exact())
        scores.append(np.nanmean(fit.posterior(context, draws=200).predict(target).log_prob()))
    assert scores[1] > scores[0] - 0.1


@pytest.mark.parametrize(("tasks", "held_out"), [(FEWEST_TO_HOLD_OUT - 1, False), (FEWEST_TO_HOLD_OUT, True)])
def test_few_tasks_are_all_trained_on(tasks: int, held_out: bool) -> None:
    fit = fitted(alpaca.build(dim=2, features=4), curves(tasks), 20, guide=bm.guides.Exact())
    assert math.isfinite(fit.history.stages[-1]["held_out"]) is held_out


def test_few_coefficients_have_all_tasks() -> None:
    model = alpaca.build(nn.Linear(2, 2).double(), features=2)
    assert math.isnan(fitted(model, curves(30), 20).history.stages[-1]["held_out"])


def test_coupled_rows_of_unlike_sizes_are_held_out() -> None:
    tasks = bm.families.Cauchy().simulate(24, rows=[4, 5, 6] * 8, seed=0)[0]
    model = pacoh_gp.build(tasks)
    fit = bm.fit(model, tasks, method=pacoh_gp.method(optimizer=bm.Optimizer(steps=20)), progress=False)
    assert math.isfinite(fit.history.stages[-1]["held_out"])


def test_only_tasks_with_labels_are_held_out() -> None:
    """Tasks without any would find every state as good as the first."""
    filled, empty = curves(20), curves(4).without_rows()
    x, y = ([*(filled.batch([i]).tensors[name][0] for i in range(20))] for name in ("x", "y"))
    x, y = [*[torch.zeros(0, 2)] * len(empty), *x], [*[torch.zeros(0)] * len(empty), *y]
    fit = fitted(alpaca.build(dim=2, features=10), bm.Tasks.from_arrays(x, y), 20, guide=bm.guides.Exact())
    assert fit.history.stages[-1]["held_out"] < -1.0
    few = bm.Tasks.from_arrays([*x[:4], *x[5:]], [*y[:4], *y[5:]])
    fit = fitted(alpaca.build(dim=2, features=10), few, 20, guide=bm.guides.Exact())
    assert math.isnan(fit.history.stages[-1]["held_out"])


class Levels(nn.Module):
    """Weights of single tasks, found by a task column."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.weight = nn.Embedding(20, 30), nn.Linear(30, 1, bias=False)
        nn.init.normal_(self.table.weight, 0.0, 0.1, generator=torch.Generator().manual_seed(0))

    def forward(self, unit: torch.Tensor) -> torch.Tensor:
        return self.weight(self.table(unit.long())).squeeze(-1)


def test_weights_of_single_tasks_have_all_tasks() -> None:
    levels = Levels()

    def model(batch: bm.Batch) -> None:
        pyro.module("levels", levels)
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 0.3))
            with batch.observations():
                pyro.sample("y", dist.Normal(levels(batch["unit"]) + phi, 0.3), obs=batch.y)

    truth = 5.0 * torch.randn(20, generator=torch.Generator().manual_seed(1))
    noise = 0.3 * torch.randn(20, 10, generator=torch.Generator().manual_seed(2))
    tasks = bm.Tasks.from_arrays(None, [*(truth[:, None] + noise)], task_columns={"unit": torch.arange(20)})
    fit = bm.fit(model, tasks, method=bm.Amortized(optimizer=bm.Optimizer(steps=400, lr=0.02)), progress=False)
    found = fit.modules["levels"](torch.arange(20)).detach()
    assert math.isnan(fit.history.stages[-1]["held_out"]) and float((found - truth).abs().max()) < 0.6


def test_training_that_helps_no_held_out_task_is_said() -> None:
    def backwards(density: Any, guides: Any, step: Any) -> tuple[torch.Tensor, Any]:
        """Minimises on training tasks what it maximises on those held out."""
        loss, info = elbo(density, guides, step)
        return (-loss if step.tasks == stopping.EVERY_TASK else loss), info

    model = alpaca.build(dim=2, features=10)
    with pytest.warns(UserWarning, match="100 steps of training have not raised the score of held-out tasks"):
        fitted(model, curves(20), 100, objective=backwards)


def test_stopped_training_is_resumed_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages end in the best state, so the file holds it; a finished fit read from its file is the same."""
    monkeypatch.setattr("bayesmeta.inference.training.STAGES", (250, 150))
    monkeypatch.setattr("bayesmeta.inference.amortized.SETTLED", -math.inf)
    tasks, model = curves(20), alpaca.build(dim=2, features=10)
    method = bm.Amortized(shared="map", guide=bm.guides.Exact(), optimizer=bm.Optimizer(lr=0.02))

    def weights(checkpoint: Path | None) -> tuple[torch.Tensor, list[float]]:
        fit = bm.fit(model, tasks, method=method, checkpoint=checkpoint, progress=False)
        (module,) = fit.modules.values()
        return torch.cat([p.flatten() for p in module.parameters()]), [s["held_out"] for s in fit.history.stages]

    run = training._run_stage

    def interrupted(loss: Any, groups: Any, steps: int, *rest: Any) -> float:
        if steps == 150:
            raise KeyboardInterrupt
        return run(loss, groups, steps, *rest)

    whole = weights(None)
    monkeypatch.setattr(training, "_run_stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "fit")
    monkeypatch.setattr(training, "_run_stage", run)
    for again in (weights(tmp_path / "fit"), weights(tmp_path / "fit")):
        assert torch.equal(again[0], whole[0]) and again[1] == whole[1]


def test_a_share_that_is_none_is_refused() -> None:
    for share in (-0.1, 0.6, True, math.nan, None):
        with pytest.raises(ValueError, match=r"Amortized: held_out must be a share from 0 to 0.5, got"):
            bm.Amortized(held_out=share)
