"""Coverage of intervals: against known shares, and of exact posteriors of simulated tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conjugate import centre, drawn_rows, fitted, make_tasks

from bayesmeta import checks
from bayesmeta.checks.calibration import Calibration
from bayesmeta.results.simulation import simulate

PROBS = np.array(checks.coverage.__kwdefaults__["probs"])


@pytest.fixture(scope="module")
def fit() -> Any:
    return fitted(drawn_rows(60, seed=1))


def test_parameters_and_held_out_rows_of_new_tasks_are_covered(fit: Any) -> None:
    rows = drawn_rows(400, seed=2, sizes=(6,))
    new = make_tasks(rows)
    context, target = new.context_target(context=3, seed=0)
    post = fit.posterior(context)
    of_rows = checks.coverage(post.predict(target))
    assert set(of_rows.share) == {"y"}
    assert np.abs(of_rows.z()["y"]).max() < 4
    assert (of_rows.error["y"] < 0.04).all()


def test_true_parameters_are_covered_and_shifted_ones_are_not() -> None:
    sim, truth = simulate(centre, like=make_tasks({"a": [0.0] * 3, "b": [0.0] * 9}), n=150, seed=3)
    rows = {name: task.y.tolist() for name, task in zip(sim.names, sim, strict=True)}
    post = fitted(rows).posterior(make_tasks(rows))
    found = checks.coverage(post, truth)
    assert set(found.share) == {"a"}
    assert np.abs(found.z()["a"]).max() < 4
    wrong = checks.coverage(post, {"a": truth["a"] + 0.5})
    assert wrong.z()["a"].max() < -4
    assert "90 %" in wrong.table()


def test_ranks_say_the_same_as_intervals() -> None:
    rng = np.random.default_rng(0)
    ranks = rng.integers(0, 100, 20_000)
    none = np.full(len(ranks), "", dtype=object)
    found = checks.coverage(Calibration({"a": ranks}, 99, np.ones(len(ranks)), none))
    np.testing.assert_allclose(found.share["a"], PROBS, atol=4 * 0.5 / np.sqrt(len(ranks)))
    every = checks.coverage(Calibration({"a": np.arange(10)}, 9, np.ones(10), none[:10]), probs=(0.5, 0.8, 0.93))
    np.testing.assert_allclose(every.share["a"], [0.5, 0.8, 0.93])  # all ranks once: exactly what is promised


def test_the_error_is_over_tasks_and_never_zero() -> None:
    none = np.full(50, "", dtype=object)
    found = checks.coverage(Calibration({"a": np.full(50, 50)}, 99, np.ones(50), none))
    np.testing.assert_array_equal(found.share["a"], 1.0)
    np.testing.assert_allclose(found.error["a"], np.sqrt(PROBS * (1 - PROBS) / 50))


def test_wrong_arguments_are_named(fit: Any) -> None:
    post = fit.posterior(make_tasks(drawn_rows(3, seed=9)))
    with pytest.raises(ValueError, match="got a Posterior without truth"):
        checks.coverage(post)
    with pytest.raises(ValueError, match=r"truth\['a'\]: expected shape \(3,\)"):
        checks.coverage(post, {"a": np.zeros(2)})
    with pytest.raises(ValueError, match=r"expected values of some of \['a'\], got \['b'\]"):
        checks.coverage(post, {"b": np.zeros(3)})
    with pytest.raises(ValueError, match="pass Tasks to predict"):
        checks.coverage(post.predict(np.zeros((2, 0))))
    with pytest.raises(ValueError, match=r"probabilities in \(0, 1\), got \(1.0,\)"):
        checks.coverage(post.predict(post.tasks), probs=(1.0,))


def test_the_picture_is_drawn(fit: Any, tmp_path: Any) -> None:
    rng = np.random.default_rng(0)
    ranks = {name: rng.integers(0, 100, 300) for name in ("mu", "phi[0]", "phi[1]")}
    found = checks.coverage(Calibration(ranks, 99, np.ones(300), np.full(300, "", dtype=object)))
    found.plot(tmp_path / "coverage.png")
    assert (tmp_path / "coverage.png").stat().st_size > 10_000
