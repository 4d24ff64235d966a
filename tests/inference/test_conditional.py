"""Training a conditional model: what is learned, on which rows, and what is left alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

import bayesmeta as bm
from bayesmeta.data.batch import Batch
from bayesmeta.data.episodes import Episode, full_batch
from bayesmeta.inference.conditional import HELD_OUT_EPISODES, predictive
from bayesmeta.inference.stopping import FEWEST_TO_HOLD_OUT


class Constant(nn.Module):
    """N(loc, scale²) whatever the context; keeps the sizes of the contexts it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, context: Batch, x: Tensor) -> Distribution:
        self.seen += context.n.tolist()
        return Normal(self.loc.expand(x.shape[:2]), self.log_scale.exp())


def table(tasks: int = 30, rows: int = 6, **options: Any) -> bm.Tasks:
    y = np.random.default_rng(0).normal(3.0, 0.5, size=(tasks, rows))
    return bm.Tasks.from_arrays(None, list(y), **options)


def method(steps: int, lr: float = 0.05) -> bm.Amortized:
    return bm.Amortized(optimizer=bm.Optimizer(steps=steps, lr=lr))


def test_it_learns_the_distribution_of_the_rows_and_leaves_the_module_alone() -> None:
    module, tasks = Constant(), table()
    state = torch.get_rng_state()
    fit = bm.fit(bm.ConditionalModel(module, context=(0, 3)), tasks, method=method(400), progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    learned = fit.modules["module"]
    error = float(tasks.y.std()) / math.sqrt(len(tasks.y))
    assert abs(float(learned.loc) - float(tasks.y.mean())) < 2 * error
    assert abs(float(learned.log_scale) - math.log(float(tasks.y.std()))) < 2 * error / 0.5
    assert float(module.loc.detach()) == 0.0 and not module.seen and not learned.training
    assert {0, 1, 2, 3} == set(learned.seen)


def test_same_seed_same_fit() -> None:
    fits = [bm.fit(bm.ConditionalModel(Constant()), table(), method=method(30), progress=False) for _ in range(2)]
    states = [fit.modules["module"].state_dict() for fit in fits]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_tasks_are_held_out_where_there_are_enough_and_training_stops_by_itself() -> None:
    options = bm.Amortized(optimizer=bm.Optimizer(lr=0.05))
    few = bm.fit(bm.ConditionalModel(Constant()), table(FEWEST_TO_HOLD_OUT - 1), method=method(20), progress=False)
    many = bm.fit(bm.ConditionalModel(Constant()), table(FEWEST_TO_HOLD_OUT), method=options, progress=False)
    assert math.isnan(few.history.stages[-1]["held_out"])
    last = many.history.stages[-1]
    assert last["done"] and len(many.history.stages) == 2
    assert abs(last["held_out"] + math.log(0.5 * math.sqrt(2 * math.pi * math.e))) < 0.3


def test_the_best_state_on_held_out_tasks_is_kept() -> None:
    def objective(model: bm.ConditionalModel, drawn: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        """Drives loc up and away, while held-out tasks are best at 1."""
        loc = model.module.loc
        return (-loc if model.module.training else (loc - 1.0) ** 2), {}

    model = bm.ConditionalModel(Constant(), objective=objective)
    fit = bm.fit(model, table(), method=method(400, 0.02), progress=False)
    assert fit.history.stages[-1]["bound"] > 3.0
    assert 0.5 < float(fit.modules["module"].loc) < 2.0


def test_training_that_helps_no_held_out_task_is_said() -> None:
    def objective(model: bm.ConditionalModel, drawn: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        """Drives loc up, while held-out tasks are best at 0, where it begins."""
        loc = model.module.loc
        return (-loc if model.module.training else loc**2), {}

    model = bm.ConditionalModel(Constant(), objective=objective)
    with pytest.warns(UserWarning, match="100 steps of training have not raised the score of held-out tasks"):
        fit = bm.fit(model, table(), method=method(100, 0.02), progress=False)
    assert float(fit.modules["module"].loc) == 0.0
    bm.fit(model, table(FEWEST_TO_HOLD_OUT - 1), method=method(100, 0.02), progress=False)  # none held out, no warning


def episode(tasks: bm.Tasks) -> Episode:
    context, target = tasks.context_target(context=1, seed=0)
    return Episode(context.batch(slice(None)), target.batch(slice(None)))


def test_the_score_counts_tasks_alike_and_only_labelled_rows() -> None:
    y = [[1.0, 2.0, np.nan, 4.0], [0.5, -1.0], [7.0]]
    drawn = episode(bm.Tasks.from_arrays(None, y, missing="mask"))
    loss, info = predictive(bm.ConditionalModel(Constant()), drawn)
    expected = [
        float(np.mean([Normal(0.0, 1.0).log_prob(v) for v in row[kept]])) if kept.any() else 0.0
        for row, kept in zip(drawn.target.y, drawn.target.observed, strict=True)
    ]
    np.testing.assert_allclose(info["log_p"].detach(), expected, rtol=1e-6)
    np.testing.assert_allclose(loss.detach(), -np.mean(expected[:2]), rtol=1e-6)


def test_weights_multiply_the_log_likelihood() -> None:
    y = [[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]]
    weights = {"weight": [[2.0] * 3, [1.0] * 3], "task_weight": [1.0, 3.0]}
    plain = predictive(bm.ConditionalModel(Constant()), episode(bm.Tasks.from_arrays(None, y)))[1]["log_p"]
    loss, info = predictive(bm.ConditionalModel(Constant()), episode(bm.Tasks.from_arrays(None, y, **weights)))
    torch.testing.assert_close(info["log_p"], plain * torch.tensor([2.0, 1.0]), check_dtype=False)
    torch.testing.assert_close(loss, -(info["log_p"] * torch.tensor([0.25, 0.75])).sum(), check_dtype=False)


def test_a_step_has_one_context_size_and_what_is_held_out_has_many() -> None:
    seen: dict[bool, list[set[int]]] = {True: [], False: []}

    def objective(model: bm.ConditionalModel, drawn: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        seen[model.module.training].append(set(drawn.context.n.tolist()))
        return (model.module.loc - 2.0) ** 2, {}

    model = bm.ConditionalModel(Constant(), objective=objective, context=(0, 3))
    bm.fit(model, table(100), method=method(30), progress=False)
    assert all(len(sizes) == 1 for sizes in seen[True]) and len(set.union(*seen[True])) == 4
    assert sum(len(sizes) > 1 for sizes in seen[False]) > 10


def test_an_objective_of_ones_own_gets_episodes() -> None:
    seen: list[Episode] = []

    def objective(model: bm.ConditionalModel, drawn: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(drawn)
        return (model.module.loc - 2.0) ** 2, {}

    model = bm.ConditionalModel(Constant(), objective=objective, context=(2, 2))
    fit = bm.fit(model, table(5), method=method(300), progress=False)
    assert abs(float(fit.modules["module"].loc) - 2.0) < 1e-2
    assert set(seen[0].context.n.tolist()) == {2} and set(seen[0].target.n.tolist()) == {4}


class Broken(Constant):
    def forward(self, context: Batch, x: Tensor) -> Distribution:
        return Normal(self.loc.expand(x.shape[:2]), self.log_scale.exp() * 0.0)


def closure() -> Any:
    module = Constant()
    return lambda context, x: module(context, x)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (bm.ConditionalModel(Broken()), {}, r"log density of task '\d' is not finite; training has stopped"),
        (bm.ConditionalModel(Constant(), objective="elbo"), {}, r"objective must be one of \['predictive'\]"),
        (bm.ConditionalModel(closure()), {}, r"uses 2 trainable parameter\(s\).*write it as an nn.Module"),
        (bm.ConditionalModel(Constant()), {"method": bm.Amortized(shared="map")}, "no task parameters to infer"),
        (bm.ConditionalModel(Constant()), {"checkpoint": "x.bm"}, "no checkpoint"),
    ],
)
def test_errors(model: bm.ConditionalModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bm.fit(model, table(5), progress=False, **options)


def test_tasks_without_any_row_are_refused() -> None:
    tasks, _ = table(3).context_target(context=0, seed=0)
    with pytest.raises(ValueError, match="no task has rows"):
        bm.fit(bm.ConditionalModel(Constant()), tasks, progress=False)


class Normals:
    """An endless source: N(mean, 0.5²) rows, never twice the same; notes what it is asked for."""

    def __init__(self) -> None:
        self.schema = table(2).schema
        self.asked: list[tuple[int, tuple[int, int]]] = []
        self.held_out = 0

    def draw(self, count: int, *, context: tuple[int, int], generator: torch.Generator) -> Episode:
        self.asked.append((count, context))
        y = 3.0 + 0.5 * torch.randn(count, 6, generator=generator, dtype=torch.float64)
        x = y.new_zeros(count, 6, 0)
        return Episode(full_batch(x[:, :2], y[:, :2], self.schema), full_batch(x[:, 2:], y[:, 2:], self.schema))

    def hold_out(self, share: float, *, fewest: int, seed: int) -> tuple[Normals, Normals]:
        self.held_out += 1
        return self, self


def test_episodes_come_from_an_endless_source() -> None:
    source = Normals()
    options = bm.Amortized(optimizer=bm.Optimizer(steps=300, batch_tasks=16, lr=0.05))
    fit = bm.fit(bm.ConditionalModel(Constant(), context=(1, 3)), source, method=options, progress=False)
    assert source.asked == [(16, (1, 3))] * (HELD_OUT_EPISODES + 1 + 300) and source.held_out == 1
    learned = fit.modules["module"]
    error = 0.5 / math.sqrt(HELD_OUT_EPISODES * 16 * 4)  # the state is chosen by the held-out episodes
    assert abs(float(learned.loc) - 3.0) < 4 * error
    assert abs(float(learned.log_scale) - math.log(0.5)) < 4 * error / 0.5
    assert fit.predict(table(3), np.zeros((2, 0)), draws=4).draws.shape == (4, 3, 2)
    assert not math.isnan(fit.history.stages[-1]["held_out"])


def test_a_model_with_task_parameters_refuses_a_source() -> None:
    with pytest.raises(ValueError, match="expected Tasks, got the endless source Normals; draw some from it"):
        bm.fit(lambda batch: None, Normals(), progress=False)
