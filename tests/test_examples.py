"""Every example runs with small settings, and what it finds is checked: against the truth, or exact moments.

Bounds on shares of true values inside 90 % intervals are four binomial standard errors wide, plus what an error of the
shared parameters, common to all tasks, can do.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
STEPS = 600


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested


def test_quickstart() -> None:
    found = load("quickstart").main(steps=STEPS, progress=False)
    assert 0.8 < found["inside"] < 0.96
    assert found["error of mu in sds"] < 4


def test_components() -> None:
    found = load("components").main(steps=STEPS, progress=False)
    assert 0.76 < found["inside"] < 1.0
    assert found["ours"] < found["raw"]


def test_custom_likelihood() -> None:
    found = load("custom_likelihood").main(steps=1000, progress=False)
    assert found["error in sds"] < 4
    assert found["scale"] < 0.5 * (0.6 + found["naive"])
    assert 0.76 < found["inside"] < 1.0


def test_the_rounded_distribution_sums_to_one() -> None:
    import torch

    example = load("custom_likelihood")
    one = example.Rounded(torch.tensor([1.3], dtype=torch.float64), torch.tensor([0.6], dtype=torch.float64))
    grid = example.GRID * torch.arange(-20, 21, dtype=torch.float64).unsqueeze(1)
    assert float(one.log_prob(grid).exp().sum()) == pytest.approx(1.0, abs=1e-12)


def test_meta_analysis(tmp_path: pathlib.Path, exact: Callable[[str], tuple[Any, Any]]) -> None:
    draws = 4000
    found = load("meta_analysis").main(out=tmp_path, steps=STEPS, draws=draws, progress=False)
    _, moments = exact("eight_schools")
    truth = {line["name"]: line for line in moments["summary"]}
    for j in range(8):
        line = truth[f"theta[{j + 1}]"]
        assert abs(found["mean"][j] - line["mean"]) < 0.1 * line["sd"]
        assert found["sd"][j] == pytest.approx(line["sd"], rel=0.1)
    assert abs(found["mu"][0] - truth["mu"]["mean"]) < 0.1 * truth["mu"]["sd"]
    assert found["off"].max() < 0.1
    assert (tmp_path / "eight_schools_exact.png").stat().st_size > 5000
    assert (tmp_path / "eight_schools.png").stat().st_size > 5000


def test_sinusoids() -> None:
    found = load("sinusoids").main(count=60, steps=400, progress=False)
    assert found["0"] > 1.5
    assert found["5"] < 0.8
    assert found["10"] < 0.6


def test_rare_positives() -> None:
    found = load("rare_positives").main(steps=STEPS, progress=False)
    assert 0.78 < found["inside"] < 0.98
    assert found["inside, no event"] > 0.65
    assert found["effect error in sds"] < 4


def test_uranium() -> None:
    found = load("uranium").main(progress=False)
    assert 0.5 < found["gamma"] < 1.1
    assert found["tau"] < 0.28, "log uranium explains much of what lies between counties (0.33 without it)"
    assert found["rich minus poor"] == pytest.approx(found["expected difference"], abs=0.2)


def test_radon(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = load("radon").main(out=tmp_path, steps=STEPS, draws=500, progress=False)
    names = ("shrinkage", "arrival", "prior", "calibration")
    assert {path.name for path in tmp_path.iterdir()} == {"radon.nc", *(f"radon_{name}.png" for name in names)}
    assert result.contexts == (0, 1, 2, 3, 5)
    assert result.gain("no pooling", 1)[0] > 0.2
    share, error = result.score("learned prior", 0, "coverage of rows")
    assert abs(share - 0.9) < 4 * error
    assert "complete pooling" in capsys.readouterr().out
    assert np.isfinite(result.score("learned prior", 5, "log score")[0])


def test_mixed_outputs() -> None:
    """120 effects: four standard errors of a share of .9 are .11."""
    found = load("mixed_outputs").main(steps=3 * STEPS, progress=False)
    assert 0.79 < found["inside"] < 1.0
    assert found["error"] < found["error of the mean"]


def test_county_kinds() -> None:
    """364 homes: four standard errors of a share of .9 are .063."""
    assert 0.83 < load("county_kinds").main(steps=STEPS, progress=False)["inside"] < 0.97


def test_task_clusters() -> None:
    """The groups are found; sharing everything costs more than it gains."""
    found = load("task_clusters").main(rows=14, folds=2, draws=200, picture=None)
    assert found["within"] > 0.8 and found["between"] < -0.5
    assert found["gain"] > 3 * found["error"] and found["pooling"] < 0


def test_bayesian_optimisation() -> None:
    """The learned prior finds better ones than chance and than its first guess."""
    found = load("bayesian_optimisation").main(new=20, places=60, budget=5, draws=200)
    assert found["learned prior"] < 0.7 * found["random places"]
    assert found["learned prior"] < 0.7 * found["its first guess alone"]


def test_next_dose() -> None:
    found = load("next_dose").main(count=100, new=60, trials=4, steps=400, progress=False)
    assert found["chosen"] < 0.8 * found["random"]
    assert found["random"] < found["before"]


def test_information_is_that_of_two_coins() -> None:
    """Chances 0 and 1 tell all there is, log 2; equal chances nothing."""
    import types

    draws = np.array([[[0.0, 0.3]], [[1.0, 0.3]]])
    prediction = types.SimpleNamespace(draws=draws)
    post: Any = types.SimpleNamespace(predict=lambda x, kind: prediction)
    np.testing.assert_allclose(load("next_dose").information(post), [[np.log(2), 0.0]], atol=1e-12)


def test_out_of_range(tmp_path: pathlib.Path) -> None:
    found = load("out_of_range").main(known=15, read=300, new=40, steps=400, out=tmp_path, progress=False)
    process = {place: found[f"Gaussian process, {place}"] for place in ("inside", "outside")}
    assert all(0.8 < covered < 0.96 for covered, _ in process.values())
    assert process["outside"][1] > 3 * process["inside"][1]
    assert found["Bayesian last layer, outside"][0] < process["outside"][0] - 0.1
    assert (tmp_path / "out_of_range.png").stat().st_size > 10_000


def test_sinusoid_or_line() -> None:
    """Ambiguous tasks keep both kinds, the others are decided: half and half for all would do neither well."""
    found = load("sinusoid_or_line").main(count=200, new=60, steps=1500, progress=False)
    assert 5 <= found["ambiguous"] <= 55
    assert found["kept"] >= 0.9
    assert found["decided"] >= 0.9
    assert found["error"] < 0.06
    assert found["flagged"] <= 0.1
