"""Errors as users meet them: one clear message each, with the cure; nothing is printed, nothing global changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import bayesmeta as bm

NAMES = list("abcd")
QUICK = bm.Amortized(optimizer=bm.Optimizer(steps=30))
NAN = float("nan")


@pytest.fixture(autouse=True)
def silence(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing is printed and the global state stays, whatever goes wrong."""
    generator = torch.get_rng_state()
    yield
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled()
    assert len(pyro.get_param_store()) == 0
    assert torch.distributions.Distribution._validate_args


def line(batch: bm.Batch) -> None:
    """Lines with their own intercept and slope."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau).to_event(1))
        with batch.observations():
            mean = phi[..., 0] + phi[..., 1] * batch.x[..., 0]
            pyro.sample("y", dist.Normal(mean, 1.0), obs=batch.y)


def arrays(sizes: tuple[int, ...] = (3, 2, 4, 1)) -> tuple[list[np.ndarray], list[np.ndarray]]:
    draw = np.random.default_rng(0)
    x = [draw.normal(size=(n, 1)) for n in sizes]
    return x, [1.0 + v[:, 0] + draw.normal(size=len(v)) for v in x]


def make_tasks(**changes: Any) -> bm.Tasks:
    x, y = arrays()
    return bm.Tasks.from_arrays(**({"x": x, "y": y, "names": NAMES} | changes))


@pytest.fixture(scope="module")
def fit() -> bm.Fit:
    torch.set_num_threads(1)
    return bm.fit(line, make_tasks(), method=QUICK, progress=False)


@pytest.fixture(scope="module")
def saved(fit: bm.Fit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "fit.bm"
    fit.save(path)
    return path


def with_entry(part: int, value: Any) -> list[np.ndarray]:
    changed = [a.copy() for a in arrays()[part]]
    changed[1].reshape(-1)[0] = value
    return changed


BAD_DATA: list[tuple[dict[str, Any], str]] = [
    (
        {"y": with_entry(1, NAN)},
        r"column 'y': 1 row\(s\) are NaN or missing, the first in task 'b', row 0.*missing=\"mask\"",
    ),
    (
        {"y": with_entry(1, np.inf)},
        r"column 'y': 1 row\(s\) are infinite, the first in task 'b', row 0 of that task; drop these rows",
    ),
    (
        {"x": with_entry(0, NAN)},
        r"column 'x0': 1 row\(s\) are NaN or missing, the first in task 'b', row 0 of that task; drop or fill",
    ),
    (
        {"y": [np.zeros((n, 2, 1)) if n == 2 else np.zeros(n) for n in (3, 2, 4, 1)]},
        r"y: expected rows of one shape, got \(\) and, in task 'b', \(2, 1\); make them alike",
    ),
    ({"y": arrays((3, 2, 5, 1))[1]}, r"x: expected 5 rows in task 'c', got 4; give one entry a row"),
    ({"names": ["a", "b", "b", "c"]}, r"duplicated names: 'b' stand for several tasks; make names unique"),
    ({"names": ["a", "b"]}, r"names: expected one name a task, 4 in all, got a list of length 2"),
    ({"x": [], "y": [], "names": []}, r"y is empty: expected one array a task, got no tasks"),
]


@pytest.mark.parametrize(("changes", "text"), BAD_DATA)
def test_bad_data_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_tasks(**changes)


def test_bad_tables_are_refused() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"school": ["a", "a", "b"], "score": [1.0, 2.0, 3.0]})
    for options, text in (
        ({"task": "scool", "y": "score"}, r"unknown column 'scool'.*Did you mean 'school'"),
        ({"task": "school", "y": "score", "x": ["hours"]}, r"unknown column 'hours'"),
        ({"task": "school", "y": "score", "columns": ["trials"]}, r"unknown column 'trials'"),
    ):
        with pytest.raises(ValueError, match=text):
            bm.Tasks.from_dataframe(table, **options)
    with pytest.raises(ValueError, match="the table is empty: expected at least one row"):
        bm.Tasks.from_dataframe(table[:0], task="school", y="score")


def run(model: Any, tasks: Any, **options: Any) -> bm.Fit:
    return bm.fit(model, tasks, **({"method": QUICK, "progress": False} | options))


BAD_FITS: list[tuple[Any, Callable[[], Any], dict[str, Any], str]] = [
    (line, lambda: make_tasks()[:1], {}, r"at least two tasks to learn what they share, got 1; with one task, fix"),
    (line, lambda: [1, 2], {}, r"fit: expected Tasks, got list; make them with bm.Tasks.from_dataframe"),
    (None, make_tasks, {}, r"model: expected a Pyro function of a batch or a HierarchicalModel, got None"),
    (line, make_tasks, {"method": "vi"}, r"method must be one of \['amortized'.*\], got 'vi'"),
    (line, make_tasks, {"method": 3}, r"method must be one of \['amortized'.*\] or an object of options, got int"),
    (line, make_tasks, {"device": "cuda"}, r"device must be 'cpu', got 'cuda'"),
    (line, make_tasks, {"dtype": torch.float16}, r"dtype must be torch.float64 or torch.float32, got torch.float16"),
    (line, make_tasks, {"seed": 0.5}, r"seed must be a whole number of at least 0, got 0.5"),
]


@pytest.mark.parametrize(("model", "tasks", "options", "text"), BAD_FITS)
def test_bad_fits_are_refused(model: Any, tasks: Callable[[], Any], options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        run(model, tasks(), **options)


def test_bad_options_are_refused() -> None:
    for build, text in (
        (lambda: bm.Amortized(shared="gaussian"), r"shared must be one of .*'normal'.*, got 'gaussian'"),
        (lambda: bm.Amortized(objective="elob"), r"objective must be one of \['elbo', 'iw'.*\], got 'elob'"),
        (lambda: bm.Optimizer(steps=0), r"Optimizer: steps must be a positive whole number, got 0"),
        (lambda: bm.Optimizer(lr=-1.0), r"Optimizer: lr must be a positive number, got -1.0"),
    ):
        with pytest.raises(ValueError, match=text):
            build()


def outside(batch: bm.Batch) -> None:
    """A likelihood for positive labels."""
    with batch.tasks():
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with batch.observations():
            pyro.sample("waiting", dist.Exponential(rate.expand(batch.y.shape)), obs=batch.y)


def test_data_outside_the_likelihoods_support_name_site_and_task() -> None:
    labels = [np.abs(y) for y in arrays()[1]]
    labels[2][1] = -3.0
    with pytest.raises(ValueError, match=r"site 'waiting': data of task 'c' lie outside the support"):
        run(outside, make_tasks(y=labels))
    model = bm.HierarchicalModel(bm.priors.Gaussian(2), lambda phi, x: phi[..., 0], bm.likelihoods.Poisson())
    with pytest.raises(ValueError, match=r"task 'c'"):
        run(model, make_tasks(y=[np.round(y) for y in labels]))


def test_all_tasks_outside_the_support_are_counted_whatever_their_sizes() -> None:
    labels = [np.where(np.arange(n) == n - 1, -3.0, 1.0) for n in (40, 1, 3)]
    tasks = bm.Tasks.from_arrays(None, [*labels, [1.0]], names=["a", "b", "c", "fine"])
    with pytest.raises(ValueError, match=r"task 'a' \(and 2 more\) lie outside the support"):
        run(outside, tasks)


def test_labels_of_new_tasks_outside_the_support_name_the_task() -> None:
    """The chains would say that they have not settled, which is true and helps nobody."""
    labels = [np.abs(y) for y in arrays()[1]]
    fit = run(outside, make_tasks(y=labels))
    new = make_tasks(y=labels).copies([0, 1], names=["fine", "new"])
    labels = new.y.clone()
    labels[-1] = -3.0
    with pytest.raises(ValueError, match=r"site 'waiting': data of task 'new' lie outside the support"):
        fit.posterior(new.with_labels(labels), draws=10)


def ceiling(batch: bm.Batch) -> None:
    """Labels up to a limit that each task has for itself."""
    with batch.tasks():
        phi = pyro.sample("phi", dist.LogNormal(0.0, 1.0))
        with batch.observations():
            pyro.sample("y", dist.Uniform(0.0, 1.0 + phi), obs=batch.y)


def test_labels_that_some_task_may_have_are_not_refused() -> None:
    """Beyond the limit of the task at the prior's centre, not of every task."""
    rng = np.random.default_rng(0)
    fit = run(ceiling, bm.Tasks.from_arrays(None, [rng.uniform(0, 1, 5) for _ in range(8)]))
    phi = np.exp(np.linspace(-8.0, 8.0, 40001))
    weight = np.exp(-0.5 * np.log(phi) ** 2) * (phi > 1.5) * (1 + phi) ** -2.0
    post = fit.posterior(bm.Tasks.from_arrays(None, [[0.3, 2.5]], names=["new"]), draws=2000, seed=0)
    exact = (weight * phi).sum() / weight.sum()
    assert abs(float(post.mean("phi")[0]) / exact - 1) < 0.15


def shrinking(batch: bm.Batch) -> None:
    """A scale that can leave the positive numbers, in the tasks that the column marks."""
    width = pyro.sample("width", dist.Normal(0.0, 1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with batch.observations():
            scale = torch.where(batch["risky"] == 1, 0.3 + width, 1.0)
            pyro.sample("first", dist.Normal(phi, 1.0), obs=batch.y)
            pyro.sample("second", dist.Normal(phi, scale), obs=batch.y)


def test_a_loss_that_turns_non_finite_stops_at_once_and_names_site_and_task() -> None:
    x, y = arrays()
    risky = [np.full(len(v), float(name == "c")) for name, v in zip(NAMES, y, strict=True)]
    tasks = make_tasks(y=[0.01 * v for v in y], columns={"risky": risky})
    with pytest.raises(
        ValueError, match=r"log density of task 'c' is not finite at site\(s\) \['second'\]; training has stopped"
    ):
        run(shrinking, tasks, method=bm.Amortized(optimizer=bm.Optimizer(steps=500)))


def steep(batch: bm.Batch) -> None:
    """A finite density whose gradient is not finite."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, 1.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi + (0.0 * phi).abs().sqrt(), 1.0), obs=batch.y)


def test_a_gradient_that_is_not_finite_stops_at_once() -> None:
    with pytest.raises(ValueError, match=r"the loss is not finite; training has stopped. The guide has diverged"):
        run(steep, make_tasks())


def test_an_objective_of_ones_own_that_turns_non_finite() -> None:
    def broken(density: Any, guides: Any, step: Any) -> Any:
        return guides.shared.mean.sum() * NAN, {}

    with pytest.raises(ValueError, match=r"the loss is not finite; training has stopped. Check the objective"):
        run(line, make_tasks(), method=bm.Amortized(objective=broken, optimizer=bm.Optimizer(steps=5)))


def test_models_that_are_not_fitted_have_no_posterior() -> None:
    model = bm.HierarchicalModel(bm.priors.Gaussian(2), lambda phi, x: phi[..., 0], bm.likelihoods.Normal())
    for verb in ("posterior", "predict"):
        with pytest.raises(
            ValueError, match=rf"{verb}: expected a fit, got a HierarchicalModel that is not fitted: fit"
        ):
            getattr(model, verb)(make_tasks())


BAD_POSTERIORS: list[tuple[Callable[[bm.Fit], Any], str]] = [
    (lambda fit: fit.posterior(3), r"posterior: expected Tasks, got int; make them with"),
    (lambda fit: fit.posterior(make_tasks(), draws=0), r"draws must be a whole number of at least 1, got 0"),
    (lambda fit: fit.posterior(make_tasks(), draws=10.0), r"draws must be a whole number of at least 1, got 10.0"),
    (lambda fit: fit.posterior(make_tasks(), refine="hmc"), r"refine must be one of \['auto', .*\], got 'hmc'"),
    (
        lambda fit: fit.posterior(make_tasks(), updated="yes"),
        r"updated must be one of \['error', 'replace'\], got 'yes'",
    ),
    (
        lambda fit: fit.posterior(bm.Tasks.from_arrays(None, arrays()[1])),
        r"x: the fit has the shape \(1,\) a row, these data \(0,\)",
    ),
    (lambda fit: fit.posterior(make_tasks(x=[np.zeros((n, 2, 2)) for n in (3, 2, 4, 1)])), r"x: the fit has the shape"),
    (lambda fit: fit.posterior(make_tasks(), shared={"mu": [0.0, 0.0]}), r"a value for each of \['mu', 'tau'\], got"),
    (lambda fit: fit.posterior(make_tasks(), shared={"mu": 0.0, "tau": 1.0}), r"shared: 'mu' must have shape \(2,\)"),
    (lambda fit: fit.posterior(make_tasks(), shared={"mu": [0.0, 0.0], "tau": -1.0}), r"'tau' = -1.0 is outside"),
    (lambda fit: fit.posterior(make_tasks(), shared={"mu": [0.0, NAN], "tau": 1.0}), r"'mu' = .*nan.* is outside"),
    (
        lambda fit: fit.posterior(make_tasks(), shared={"mu": "low", "tau": 1.0}),
        r"shared: 'mu' must be numbers in the shape of the site, got 'low'",
    ),
    (lambda fit: fit.posterior(make_tasks(), shared=[0.0, 1.0]), r"shared: expected \{site: value\}, got list"),
    (lambda fit: fit.shared.mean("sigma"), r"unknown shared parameter 'sigma'; there are \['mu', 'tau'\]"),
    (lambda fit: fit.prior(0), r"draws must be a whole number of at least 1, got 0"),
    (lambda fit: fit.prior(like="a"), r"like: expected Tasks, got str"),
    (lambda fit: bm.simulate(line, like=make_tasks(), n=0), r"n must be a whole number of at least 1, got 0"),
]


@pytest.mark.parametrize(("ask", "text"), BAD_POSTERIORS)
def test_bad_questions_to_a_fit(fit: bm.Fit, ask: Callable[[bm.Fit], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ask(fit)


BAD_PREDICTIONS: list[tuple[Callable[[bm.Posterior], Any], str]] = [
    (lambda post: post.mean("a"), r"unknown task parameter 'a'; there are \['phi'\]"),
    (lambda post: post.quantile("phi", 1.5), r"quantile levels must lie in \[0, 1\], got 1.5"),
    (lambda post: post.predict(np.zeros((2, 3))), r"x: expected rows of shape \(1,\) \('x0'\), got \(3,\); reshape x"),
    (lambda post: post.predict([np.zeros((2, 1))]), r"x: a list must hold one array a task, 4 in all, got 1 entries"),
    (lambda post: post.predict(), r"x: expected the inputs 'x0' of the new rows, got None; pass x"),
    (
        lambda post: post.predict(np.full((2, 1), NAN)),
        r"column 'x0': 8 row\(s\) are NaN or missing, the first in task 'a'",
    ),
    (lambda post: post.predict(np.zeros((2, 1)), {"trials": [1, 2]}), r"unknown column 'trials'; known: none"),
    (lambda post: post.predict(np.zeros((2, 1)), kind="median"), r"kind must be 'outcome' or 'mean', got 'median'"),
    (lambda post: post.predict(np.zeros((2, 1)), site="z"), r"unknown observed site 'z'; there are \['y'\]"),
    (lambda post: post.predict(np.zeros((2, 1))).interval(2.0), r"prob must lie in \(0, 1\), got 2.0"),
    (lambda post: post.predict(np.zeros((2, 1))).log_prob(np.zeros(3)), r"y of task 'a': expected \(2,\), got \(3,\)"),
    (
        lambda post: post.predict(np.zeros((2, 1))).log_prob(np.array([0.0, NAN])),
        r"y of task 'a' has values that are not",
    ),
    (
        lambda post: post.predict(np.zeros((2, 1))).log_prob(),
        "expected outcomes, got none: predict was given inputs alone",
    ),
]


@pytest.mark.parametrize(("ask", "text"), BAD_PREDICTIONS)
def test_bad_questions_to_a_posterior(fit: bm.Fit, ask: Callable[[bm.Posterior], Any], text: str) -> None:
    post = fit.posterior(make_tasks(), draws=10)
    with pytest.raises(ValueError, match=text):
        ask(post)


def test_ragged_predictions_have_nan_where_there_is_no_row(fit: bm.Fit) -> None:
    post = fit.posterior(make_tasks(), draws=10)
    predicted = post.predict([np.zeros((n, 1)) for n in (1, 3, 0, 2)])
    assert predicted.draws.shape == (10, 4, 3)
    assert (~np.isnan(predicted.mean)).sum(1).tolist() == [1, 3, 0, 2]
    scores = predicted.log_prob([np.zeros(n) for n in (1, 3, 0, 2)])
    assert (~np.isnan(scores)).sum(1).tolist() == [1, 3, 0, 2]


def factor_only(batch: bm.Batch) -> None:
    """A likelihood that is no distribution."""
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        with batch.observations():
            pyro.factor("y", -(batch.y - phi).abs())


def test_a_model_of_factors_alone_predicts_nothing() -> None:
    post = run(factor_only, make_tasks()).posterior(make_tasks(), draws=10)
    with pytest.raises(ValueError, match="no observed site that can be predicted, only factors"):
        post.predict(np.zeros((2, 1)))
    with pytest.raises(ValueError, match="no observed site to simulate, only factors"):
        bm.simulate(factor_only, like=make_tasks())


def test_a_model_that_reads_a_column_that_is_not_there() -> None:
    def model(batch: bm.Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(phi, batch["error"]), obs=batch.y)

    with pytest.raises(ValueError, match=r"unknown column 'error'; known: .* Name it in columns= or task_columns="):
        run(model, make_tasks())


def test_a_trainable_module_that_nobody_registered() -> None:
    with torch.random.fork_rng():
        net = nn.Linear(1, 1)

    def model(batch: bm.Batch) -> None:
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(phi + net(batch.x).squeeze(-1), 1.0), obs=batch.y)

    with pytest.raises(ValueError, match="2 trainable parameter.* nobody registered.*register their module with pyro"):
        run(model, make_tasks())


def two_sites(batch: bm.Batch) -> None:
    """Sites of another name and shape than those of `line`."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with batch.tasks():
        psi = pyro.sample("psi", dist.Normal(mu, tau).expand([len(batch.names), 1]))
        with batch.observations():
            pyro.sample("y", dist.Normal(psi, 1.0), obs=batch.y)


def wider(batch: bm.Batch) -> None:
    """`line` with another constant."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau).to_event(1))
        with batch.observations():
            mean = phi[..., 0] + phi[..., 1] * batch.x[..., 0]
            pyro.sample("y", dist.Normal(mean, 2.0), obs=batch.y)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (
            two_sites,
            r"model with other sites: shared site 'mu' has shape \(2,\) in the file, \(\) here; "
            r"task site 'phi' is missing here; task site 'psi' is not in the file; give the model that was fitted",
        ),
        (wider, r"site 'y' has another density than in the fit \(log density .* in the file, .* here\)"),
        (None, "model: expected a Pyro function"),
    ],
)
def test_a_fit_is_not_loaded_into_another_model(saved: Path, model: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        bm.load(saved, model)


def test_other_options_are_not_loaded(saved: Path) -> None:
    with pytest.raises(ValueError, match="options differ .*shared: 'normal' in the file, 'map' here"):
        bm.load(saved, line, method=bm.Amortized(shared="map", optimizer=bm.Optimizer(steps=30)))


def test_broken_files_are_not_loaded(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    middle = len(whole) // 2
    for content, text in (
        (whole[:middle], "cut short or damaged"),
        (whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], "does not match its checksum"),
        (b"something else", "was not saved by bayesmeta"),
    ):
        path = tmp_path / "broken.bm"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=text):
            bm.load(path, line)
    with pytest.raises(ValueError, match="there is no such file; check the path"):
        bm.load(tmp_path / "nothing.bm", line)


def test_a_failed_save_leaves_the_old_file(fit: bm.Fit, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the folder .*nowhere does not exist; create it first"):
        fit.save(tmp_path / "nowhere" / "fit.bm")
    assert np.array_equal(bm.load(saved, line).shared.draws("mu"), fit.shared.draws("mu"))


def test_other_frozen_weights_are_refused(tmp_path: Path) -> None:
    def with_net(net: nn.Module) -> Any:
        net.requires_grad_(False)

        def model(batch: bm.Batch) -> None:
            with batch.tasks():
                phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
                with batch.observations():
                    pyro.sample("y", dist.Normal(phi + net(batch.x).squeeze(-1), 1.0), obs=batch.y)

        return model

    with torch.random.fork_rng():
        net, other = nn.Linear(1, 1), nn.Linear(1, 1)
    run(with_net(net), make_tasks(), method=bm.Amortized(optimizer=bm.Optimizer(steps=2))).save(tmp_path / "fit.bm")
    bm.load(tmp_path / "fit.bm", with_net(net))
    with pytest.raises(ValueError, match=r"frozen parameters that the model captures are others.*same weights"):
        bm.load(tmp_path / "fit.bm", with_net(other))
