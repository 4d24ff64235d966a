"""q(θ) corrected by importance sampling: right from a wrong q, and honest where it cannot be done."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conjugate import ROWS, SIGMA, TAU, WIDE, ExactGuide, close, exact, exact_guides, known_mean, make_tasks, setting

from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference import correction
from bayesmeta.inference.correction import SharedDraws, correct_shared, reachable_ess, weigh_shared
from bayesmeta.inference.particles import ParticleShared
from bayesmeta.inference.shared import NormalShared, PointShared
from bayesmeta.results.weighted import weighted_mean, weighted_sd

DRAWS = 4000


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def moments(drawn: SharedDraws) -> tuple[float, float]:
    theta = drawn.theta[:, 0].numpy()
    return float(weighted_mean(theta, drawn.log_weight)), float(weighted_sd(theta, drawn.log_weight))


def truth() -> tuple[float, float]:
    mean, covariance = exact(ROWS)
    return mean[-1], covariance[-1, -1] ** 0.5


def corrected(tasks: float = 0.0, budget: int = correction.FULL_BUDGET, **options: float) -> SharedDraws:
    density, guides, data = setting(ROWS, **options)
    guides.task = ExactGuide(tasks, 1.0)
    return correct_shared(density, guides, data, draws=DRAWS, budget=budget)


@pytest.mark.parametrize("options", [{}, {"shift": 2.0}, {"width": 0.5}, {"shift": -1.5, "width": 0.6}, {"width": 3.0}])
def test_a_shifted_or_narrow_q_is_repaired(options: dict[str, float]) -> None:
    drawn, answer = corrected(**options), truth()
    assert drawn.status == "corrected" and drawn.khat < 0.7
    assert close(*moments(drawn), answer, DRAWS * drawn.ess)
    shift, width = options.get("shift", 0.0), options.get("width", 1.0)
    own = (answer[0] + shift * answer[1], width * answer[1])
    assert (shift == 0 and width == 1) or not close(*own, answer, DRAWS * drawn.ess)


def test_a_poor_task_guide_costs_candidates_and_leaves_theta_right() -> None:
    drawn = corrected(tasks=1.5)
    assert drawn.status == "corrected"
    assert close(*moments(drawn), truth(), DRAWS * drawn.ess)


def test_an_exact_q_is_used_nearly_in_full() -> None:
    drawn = corrected()
    assert drawn.ess > 0.85
    np.testing.assert_allclose(np.exp(drawn.log_weight).sum(), 1.0)


def test_a_q_far_from_the_posterior_is_reported() -> None:
    """Too few of its draws lie under the posterior: the weights fail, and say so."""
    density, guides, data = setting(ROWS, shift=60.0, width=0.3)
    guides.task = ExactGuide(0.0, 1.0)
    drawn = correct_shared(density, guides, data, draws=DRAWS, rounds=0)
    assert drawn.status == "uncorrected" and drawn.khat > 0.7


@pytest.mark.parametrize(
    "options", [{"shift": 6.0, "width": 0.5}, {"shift": -12.0, "width": 1.5}, {"shift": 60.0, "width": 0.3}]
)
def test_a_q_that_is_off_by_many_sds_is_led_to_the_posterior(options: dict[str, float]) -> None:
    density, guides, data = setting(ROWS, **options)
    guides.task = ExactGuide(0.0, 1.0)
    assert correct_shared(density, guides, data, draws=DRAWS, rounds=0).status == "uncorrected"
    drawn = correct_shared(density, guides, data, draws=DRAWS)
    assert drawn.status == "corrected" and drawn.ess > 0.5
    assert close(*moments(drawn), truth(), DRAWS * drawn.ess)


def test_weights_without_a_number_lead_nowhere_and_are_reported() -> None:
    def dead(theta: torch.Tensor) -> torch.Tensor:
        return torch.where(theta[:, 0] == theta[:, 0].max(), 0.0, -torch.inf).double()

    density, guides, _ = setting(ROWS)
    assert weigh_shared(guides.shared, dead, draws=DRAWS, affordable=DRAWS).status == "uncorrected"
    assert correction._led(density, guides.shared, dead, draws=DRAWS, affordable=DRAWS, rounds=3) is None


def at(loc: float, sd: float, dim: int = 1) -> NormalShared:
    shared = NormalShared(torch.full((dim,), loc), torch.full((dim,), sd))
    shared.log_diagonal.fill_(0.0)
    return shared


def test_where_q_and_the_prior_lead_to_different_modes_nothing_is_called_corrected() -> None:
    """95 % of the mass at 3, within the prior's sd; q is led to the rest at -10."""

    def two_modes(theta: torch.Tensor) -> torch.Tensor:
        small, large = (-0.5 * ((theta[:, 0] - mode) / 0.5).square() for mode in (-10.0, 3.0))
        return torch.logaddexp(small + np.log(0.05), large + np.log(0.95)).double()

    torch.manual_seed(0)
    density, _, _ = setting(ROWS)
    found = correction._led(density, at(-13.0, 0.3), two_modes, draws=DRAWS, affordable=DRAWS, rounds=correction.ROUNDS)
    assert found is not None and found.status == "uncorrected" and moments(found)[0] < -9
    found = correction._led(density, at(6.0, 0.3), two_modes, draws=DRAWS, affordable=DRAWS, rounds=correction.ROUNDS)
    assert found is not None and found.status == "corrected" and abs(moments(found)[0] - 3) < 0.1


@pytest.mark.parametrize("dim", [2, 5, 10, 20, 40])
def test_a_q_that_is_half_an_sd_off_is_corrected_in_few_and_many_dimensions(dim: int) -> None:
    torch.manual_seed(0)
    true = torch.full((dim,), 0.5 * dim**-0.5, dtype=torch.float64)

    def score(theta: torch.Tensor) -> torch.Tensor:
        return -0.5 * ((theta.double() - true) / 1.1).square().sum(1)

    found = weigh_shared(at(0.0, 1.0, dim), score, draws=4000, affordable=10**6)
    weight, theta = torch.as_tensor(found.log_weight).exp(), found.theta.double()
    mean = weight @ theta
    sd = (weight @ (theta - mean).square()).sqrt() / 1.1
    error = 1.1 / np.sqrt(len(theta) * found.ess)
    assert found.status == "corrected"
    assert float((mean - true).abs().max()) < 4 * error < 0.25
    assert 0.8 < float(sd.min()) <= float(sd.max()) < 1.2


@pytest.mark.parametrize("dim", [20, 50])
def test_in_many_dimensions_few_draws_are_led_nowhere(dim: int) -> None:
    """No proposal can be fitted to 200 draws; fitted again and again it would only widen."""
    torch.manual_seed(0)
    shared = at(0.0, 1.0, dim)
    assert correction._arrived(correction.Wide(shared), lambda t: -0.5 * t.square().sum(1).double(), 200, 6) is None


def test_where_few_draws_would_count_those_of_q_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in hundreds of dimensions: a handful of weighted draws of the wide proposal would look like certainty."""
    monkeypatch.setattr(correction, "MIN_EFFECTIVE", DRAWS)
    drawn = corrected(shift=1.0)
    assert drawn.status == "uncorrected" and np.isfinite(drawn.khat) and 0 < drawn.ess < 1
    answer = truth()
    assert close(*moments(drawn), (answer[0] + answer[1], answer[1]), DRAWS)
    assert len(np.unique(drawn.log_weight)) == 1


@pytest.mark.parametrize("share", [0.25, 2.0])
def test_a_share_of_the_evidence_is_a_power_of_it(share: float) -> None:
    density, guides, data = setting(ROWS)
    drawn = correct_shared(density, guides, data, draws=DRAWS, share=share)
    sizes = np.array([len(y) for y in ROWS.values()])
    precision = share / (TAU**2 + SIGMA**2 / sizes)
    total = 1 / WIDE**2 + precision.sum()
    answer = precision @ np.array([np.mean(y) for y in ROWS.values()]) / total
    assert drawn.status == "corrected"
    assert close(*moments(drawn), (answer, total**-0.5), DRAWS * drawn.ess)


def test_noisy_evidence_of_many_tasks_leaves_q_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several hundred tasks with a poor guide: the variance of their summed evidence is too large at M candidates."""
    monkeypatch.setattr(correction, "MAX_PER_THETA", 8)
    rng = np.random.default_rng(0)
    rows = {f"task {i}": list(rng.normal(size=5)) for i in range(300)}
    density, guides, tasks = setting(rows)
    guides.task = ExactGuide(2.0, 0.7)
    drawn = correct_shared(density, guides, tasks, draws=DRAWS)
    assert drawn.status == "uncorrected" and np.isinf(drawn.khat) and np.isnan(drawn.ess)
    mean, covariance = exact(rows)
    assert close(*moments(drawn), (mean[-1], covariance[-1, -1] ** 0.5), DRAWS)
    assert len(np.unique(drawn.log_weight)) == 1


def test_more_candidates_are_drawn_where_the_evidence_is_noisy() -> None:
    few = correction._enough_candidates(*setting(ROWS), correction.MAX_PER_THETA, 1.0)
    density, guides, tasks = setting(ROWS)
    guides.task = ExactGuide(2.5, 0.5)
    many = correction._enough_candidates(density, guides, tasks, correction.MAX_PER_THETA, 1.0)
    assert few[0] == correction.PER_THETA and correction.PER_THETA < many[0] <= correction.MAX_PER_THETA
    assert few[1] < correction.MAX_VARIANCE


def test_a_correction_that_would_cost_too_much_is_left_out() -> None:
    assert corrected(budget=1000).status == "uncorrected"


def test_a_point_and_a_model_without_theta_have_nothing_to_correct() -> None:
    density, guides, tasks = setting(ROWS)
    guides.shared = PointShared(torch.tensor([1.25]), torch.tensor([1.0]))
    point = correct_shared(density, guides, tasks, draws=50)
    assert point.status == "plug-in" and point.theta.unique().tolist() == [1.25]
    nothing = TaskDensity(known_mean, make_tasks(ROWS))
    guides.shared = PointShared(torch.zeros(0), torch.ones(0))
    sampled = correct_shared(nothing, guides, tasks, draws=50)
    assert sampled.status == "sampled" and sampled.theta.shape == (50, 0) and sampled.khat == 0


def test_a_proposal_with_two_modes_is_not_replaced_by_one_over_both() -> None:
    """θ near ± 2, ten sds apart: one t(5) over both modes would waste nearly all draws between them."""
    shared = ParticleShared(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), particles=2)
    shared.mean.copy_(torch.tensor([[-2.0], [2.0]]))
    shared.log_diagonal.fill_(np.log(0.15))
    modes = torch.distributions.Normal(torch.tensor([-2.05, 1.98], dtype=torch.float64), 0.2)
    log_share = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
    drawn = weigh_shared(
        shared, lambda theta: (modes.log_prob(theta) + log_share).logsumexp(1), draws=DRAWS, affordable=DRAWS
    )
    assert drawn.status == "corrected" and drawn.ess > 0.5
    below = np.exp(drawn.log_weight)[drawn.theta[:, 0].numpy() < 0].sum()
    assert abs(below - 0.3) < 4 * (0.21 / DRAWS / drawn.ess) ** 0.5


def test_reachable_ess_is_that_of_a_perfect_q() -> None:
    """In one dimension: 1/ESS = E_t[(N/t)²], by quadrature."""
    from scipy.stats import norm, t

    grid = np.linspace(-12, 12, 20_001)
    exact_ess = 1 / np.trapezoid(norm.pdf(grid) ** 2 / (t(5).pdf(grid / 1.5) / 1.5), grid)
    assert reachable_ess(1) == pytest.approx(exact_ess, abs=0.03)
    assert 1 > reachable_ess(1) > reachable_ess(3) > reachable_ess(10) > 0


def test_guides_of_the_test_itself_are_exact() -> None:
    mean, scale = exact_guides(ROWS).shared.centre()
    assert (float(mean), float(scale)) == pytest.approx(truth())
