"""Leaving out tasks and rows: against exact log predictive densities of the conjugate model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pytest
from conjugate import SIGMA, TAU, WIDE, drawn_rows, fitted, make_tasks

from bayesmeta import checks
from bayesmeta.inference.amortized import Amortized
from bayesmeta.inference.training import Optimizer

ROWS = drawn_rows(30, seed=1, sizes=(4,)) | drawn_rows(3, seed=2, sizes=(9,))


def evidence(groups: list[int], y: list[float]) -> float:
    """Exact log density of rows of several tasks."""
    group, values = np.array(groups), np.array(y)
    covariance = SIGMA**2 * np.eye(len(values)) + TAU**2 * (group[:, None] == group) + WIDE**2
    quadratic = values @ np.linalg.solve(covariance, values)
    return float(-0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * covariance)[1]))


def flat(rows: dict[str, list[float]]) -> tuple[list[int], list[float]]:
    pairs = [(i, v) for i, y in enumerate(rows.values()) for v in y]
    return [i for i, _ in pairs], [v for _, v in pairs]


@pytest.fixture(scope="module")
def fit() -> Any:
    return fitted(ROWS)


def test_leaving_out_a_task_is_exact(fit: Any) -> None:
    whole = evidence(*flat(ROWS))
    exact = [whole - evidence(*flat({k: v for k, v in ROWS.items() if k != name})) for name in ROWS]
    found = checks.leave_one_task_out(fit, draws=4000)
    assert found.names == tuple(ROWS)
    assert list(found.flag) == [""] * len(ROWS)
    np.testing.assert_allclose(found.elpd, exact, atol=0.06)
    assert found.total[0] == pytest.approx(sum(exact), abs=0.3)
    assert found.total[1] == pytest.approx(np.std(exact, ddof=1) * np.sqrt(len(exact)), rel=0.02)
    some = checks.leave_one_task_out(fit, make_tasks({name: ROWS[name] for name in ("1-3", "2-1")}), draws=4000)
    np.testing.assert_allclose(some.elpd, [exact[3], exact[31]], atol=0.06)


def test_leaving_out_is_not_the_density_with_the_task_in(fit: Any) -> None:
    inside = fit.posterior(make_tasks(ROWS)).log_likelihood()
    density = np.logaddexp.reduce(np.nansum(inside, 2), 0) - np.log(len(inside))
    assert (checks.leave_one_task_out(fit).elpd < density - 0.5).all()


def test_a_task_that_decides_on_theta_is_flagged_and_drawn(tmp_path: Path) -> None:
    rows = drawn_rows(12, seed=6) | {"odd": [15.0] * 4}
    found = checks.leave_one_task_out(fitted(rows))
    assert found.flag[-1].startswith("leaving it out changes too much: k̂")
    assert "odd" in found.table()
    found.plot(tmp_path / "tasks.png")
    checks.loo(fitted(rows).posterior(make_tasks(rows))).plot(tmp_path / "rows.png")
    assert all((tmp_path / name).stat().st_size > 20_000 for name in ("tasks.png", "rows.png"))
    assert list(found.flag[:-1]) == [""] * 12


def test_rows_through_arviz_are_exact(fit: Any) -> None:
    post = fit.posterior(make_tasks(ROWS), draws=4000)
    found = checks.loo(post)
    assert found.elpd.shape == (len(ROWS), 9)
    assert (~np.isnan(found.elpd)).sum(1).tolist() == [len(y) for y in ROWS.values()]
    groups, y = flat(ROWS)
    whole = evidence(groups, y)
    for task, row in ((0, 0), (5, 2), (31, 8)):
        place = [i for i, g in enumerate(groups) if g == task][row]
        exact = whole - evidence(groups[:place] + groups[place + 1 :], y[:place] + y[place + 1 :])
        assert found.elpd[task, row] == pytest.approx(exact, abs=0.15)
    assert (found.flag == "").mean() > 0.8


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_arviz_takes_the_export_itself_where_tasks_have_equal_sizes() -> None:
    rows = drawn_rows(20, seed=4, sizes=(5,))
    post = fitted(rows).posterior(make_tasks(rows))
    found = arviz.loo(post.to_arviz())
    elpd = found.elpd_loo if hasattr(found, "elpd_loo") else found.elpd
    assert float(elpd) == pytest.approx(checks.loo(post).total[0], abs=0.2)


def test_what_cannot_be_left_out_is_named(fit: Any) -> None:
    with pytest.raises(ValueError, match="task 'new' is not a training task"):
        checks.leave_one_task_out(fit, make_tasks({"new": [1.0]}))
    hollow = {"empty": [], "a": [1.0], "b": [2.0]}
    with pytest.raises(ValueError, match="task 'empty' has no rows"):
        checks.leave_one_task_out(fitted(hollow))
    from conjugate import ExactGuide, centre

    from bayesmeta.fitting import fit as learn

    method = Amortized(shared="map", guide=ExactGuide(), optimizer=Optimizer(steps=50))
    point = learn(centre, make_tasks(ROWS), method=method, progress=False)
    with pytest.raises(ValueError, match="θ is a point that has seen every task"):
        checks.leave_one_task_out(point)
    with pytest.raises(ValueError, match="loo: expected a Posterior, got Fit"):
        checks.loo(fit)
    with pytest.raises(ValueError, match="expected tasks with rows, got none"):
        checks.loo(fit.posterior(make_tasks({"empty": []})))
