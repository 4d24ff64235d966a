"""Eight scripts as users write them, from data to posterior and prediction, each against a known answer."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from quadrature import (
    GAMES,
    NUGGET,
    READINGS,
    SPREAD,
    WINS,
    binomial_answer,
    classes_answer,
    halves,
    kernel,
    process_answer,
    rounded_answer,
)
from scipy.special import expit
from scipy.stats import norm
from torch import Tensor, nn

import bayesmeta as bm

DRAWS = 4000
HOMES = pathlib.Path(bm.__file__).parent / "data" / "radon.csv"
Exact = Callable[[str], tuple[dict[str, Any], dict[str, Any]]]


def method(steps: int, **options: Any) -> bm.Amortized:
    return bm.Amortized(optimizer=bm.Optimizer(steps=steps, lr=options.pop("lr", None)), **options)


def assert_close(mean: Any, sd: Any, answer: tuple[Any, Any], effective: float) -> None:
    """Means and sds agree with the answer within four standard errors of so many draws."""
    z_mean = np.abs(np.asarray(mean) - answer[0]) / answer[1] * math.sqrt(effective)
    z_sd = np.abs(np.asarray(sd) / answer[1] - 1) * math.sqrt(2 * effective)
    assert z_mean.max() < 4 and z_sd.max() < 4, f"{z_mean.max():.1f} and {z_sd.max():.1f} standard errors"


def effective(fit: bm.Fit, post: bm.Posterior, draws: int = DRAWS) -> float:
    """Draws that count: those of θ and of the worst task; weights are estimates, hence the half."""
    return draws * fit.shared.ess * float(post.ess.min()) / 2


def moments(exact: Exact, posterior: str) -> dict[str, tuple[float, float]]:
    return {line["name"]: (line["mean"], line["sd"]) for line in exact(posterior)[1]["summary"]}


def of(known: dict[str, tuple[float, float]], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    mean, sd = np.array([known[name] for name in names]).T
    return mean, sd


# 1. The radon function, on all 919 homes.


def radon(batch: bm.Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau).to_event(1))
        with batch.observations():
            mean = phi[..., 0] + phi[..., 1] * batch.x[..., 0]
            pyro.sample("y", dist.Normal(mean, sigma), obs=batch.y)


def test_radon(exact: Exact) -> None:
    homes = pd.read_csv(HOMES).sort_values("county", kind="stable")
    tasks = bm.Tasks.from_dataframe(homes, task="county", x=["floor"], y="log_radon")
    fit = bm.fit(radon, tasks, progress=False)
    post = fit.posterior(tasks, draws=1000)
    known = moments(exact, "radon_mn_variable_intercept_slope")
    assert fit.shared.status == "corrected" and fit.shared.ess > 0.25
    assert (post.flag == "").mean() > 0.97
    count = effective(fit, post, 1000)
    for site, names in {
        "mu": ["mu_alpha", "mu_beta"],
        "tau": ["sigma_alpha", "sigma_beta"],
        "sigma": ["sigma_y"],
    }.items():
        assert_close(fit.shared.mean(site), fit.shared.sd(site), of(known, names), count)
    for column, name in enumerate(("alpha", "beta")):
        answer = of(known, [f"{name}.{i + 1}" for i in range(len(tasks))])
        assert_close(post.mean("phi")[:, column], post.sd("phi")[:, column], answer, count)
    predicted = post.predict(np.array([[0.0], [1.0]]), kind="mean")
    basement = of(known, [f"alpha.{i + 1}" for i in range(len(tasks))])
    assert_close(predicted.mean[:, 0], predicted.sd[:, 0], basement, count)


# 2. Components, with a likelihood nobody ships that declares its own shared parameter: rounded measurements.


def test_components_with_a_custom_likelihood() -> None:
    def rounded(f: Tensor, batch: bm.Batch, shared: dict[str, Tensor]) -> Tensor:
        bell = torch.special.ndtr
        ends = ((batch.y + 0.5 - f) / shared["noise"], (batch.y - 0.5 - f) / shared["noise"])
        # Differences of the nearer tails keep their digits.
        upper, lower = (torch.where(ends[1] > 0, -e, e) for e in ends)
        return (bell(upper) - bell(lower)).abs().clamp(min=1e-300).log()

    model = bm.HierarchicalModel(
        lambda shared: dist.Normal(shared["mu"], SPREAD),
        lambda phi, x: phi,
        rounded,
        shared={"mu": dist.Normal(0.0, 5.0), "noise": dist.HalfNormal(1.0)},
    )
    tasks = bm.Tasks.from_arrays(None, [np.array(row, dtype=float) for row in READINGS])
    fit = bm.fit(model, tasks, method=method(300), progress=False)
    post = fit.posterior(tasks, draws=DRAWS)
    mean, sd = rounded_answer()
    assert fit.shared.status == "corrected" and set(post.flag) == {""}
    shared = [[float(f(name)) for name in ("mu", "noise")] for f in (fit.shared.mean, fit.shared.sd)]
    assert_close(*shared, (mean[:2], sd[:2]), DRAWS * fit.shared.ess / 2)
    assert_close(post.mean("phi").reshape(-1), post.sd("phi").reshape(-1), (mean[2:], sd[2:]), effective(fit, post))


# 3. Successes of trials.


def test_binomial_with_trials() -> None:
    table = pd.DataFrame(
        {
            "player": np.repeat(list("abcdef"), [len(row) for row in WINS]),
            "wins": np.concatenate(WINS),
            "games": np.concatenate(GAMES),
        }
    )
    tasks = bm.Tasks.from_dataframe(table, task="player", y="wins", columns=["games"])
    model = bm.HierarchicalModel(
        bm.priors.Gaussian(1, loc_scale=2.0, sd_scale=1.0),
        lambda phi, x: phi[..., 0].expand(x.shape[:2]),
        bm.likelihoods.Binomial(trials="games"),
    )
    fit = bm.fit(model, tasks, method=method(300), progress=False)
    post = fit.posterior(tasks, draws=DRAWS)
    mean, sd = binomial_answer()
    assert fit.shared.status == "corrected" and set(post.flag) == {""}
    shared = [[float(f(name).item()) for name in ("mu", "tau")] for f in (fit.shared.mean, fit.shared.sd)]
    assert_close(*shared, (mean[:2], sd[:2]), DRAWS * fit.shared.ess / 2)
    assert_close(post.mean("phi")[:, 0], post.sd("phi")[:, 0], (mean[2:], sd[2:]), effective(fit, post))
    predicted = post.predict(None, {"games": np.array([20, 1])})
    chance = expit(post.draws("phi"))[:, :, 0].mean(0)
    assert np.abs(predicted.mean[:, 0] / 20 - chance).max() < 4 * 0.5 / math.sqrt(20 * DRAWS)
    assert predicted.draws[..., 0].max() > 1 >= predicted.draws[..., 1].max()


# 4. A meta-analysis: known standard errors.


def schools(batch: bm.Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with batch.tasks():
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Normal(theta, batch["se"]), obs=batch.y)


def test_meta_analysis_with_known_standard_errors(exact: Exact) -> None:
    data, _ = exact("eight_schools")
    table = pd.DataFrame({"school": list("ABCDEFGH"), "effect": map(float, data["y"]), "se": map(float, data["sigma"])})
    tasks = bm.Tasks.from_dataframe(table, task="school", y="effect", columns=["se"])
    fit = bm.fit(schools, tasks, method=method(300), progress=False)
    post = fit.posterior(tasks, draws=DRAWS)
    known, count = moments(exact, "eight_schools"), effective(fit, post)
    assert fit.shared.status == "corrected" and set(post.flag) == {""}
    assert_close(fit.shared.mean("mu"), fit.shared.sd("mu"), known["mu"], count)
    assert_close(fit.shared.mean("tau"), known["tau"][1], known["tau"], count)
    answer = of(known, [f"theta[{i}]" for i in range(1, 9)])
    assert_close(post.mean("theta"), post.sd("theta"), answer, count)
    quantiles = exact("eight_schools")[1]["meta"]["tau_quantiles"]
    below = [(fit.shared.draws("tau") < value).mean() for value in quantiles.values()]
    levels = np.array([float(q) for q in quantiles])
    assert (np.abs(below - levels) < 4 * np.sqrt(levels * (1 - levels) / (DRAWS * fit.shared.ess / 2))).all()


# 5. A Gaussian process couples the rows of a task.


def process(batch: bm.Batch) -> None:
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
    with batch.tasks():
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
        x = batch.x[..., 0].unsqueeze(-2)
        covariance = kernel(x, x, length) + NUGGET**2 * torch.eye(x.shape[-1])
        mean = level.unsqueeze(-1).expand(x.shape)
        pyro.sample("y", dist.MultivariateNormal(mean, covariance), obs=batch.y.unsqueeze(-2))


def test_a_gaussian_process_couples_the_rows_of_a_task() -> None:
    rng = np.random.default_rng(2)
    x = [np.sort(rng.uniform(-2, 2, (n, 1)), 0) for n in (6, 6, 3, 6, 3, 6)]
    level = rng.normal(0, 2, len(x))
    noise = [kernel(v[:, 0], v[:, 0], 0.8) + NUGGET**2 * np.eye(len(v)) for v in x]
    y = [rng.multivariate_normal(np.full(len(v), a), c) for v, a, c in zip(x, level, noise, strict=True)]
    tasks = bm.Tasks.from_arrays(x, y)
    fit = bm.fit(process, tasks, method=method(250), progress=False)
    post = fit.posterior(tasks, draws=DRAWS)
    new = np.array([-1.0, 0.4, 3.0])
    mean, sd, new_mean, new_sd = process_answer(tasks, new)
    assert fit.shared.status == "corrected" and set(post.flag) == {""}
    assert_close(post.mean("level"), post.sd("level"), (mean, sd), effective(fit, post))
    predicted = post.predict(new[:, None])
    assert_close(predicted.mean, predicted.sd, (new_mean, new_sd), effective(fit, post))


# 6. A network whose last layer is φ.


def test_a_neural_predictor_whose_last_layer_is_phi() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 3))

    def model(batch: bm.Batch) -> None:
        pyro.module("net", net)
        sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            with batch.observations():
                pyro.sample("y", dist.Normal((net(batch.x) * phi).sum(-1), sigma), obs=batch.y)

    rng = np.random.default_rng(0)
    x = [rng.uniform(-3, 3, (n, 1)) for n in np.tile([2, 3, 4, 6], 10)]
    y = [rng.normal(1, 0.5) * np.sin(v[:, 0] + rng.uniform(0, 1)) + 0.3 * rng.normal(size=len(v)) for v in x]
    tasks = bm.Tasks.from_arrays(x, y)
    known, new = tasks[:38], tasks[38:]
    fit = bm.fit(model, known, method=method(300), progress=False)
    sigma = round(float(fit.shared.mean("sigma")), 2)
    post = fit.posterior(new, draws=DRAWS, shared={"sigma": sigma})
    at = np.array([[-1.0], [2.0]])
    predicted = post.predict(at)

    def features(rows: Any) -> np.ndarray:
        with torch.no_grad():
            return fit.modules["net"](torch.as_tensor(np.asarray(rows), dtype=torch.float32)).double().numpy()

    for t, task in enumerate(new):
        h, ahead = features(task.x), features(at)
        covariance = np.linalg.inv(np.eye(3) + h.T @ h / sigma**2)
        mean = covariance @ h.T @ task.y.numpy() / sigma**2
        count = DRAWS * float(post.ess[t]) / 2
        assert post.khat[t] < 0.7 and count > 100
        assert_close(post.mean("phi")[t], post.sd("phi")[t], (mean, np.sqrt(np.diag(covariance))), count)
        spread = np.sqrt(np.einsum("mi,ij,mj->m", ahead, covariance, ahead) + sigma**2)
        assert_close(predicted.mean[t], predicted.sd[t], (ahead @ mean, spread), count)
    learned = features(np.linspace(-3, 3, 7)[:, None])
    with torch.no_grad():
        before = net(torch.linspace(-3, 3, 7).unsqueeze(-1)).numpy()
    assert np.abs(learned - before).max() > 0.1


# 7. Episodes of images: classes of 8 × 8 pictures, whose meaning changes from task to task.


class Look(nn.Module):
    """The inference network's view of a picture: small, for a larger one would learn these few tasks by heart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 2))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures.unsqueeze(1))


def classes(batch: bm.Batch) -> None:
    """Three classes; the first has logit zero, φ holds the weights of the two others."""
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(0.0, tau).expand([2]).to_event(1))
        with batch.observations():
            scores = halves(batch.x) * phi
            logits = torch.cat([torch.zeros_like(scores[..., :1]), scores], -1)
            pyro.sample("y", dist.Categorical(logits=logits), obs=batch.y)


def test_image_episodes() -> None:
    rng = np.random.default_rng(1)
    tau, pictures, labels = 1.5, [], []
    for _ in range(42):
        x = rng.normal(size=(10, 8, 8))
        scores = np.concatenate([np.zeros((10, 1)), halves(x) * rng.normal(0, tau, 2)], 1)
        pictures.append(x.astype(np.float32))
        labels.append((scores + rng.gumbel(size=(10, 3))).argmax(1))
    tasks = bm.Tasks.from_arrays(pictures, labels)
    known, new = tasks[:40], tasks[40:]
    fit = bm.fit(classes, known, method=method(300, embed=Look(), lr=1e-2), progress=False)
    assert abs(fit.shared.mean("tau") - tau) < 4 * fit.shared.sd("tau")
    tau = float(fit.shared.mean("tau"))
    post = fit.posterior(new, draws=DRAWS, shared={"tau": tau})
    ahead = rng.normal(size=(4, 8, 8)).astype(np.float32)
    predicted = post.predict(ahead)
    for t, task in enumerate(new):
        mean, sd, chance = classes_answer(task, ahead, tau)
        count = DRAWS * float(post.ess[t]) / 2
        assert post.khat[t] < 0.7 and count > 100
        assert_close(post.mean("phi")[t], post.sd("phi")[t], (mean, sd), count)
        drawn = (predicted.draws[:, t, :, None] == np.arange(3)).mean(0)
        assert (np.abs(drawn - chance) < 4 * np.sqrt(chance * (1 - chance) / count)).all()


# 8. A conditional neural process: no φ at all.


class NeuralProcess(nn.Module):
    """Encodes every row, averages, and decodes with the new input."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32))
        self.head = nn.Sequential(nn.Linear(34, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, context: bm.Batch, x: Tensor) -> dist.TorchDistribution:
        rows = self.rows(torch.cat([context.x, context.y.unsqueeze(-1)], -1)) * context.mask.unsqueeze(-1)
        count = context.mask.sum(-1, keepdim=True).to(rows.dtype)
        pooled = torch.cat([rows.sum(1) / (1 + count), 1 / (1 + count)], -1)
        loc, log_scale = self.head(torch.cat([pooled.unsqueeze(1).expand(-1, x.shape[1], -1), x], -1)).unbind(-1)
        return dist.Normal(loc, 0.01 + nn.functional.softplus(log_scale))


def test_a_conditional_neural_process() -> None:
    """Tasks y = a + x + ε: the exact predictive is known, and a good process comes near it at every context size."""
    rng = np.random.default_rng(3)
    x = [rng.uniform(-1, 1, (12, 1)) for _ in range(500)]
    y = [rng.normal() + v[:, 0] + 0.3 * rng.normal(size=12) for v in x]
    tasks = bm.Tasks.from_arrays([v.astype(np.float32) for v in x], [v.astype(np.float32) for v in y])
    known, new = tasks.split(new=100, seed=0)
    torch.manual_seed(0)
    model = bm.ConditionalModel(NeuralProcess(), context=(0, 6))
    fit = bm.fit(model, known, method=method(800, lr=5e-3), progress=False)
    prior = 0.5 * math.log(2 * math.pi * math.e * (1 + 0.09))
    for size in (0, 1, 5):
        context, target = new.context_target(context=size, seed=0)
        scores = fit.predict(context, target, draws=1).log_prob()
        best = []
        for old, ahead in zip(context, target, strict=True):
            precision = 1 + size / 0.09
            loc = float((old.y - old.x[:, 0]).sum()) / 0.09 / precision
            truth = norm(loc + ahead.x[:, 0].numpy(), math.sqrt(1 / precision + 0.09))
            best.append(truth.logpdf(ahead.y.numpy()))
        behind = np.mean(best) - np.nanmean(scores)
        assert -0.05 < behind < 0.1
        assert size < 5 or np.nanmean(scores) > -prior + 0.5
    assert fit.predict(new[:2], np.zeros((4, 1)), kind="mean").mean.shape == (2, 4)
