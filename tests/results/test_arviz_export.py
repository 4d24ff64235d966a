"""The export, with whichever ArviZ is installed; runs without torch, so the module is loaded from its file."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FILE = pathlib.Path(__file__).parents[2] / "bayesmeta" / "results" / "arviz_export.py"


def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("arviz_export", FILE)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


export = module()
to_arviz = export.to_arviz
arviz = export._arviz()
GENERATION = int(arviz.__version__.split(".")[0])

RNG = np.random.default_rng(0)
GROUPS: dict[str, dict[str, np.ndarray]] = {
    "posterior": {"phi": RNG.normal(size=(2, 5, 3, 2)), "tau": RNG.normal(size=(2, 5))},
    "posterior_predictive": {"y": RNG.normal(size=(2, 5, 3, 4, 2))},
    "log_likelihood": {"y": RNG.normal(size=(2, 5, 3, 4))},
    "observed_data": {"y": np.where(np.arange(24).reshape(3, 4, 2) > 20, np.nan, 1.0)},
    "constant_data": {
        "mask": np.ones((3, 4), bool),
        "n": np.array([4, 4, 3]),
        "method": np.array(["exact", "psis", "é"]),
    },
    "prior": {"phi": RNG.normal(size=(1, 7, 3, 2))},
    "sample_stats": {"lp": RNG.normal(size=(2, 5))},
}
DIMS = {
    "phi": ["task", "coefficient"],
    "y": ["task", "row", "output"],
    "mask": ["task", "row"],
    "n": ["task"],
    "method": ["task"],
}
COORDS = {"task": ["Aitkin", "Lac qui Parle", "Ångström"], "coefficient": ["level", "floor"]}
ATTRS = {"note": "tasks were inferred independently", "draws": 10, "new": True}


def names(result: Any) -> set[str]:
    return set(result.groups()) if GENERATION == 0 else set(result.children)


def assert_complete(result: Any) -> None:
    """All arrays, axes and labels of GROUPS are in the result."""
    assert names(result) == set(GROUPS)
    for group, arrays in GROUPS.items():
        assert set(result[group].data_vars) == set(arrays)
        lead = ("chain", "draw") if group in export.SAMPLED else ()
        for name, array in arrays.items():
            found = result[group][name]
            want = (*lead, *DIMS.get(name, []))
            assert found.dims == (want[:-1] if group == "log_likelihood" else want)
            np.testing.assert_array_equal(found.values, array)
            if "task" in found.dims:
                assert found["task"].values.tolist() == COORDS["task"]
    assert result["posterior"]["coefficient"].values.tolist() == COORDS["coefficient"]
    assert {name: result.attrs[name] for name in ATTRS} == ATTRS


def test_the_generation_decides_the_type() -> None:
    result = to_arviz(GROUPS, dims=DIMS, coords=COORDS, attrs=ATTRS)
    assert type(result).__name__ == ("InferenceData" if GENERATION == 0 else "DataTree")


def test_every_group_arrives_with_its_axes_and_labels() -> None:
    assert_complete(to_arviz(GROUPS, dims=DIMS, coords=COORDS, attrs=ATTRS))


def test_netcdf_round_trip(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "radon.nc"
    to_arviz(GROUPS, dims=DIMS, coords=COORDS, attrs=ATTRS).to_netcdf(path)
    assert_complete(arviz.from_netcdf(path))


def test_a_task_is_found_by_its_name() -> None:
    result = to_arviz(GROUPS, dims=DIMS, coords=COORDS)
    found = result["posterior"]["phi"].sel(task="Ångström", coefficient="floor").values
    np.testing.assert_array_equal(found, GROUPS["posterior"]["phi"][:, :, 2, 1])


def test_arviz_itself_works_on_the_result() -> None:
    table = arviz.summary(to_arviz(GROUPS, dims=DIMS, coords=COORDS), var_names=["tau"], round_to="none")
    assert float(table.loc["tau", "mean"]) == pytest.approx(GROUPS["posterior"]["tau"].mean(), rel=1e-12)


def test_axes_without_names_are_numbered_and_empty_groups_left_out() -> None:
    result = to_arviz({"posterior": {"phi": np.zeros((1, 4, 3, 2))}, "prior": {}})
    assert names(result) == {"posterior"}
    assert result["posterior"]["phi"].dims == ("chain", "draw", "phi_dim_0", "phi_dim_1")


def test_more_chains_than_draws_are_no_warning() -> None:
    assert to_arviz({"posterior": {"tau": np.zeros((4, 1))}})["posterior"]["tau"].shape == (4, 1)


def test_the_arguments_are_not_changed() -> None:
    attrs = {"arviz_version": "mine", "note": "kept"}
    dims = {"phi": ("task", "k")}
    to_arviz({"posterior": {"phi": np.zeros((1, 2, 3, 2))}}, dims=dims, attrs=attrs)
    assert attrs == {"arviz_version": "mine", "note": "kept"}
    assert dims == {"phi": ("task", "k")}


def test_the_filters_for_warnings_stay_as_they_were() -> None:
    before = list(warnings.filters)
    to_arviz({"posterior": {"tau": np.zeros((1, 2))}})
    assert warnings.filters == before


def test_loading_the_file_does_not_import_arviz_and_the_first_import_is_silent(tmp_path: pathlib.Path) -> None:
    code = (
        "import runpy, sys; m = runpy.run_path(sys.argv[1]); assert 'arviz' not in sys.modules; "
        "m['to_arviz']({'posterior': {'a': m['np'].zeros((1, 2))}}); assert 'arviz' in sys.modules"
    )
    env = {
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
        "MPLCONFIGDIR": str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", code, str(FILE)], capture_output=True, text=True, env=env
    )
    assert (done.returncode, done.stderr) == (0, "")


ONE = np.zeros((1, 2))


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ({"posteriors": {"a": ONE}}, {}, "unknown group 'posteriors': expected one of posterior, "),
        (
            {"posterior": {"a": np.zeros(3)}},
            {},
            r"posterior\['a'\]: expected axes \(chain, draw, ...\), got shape \(3,\)",
        ),
        (
            {"posterior": {"a": ONE, "b": ONE.T}},
            {},
            r"'b'\]: expected \(1, 2\) chains and draws as in 'a', got \(2, 1\)",
        ),
        (
            {"posterior": {"a": ONE}},
            {"dims": {"a": ["task"]}},
            "names 1 axes .task., but an array of shape .1, 2. has 0",
        ),
        (
            {"observed_data": {"y": ONE}},
            {"dims": {"y": ["task"]}},
            "names 1 axes .task., but an array of shape .1, 2. has 2",
        ),
        (
            {"observed_data": {"y": np.zeros(2)}},
            {"dims": {"y": ["task"]}, "coords": {"task": ["a", "b", "c"]}},
            "axis 'task' has length 2, but coords.'task'. has 3 labels",
        ),
        (
            {},
            {"coords": {"task": ["a", "a"]}},
            r"coords\['task'\]: expected a list of different labels, got \['a', 'a'\]",
        ),
        ({}, {"attrs": {"fit": [1]}}, r"attrs\['fit'\]: expected a string or a number, got list"),
        (
            {"posterior": {"y": np.zeros((1, 2, 3))}, "observed_data": {"y": np.zeros((3, 4))}},
            {},
            r"observed_data\['y'\] has 2 axes .* posterior\['y'\] has 1; give them the same axes or different names",
        ),
    ],
)
def test_each_mistake_is_one_clear_error(groups: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_arviz(groups, **options)


def test_loo_of_rows_agrees_with_importance_weights() -> None:
    rng = np.random.default_rng(0)
    likelihood = -0.5 * (rng.normal(0, 0.2, (4000, 1)) - rng.normal(size=5)) ** 2
    elpd, khat = export.loo(likelihood)
    np.testing.assert_allclose(elpd, -np.log(np.exp(-likelihood).mean(0)), atol=5e-3)
    assert khat.shape == (5,)
    assert (khat < 0.7).all()
