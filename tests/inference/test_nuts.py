"""NUTS on the joint density against exact moments, and what it refuses."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conjugate import centre, drawn_rows, make_tasks

import bayesmeta as bm
from bayesmeta.hierarchy import derivatives
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import collected
from bayesmeta.inference.nuts import JITTER, Drawn, Joint, climbed, from_chains, sample
from benchmarks.exact_posteriors import eight_schools, schools


def test_chains_are_stored_and_exported(tmp_path: Path) -> None:
    fit = bm.fit(eight_schools, schools(), method=bm.NUTS(chains=2), progress=False)
    fit.save(tmp_path / "fit.bm")
    loaded = bm.load(tmp_path / "fit.bm", eight_schools)
    before, after = (f.posterior(schools(), draws=2000) for f in (fit, loaded))
    assert np.array_equal(before.draws("effect"), after.draws("effect"))
    assert set(after.method) == {"nuts"}
    assert dict(after.to_arviz()["posterior"].sizes)["chain"] == 2


def test_without_nutpie_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nutpie", None)
    with pytest.raises(ValueError, match=r"bayesmeta\[nuts\]"):
        bm.fit(eight_schools, schools(), method=bm.NUTS(chains=1, warmup=5, draws=5), progress=False)


def test_lengths_are_whole_numbers() -> None:
    with pytest.raises(ValueError, match="chains must be a whole number of at least 1, got 0"):
        bm.NUTS(chains=0)


def normal(position: np.ndarray) -> tuple[float, np.ndarray]:
    return -0.5 * float(position @ position), -position


def start(size: int = 1) -> np.ndarray:
    return 0.1 + 0.1 * torch.rand(size, dtype=torch.float64).numpy()


def short(function: Any, *, warmup: int = 300, draws: int = 700, chains: int = 2) -> Drawn:
    return sample(lambda: function, start, chains=chains, warmup=warmup, draws=draws, progress=False)


def test_a_normal_is_sampled() -> None:
    drawn = short(normal)
    assert drawn.draws.shape == (2, 700, 1) and drawn.stats["diverging"].shape == (2, 700)
    assert abs(drawn.draws.mean()) < 4 / np.sqrt(drawn.ess[0])
    assert abs(drawn.draws.std() - 1) < 4 / np.sqrt(2 * drawn.ess[0])
    assert drawn.rhat[0] < 1.05 and drawn.ess[0] > 100


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_what_is_not_finite_is_never_accepted(bad: float) -> None:
    def half(position: np.ndarray) -> tuple[float, np.ndarray]:
        return (bad, np.zeros(1)) if position[0] > 1 else normal(position)

    with pytest.warns(UserWarning, match="the chains have not mixed well.*divergent transitions; take more warmup"):
        drawn = short(half)
    assert drawn.draws.max() <= 1


def test_singular_matrices_are_rejected_and_other_errors_come_out() -> None:
    def singular(position: np.ndarray) -> tuple[float, np.ndarray]:
        if position[0] > 4:
            torch.linalg.cholesky(-torch.eye(2))
        return normal(position)

    assert short(singular).draws.max() <= 4

    def broken(position: np.ndarray) -> tuple[float, np.ndarray]:
        if position[0] > 1:
            raise KeyError("a bug")
        return normal(position)

    with pytest.raises((KeyError, ValueError), match="a bug"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        short(broken)

    def hopeless(position: np.ndarray) -> tuple[float, np.ndarray]:
        raise KeyError("a bug at once")

    with pytest.raises(ValueError, match="sampling has failed: 'a bug at once'; check that the density is finite"):
        short(hopeless)


def test_two_islands_draw_a_warning_with_the_cure() -> None:
    places = itertools.cycle((-30.0, 30.0))

    def islands(position: np.ndarray) -> tuple[float, np.ndarray]:
        return normal(position - np.sign(position) * 30.0)

    with pytest.warns(UserWarning, match=r"largest R-hat .* tighter priors, or method='marginal'"):
        sample(lambda: islands, lambda: start() + next(places), chains=2, warmup=200, draws=200, progress=False)


def test_short_chains_have_no_diagnostics() -> None:
    with pytest.warns(UserWarning, match="largest R-hat inf"):
        drawn = short(normal, warmup=20, draws=3, chains=1)
    assert drawn.draws.shape == (1, 3, 1)


def test_draws_of_chains_weigh_alike() -> None:
    drawn = Drawn(np.zeros((2, 50, 1)), {}, np.ones(1), np.array([30.0]))
    shared = from_chains(torch.zeros(100, 1), drawn)
    assert shared.chains == 2 and shared.ess == 0.3 and shared.status == "sampled"
    np.testing.assert_allclose(np.exp(shared.log_weight), 0.01)


@pytest.mark.parametrize("most", [2**20, 60])
def test_the_joint_is_the_models_and_its_gradient(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivatives, "compile_graph", lambda graph, leaves: graph)
    monkeypatch.setattr(collected, "BLOCK_ELEMENTS", most)
    tasks = make_tasks(drawn_rows(12, seed=0, sizes=(1, 7, 12)))
    density = TaskDensity(centre, tasks)
    joint = Joint(density, tasks)
    position = np.random.default_rng(0).normal(size=13)
    value, gradient = joint(position)
    unit = joint.view(position[None, None])[0, 0]
    theta, noise = torch.as_tensor(unit[:1]), torch.as_tensor(unit[1:]).reshape(12, 1)
    data = density.tensors(tasks.batch(slice(None)))
    truth = density.log_task(theta, noise, data, {}).sum() + density.log_prior(theta)
    assert value == pytest.approx(float(truth), rel=1e-12)
    for k in (0, 1, 7, 12):
        step = 1e-5 * np.eye(13)[k]
        assert gradient[k] == pytest.approx((joint(position + step)[0] - joint(position - step)[0]) / 2e-5, rel=1e-6)


def test_chains_start_uphill_of_the_priors_centre_each_somewhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivatives, "compile_graph", lambda graph, leaves: graph)
    tasks = make_tasks(drawn_rows(12, seed=0, sizes=(1, 7, 12)))
    joint = Joint(TaskDensity(centre, tasks), tasks)
    torch.manual_seed(0)
    starts = [joint.start() for _ in range(2)]
    for start in starts:
        assert joint(start)[0] > joint(np.zeros(13))[0] + 50
    assert np.abs(starts[0] - starts[1]).max() > JITTER


def test_a_climb_that_fails_ends_where_it_began() -> None:
    origin = torch.tensor([3.0, -2.0], dtype=torch.float64)

    def nowhere(position: np.ndarray) -> tuple[float, np.ndarray]:
        return math.nan, np.zeros(2)

    def singular(position: np.ndarray) -> tuple[float, np.ndarray]:
        raise torch.linalg.LinAlgError("not positive definite")

    def parabola(position: np.ndarray) -> tuple[float, np.ndarray]:
        return -float(((position - 1) ** 2).sum()), -2 * (position - 1)

    def endless(position: np.ndarray) -> tuple[float, np.ndarray]:
        return float(position.sum()), np.ones(2)

    def failing(position: np.ndarray) -> tuple[float, np.ndarray]:
        if abs(position).max() > 3:
            raise ValueError("out of range")
        return float(position.sum()), np.ones(2)

    for function in (nowhere, singular, endless, failing):
        np.testing.assert_array_equal(climbed(function, origin), origin)
    np.testing.assert_allclose(climbed(parabola, origin), 1.0)


def test_progress_is_shown_only_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    short(normal)
    assert capfd.readouterr() == ("", "")
