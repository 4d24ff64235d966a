"""The identities behind the table of schemes, and that every scheme fits, predicts and meets a new task."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.exact import ExactGuide
from bayesmeta.inference.protocols import Context
from bayesmeta.models import conditioning, sharing
from bayesmeta.models.conditioning.base import Sizes

T, N, D, H = 3, 5, 2, 4


@pytest.fixture(autouse=True)
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def built(options: Any, trunk: nn.Module | None = None, *, features: int = H) -> Any:
    return options.build(nn.Identity() if trunk is None else trunk, Sizes(features, 1))


def phi_of(function: Any, **blocks: Tensor) -> Tensor:
    """Blocks `(T, *shape)` put together as φ `(T, 1, d)`."""
    return torch.cat([blocks[block.name].reshape(T, -1) for block in function.blocks.all], 1).unsqueeze(1)


def test_concat_is_additive() -> None:
    """W [x; z] = W_x x + V z."""
    one, other = built(conditioning.Concat(size=3)), built(conditioning.Additive(size=3))
    with torch.no_grad():
        other.layer.weight.copy_(one.layer.weight[:, :H])
        other.code.weight.copy_(one.layer.weight[:, H:])
        other.layer.bias.copy_(one.layer.bias)
    other.head.load_state_dict(one.head.state_dict())
    phi, x = torch.randn(T, 1, 3), torch.randn(T, N, H)
    torch.testing.assert_close(one(phi, x), other(phi, x))


class Repeated(nn.Module):
    """Features once for each task."""

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 1, T)


def one_hot_gates(size: int) -> Tensor:
    return torch.eye(T).repeat_interleave(size, 1)


def test_one_hot_gates_are_heads() -> None:
    """Each task's gate opens its own copy of the features: the parts of one head are the tasks' heads."""
    gated, heads = built(conditioning.Multiplicative(), Repeated(), features=T * H), built(conditioning.Heads())
    weight = gated.head.weight.reshape(T, H)
    phi = phi_of(heads, weight=weight, bias=gated.head.bias.expand(T, 1))
    x = torch.randn(T, N, H)
    torch.testing.assert_close(gated(phi_of(gated, scale=one_hot_gates(H)), x), heads(phi, x))


def test_one_hot_gates_on_the_input_are_independent_networks() -> None:
    """A network in blocks, of which a task's gate feeds one; the others give 0 where there are no biases."""
    gated = built(conditioning.Multiplicative(), Repeated(), features=T * D)
    first, last = torch.randn(T, H, D), torch.randn(T, 1, H)
    wide, head = nn.Linear(T * D, T * H, bias=False), nn.Linear(T * H, 1, bias=False)
    with torch.no_grad():
        wide.weight.copy_(torch.block_diag(*first))
        head.weight.copy_(torch.cat([*last], 1))
    gated.head = nn.Sequential(wide, nn.Tanh(), head)
    own = built(conditioning.Networks(), nn.Sequential(nn.Linear(D, H, bias=False), nn.Tanh()))
    weights = dict(own.net.named_parameters())
    differences = {
        "0_0_weight": first - weights["0.0.weight"],
        "1_weight": last - weights["1.weight"],
        "1_bias": -weights["1.bias"].expand(T, 1),
    }
    x = torch.randn(T, N, D)
    torch.testing.assert_close(gated(phi_of(gated, scale=one_hot_gates(D)), x), own(phi_of(own, **differences), x))


def prior(options: sharing.Sharing, d: int, centre: float | None = None) -> sharing.Sharing:
    return options.over(sharing.Blocks((sharing.Block("all", (d,), centre),)))


def test_squared_distances_of_pairs_are_the_gaussian_prior() -> None:
    """Σ_{i<j} ‖φ_i − φ_j‖² = T Σ ‖φ_i − φ̄‖² = −2 T s² log p(φ | θ) at the best θ, but for a constant."""
    s, batch = 0.7, None
    given = prior(sharing.Gaussian(scale=s), 2)

    def scores(phi: Tensor) -> tuple[float, float]:
        pairs = sum(float((phi[i] - phi[j]).square().sum()) for i in range(T) for j in range(i))
        fn: Any = given.distribution({"mu": phi.mean(0)}, batch)  # type: ignore[arg-type]
        return pairs, -2 * T * s**2 * float(fn.log_prob(phi).sum())

    (pairs, prior_term), (others, other_term) = scores(torch.randn(T, 2)), scores(torch.randn(T, 2))
    assert pairs - others == pytest.approx(prior_term - other_term)


def test_the_exchangeable_covariance_is_theta_integrated_out() -> None:
    """log p(φ | θ) + log p(θ) − log p(θ | φ) is the density of N(0, s² I + κ² 11ᵀ), for every θ."""
    s, kappa = 0.7, 1.9
    given, phi = prior(sharing.Gaussian(scale=s, loc_scale=kappa), 1), torch.randn(T, 1)
    together = torch.distributions.MultivariateNormal(torch.zeros(T), s**2 * torch.eye(T) + kappa**2 * torch.ones(T, T))
    precision = T / s**2 + 1 / kappa**2
    posterior = torch.distributions.Normal(phi.sum() / s**2 / precision, precision**-0.5)
    for theta in torch.randn(4, 1):
        fn: Any = given.distribution({"mu": theta}, None)  # type: ignore[arg-type]
        site: Any = given.shared["mu"]
        evidence = fn.log_prob(phi).sum() + site.log_prob(theta) - posterior.log_prob(theta).sum()
        torch.testing.assert_close(evidence, together.log_prob(phi[:, 0]))


def test_cross_stitch_is_coregionalisation() -> None:
    """Independent standard normal weights of the streams: Cov(f_i(x), f_k(x')) = (A Aᵀ)_ik x·x'."""
    function = built(conditioning.Stitch(streams=2), nn.Linear(D, 1, bias=False), features=1)
    nn.init.ones_(function.head.weight)
    nn.init.zeros_(function.head.bias)
    mixing, x = torch.randn(T, 2), torch.randn(N, D)
    streams = [part[0].weight for part in function.layers[0]]
    f = function(phi_of(function, stitch_0=mixing), x.expand(T, N, D))[..., 0].flatten()
    grads = [torch.autograd.grad(value, streams, retain_graph=True) for value in f]
    slopes = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in grads])
    torch.testing.assert_close(slopes @ slopes.mT, torch.kron(mixing @ mixing.mT, x @ x.mT))


def lines(count: int = 8, *, seed: int = 0) -> bm.Tasks:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 6, D))
    slope = np.array([1.0, -1.0]) + 0.5 * rng.normal(size=(count, D))
    y = np.einsum("tnd,td->tn", x, slope) + 0.3 * rng.normal(size=(count, 6))
    return bm.Tasks.from_arrays(list(x), list(y), names=[f"t{i}" for i in range(count)])


def task_means(scale: float, tasks: bm.Tasks, mu: Tensor) -> np.ndarray:
    """Posterior means of all heads given μ, with the noise known."""
    model = bm.models.multitask(
        features=D, sharing=sharing.Gaussian(scale=scale), likelihood=bm.likelihoods.Normal(0.3)
    )
    density = TaskDensity(model, tasks)
    guide, batch = ExactGuide(), tasks.batch(np.arange(len(tasks)))
    guide.attach(density, tasks)
    with torch.no_grad():
        noise = guide.condition(mu.unsqueeze(0), Context(batch, density.tensors(batch))).loc[0]
    return (mu + scale * noise).numpy()


def test_scales_lead_from_one_fit_to_independent_ones() -> None:
    tasks, mu = lines(), torch.tensor([0.9, -0.7, 0.1])
    np.testing.assert_allclose(task_means(1e-9, tasks, mu), mu.expand(8, -1), atol=1e-12)
    alone = []
    for task in tasks:
        rows = np.column_stack([task.x.numpy(), np.ones(6)])
        alone.append(np.linalg.lstsq(rows, task.y.numpy(), rcond=None)[0])
    np.testing.assert_allclose(task_means(1e6, tasks, mu), np.array(alone), atol=1e-9)


def test_hard_sharing_is_one_regression() -> None:
    """Scale 0: the posterior of the one φ is that of all rows together."""
    tasks = lines()
    model = bm.models.multitask(features=D, conditioning="hard", likelihood=bm.likelihoods.Normal(0.3))
    fit = bm.fit(model, tasks, method=bm.Marginal(chains=2, draws=500, warmup=300), seed=0, progress=False)
    rows = np.column_stack([tasks.x.numpy(), np.ones(len(tasks.y))])
    covariance = np.linalg.inv(rows.T @ rows / 0.09 + np.eye(3) / 100)
    mean = covariance @ rows.T @ tasks.y.numpy() / 0.09
    sd = np.sqrt(np.diag(covariance))
    z = (fit.shared.mean("mu") - mean) / sd * math.sqrt(1000 * min(1.0, fit.shared.ess))
    assert np.abs(z).max() < 4 and np.abs(fit.shared.sd("mu") / sd - 1).max() < 0.15
    post = fit.posterior(tasks, draws=500)
    assert post.predict(tasks).mean.shape == (8, 6)


def trunk() -> nn.Module:
    return nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, H), nn.Tanh())


SCHEMES = (
    "multi_head",
    "independent",
    "concat",
    "additive",
    "multiplicative",
    "film",
    "gates",
    "experts",
    "cross_stitch",
    "sluice",
)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_conditioning_fits_and_meets_a_new_task(scheme: str) -> None:
    torch.set_default_dtype(torch.float32)
    tasks = lines()
    model = bm.models.multitask(trunk(), conditioning=scheme)
    method = bm.Amortized(shared="map", optimizer=bm.Optimizer(steps=40))
    fit = bm.fit(model, tasks, method=method, seed=0, progress=False)
    new = tasks.copies([0, 1], names=["new", "newer"])
    for some in (tasks, new):
        post = fit.posterior(some, draws=40, refine="none")
        assert post.mean("phi").shape == (len(some), model.sharing.d)
        assert np.isfinite(post.predict(some).mean).all()


@pytest.mark.parametrize("name", ["gaussian", "laplace", "factors", "clusters"])
def test_every_sharing_prior_fits_meets_a_new_task_and_is_drawn(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    tasks = lines()
    model = bm.models.multitask(features=D, sharing=name)
    fit = bm.fit(model, tasks, method=bm.Amortized(optimizer=bm.Optimizer(steps=40)), seed=0, progress=False)
    new = tasks.copies([0, 1], names=["new", "newer"])
    posts = [fit.posterior(some, draws=40, refine="none") for some in (tasks, new)]
    for some, post in zip((tasks, new), posts, strict=True):
        assert np.isfinite(post.mean("phi")).all() and np.isfinite(post.predict(some).mean).all()
    assert fit.prior(draws=5).draws("phi").shape[0] == 5
    scales, similar = model.plot_scales(fit).axes[0], model.plot_similarity(posts[0]).axes[0]
    assert [label.get_text() for label in scales.get_yticklabels()] == ["weight", "bias"]
    assert np.isfinite(similar.images[0].get_array()).all()


def test_minimax_raises_the_worst_task() -> None:
    """One slope for five tasks of slope 1 and one of -1: the mean is 2/3, the soft worst case near 0.3."""
    torch.set_default_dtype(torch.float32)
    x = np.tile(np.linspace(-1.7, 1.7, 10)[:, None], (6, 1, 1))
    tasks = bm.Tasks.from_arrays(list(x), list(x[..., 0] * np.array([1.0] * 5 + [-1.0])[:, None]))
    worst = []
    for objective in ("elbo", "minimax"):
        model = bm.models.multitask(nn.Linear(1, 1), conditioning="hard", likelihood=bm.likelihoods.Normal(1.0), seed=1)
        method = bm.Amortized(shared="map", objective=objective, held_out=0, optimizer=bm.Optimizer(steps=120))
        fit = bm.fit(model, tasks, method=method, progress=False)
        mean = fit.posterior(tasks, draws=20, refine="none").predict(tasks, kind="mean").mean
        worst.append(float(np.square(mean - tasks.y.numpy().reshape(6, 10)).mean(1).max()))
    assert worst[1] < worst[0] - 0.5


def test_weights_do_not_touch_the_global_seed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, other = (bm.models.multitask(trunk(), conditioning="film", seed=3) for _ in range(2))
    torch.testing.assert_close(one.function.head.weight, other.function.head.weight)
    torch.set_rng_state(before)
    bm.models.multitask(features=2, conditioning="film", seed=4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "expected features="),
        ({"features": 0}, "whole number ≥ 1"),
        ({"features": 2, "conditioning": "heads"}, "'multi_head'"),
        ({"features": 2, "sharing": "normal"}, "bm.models.sharing"),
        ({"features": 2, "conditioning": "hard", "sharing": "laplace"}, "leave it out"),
        ({"features": 2, "conditioning": "experts"}, "trunk with weights"),
        ({"features": 2, "conditioning": "sluice"}, "trunk with weights"),
        ({"features": 2, "likelihood": bm.likelihoods.Categorical()}, "levels="),
        ({"trunk": nn.Linear, "features": 2}, "trunk as a module"),
        ({"features": 2, "standardize": True}, "standardize as Tasks"),
        ({"features": 2, "noise": "own"}, 'noise="task"'),
        ({"features": 2, "noise": "task", "likelihood": bm.likelihoods.Poisson()}, "which learns its noise"),
    ],
)
def test_what_does_not_fit_together(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        bm.models.multitask(**options)


@pytest.mark.parametrize("width", [1, 3])
def test_a_wrong_number_of_features_is_said(width: int) -> None:
    with pytest.raises(ValueError, match=f"expected {width} numbers a row.*got 2"):
        bm.fit(bm.models.multitask(features=width), lines(), method=bm.Marginal(shared="map"), progress=False)


def test_independent_networks_of_images() -> None:
    """A trunk that flattens `(T, N, 4, 4)` is the same for every task."""
    images = torch.randn(T, N, 4, 4)
    function = built(conditioning.Networks(), nn.Sequential(nn.Flatten(2), nn.Linear(16, H), nn.Tanh()))
    phi = 0.1 * torch.randn(T, 1, function.blocks.d)
    weights = dict(function.net.named_parameters())
    for i in range(T):
        own = {k: w + function.blocks.split(phi)[k.replace(".", "_")][i, 0] for k, w in weights.items()}
        want = torch.func.functional_call(function.net, own, (images[i : i + 1],))
        torch.testing.assert_close(function(phi, images)[i], want[0])


def test_pictures_ask_for_what_they_need() -> None:
    tasks, hard = lines(), bm.models.multitask(features=D, conditioning="hard")
    method = bm.Marginal(shared="map", chains=1, draws=50)
    model = bm.models.multitask(features=D)
    fit = bm.fit(model, tasks, method=method, progress=False)
    new = fit.posterior(tasks.copies([0, 1], names=["a", "b"]), draws=50)
    with pytest.raises(ValueError, match="got new ones"):
        model.similarity(new)
    with pytest.raises(ValueError, match="hard sharing: all are alike"):
        hard.similarity(new)
    with pytest.raises(ValueError, match="learns its scales"):
        hard.plot_scales(fit)
    with pytest.raises(ValueError, match="expected the fit"):
        model.plot_scales(new)  # type: ignore[arg-type]
    pooled = bm.models.multitask(features=D, sharing=bm.models.sharing.Gaussian(by="coordinate", spread=0.5))
    axis = pooled.plot_scales(bm.fit(pooled, tasks, method=method, progress=False)).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [*(f"weight {i}" for i in range(D)), "bias"]
    alike = model.similarity(fit.posterior(tasks, draws=50))
    np.testing.assert_allclose(np.diag(alike), 1.0)


def test_standard_units_are_undone_in_predictions() -> None:
    """Labels in thousands and inputs in hundreds: φ is of order one, predictions are in the user's units."""
    plain = lines()
    x = [100 * task.x.numpy() + 300 for task in plain]
    y = [1000 * task.y.numpy() + 5000 for task in plain]
    tasks = bm.Tasks.from_arrays(x, y, names=plain.names)
    method = bm.Marginal(shared="map", chains=1, draws=200)
    found = []
    for some, scale, centre in ((plain, 1.0, 0.0), (tasks, 1000.0, 5000.0)):
        model = bm.models.multitask(features=D, standardize=some)
        prediction = bm.fit(model, some, method=method, seed=0, progress=False).posterior(some, draws=200).predict(some)
        found.append(((prediction.mean - centre) / scale, prediction.log_prob() + math.log(scale)))
    np.testing.assert_allclose(found[1][0], found[0][0], atol=1e-3)
    np.testing.assert_allclose(found[1][1], found[0][1], atol=1e-3)


@pytest.mark.parametrize("conditioning", ["multi_head", "hard"])
def test_a_noise_of_each_task_is_found(conditioning: str) -> None:
    """Noise sds from .1 to 1 in tasks of 40 rows: their order and size, with one head for all too."""
    rng = np.random.default_rng(0)
    sd = np.geomspace(0.1, 1.0, 6)
    y = 1.0 + sd[:, None] * rng.normal(size=(6, 40))
    tasks = bm.Tasks.from_arrays(list(rng.normal(size=(6, 40, 1))), list(y))
    model = bm.models.multitask(features=1, conditioning=conditioning, noise="task")
    fit = bm.fit(model, tasks, method=bm.Marginal(shared="map", chains=1, draws=100), progress=False)
    post = fit.posterior(tasks, draws=300)
    np.testing.assert_allclose(post.mean("phi")[:, -1], np.log(y.std(1)), atol=0.25)
    if conditioning == "hard":
        assert np.ptp(post.mean("phi")[:, :-1], 0).max() < 1e-9
        assert [label.get_text() for label in model.plot_scales(fit).axes[0].get_yticklabels()] == ["log_noise"]


def test_independent_networks_have_noises_that_are_shared_softly() -> None:
    """Sd 10 of every weight, and a learned one of log noises."""
    prior = bm.models.multitask(trunk(), conditioning="independent", noise="task").sharing
    assert set(prior.shared) == {"mu", "tau"} and prior.scaled == ["log_noise"]
    sds = prior.variance({"tau": torch.tensor([0.3])}).sqrt()
    torch.testing.assert_close(sds, torch.cat([torch.full((prior.d - 1,), 10.0), torch.tensor([0.3])]))
