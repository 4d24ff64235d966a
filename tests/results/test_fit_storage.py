"""Every kind of model is stored and read again, with and without its data, bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scenarios import Scenario, scenarios

from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.inference.amortized import Amortized, build_guides
from bayesmeta.inference.correction import SharedDraws
from bayesmeta.inference.nuts import NUTS
from bayesmeta.inference.training import History
from bayesmeta.results.fit_storage import FileCheckpoint, FitState, load_fit, save_fit
from bayesmeta.results.training_tasks import TrainingTasks

KINDS = {"amortized": Amortized}


def untrained(scenario: Scenario) -> FitState:
    """A fit before its first step, every learned number moved."""
    options = Amortized()
    with seeded(3):
        density = TaskDensity(scenario.model, scenario.tasks)
        guides = build_guides(density, scenario.tasks, options)
        with torch.no_grad():
            for value in [*guides.task.parameters(), *guides.shared.parameters(), *guides.values.values()]:
                value += 0.1 * torch.randn_like(value)
        guides.values = {name: value.detach() for name, value in guides.values.items()}
        density.learned.values.update(guides.values)
        theta = guides.shared.sample(20).detach()
    history = History([{"step": 0, "elbo": -1.0}], [{"seconds": 1.0, "ess": float("nan"), "done": True}])
    shared = SharedDraws(theta, np.full(20, -np.log(20)), 0.1, np.float64(0.5), "corrected")
    return FitState(density, guides, shared, TrainingTasks(scenario.tasks), history, options, 3)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("scenario", scenarios(), ids=lambda scenario: scenario.name)
def test_every_model_is_stored_and_read_again(scenario: Scenario, data: bool, tmp_path: Path) -> None:
    state = untrained(scenario)
    save_fit(tmp_path / "fit.bm", state, data=data)
    again = load_fit(tmp_path / "fit.bm", scenario.model, kinds=KINDS)
    for old, new in ((state.guides.task, again.guides.task), (state.guides.shared, again.guides.shared)):
        ours, theirs = old.state_dict(), new.state_dict()
        assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(torch.equal(value, again.density.learned.values[name]) for name, value in state.guides.values.items())
    assert again.density.structure == state.density.structure and again.options == state.options and again.seed == 3
    assert again.history.steps == state.history.steps and np.isnan(again.history.stages[0]["ess"])
    assert again.shared.status == "corrected" and torch.equal(again.shared.theta, state.shared.theta)
    batch = scenario.tasks.batch([0])
    context = [s.guides.task.prepare(batch, s.density.tensors(batch)) for s in (state, again)]
    with torch.no_grad():
        draws = []
        for s, c in zip((state, again), context, strict=True):
            with seeded(0):
                draws.append(s.guides.task.condition(state.shared.theta, c).sample())
    assert torch.equal(*draws)


def test_a_guide_of_other_width_is_refused(tmp_path: Path) -> None:
    from bayesmeta.inference.guides import NaturalGuide

    scenario = scenarios()[0]
    narrow, wide = Amortized(guide=NaturalGuide(hidden=8)), Amortized(guide=NaturalGuide(hidden=16))
    state = untrained(scenario)
    with seeded(0):
        state.options, state.guides = narrow, build_guides(state.density, scenario.tasks, narrow)
    save_fit(tmp_path / "fit.bm", state, data=True)
    with pytest.raises(ValueError, match="cannot be stored: guide=NaturalGuide"):
        load_fit(tmp_path / "fit.bm", scenario.model, kinds=KINDS)
    with pytest.raises(ValueError, match="the guide NaturalGuide has other parameters than the one in the file"):
        load_fit(tmp_path / "fit.bm", scenario.model, kinds=KINDS, options=wide)
    load_fit(tmp_path / "fit.bm", scenario.model, kinds=KINDS, options=Amortized(guide=NaturalGuide(hidden=8)))


def test_a_checkpoint_brings_back_state_history_and_generator(tmp_path: Path) -> None:
    scenario = scenarios()[0]
    state = untrained(scenario)
    file = FileCheckpoint(tmp_path / "check.bm", state.density, state.training, state.options, 3)
    with seeded(1):
        assert file.restore(state.guides).stages == []
        file.store(state.guides, state.history)
        expected = torch.rand(3)
    other = build_guides(state.density, scenario.tasks, state.options)
    with seeded(2):
        history = file.restore(other)
        assert torch.equal(torch.rand(3), expected)
    assert history.steps == state.history.steps
    assert all(torch.equal(v, other.task.state_dict()[k]) for k, v in state.guides.task.state_dict().items())


def test_chains_and_their_diagnostics_are_stored(tmp_path: Path) -> None:
    scenario = scenarios()[0]
    state = untrained(scenario)
    method = NUTS(chains=2, warmup=3, draws=10)
    state.options, state.guides = method, method.build(state.density, scenario.tasks)
    noise = torch.randn(20, len(scenario.tasks), state.density.structure.task_size, dtype=torch.float64)
    stats = {"lp": np.random.default_rng(0).normal(size=(2, 10)), "diverging": np.zeros((2, 10), dtype=bool)}
    state.shared = SharedDraws(state.shared.theta, np.full(20, -np.log(20)), 0.0, 0.4, "sampled", 2, stats, noise)
    save_fit(tmp_path / "fit.bm", state, data=True)
    again = load_fit(tmp_path / "fit.bm", scenario.model, kinds={"nuts": NUTS})
    assert again.options == method and again.shared.chains == 2 and again.shared.status == "sampled"
    assert again.shared.noise is not None and torch.equal(again.shared.noise, noise)
    assert {k: v.dtype for k, v in again.shared.stats.items()} == {k: v.dtype for k, v in stats.items()}
    assert all(np.array_equal(values, again.shared.stats[name]) for name, values in stats.items())


def test_draws_without_chains_have_none_after_reading(tmp_path: Path) -> None:
    scenario = scenarios()[0]
    save_fit(tmp_path / "fit.bm", untrained(scenario), data=True)
    again = load_fit(tmp_path / "fit.bm", scenario.model, kinds=KINDS)
    assert again.shared.chains == 0 and again.shared.stats == {} and again.shared.noise is None
