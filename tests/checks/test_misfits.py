"""Misfit: outlying tasks are named, typical ones are not, and p-values of typical tasks are uniform."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scenarios
from conjugate import drawn_rows, fitted, make_tasks
from scipy.stats import kstest

from bayesmeta import checks
from bayesmeta.checks.misfits import Misfit
from bayesmeta.data.tasks import Tasks

KNOWN = drawn_rows(60, seed=1)
ODD = {"far": [9.0, 9.5, 8.0], "wide": [-6.0, 8.0, 2.0, -5.0], "all equal": [1.0] * 12}


@pytest.fixture(scope="module")
def fit() -> Any:
    return fitted(KNOWN)


def test_outlying_tasks_are_named_and_typical_ones_are_not(fit: Any) -> None:
    found = checks.misfit(fit, make_tasks(drawn_rows(30, seed=2) | ODD))
    assert set(found.unlike()) == set(ODD)
    assert found.table().splitlines()[1].endswith("unlike the others")
    z = dict(zip(found.names, found.z, strict=True))
    assert z["far"] < -5
    assert z["wide"] < -5
    assert z["all equal"] > 2


@pytest.mark.parametrize(("statistic", "named"), [("mean", {"far"}), ("sd", {"wide", "all equal"})])
def test_another_statistic_sees_what_it_measures(fit: Any, statistic: str, named: set[str]) -> None:
    found = checks.misfit(fit, make_tasks(drawn_rows(30, seed=2) | ODD), statistic=statistic)
    assert set(found.unlike()) == named
    own = checks.misfit(fit, make_tasks(ODD), statistic=lambda y: float(np.ptp(y)))
    assert own.statistic == "<lambda>"


def test_p_values_of_typical_tasks_are_uniform(fit: Any) -> None:
    rows = drawn_rows(300, seed=3, mu=float(fit.shared.mean("mu")))
    found = checks.misfit(fit, make_tasks(rows), draws=50)
    assert kstest(found.p, "uniform").pvalue > 1e-3
    assert abs((found.p <= 0.05).mean() - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 300)
    assert len(found.unlike()) <= 1


def test_a_training_task_is_compared_with_what_the_others_say() -> None:
    others = drawn_rows(6, seed=5, sizes=(8,))
    odd = {"odd": [y + 3.5 for y in others["5-0"]]}
    options: dict[str, Any] = {"statistic": "mean", "draws": 4000, "replicates": 4000}
    inside = checks.misfit(fitted(others | odd), make_tasks(odd), **options)
    as_new = checks.misfit(fitted(others), make_tasks(odd), **options)
    with_it = checks.misfit(fitted(others | odd), make_tasks({"another name": odd["odd"]}), **options)
    assert inside.flag[0] == ""
    assert abs(inside.z[0] - as_new.z[0]) < 0.15
    assert with_it.z[0] < as_new.z[0] - 0.3


def test_names_follow_holm() -> None:
    p = np.array([0.012, 0.5, 0.0124, 0.03])
    found = Misfit(("a", "b", "c", "d"), "mean", p, p, p, np.full(4, "", dtype=object))
    assert found.unlike() == ("a", "c")
    assert found.unlike(0.01) == ()
    assert found.unlike(0.999) == ("a", "c", "d", "b")


def test_what_no_simulated_task_has_is_refused(fit: Any) -> None:
    with pytest.raises(ValueError, match="without weights"):
        checks.misfit(fit, scenarios.make_tasks(weighted=True))
    gaps = Tasks.from_arrays(None, [[1.0, np.nan]], names=["holed"], missing="mask")
    with pytest.raises(ValueError, match="task 'holed' has missing ones"):
        checks.misfit(fit, gaps)
    with pytest.raises(ValueError, match="expected a Fit"):
        checks.misfit("fit", make_tasks(ODD))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"statistic: expected one of \['mean'"):
        checks.misfit(fit, make_tasks(ODD), statistic="mode")
    with pytest.raises(ValueError, match="were in the fit with other data"):
        checks.misfit(fit, make_tasks({"1-0": [0.0]}))


def test_a_task_without_rows_is_like_any_other(fit: Any) -> None:
    found = checks.misfit(fit, make_tasks({"empty": [], "one": [1.0]}))
    assert found.p[0] == 1.0
    assert found.z[0] == 0.0


def test_the_picture_has_a_line_a_task(fit: Any, tmp_path: Any) -> None:
    checks.misfit(fit, make_tasks(ODD)).plot(tmp_path / "misfit.png")
    assert (tmp_path / "misfit.png").stat().st_size > 10_000
