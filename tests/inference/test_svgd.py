"""Particles of task parameters: Stein's steps, an exact density around them, Gaussian tasks exact, every mode kept."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import one_dimensional
import pytest
import torch
from conjugate import ROWS, TAU, centre, close, conditional, density, exact, make_tasks
from scenarios import make_tasks as make_lines
from scenarios import radon
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.gaussian import student_t_log_prob
from bayesmeta.inference.laplace import MixtureTasks
from bayesmeta.inference.objectives import Guides
from bayesmeta.inference.protocols import Context
from bayesmeta.inference.svgd import NARROWEST, _direction, kernel_shares
from bayesmeta.inference.weighing import weigh_known

RAGGED = ROWS | {"empty": []}


def attached(model: TaskDensity, tasks: bm.Tasks, **options: int) -> tuple[bm.guides.SVGD, Context]:
    guide = bm.guides.SVGD(**options)
    guide.attach(model, tasks)
    batch = tasks.batch(slice(None))
    return guide, guide.prepare(batch, model.tensors(batch))


def mixture(guide: bm.guides.SVGD, theta: Tensor, context: Context) -> MixtureTasks:
    with torch.no_grad():
        posterior = guide.condition(theta, context)
    assert isinstance(posterior, MixtureTasks)
    return posterior


def places(posterior: MixtureTasks) -> Tensor:
    """Centres of the parts `(P, S, T, d)`."""
    return torch.stack([part.loc for part in posterior.parts])


def moments(posterior: MixtureTasks) -> tuple[np.ndarray, np.ndarray]:
    """Exact mean and sd `(S, T)` of mixtures in one dimension."""
    share, loc = posterior.log_share.exp(), places(posterior)[..., 0]
    variance = torch.stack([part.factor[..., 0, 0] for part in posterior.parts]) ** -2
    mean = (share * loc).sum(0)
    return mean.numpy(), (share * (variance + (loc - mean).square())).sum(0).sqrt().numpy()


def test_the_kernel_has_the_width_of_the_median_heuristic() -> None:
    points = torch.randn(6, 3, 2, dtype=torch.float64)
    share, width = kernel_shares(points)
    for i in range(3):
        pairs = [float((a - b).square().sum()) for a, b in itertools.combinations(points[:, i], 2)]
        assert len(pairs) == 15 and float(width[i]) == pytest.approx(np.median(pairs) / np.log(7))
        kernel = torch.exp(-torch.cdist(points[:, i], points[:, i]).square() / width[i])
        torch.testing.assert_close(share[..., i], kernel / kernel.sum(1, keepdim=True))
    assert bool((kernel_shares(points, widest=0.3)[1] <= 0.3).all())
    together, narrow = kernel_shares(torch.zeros(4, 1, 2))
    assert float(narrow) == pytest.approx(NARROWEST) and bool((together == 0.25).all())


def test_the_direction_is_that_of_stein_variational_gradients() -> None:
    """With unit curvature: φ_i = Σ_j [k_ij ∇log p_j + ∇_j k_ij], by loops, over the sum of the kernel's row."""
    points, slopes = torch.randn(2, 5, 1, 1, 3, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64).expand(5, 1, 1, 3, 3)
    found = _direction(points, slopes, eye)[:, 0, 0]
    pairs = [float((a - b).square().sum()) for a, b in itertools.combinations(points[:, 0, 0], 2)]
    width = sorted(pairs)[4] / np.log(6)  # torch's median of ten is the lower one
    for i, here in enumerate(points[:, 0, 0]):
        total, weight = torch.zeros(3, dtype=torch.float64), 0.0
        for there, gradient in zip(points[:, 0, 0], slopes[:, 0, 0], strict=True):
            kernel = torch.exp(-(here - there).square().sum() / width)
            total += kernel * gradient + kernel * 2 / width * (here - there)
            weight += float(kernel)
        torch.testing.assert_close(found[i], total / weight)


def test_the_direction_does_not_depend_on_the_units() -> None:
    """Coordinates may be stretched and mixed: u = A z has slopes A⁻ᵀ g and curvatures A⁻ᵀ H A⁻¹."""
    points, slopes = torch.randn(2, 5, 1, 1, 3, dtype=torch.float64)
    root = torch.randn(5, 1, 1, 3, 3, dtype=torch.float64)
    precision = root @ root.mT + torch.eye(3)
    map_ = torch.randn(3, 3, dtype=torch.float64) + 3 * torch.eye(3)
    inverse = torch.linalg.inv(map_)
    moved = _direction(points @ map_.mT, slopes @ inverse, inverse.mT @ precision @ inverse)
    torch.testing.assert_close(moved, _direction(points, slopes, precision) @ map_.mT)


@pytest.mark.parametrize("particles", [2, 5])
def test_gaussian_tasks_are_exact_with_full_shrinkage(particles: int) -> None:
    """Newton's step from any particle ends at the mode: all parts are the posterior itself, trained or not."""
    theta = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64)
    guide, context = attached(density(), make_tasks(RAGGED), particles=particles)
    with torch.no_grad():
        guide.shrinkage.fill_(30.0)
    posterior = mixture(guide, theta, context)
    mean, sd = conditional(ROWS, theta[:, 0].numpy())
    found = moments(posterior)
    np.testing.assert_allclose(found[0][:, :-1] * TAU + theta.numpy(), mean, atol=1e-9)
    np.testing.assert_allclose(found[1][:, :-1] * TAU, np.broadcast_to(sd, mean.shape), rtol=1e-9)


def test_a_task_without_rows_keeps_its_prior() -> None:
    guide, context = attached(density(), make_tasks(RAGGED), particles=3, steps=1)
    posterior = mixture(guide, torch.zeros(9, 1, dtype=torch.float64), context)
    noise = torch.linspace(-3, 3, 9, dtype=torch.float64).reshape(9, 1, 1).expand(9, 6, 1)
    log_q = posterior.log_prob(noise)
    torch.testing.assert_close(log_q[:, -1], torch.distributions.Normal(0.0, 1.0).log_prob(noise[:, -1, 0]))
    assert ((log_q[:, :-1] - log_q[:, -1:]).abs().amax(0) > 0.5).all()


@pytest.mark.parametrize("shrinkage", [0.2, 0.5, 0.8])
def test_shrunken_parts_leave_mean_and_sd_as_they_are(shrinkage: float) -> None:
    """Sixteen particles after twenty steps are nearly draws of the posterior: within .1 sd, sds within 10 %."""
    theta = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    guide, context = attached(density(), make_tasks(ROWS), particles=16, steps=20)
    with torch.no_grad():
        guide.shrinkage.fill_(float(torch.tensor(shrinkage).logit()))
    posterior = mixture(guide, theta, context)
    mean, sd = conditional(ROWS, theta[:, 0].numpy())
    found = moments(posterior)
    assert np.abs((found[0] * TAU + theta.numpy() - mean) / sd).max() < 0.1
    assert np.abs(found[1] * TAU / sd - 1).max() < 0.1
    widths = [float(part.factor.amax()) ** -1 for part in posterior.parts]
    assert max(widths) < sd.min() / TAU * 1.01 * (1 - (1 - shrinkage) ** 2) ** 0.5


def test_the_density_is_exact_and_that_of_the_draws() -> None:
    """The mixture and its t(5) version against densities of torch, and draws against the density."""
    tasks = make_lines(sizes=(3, 8))
    model = TaskDensity(radon, tasks)
    guide, context = attached(model, tasks, particles=3, steps=2)
    theta = torch.tensor([[0.2, -0.3, 0.1, -0.5, -0.7]], dtype=torch.float64)
    posterior = mixture(guide, theta, context)
    precision = [part.factor @ part.factor.mT for part in posterior.parts]
    parts = MultivariateNormal(places(posterior).movedim(0, 2), precision_matrix=torch.stack(precision, 2))
    reference = MixtureSameFamily(Categorical(logits=posterior.log_share.movedim(0, 2)), parts)
    noise = reference.sample()
    torch.testing.assert_close(posterior.log_prob(noise), reference.log_prob(noise))
    gap = noise.unsqueeze(2) - parts.loc
    quadratic = (gap.unsqueeze(-2) @ parts.precision_matrix @ gap.unsqueeze(-1)).flatten(-3)
    heavy = student_t_log_prob(quadratic, parts.precision_matrix.logdet() / 2, 2)
    torch.testing.assert_close(
        posterior.log_prob(noise, heavy=True), (heavy + posterior.log_share.movedim(0, 2)).logsumexp(-1)
    )
    drawn = torch.stack([posterior.sample() for _ in range(4000)])[:, 0]
    spread = reference.variance[0].sqrt()
    assert ((drawn.mean(0) - reference.mean[0]).abs() < 4 * spread / 4000**0.5).all()
    assert ((drawn.std(0) / spread - 1).abs() < 0.1).all()


def test_particles_end_in_both_modes_whose_weights_are_right() -> None:
    """Squares: φ + lean is ± √y. Weights of the signs by quadrature; parts reach from one mode into the other a bit."""
    rows = one_dimensional.SQUARES
    tasks, mu = one_dimensional.make_tasks(rows), np.array([-0.6, 0.0, 0.5])
    guide, context = attached(one_dimensional.density("squares"), tasks)
    posterior = mixture(guide, torch.as_tensor(mu).unsqueeze(1), context)
    upper = (places(posterior)[..., 0] + torch.as_tensor(mu)[:, None] + one_dimensional.LEAN) > 0
    assert upper.any(0).all() and (~upper).any(0).all()
    share = (posterior.log_share.exp() * upper).sum(0).numpy()
    for task, y in enumerate(rows.values()):
        weight = np.exp(one_dimensional.log_joint("squares", y, mu))
        above = one_dimensional.phi_grid("squares", mu) + one_dimensional.LEAN > 0
        np.testing.assert_allclose(share[:, task], (weight * above).sum(1) / weight.sum(1), atol=0.12)


def test_weighted_draws_of_two_modes_are_exact_and_accepted() -> None:
    rows = one_dimensional.SQUARES
    tasks, theta = one_dimensional.make_tasks(rows), one_dimensional.theta_draws("squares", rows, 500)
    model = one_dimensional.density("squares")
    guide, _ = attached(model, tasks)
    with torch.no_grad():
        drawn = weigh_known(model, Guides(one_dimensional.guides().shared, guide), theta, tasks)
    assert drawn.flag == ["", "", ""] and drawn.method == ["psis"] * 3
    for place, y in enumerate(rows.values()):
        answer = one_dimensional.answer("squares", rows, y)
        assert one_dimensional.agrees(one_dimensional.moments("squares", drawn, place), answer, 500)


def test_equal_theta_share_particles_and_padding_does_not_matter() -> None:
    tasks = make_tasks(RAGGED)
    guide, context = attached(density(), tasks, particles=3, steps=2)
    theta = torch.tensor([[0.3], [0.3], [1.0]], dtype=torch.float64)
    posterior = mixture(guide, theta, context)
    with torch.enable_grad():
        recorded = guide.condition(theta, context)
    noise = torch.randn(3, 6, 1, dtype=torch.float64)
    torch.testing.assert_close(posterior.log_prob(noise), recorded.log_prob(noise).detach())
    assert torch.equal(places(posterior)[:, 0], places(posterior)[:, 1])
    batch = tasks.batch([1])
    alone = mixture(guide, theta, Context(batch, density().tensors(batch)))
    torch.testing.assert_close(alone.log_prob(noise[:, 1:2]), posterior.log_prob(noise)[:, 1:2])


@pytest.mark.parametrize("unrolled", [True, False])
def test_what_is_learned(unrolled: bool) -> None:
    guide, context = attached(density(), make_tasks(RAGGED), particles=3, steps=2, unrolled=unrolled)
    theta = torch.tensor([[0.3], [1.0]], dtype=torch.float64, requires_grad=True)
    posterior = guide.condition(theta, context)
    posterior.log_prob(torch.ones(2, 6, 1, dtype=torch.float64)).sum().backward()
    reached = {name for name, p in guide.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert reached == ({"start", "log_rate", "shrinkage"} if unrolled else {"shrinkage"})
    assert (theta.grad is not None) == unrolled


def test_a_particle_without_a_slope_does_not_spoil_the_others() -> None:
    """One starts where the rate of a count overflows: it gets no share, the mixture stays that of the others."""
    tasks = one_dimensional.make_tasks(one_dimensional.COUNTS)
    guide, context = attached(one_dimensional.density("counts"), tasks, particles=4)
    with torch.no_grad():
        guide.start[0] = 5000.0
    posterior = mixture(guide, torch.tensor([[0.7]], dtype=torch.float64), context)
    assert bool((posterior.log_share[0] < -1e3).all()) and bool(posterior.log_share[1:].isfinite().all())
    assert bool(posterior.log_prob(torch.zeros(1, 5, 1, dtype=torch.float64)).isfinite().all())


def test_a_fit_is_exact_after_refinement_and_is_stored(tmp_path: Path) -> None:
    tasks = make_tasks(RAGGED)

    def options() -> bm.Amortized:
        guide = bm.guides.SVGD(particles=4, steps=3)
        return bm.Amortized(shared="svgd", guide=guide, optimizer=bm.Optimizer(steps=80))

    fit = bm.fit(centre, tasks, method=options(), progress=False)
    mean, covariance = exact(ROWS)
    sd = np.sqrt(covariance.diagonal())
    assert fit.shared.status == "corrected"
    assert close(fit.shared.mean("mu"), fit.shared.sd("mu"), (mean[-1], sd[-1]), 4000 * fit.shared.ess)
    plain = fit.posterior(tasks, refine="none", draws=4000)
    assert np.abs((plain.mean("a")[:-1] - mean[:-1]) / sd[:-1]).max() < 0.1
    assert np.abs(plain.sd("a")[:-1] / sd[:-1] - 1).max() < 0.1
    post = fit.posterior(tasks)
    assert post.method.tolist() == ["psis"] * 5 + ["prior"] and (post.flag == "").all()
    assert close(post.mean("a")[:-1], post.sd("a")[:-1], (mean[:-1], sd[:-1]), 1000)
    fit.save(tmp_path / "fit.bm")
    loaded = bm.load(tmp_path / "fit.bm", centre, method=options())
    assert np.array_equal(loaded.posterior(tasks).draws("a"), post.draws("a"))


@pytest.mark.parametrize(
    ("options", "least"), [({"particles": 1}, 2), ({"particles": 2.5}, 2), ({"steps": 0}, 1), ({"steps": True}, 1)]
)
def test_options_must_be_whole_numbers(options: dict[str, int], least: int) -> None:
    with pytest.raises(ValueError, match=f"SVGD: {next(iter(options))} must be a whole number of at least {least}"):
        bm.guides.SVGD(**options)
