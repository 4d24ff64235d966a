from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesmeta.inference.training import STAGES, History, Optimizer, train


def quadratic(point: nn.Parameter, calls: list[float] | None = None) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        value = (point - 3.0).square().sum()
        if calls is not None:
            calls.append(float(value.detach()))
        return value

    return loss


def run(point: nn.Parameter, loss: Callable[[], Tensor], done_after: int = 1, **options: Any) -> History:
    judged = itertools.count(1)
    return train(
        loss,
        [{"params": [point], "lr": 0.1}, {"params": [], "lr": 1.0}],
        optimizer=options.pop("optimizer", Optimizer(steps=300)),
        between=options.pop("between", lambda: None),
        judge=lambda bound: {"done": next(judged) >= done_after, "ess": 0.5, "bound": bound},
        progress=False,
        **options,
    )


def test_finds_the_minimum_and_reports_the_bound() -> None:
    point = nn.Parameter(torch.zeros(2))
    calls: list[float] = []
    history = run(point, quadratic(point, calls))
    torch.testing.assert_close(point.detach(), torch.full((2,), 3.0), rtol=0, atol=1e-2)
    assert len(calls) == 300
    assert history.stages[0]["bound"] == pytest.approx(-sum(calls[225:]) / 75, abs=1e-9)
    assert [record["step"] for record in history.steps] == [*range(0, 300, 25), 299]
    assert all(math.isnan(record["ess"]) for record in history.steps)


def test_a_slope_that_is_no_number_in_the_last_step_is_an_error() -> None:
    """The next step would have had a loss that is no number; after the last one nobody looks."""
    point = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="not finite after the last step of a stage"):
        run(point, lambda: (point * 0).abs().sqrt().sum(), optimizer=Optimizer(steps=1))


def test_stops_at_the_stage_that_is_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesmeta.inference.training.STAGES", (4, 6, 8))
    point = nn.Parameter(torch.zeros(1))
    calls: list[float] = []
    starts: list[int] = []
    history = run(point, quadratic(point, calls), 2, optimizer=Optimizer(), between=lambda: starts.append(len(calls)))
    assert [stage["steps"] for stage in history.stages] == [4, 6]
    assert starts == [0, 4] and len(calls) == 10
    assert [stage["done"] for stage in history.stages] == [False, True]
    assert history.steps[-1]["step"] == 9 and history.steps[-1]["ess"] == 0.5


def test_ends_after_the_last_stage_even_if_not_good_enough() -> None:
    point = nn.Parameter(torch.zeros(1))
    assert len(run(point, quadratic(point), 99).stages) == 1
    assert Optimizer().stages() == STAGES


def test_goes_on_after_the_stages_of_an_earlier_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesmeta.inference.training.STAGES", (4, 6, 8))
    stored: list[int] = []
    earlier = History(stages=[{"done": False, "ess": 0.1, "steps": 4, "seconds": 100.0, "stage": 0, "bound": 0.0}])
    point = nn.Parameter(torch.zeros(1))
    calls: list[float] = []
    history = run(
        point,
        quadratic(point, calls),
        optimizer=Optimizer(),
        history=earlier,
        finished=lambda h: stored.append(len(h.stages)),
    )
    assert [stage["steps"] for stage in history.stages] == [4, 6]
    assert len(calls) == 6 and stored == [2]
    assert history.stages[-1]["seconds"] > 100
    assert len(run(point, quadratic(point, calls), optimizer=Optimizer(), history=history).stages) == 2
    assert len(calls) == 6


def test_the_rate_warms_up_and_falls_like_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda adam, *a: (rates.append(adam.param_groups[0]["lr"]), step(adam, *a))[1]
    )
    point = nn.Parameter(torch.zeros(1))
    run(point, quadratic(point), optimizer=Optimizer(steps=100))
    expected = [0.1 * min(1.0, (i + 1) / 5) * 0.5 * (1 + math.cos(math.pi * i / 100)) for i in range(100)]
    assert rates == pytest.approx(expected)


def test_an_error_of_the_loss_ends_training() -> None:
    point = nn.Parameter(torch.zeros(1))

    def loss() -> Tensor:
        raise ValueError("the loss is not finite")

    with pytest.raises(ValueError, match="not finite"):
        run(point, loss)
    assert point.item() == 0


@pytest.mark.parametrize("options", [{"steps": 0}, {"batch_tasks": -1}, {"lr": 0.0}, {"lr": math.nan}])
def test_refuses_what_is_not_positive(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be a positive"):
        Optimizer(**options)
