"""Several likelihoods in one model: sites, names and densities against sums written out row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.hierarchy.likelihood_base import Custom
from bayesmeta.hierarchy.likelihoods import Bernoulli, Beta, Categorical, Kinds, Normal, Outputs, Poisson, StudentT
from bayesmeta.hierarchy.model import HierarchicalModel
from bayesmeta.hierarchy.priors import Gaussian

NAN = float("nan")
Y = [[[0.3, 2.0, 1.0], [NAN, 0.0, 2.0], [-1.2, NAN, 0.0]], [[0.7, 5.0, NAN]]]
X = [[[0.1], [-0.5], [1.0]], [[0.4]]]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def three(y: Any = Y) -> Tasks:
    return Tasks.from_arrays(X, y, missing="mask", names=["a", "b"])


def traced(likelihood: Any, predictor: Any, batch: Batch, values: dict[str, Tensor], d: int) -> dict[str, Any]:
    """The sites of one pass, with their log densities; plates are left out."""
    model = HierarchicalModel(Gaussian(d), predictor, likelihood)
    known = {"mu": torch.zeros(d), "tau": torch.ones(d), **values}
    with poutine.trace() as trace, poutine.condition(data=known):
        model(batch)
    trace.trace.compute_log_prob()
    sites = {name: node for name, node in trace.trace.nodes.items() if node["type"] == "sample"}
    return {name: node for name, node in sites.items() if name not in ("task", "obs", "mu", "tau", "phi")}


PHI = np.array([[0.2, -0.3, 0.5, 0.1, -0.7], [1.0, 0.4, -0.2, 0.3, 0.6]])


def five(phi: Tensor, x: Tensor) -> Tensor:
    return phi * (1 + x)


def by_hand(t: int, n: int) -> dict[str, float]:
    """Log density of each label of a row: levels have the numbers 0 to 2 of f, the normal one 3, counts 4."""
    f, (real, count, level) = PHI[t] * (1 + X[t][n][0]), Y[t][n]
    terms = {"y2": NAN if math.isnan(level) else f[int(level)] - math.log(np.exp(f[:3]).sum())}
    return terms | {"y0": stats.norm(f[3], 0.6).logpdf(real), "y1": stats.poisson(np.exp(f[4])).logpmf(count)}


def test_outputs_are_scored_each_by_its_own() -> None:
    likelihood = Outputs({"y2": Categorical(levels=3), 0: Normal(), 1: Poisson()})
    assert likelihood.sites == ("y2", "y0", "y1") and likelihood.width == 5 and list(likelihood.shared) == ["sigma_y0"]
    values = {"phi": torch.as_tensor(PHI).unsqueeze(1), "sigma_y0": torch.tensor(0.6)}
    sites = traced(likelihood, five, three().batch([0, 1]), values, 5)
    assert list(sites) == ["sigma_y0", "y2", "y0", "y1"]
    assert sites.pop("sigma_y0")["log_prob"].item() == pytest.approx(stats.halfnorm(0, 2.5).logpdf(0.6))
    rows = [(t, n) for t in range(2) for n in range(len(Y[t]))]
    for name, site in sites.items():
        want = np.zeros((2, 3))
        for t, n in rows:
            want[t, n] = np.nan_to_num(by_hand(t, n)[name])
        np.testing.assert_allclose(site["log_prob"].numpy(), want, rtol=1e-10, err_msg=name)
        assert (site["log_prob"] != 0).sum() == 3 and [f.name for f in site["cond_indep_stack"]] == ["task", "obs"]


def test_some_outputs_may_be_left_out_and_weights_count() -> None:
    tasks = Tasks.from_arrays(X, Y, missing="mask", weight=[[1.0, 2.0, 0.5], [3.0]])
    values = {"phi": torch.as_tensor(PHI[:, 4:]).unsqueeze(1)}
    sites = traced(Outputs({1: Poisson()}), five, tasks.batch([0, 1]), values, 1)
    want = [[by_hand(0, 0)["y1"], 2 * by_hand(0, 1)["y1"], 0.0], [3 * by_hand(1, 0)["y1"], 0.0, 0.0]]
    assert list(sites) == ["y1"]
    np.testing.assert_allclose(sites["y1"]["log_prob"].numpy(), want, rtol=1e-10)


def test_one_output_is_the_plain_likelihood() -> None:
    batch = Tasks.from_arrays(X, [[0.3, -1.2, 2.0], [0.7]]).batch([0, 1])
    phi = {"phi": torch.as_tensor(PHI[:, :1]).unsqueeze(1)}
    one = traced(Outputs({"y": StudentT()}), five, batch, phi | {k: torch.ones(()) for k in ("sigma_y", "nu_y")}, 1)
    plain = traced(
        StudentT(),
        lambda phi, x: five(phi, x)[..., 0],
        batch,
        phi | {k: torch.ones(()) for k in ("sigma", "nu")},
        1,
    )
    assert list(one) == ["sigma_y", "nu_y", "y"] and list(plain) == ["sigma", "nu", "y"]
    torch.testing.assert_close(one["y"]["log_prob"], plain["y"]["log_prob"])


def test_shared_parameters_of_outputs_do_not_mix() -> None:
    batch = Tasks.from_arrays(X, [[[1.0, 2.0]] * 3, [[3.0, 4.0]]]).batch([0, 1])
    values = {"phi": torch.zeros(2, 1, 2), "sigma_y0": torch.tensor(0.5), "sigma_y1": torch.tensor(4.0)}
    likelihood = Outputs({0: Normal(), 1: lambda f, shared: torch.distributions.Normal(f, shared["sigma_y0"])})
    sites = traced(likelihood, five, batch, values, 2)
    for k, labels in enumerate(([1.0, 3.0], [2.0, 4.0])):
        want = stats.norm(0, 0.5).logpdf(labels)
        np.testing.assert_allclose(sites[f"y{k}"]["log_prob"][:, 0].numpy(), want)
    both = {"sigma": torch.tensor(9.0), "sigma_y0": torch.tensor(0.5)}
    outcome: Any = next(likelihood.observe(torch.zeros(2, 3, 2), batch, both)).outcome
    assert (outcome.scale == 0.5).all()


@pytest.mark.parametrize("where", ["columns", "task_columns"])
def test_kinds_of_rows_and_of_tasks(where: str) -> None:
    """Labels that are none of the other kind's, and one that is missing."""
    mixed = where == "columns"
    y = [[0.3, 4.0, NAN], [0.0]] if mixed else [[0.3, NAN, -1.2], [4.0]]
    kinds = [["scan", "count", "scan"], ["count"]] if mixed else [["scan"] * 3, ["count"]]
    given: Any = kinds if mixed else [row[0] for row in kinds]
    tasks = Tasks.from_arrays(X, y, missing="mask", **{where: {"kind": given}})
    likelihood = Kinds("kind", {"scan": Normal(), "count": Poisson()})
    likelihood.check(tasks)
    assert likelihood.sites == ("y_scan", "y_count") and likelihood.width == 1
    values = {"phi": torch.as_tensor(PHI[:, :1]).unsqueeze(1), "sigma_y_scan": torch.tensor(0.6)}
    with pyro.validation_enabled():
        sites = traced(likelihood, lambda phi, x: five(phi, x)[..., 0], tasks.batch([0, 1]), values, 1)
    want = {"y_scan": np.zeros((2, 3)), "y_count": np.zeros((2, 3))}
    for t, row in enumerate(kinds):
        for n, kind in enumerate(row):
            f = PHI[t, 0] * (1 + X[t][n][0])
            outcome = stats.norm(f, 0.6).logpdf if kind == "scan" else stats.poisson(np.exp(f)).logpmf
            want[f"y_{kind}"][t, n] = np.nan_to_num(outcome(y[t][n]))
    assert list(sites) == ["sigma_y_scan", "y_scan", "y_count"]
    for name, term in want.items():
        np.testing.assert_allclose(sites[name]["log_prob"].numpy(), term, rtol=1e-10, err_msg=name)


def test_kinds_by_number_leave_weights_and_other_columns() -> None:
    tasks = Tasks.from_arrays(
        X,
        [[0.3, 0.5, 2.0], [0.7]],
        columns={"kind": [[1, 2, 2], [1]], "se": [[0.1, 0.2, 0.3], [0.4]]},
        weight=[[2.0] * 3, [3.0]],
    )
    likelihood = Kinds("kind", {2: Normal("se"), 1: Normal(0.6)})
    likelihood.check(tasks)
    sites = traced(likelihood, lambda phi, x: phi[..., 0], tasks.batch([0, 1]), {"phi": torch.zeros(2, 1, 1)}, 1)
    normal = stats.norm.logpdf
    first = [[0.0, 2 * normal(0.5, 0, 0.2), 2 * normal(2.0, 0, 0.3)], [0.0] * 3]
    second = [[2 * normal(0.3, 0, 0.6), 0.0, 0.0], [3 * normal(0.7, 0, 0.6), 0.0, 0.0]]
    assert list(sites) == ["y_2", "y_1"]
    np.testing.assert_allclose(sites["y_2"]["log_prob"].numpy(), first, rtol=1e-10)
    np.testing.assert_allclose(sites["y_1"]["log_prob"].numpy(), second, rtol=1e-10)


def test_names_of_outputs() -> None:
    columns = {"who": ["a", "a", "b"], "length": [0.3, -1.2, 0.7], "count": [2.0, 0.0, 5.0]}
    tasks = Tasks.from_dataframe(pd.DataFrame(columns), task="who", y=["length", "count"])
    likelihood = Outputs({"count": Poisson(), "length": Normal()})
    likelihood.check(tasks)
    f = torch.full((2, 2, 2), 0.4)
    seen = list(likelihood.observe(f, tasks.batch([0, 1]), {"sigma_length": torch.tensor(0.6)}))
    assert [one.site for one in seen] == ["count", "length"] and list(likelihood.shared) == ["sigma_length"]
    assert seen[0].batch.y[:, 0].tolist() == [2.0, 5.0] and seen[1].batch.y[:, 0].tolist() == [0.3, 0.7]
    with pytest.raises(ValueError, match="unknown output 'width'; known: 'length', 'count'"):
        Outputs({"width": Normal()}).check(tasks)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Outputs({}), r"Outputs: expected likelihoods by name, \{name: likelihood\}, got \{\}"),
        (lambda: Kinds("kind", [Normal()]), r"Kinds: expected likelihoods by name, .*got \[Normal"),  # type: ignore[arg-type]
        (
            lambda: Outputs({0: Normal(), "y0": Normal()}),
            r"Outputs: expected one plain likelihood for each of \[0, 'y0'\]",
        ),
        (
            lambda: Kinds("kind", {1: Normal(), "1": Normal()}),
            r"Kinds: expected one plain likelihood for each of \[1, '1'\]",
        ),
        (lambda: Outputs({0: Kinds("kind", {1: Normal()})}), "Outputs: expected one plain likelihood"),
        (lambda: Kinds("kind", {1: Outputs({0: Normal()})}), "Kinds: expected one plain likelihood"),
        (lambda: Outputs({0: Normal(), 1: Categorical()}), r"got \['y1'\] without; give Categorical its levels"),
        (
            lambda: Kinds("kind", {1: Normal(), 2: Categorical(levels=3)}),
            "Kinds: .*take equally many numbers of f, got",
        ),
        (lambda: Outputs({0: 3.0}), r"likelihood: expected a callable of \(f, batch, shared\), got 3.0"),
    ],
)
def test_what_does_not_fit_together_is_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_widths_of_kinds() -> None:
    assert Kinds("kind", {1: Categorical(levels=3), 2: Categorical(levels=3)}).width == 3
    assert Kinds("kind", {1: Categorical()}).width is None


def test_f_must_have_the_numbers_of_all_outputs() -> None:
    likelihood = Outputs({"y2": Categorical(levels=3), 0: Normal(1.0)})
    for f in (torch.zeros(2, 3, 3), torch.zeros(2, 3)):
        with pytest.raises(
            ValueError, match=r"Outputs likelihood: .*shape \(T, N, 4\).*\['y2', 'y0'\] side by side, got"
        ):
            next(likelihood.observe(f, three().batch([0, 1]), {}))


def test_there_is_no_one_distribution() -> None:
    batch = three().batch([0, 1])
    with pytest.raises(TypeError, match=r"Outputs has a distribution for each of \['y0'\]; call observe"):
        Outputs({0: Normal()}).distribution(torch.zeros(2, 3, 1), batch, {})
    with pytest.raises(TypeError, match=r"Kinds has a distribution for each of \['y_a'\]; call observe"):
        Kinds("kind", {"a": Normal()}).distribution(torch.zeros(2, 3), batch, {})


def test_sites_must_not_be_those_of_the_prior() -> None:
    with pytest.raises(ValueError, match=r"got \['tau'\] again; rename them"):
        HierarchicalModel(Gaussian(1), five, Outputs({"tau": Normal()}))


def test_labels_of_an_output_outside_its_support_are_refused() -> None:
    with pytest.raises(ValueError, match="Poisson likelihood: expected y as a count.*got -1 in task 'b'"):
        Outputs({0: Normal(), 1: Poisson()}).check(three([Y[0], [[0.7, -1.0, NAN]]]))
    Outputs({0: Normal(), 2: Poisson()}).check(three([Y[0], [[0.7, -1.0, NAN]]]))
    with pytest.raises(ValueError, match="unknown output 3.* Outputs are counted 0 … 2"):
        Outputs({3: Normal()}).check(three())


def kinds(**given: Any) -> Tasks:
    given = given or {"columns": {"kind": [["scan", "count", "scan"], ["count"]]}}
    return Tasks.from_arrays(X, [[0.3, 4.0, -1.2], [1.0]], names=["a", "b"], **given)


@pytest.mark.parametrize(
    ("likelihood", "message"),
    [
        (
            Kinds("kind", {"scan": Normal()}),
            r"expected 'kind' among \['scan'\], got 'count' in task 'a'; give a likelihood",
        ),
        (
            Kinds("kind", {"scan": Poisson(), "count": Normal()}),
            "Poisson likelihood: expected y as a count.*0.3 in task 'a'",
        ),
        (Kinds("kind", {"scan": Normal(), "count": Bernoulli()}), "Bernoulli likelihood: expected y as 0 or 1, got 4"),
        (Kinds("kind", {"scan": Normal(), "count": Beta()}), r"got 4 in task 'a' \(2 of 2 rows"),
        (
            Kinds("kind", {"scan": Normal(), "pet": Normal()}),
            "the level 'pet' was not seen before; known levels: 'count'",
        ),
        (
            Kinds("sort", {"scan": Normal()}),
            r"likelihood: unknown column 'sort'; known: \['kind'\]; name it in columns=",
        ),
    ],
)
def test_rows_that_do_not_fit_their_kind_are_refused(likelihood: Kinds, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        likelihood.check(kinds())


def test_kinds_that_are_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected 'kind' among \[1, 2.5\], got 2 in task 'b'; give a likelihood"):
        Kinds("kind", {1: Normal(), 2.5: Normal()}).check(kinds(task_columns={"kind": [1, 2]}))  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="column 'kind' holds numbers, got the text 'scan'"):
        Kinds("kind", {"scan": Normal()}).check(kinds(task_columns={"kind": [1, 2]}))


@pytest.mark.parametrize(
    ("keys", "expected"), [((0, -1), "counted from 0"), ((0, "length"), "one likelihood for each output")]
)
def test_an_output_has_one_likelihood(keys: tuple[Any, ...], expected: str) -> None:
    frame = {"task": ["a", "a"], "length": [1.0, 2.0], "width": [0.5, 0.1]}
    tasks = Tasks.from_dataframe(pd.DataFrame(frame), task="task", y=["length", "width"])
    with pytest.raises(ValueError, match=expected):
        Outputs({key: Normal() for key in keys}).check(tasks)
    with pytest.raises(ValueError, match="output 'width': "):
        Outputs({"width": Poisson()}).check(tasks)


def test_parameters_that_would_have_one_name_are_refused_and_unknown_ones_named() -> None:
    width = dist.LogNormal(0.0, 1.0)
    short = Custom(lambda f, shared: dist.Normal(f, shared["a"]), priors={"a": width})
    long = Custom(lambda f, shared: dist.Normal(f, shared["a_b"]), priors={"a_b": width})
    with pytest.raises(ValueError, match=r"Outputs: expected parameters whose names differ.*got \['a_b_c'\] twice"):
        Outputs({"b_c": short, "c": long})
    wrong = Custom(lambda f, shared: dist.Normal(f, shared["widht"]), priors={"width": width})
    model = HierarchicalModel(Gaussian(2), lambda phi, x: phi.expand(*x.shape[:2], 2), Outputs({0: wrong, 1: Normal()}))
    tasks = Tasks.from_arrays([[[0.1], [0.2]]], [[[0.3, 0.4], [0.1, 0.2]]])
    with pytest.raises(ValueError, match="unknown shared parameter 'widht'; known: .*'width'"):
        model(tasks.batch([0]))
