"""Stopping by held-out tasks: the best state is kept, networks do not overfit few tasks, regressions lose none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta.inference.stopping import FEWEST_TO_HOLD_OUT, BestState
from bayesmeta.models import alpaca, pacoh_gp


def fitted(model: bm.HierarchicalModel, tasks: bm.Tasks, steps: int, **options: object) -> bm.Fit:
    method = bm.Amortized(shared="map", optimizer=bm.Optimizer(steps=steps), **options)
    return bm.fit(model, tasks, method=method, progress=False)


def curves(count: int, rows: int = 10, *, seed: int = 0) -> bm.Tasks:
    return bm.families.Cauchy().simulate(count, rows=rows, seed=seed)[0]


def test_the_best_state_is_put_back_in_place() -> None:
    module = nn.Linear(2, 1)
    best = BestState(lambda: module.state_dict().values())
    weight, first = module.weight, module.weight.detach().clone()
    best.restore()
    assert torch.equal(module.weight, first)
    for at, (score, value) in enumerate([(-3.0, 0.5), (-1.0, 1.0), (math.nan, 2.0), (-2.0, 3.0)]):
        nn.init.constant_(module.weight, value)
        best.offer(score, at)
    best.restore()
    assert module.weight is weight and torch.equal(weight, torch.ones(1, 2)) and (best.score, best.at) == (-1.0, 1)


def test_more_training_of_a_network_on_few_tasks_is_not_worse() -> None:
    """Without held-out tasks the mean log density of a new row falls below -100 after 3,000 steps."""
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
