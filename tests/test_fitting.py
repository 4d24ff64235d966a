"""Fits as users hold them: exact answers in a conjugate model, identities, storage, checkpoints, no side effects."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import bayesmeta as bm
from bayesmeta.inference import amortized, training
from bayesmeta.results.fit_storage import FileCheckpoint

TAU, SIGMA, WIDE = 1.0, 1.0, 3.0
DRAWS = 4000
ROWS = {"a": [1.2, 0.4, 2.1], "b": [-0.3, 0.8], "c": [2.5, 1.9, 3.0, 2.2], "d": [0.1], "e": [1.0, 1.4, 0.2]}


def centre(batch: bm.Batch) -> None:
    """Means of tasks around a shared mean: everything is Gaussian."""
    mu = pyro.sample("mu", dist.Normal(0.0, WIDE))
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(mu, TAU))
        with batch.observations():
            pyro.sample("y", dist.Normal(a, SIGMA), obs=batch.y)


def known_prior(batch: bm.Batch) -> None:
    """No shared site."""
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(0.5, TAU))
        with batch.observations():
            pyro.sample("y", dist.Normal(a, SIGMA), obs=batch.y)


def trend(batch: bm.Batch) -> None:
    """Task means that follow a task column."""
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    with batch.tasks():
        a = pyro.sample("a", dist.Normal(slope * batch["size"], 0.5))
        with batch.observations():
            pyro.sample("y", dist.Normal(a, SIGMA), obs=batch.y)


def make_tasks(rows: dict[str, Sequence[float]], **options: Any) -> bm.Tasks:
    """Tasks without inputs."""
    labels = [np.array(y, dtype=float) for y in rows.values()]
    return bm.Tasks.from_arrays(None, labels, names=list(rows), **options)


def exact(rows: dict[str, Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Exact posterior means and sds of (a of every task, mu)."""
    count = len(rows)
    precision, right = np.zeros((count + 1, count + 1)), np.zeros(count + 1)
    precision[-1, -1] = 1 / WIDE**2 + count / TAU**2
    for i, y in enumerate(rows.values()):
        precision[i, i] = 1 / TAU**2 + len(y) / SIGMA**2
        precision[i, -1] = precision[-1, i] = -1 / TAU**2
        right[i] = sum(y) / SIGMA**2
    covariance = np.linalg.inv(precision)
    return covariance @ right, np.sqrt(np.diag(covariance))


def close(mean: Any, sd: Any, answer: tuple[Any, Any], effective: float) -> bool:
    """Whether means and sds agree with exact ones within four standard errors."""
    z_mean = np.abs(np.asarray(mean) - answer[0]) / answer[1] * np.sqrt(effective)
    z_sd = np.abs(np.asarray(sd) / answer[1] - 1) * np.sqrt(2 * effective)
    return bool((z_mean < 4).all() and (z_sd < 4).all())


def options(steps: int = 200, **others: Any) -> bm.Amortized:
    return bm.Amortized(optimizer=bm.Optimizer(steps=steps), **others)


def quick(model: Any, tasks: bm.Tasks, **others: Any) -> bm.Fit:
    return bm.fit(model, tasks, **({"method": options(60), "progress": False} | others))


@pytest.fixture(scope="module")
def tasks() -> bm.Tasks:
    return make_tasks(ROWS)


@pytest.fixture(scope="module")
def fit(tasks: bm.Tasks) -> bm.Fit:
    return bm.fit(centre, tasks, method=options(), progress=False)


def effective(fit: bm.Fit, ess: np.ndarray) -> float:
    """Draws that count: those of θ and of the task, resampled."""
    return DRAWS * min(1.0, fit.shared.ess) * float(ess.min()) / 2


def test_shared_and_known_tasks_agree_with_the_exact_posterior(fit: bm.Fit, tasks: bm.Tasks) -> None:
    mean, sd = exact(ROWS)
    post = fit.posterior(tasks, draws=DRAWS)
    count = effective(fit, post.ess)
    assert fit.shared.status == "corrected" and set(post.method) == {"psis"} and set(post.flag) == {""}
    assert close(fit.shared.mean("mu"), fit.shared.sd("mu"), (mean[-1], sd[-1]), count)
    assert close(post.mean("a"), post.sd("a"), (mean[:-1], sd[:-1]), count)
    assert close(post.draws("a").mean(0), post.draws("a").std(0), (mean[:-1], sd[:-1]), count)
    assert post.joint and post.shared["mu"].shape == (DRAWS,)


def test_a_new_task_agrees_with_the_exact_posterior(fit: bm.Fit) -> None:
    mean, sd = exact(ROWS | {"new": [3.0, 3.5]})
    post = fit.posterior(make_tasks({"new": [3.0, 3.5]}), draws=DRAWS)
    assert close(post.mean("a"), post.sd("a"), (mean[-2], sd[-2]), effective(fit, post.ess))
    assert not post.joint and post.shared["mu"].shape == (DRAWS, 1)


def test_a_replaced_task_agrees_with_the_exact_posterior_without_its_old_data(fit: bm.Fit) -> None:
    replaced = {name: y for name, y in ROWS.items() if name != "c"} | {"c": [-1.0, -0.5]}
    mean, sd = exact(replaced)
    post = fit.posterior(make_tasks({"c": [-1.0, -0.5]}), draws=10 * DRAWS, updated="replace")
    count = 10 * effective(fit, post.ess)
    assert close(post.mean("a"), post.sd("a"), (mean[-2], sd[-2]), count)
    added = exact(ROWS | {"new": [-1.0, -0.5]})
    assert not close(post.mean("a"), post.sd("a"), (added[0][-2], added[1][-2]), count)


def test_conditioning_on_one_theta_gives_the_exact_conditional(fit: bm.Fit, tasks: bm.Tasks) -> None:
    post = fit.posterior(tasks, draws=DRAWS, shared={"mu": 2.0})
    sizes = np.array([len(y) for y in ROWS.values()])
    sums = np.array([sum(y) for y in ROWS.values()])
    answer = (2.0 + sums) / (1 + sizes), 1 / np.sqrt(1 + sizes)
    assert close(post.mean("a"), post.sd("a"), answer, DRAWS * float(post.ess.min()) / 2)
    assert (post.shared["mu"] == 2.0).all()


def test_a_mixed_call_keeps_the_order_of_tasks(fit: bm.Fit) -> None:
    rows = {"new": [4.0], "b": ROWS["b"], "nothing": [], "c": [0.5, 0.2], "a": ROWS["a"]}
    post = fit.posterior(make_tasks(rows), draws=2000, updated="replace")
    assert post.names == tuple(rows)
    assert post.method.tolist() == ["psis", "psis", "prior", "psis", "psis"]
    alone = [fit.posterior(make_tasks({name: y}), draws=2000, updated="replace") for name, y in rows.items()]
    means, sds = (np.array([getattr(p, verb)("a")[0] for p in alone]) for verb in ("mean", "sd"))
    assert np.abs((post.mean("a") - means) / sds).max() < 0.3
    assert np.abs((post.draws("a").mean(0) - post.mean("a")) / sds).max() < 0.15
    assert post.predict(np.zeros((2, 0))).draws.shape == (2000, 5, 2)


def test_known_tasks_without_rows_are_joint_with_the_others() -> None:
    tasks = make_tasks(ROWS | {"hollow": []})
    post = quick(centre, tasks).posterior(tasks, draws=DRAWS)
    assert post.joint and post.method[-1] == "prior"
    draws, mu = post.draws("a")[:, -1], post.shared["mu"]
    assert abs((draws - mu).mean()) < 4 * TAU / np.sqrt(DRAWS)
    assert abs((draws - mu).std() - TAU) < 4 * TAU / np.sqrt(2 * DRAWS)


def test_unnamed_tasks_are_known_only_within_their_collection() -> None:
    labels = [np.array(y) for y in ROWS.values()]
    fit = quick(centre, bm.Tasks.from_arrays(None, labels))
    again, other = bm.Tasks.from_arrays(None, labels), bm.Tasks.from_arrays(None, labels[:2])
    assert fit.posterior(again[2:4], draws=50).joint
    assert not fit.posterior(other, draws=50).joint


def test_changed_data_of_a_known_task_are_refused(fit: bm.Fit) -> None:
    with pytest.raises(ValueError, match=r"task\(s\) \['c'\] were in the fit with other data; pass the same data"):
        fit.posterior(make_tasks({"a": ROWS["a"], "c": [1.0]}))


def test_the_prior_of_a_new_task(fit: bm.Fit) -> None:
    prior = fit.prior(DRAWS)
    sd = np.sqrt(TAU**2 + fit.shared.sd("mu") ** 2)
    assert prior.names == ("new task",) and prior.method.tolist() == ["prior"]
    assert close(prior.mean("a"), prior.sd("a"), (fit.shared.mean("mu"), sd), DRAWS * fit.shared.ess / 2)
    predicted = fit.prior_predict(np.zeros((2, 0)), draws=DRAWS)
    spread = np.sqrt(sd**2 + SIGMA**2)
    assert close(predicted.mean, predicted.sd, (fit.shared.mean("mu"), spread), DRAWS * fit.shared.ess / 2)


def test_the_prior_where_the_model_reads_task_columns() -> None:
    tasks = make_tasks(ROWS, task_columns={"size": np.array([1.0, 0.0, 2.0, 0.0, 1.0])})
    fit = quick(trend, tasks)
    with pytest.raises(ValueError, match=r"the model has task columns \['size'\]; say for which tasks with like=tasks"):
        fit.prior()
    like = make_tasks({"far": [], "near": [0.0]}, task_columns={"size": np.array([10.0, 0.0])})
    prior = fit.prior(DRAWS, like=like)
    assert prior.names == ("far", "near")
    expected = fit.shared.mean("slope") * np.array([10.0, 0.0])
    assert (np.abs(prior.mean("a") - expected) < 4 * prior.sd("a") / np.sqrt(DRAWS * fit.shared.ess / 2)).all()
    assert fit.prior_predict(np.zeros((3, 0)), like=like, draws=20).draws.shape == (20, 2, 3)


def test_predictions_from_a_context(fit: bm.Fit) -> None:
    context = make_tasks({"new": [3.0, 3.5]})
    predicted = fit.predict(context, np.zeros((2, 0)))
    assert np.array_equal(predicted.draws, fit.posterior(context).predict(np.zeros((2, 0))).draws)


def test_a_point_estimate_says_that_the_uncertainty_of_theta_is_missing(tasks: bm.Tasks) -> None:
    fit = bm.fit(centre, tasks, method=options(300, shared="map"), progress=False)
    mean, sd = exact(ROWS)
    assert fit.shared.status == "plug-in" and np.isnan(fit.shared.sd("mu"))
    assert "uncertainty of θ is missing" in repr(fit)
    assert abs(fit.shared.mean("mu") - mean[-1]) < 0.1 * sd[-1]


def test_a_low_rank_posterior_of_theta(tasks: bm.Tasks) -> None:
    fit = bm.fit(centre, tasks, method=options(shared="lowrank"), progress=False)
    mean, sd = exact(ROWS)
    assert fit.shared.status == "corrected"
    assert close(fit.shared.mean("mu"), fit.shared.sd("mu"), (mean[-1], sd[-1]), DRAWS * fit.shared.ess / 2)


def test_a_model_without_shared_sites(tasks: bm.Tasks, tmp_path: Path) -> None:
    fit = quick(known_prior, tasks)
    post = fit.posterior(tasks, draws=DRAWS)
    sizes = np.array([len(y) for y in ROWS.values()])
    sums = np.array([sum(y) for y in ROWS.values()])
    answer = (0.5 + sums) / (1 + sizes), 1 / np.sqrt(1 + sizes)
    assert close(post.mean("a"), post.sd("a"), answer, DRAWS * float(post.ess.min()) / 2)
    fit.save(tmp_path / "fit.bm")
    assert np.array_equal(bm.load(tmp_path / "fit.bm", known_prior).posterior(tasks, draws=50)["a"].shape, (50, 5))


def test_same_seed_same_fit(fit: bm.Fit, tasks: bm.Tasks) -> None:
    first, second = (quick(centre, tasks, method=options(), seed=seed) for seed in (0, 1))
    assert np.array_equal(first.shared.draws("mu"), fit.shared.draws("mu"))
    assert np.array_equal(first.posterior(tasks)["a"], fit.posterior(tasks)["a"])
    assert not np.array_equal(first.shared.draws("mu"), second.shared.draws("mu"))


def test_draws_depend_on_their_seed_alone(fit: bm.Fit, tasks: bm.Tasks) -> None:
    torch.manual_seed(5)
    first = fit.posterior(tasks, draws=100, seed=4)["a"]
    assert np.array_equal(first, fit.posterior(tasks, draws=100, seed=4)["a"])
    assert not np.array_equal(first, fit.posterior(tasks, draws=100, seed=5)["a"])


class Mean(bm.TaskGuide):
    """A guide of one's own with one learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def condition(self, theta: Tensor, context: Any) -> Any:
        shape = (len(theta), len(context.batch.names), 1)
        spread = self.log_scale.exp() / (1 + context.batch.n.double()).sqrt()
        return Independent(torch.zeros(shape, dtype=torch.float64), spread.reshape(1, -1, 1).expand(shape))


class Independent:
    """Independent normal or t(5) draws."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self._normal, self._t = dist.Normal(loc, scale).to_event(1), dist.StudentT(5.0, loc, scale).to_event(1)

    def sample(self, *, heavy: bool = False) -> Tensor:
        return (self._t if heavy else self._normal).rsample()

    def log_prob(self, noise: Tensor, *, heavy: bool = False) -> Tensor:
        return (self._t if heavy else self._normal).log_prob(noise)


@pytest.mark.parametrize("data", [True, False])
def test_a_loaded_fit_gives_the_same_draws_and_predictions(
    fit: bm.Fit, tasks: bm.Tasks, tmp_path: Path, data: bool
) -> None:
    fit.save(tmp_path / "fit.bm", data=data)
    loaded = bm.load(tmp_path / "fit.bm", centre)
    mixed = make_tasks({"new": [1.0, 4.0], **ROWS, "nothing": []})
    before, after = fit.posterior(mixed), loaded.posterior(mixed)
    assert np.array_equal(before["a"], after["a"]) and np.array_equal(before.khat, after.khat)
    assert np.array_equal(before.predict(np.zeros((2, 0))).draws, after.predict(np.zeros((2, 0))).draws)
    assert np.array_equal(fit.shared.draws("mu"), loaded.shared.draws("mu"))
    assert np.array_equal(fit.prior()["a"], loaded.prior()["a"])
    assert repr(fit) == repr(loaded) and loaded.seed == fit.seed
    assert loaded.history.steps[-1]["elbo"] == fit.history.steps[-1]["elbo"]
    loaded.save(tmp_path / "again.bm", data=data)
    assert np.array_equal(bm.load(tmp_path / "again.bm", centre).posterior(tasks)["a"], fit.posterior(tasks)["a"])


def test_a_fit_without_its_data_knows_its_tasks_and_says_what_it_cannot_do(fit: bm.Fit, tmp_path: Path) -> None:
    fit.save(tmp_path / "fit.bm", data=False)
    loaded = bm.load(tmp_path / "fit.bm", centre)
    assert loaded.posterior(make_tasks({"a": ROWS["a"]}), draws=20).joint
    changed = make_tasks({"a": [1.0]})
    with pytest.raises(ValueError, match=r"task\(s\) \['a'\] were in the fit with other data"):
        loaded.posterior(changed)
    with pytest.raises(ValueError, match=r"evidence of the old data of task\(s\) \['a'\].*saved with data=False"):
        loaded.posterior(changed, updated="replace")
    with pytest.raises(ValueError, match="saved with data=False and has no training data"):
        _ = loaded.tasks
    with pytest.raises(ValueError, match="saved with data=False and has no training data"):
        loaded.save(tmp_path / "again.bm")
    with_data = bm.load(_saved(fit, tmp_path / "whole.bm"), centre)
    assert np.array_equal(with_data.tasks.y, fit.tasks.y) and with_data.tasks.names == fit.tasks.names
    assert np.array_equal(
        with_data.posterior(changed, updated="replace")["a"], fit.posterior(changed, updated="replace")["a"]
    )


def _saved(fit: bm.Fit, path: Path) -> Path:
    fit.save(path)
    return path


def test_learned_modules_travel_with_the_fit(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    x = [torch.randn(6, 1, generator=draw).numpy() for _ in range(4)]
    tasks = bm.Tasks.from_arrays(x, [2.0 * v[:, 0] for v in x], names=list("abcd"))

    def with_net(net: nn.Module) -> Any:
        def model(batch: bm.Batch) -> None:
            pyro.module("net", net)
            with batch.tasks():
                a = pyro.sample("a", dist.Normal(0.0, 1.0))
                with batch.observations():
                    pyro.sample("y", dist.Normal(a + net(batch.x).squeeze(-1), 1.0), obs=batch.y)

        return model

    net, fresh = nn.Linear(1, 1), nn.Linear(1, 1)
    weights = {key: value.clone() for key, value in fresh.state_dict().items()}
    fit = quick(with_net(net), tasks)
    fit.save(tmp_path / "fit.bm", data=False)
    loaded = bm.load(tmp_path / "fit.bm", with_net(fresh))
    assert torch.equal(loaded.modules["net"].weight, fit.modules["net"].weight)
    assert not torch.equal(loaded.modules["net"].weight, fresh.weight)
    assert all(torch.equal(value, weights[key]) for key, value in fresh.state_dict().items())
    assert np.array_equal(loaded.posterior(tasks)["a"], fit.posterior(tasks)["a"])


class Interrupted(Exception):
    """Stands in for a lost machine."""


@pytest.fixture
def three_stages(monkeypatch: pytest.MonkeyPatch) -> bm.Amortized:
    """Automatic training in three short stages that nothing cuts short."""
    monkeypatch.setattr(training, "STAGES", (15, 20, 25))
    monkeypatch.setattr(amortized, "GOOD_SHARE", 9.0)
    monkeypatch.setattr(amortized, "SETTLED", -np.inf)
    return bm.Amortized(optimizer=bm.Optimizer(batch_tasks=3))


def test_an_interrupted_fit_goes_on_as_if_nothing_had_happened(
    tasks: bm.Tasks, three_stages: bm.Amortized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "check.bm"
    whole = quick(centre, tasks, method=three_stages)
    store, calls = FileCheckpoint.store, []

    def interrupted(self: FileCheckpoint, guides: Any, history: Any) -> None:
        store(self, guides, history)
        calls.append(len(history.stages))
        raise Interrupted

    monkeypatch.setattr(FileCheckpoint, "store", interrupted)
    for _ in range(3):
        with pytest.raises(Interrupted):
            quick(centre, tasks, method=three_stages, checkpoint=path)
    resumed = quick(centre, tasks, method=three_stages, checkpoint=path)
    assert calls == [1, 2, 3] and len(resumed.history.stages) == 3
    assert [s["elbo"] for s in resumed.history.steps] == [s["elbo"] for s in whole.history.steps]
    assert np.array_equal(resumed.shared.draws("mu"), whole.shared.draws("mu"))
    assert np.array_equal(resumed.posterior(tasks)["a"], whole.posterior(tasks)["a"])


def test_a_checkpoint_of_another_fit_is_refused(tasks: bm.Tasks, tmp_path: Path) -> None:
    path = tmp_path / "check.bm"
    method = options(5)
    first = quick(centre, tasks, method=method, checkpoint=path)
    other = make_tasks(ROWS | {"f": [1.0]})
    for arguments, text in (
        ((centre, other), "it belongs to a fit with other tasks"),
        ((centre, tasks, {"seed": 8}), r"other seed \(0 in the file, 8 here\)"),
        ((centre, tasks, {"method": options(6)}), r"options differ \(optimizer: .*steps=5.* in the file.*steps=6"),
        ((centre, tasks, {"dtype": torch.float32}), "other dtype"),
        ((known_prior, tasks), "shared site 'mu' is missing here"),
    ):
        model, data, *more = arguments
        with pytest.raises(ValueError, match=text):
            quick(model, data, **({"method": method, "checkpoint": path} | (more[0] if more else {})))
    with pytest.raises(
        ValueError, match="expected a fit, the file holds checkpoint; bm.load reads what fit.save wrote"
    ):
        bm.load(path, centre)
    first.save(path)
    with pytest.raises(ValueError, match="expected a checkpoint, the file holds fit"):
        quick(centre, tasks, method=method, checkpoint=path)
    with pytest.raises(ValueError, match=r"checkpoint: the folder of .*/nowhere/check.bm does not exist"):
        quick(centre, tasks, method=method, checkpoint=tmp_path / "nowhere" / "check.bm")


def _world() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        dict(pyro.get_param_store().items()),
        torch.distributions.Distribution._validate_args,
        pyro.settings.get("validate_distributions_pyro"),
        pyro.poutine.runtime._PYRO_STACK.copy(),
    ]


def test_nothing_global_changes(tasks: bm.Tasks, tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(1)
    before = _world()
    fit = quick(centre, tasks, checkpoint=tmp_path / "check.bm")
    assert _world() == before, "fit"
    post = fit.posterior(make_tasks({"new": [1.0]} | ROWS), draws=50)
    post.predict(np.zeros((2, 0))).log_prob(np.zeros(2))
    assert _world() == before, "posterior and predict"
    fit.prior(20), fit.shared.draws("mu"), bm.simulate(centre, like=tasks)
    assert _world() == before, "prior and simulate"
    fit.save(tmp_path / "fit.bm")
    bm.load(tmp_path / "fit.bm", centre)
    assert _world() == before, "save and load"


def test_the_bar_shows_bound_ess_and_time_left(tasks: bm.Tasks, capsys: pytest.CaptureFixture[str]) -> None:
    quick(centre, tasks, method=options(120))
    assert capsys.readouterr() == ("", "")
    bm.fit(centre, tasks, method=options(120))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "elbo=" in shown.err and "ess=" in shown.err and "120" in shown.err and "<" in shown.err


def test_a_guide_of_ones_own_stays_as_it_was_and_is_given_again_at_load(tasks: bm.Tasks, tmp_path: Path) -> None:
    mine = Mean()
    fit = quick(centre, tasks, method=options(20, guide=mine))
    assert float(mine.log_scale.detach()) == 0.0 != float(fit._guides.task.log_scale.detach())
    fit.save(tmp_path / "fit.bm")
    with pytest.raises(ValueError, match=r"cannot be stored: guide=Mean; .*bm.Amortized\(guide=…\)"):
        bm.load(tmp_path / "fit.bm", centre)
    guide = Mean()
    loaded = bm.load(tmp_path / "fit.bm", centre, method=options(20, guide=guide))
    assert np.array_equal(loaded.posterior(tasks)["a"], fit.posterior(tasks)["a"])
    assert float(guide.log_scale.detach()) == 0.0


def test_single_precision_travels(tasks: bm.Tasks, tmp_path: Path) -> None:
    fit = quick(centre, tasks, method=options(20), dtype=torch.float32)
    fit.save(tmp_path / "fit.bm", data=False)
    loaded = bm.load(tmp_path / "fit.bm", centre)
    assert np.array_equal(loaded.posterior(tasks)["a"], fit.posterior(tasks)["a"])


def test_a_few_draws_are_some_of_enough(tmp_path: Path) -> None:
    """Two draws are judged by the weights of more: nothing climbs, and the moments are those of all candidates."""
    from conjugate import ROWS, fitted

    fit = fitted(ROWS)
    few, many = (fit.posterior(fit.tasks, draws=draws, seed=3) for draws in (2, 1000))
    assert few.draws("a").shape == (2, 5) and few.shared["mu"].shape == (2,)
    assert set(few.method) == {"psis"} and set(few.flag) == {""}
    assert np.abs(few.mean("a") - many.mean("a")).max() < 4 * many.sd("a").max() / 200**0.5


@pytest.mark.parametrize("shared", ["normal", "map"])
def test_theta_that_is_plugged_in_makes_five_tasks_too_sure(shared: str) -> None:
    """The exact sd of a task with one row is a tenth wider than that at the best θ: an answer must show it."""
    rows = {"a": [0.3], "b": [1.1], "c": [-0.2], "d": [0.9], "e": [2.0]}
    tasks = make_tasks(rows)
    fit = bm.fit(centre, tasks, method=bm.Marginal(shared=shared, draws=4000), progress=False)
    post = fit.posterior(tasks, draws=4000)
    mean, sd = exact(rows)
    agrees = close(post.mean("a"), post.sd("a"), (mean[:-1], sd[:-1]), 4000)
    assert agrees == (shared == "normal")
    assert (fit.shared.status == "plug-in") == (shared == "map")
    if shared == "map":
        assert (post.sd("a") < 0.97 * sd[:-1]).all()
