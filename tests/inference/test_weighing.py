"""Weighted draws against a conjugate hierarchy: joint draws of known tasks, new tasks with θ integrated, flags."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conjugate import ROWS, SIGMA, TAU, ExactGuide, close, conditional, exact, make_tasks, setting
from torch import Tensor

from bayesmeta.inference import weighing
from bayesmeta.inference.candidates import Candidates, candidates
from bayesmeta.inference.correction import SharedDraws, correct_shared
from bayesmeta.inference.weighing import (
    TaskDraws,
    draw_empty,
    draw_unchecked,
    resample_theta,
    weigh_known,
    weigh_new,
)
from bayesmeta.results.weighted import weighted_mean, weighted_sd

DRAWS = 4000


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def shared_draws(count: int = DRAWS) -> SharedDraws:
    return correct_shared(*setting(ROWS), draws=count)


def values(drawn: TaskDraws) -> np.ndarray:
    """`a` of every candidate `(K, T)`."""
    return (drawn.theta + TAU * drawn.noise[..., 0]).numpy()


def chosen(drawn: TaskDraws) -> tuple[np.ndarray, np.ndarray]:
    """Equally weighted draws of a `(S, T)` and of mu `(S, T)`."""
    index = drawn.index
    return values(drawn)[index, np.arange(index.shape[1])], drawn.theta[:, 0].numpy()[index]


def known(guide: ExactGuide | None = None, draws: int = DRAWS) -> tuple[TaskDraws, float]:
    """Known tasks and the number of θ draws that count."""
    density, guides, tasks = setting(ROWS)
    guides.task = guide or guides.task
    shared = shared_draws()
    drawn = weigh_known(density, guides, resample_theta(shared, draws), tasks)
    return drawn, min(draws, shared.ess * DRAWS) / 2


@pytest.fixture(params=["all candidates", "draws alone"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of keeping known tasks: with all their candidates, or one task after the other, the draws alone."""
    if request.param == "draws alone":
        monkeypatch.setattr(weighing, "KEPT_NUMBERS", 1)
        monkeypatch.setattr(weighing, "BLOCK_NUMBERS", 1)
    return str(request.param)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("guide", [ExactGuide(), ExactGuide(1.0, 0.7), ExactGuide(-0.5, 2.0)])
def test_known_tasks_whatever_the_guide(guide: ExactGuide) -> None:
    drawn, effective = known(guide)
    mean, covariance = exact(ROWS)
    answer = mean[:-1], np.sqrt(np.diag(covariance))[:-1]
    weighted = (f(values(drawn), drawn.log_weight) for f in (weighted_mean, weighted_sd))
    assert close(*weighted, answer, effective)
    a, _ = chosen(drawn)
    assert close(a.mean(0), a.std(0), answer, effective)
    assert drawn.joint and set(drawn.flag) == {""} and set(drawn.method) == {"psis"}
    np.testing.assert_allclose(np.exp(drawn.log_weight).sum(0), 1.0)


def test_draws_of_known_tasks_and_theta_are_joint(memory: str) -> None:
    """Differences between tasks, and to mu, have the joint posterior's sd; drawn one by one they would not."""
    drawn, effective = known()
    assert (len(drawn.noise) == DRAWS) == (memory == "draws alone")
    _, covariance = exact(ROWS)
    a, mu = chosen(drawn)
    assert (mu == mu[:, :1]).all()
    whole = np.concatenate([a, mu[:, :1]], 1)
    alone = np.stack([np.random.default_rng(i).permutation(column) for i, column in enumerate(whole.T)], 1)
    tell = 0
    for i in range(len(ROWS) + 1):
        for j in range(i):
            sd = math.sqrt(covariance[i, i] + covariance[j, j] - 2 * covariance[i, j])
            error = 4 * sd / math.sqrt(2 * effective)
            assert abs((whole[:, i] - whole[:, j]).std() - sd) < error
            tell += abs((alone[:, i] - alone[:, j]).std() - sd) > error
    assert tell >= 3
    np.testing.assert_allclose(np.cov(whole.T), covariance, atol=4 * covariance.max() * math.sqrt(2 / effective))


def test_candidates_are_left_out_of_their_own_evidence() -> None:
    raw = 3 * torch.randn(4, 6, 2, dtype=torch.float64) - 800
    found = weighing._log_mean_of_others(raw).numpy()
    for s in range(4):
        for m in range(6):
            others = np.delete(raw[s].numpy(), m, 0)
            np.testing.assert_allclose(found[s, m], np.logaddexp.reduce(others, 0) - math.log(5), rtol=1e-12)


def test_one_candidate_that_outweighs_all_others_is_seen() -> None:
    """Weights normalised within a θ would look perfect; left out of its own evidence, the candidate stands out."""
    raw = torch.zeros(200, 8, 1, dtype=torch.float64)
    raw[::20, 0] = 30.0
    khat, ess = weighing._diagnose((raw - weighing._log_mean_of_others(raw)).reshape(-1, 1).numpy())
    assert ess[0] < 0.02 and weighing._flags(khat, ess, 1600) != [""]


def test_candidates_are_chosen_by_their_share() -> None:
    share = torch.tensor([0.05, 0.6, 0.0, 0.35], dtype=torch.float64)
    count = 20_000
    index = weighing._choose(share.log().reshape(1, 4, 1).expand(count, 4, 2))
    for task in range(2):
        found = np.bincount(index[:, task], minlength=4) / count
        error = np.sqrt(share.numpy() * (1 - share.numpy()) / count)
        assert (np.abs(found - share.numpy()) <= 4 * error).all()
    assert abs(np.corrcoef(index.T)[0, 1]) < 4 / math.sqrt(count)


def test_worse_guides_get_more_candidates() -> None:
    needed = []
    for guide in (ExactGuide(), ExactGuide(0.7), Stuck()):
        density, guides, tasks = setting(ROWS)
        guides.task = guide
        needed.append(weighing._candidates_needed(density, guides, tasks, resample_theta(shared_draws(), 100)).max())
    assert weighing.EFFECTIVE_CANDIDATES <= needed[0] < needed[1] < needed[2] == weighing.MAX_CANDIDATES


@pytest.mark.parametrize("weight", [-math.inf, math.inf])
def test_one_draw_of_theta_without_possible_candidates_is_told(monkeypatch: pytest.MonkeyPatch, weight: float) -> None:
    """The second task has none at the first θ, or a density without bounds there."""
    density, guides, tasks = setting(ROWS)

    def dead(*given: Any) -> Candidates:
        drawn = candidates(*given)
        drawn.log_weight[: weighing.MIN_CANDIDATES, 1] = weight
        return drawn

    monkeypatch.setattr(weighing, "candidates", dead)
    monkeypatch.setattr(weighing, "_candidates_needed", lambda *_: np.array([weighing.MIN_CANDIDATES]))
    drawn = weigh_known(density, guides, resample_theta(shared_draws(), 200), tasks)
    assert [bool(text) for text in drawn.flag] == [i == 1 for i in range(len(tasks))]
    assert np.isfinite(weighted_mean(values(drawn), drawn.log_weight)).all()


def new_rows() -> dict[str, list[float]]:
    return {"new": [4.0], "far": [4.5, 3.5, 4.0]}


def test_new_tasks_integrate_over_theta() -> None:
    """With five known tasks mu is uncertain; a guess of mu alone would be seen."""
    density, guides, _ = setting(ROWS)
    shared = shared_draws(4 * DRAWS)
    theta = resample_theta(shared, 4 * DRAWS)
    drawn = weigh_new(density, guides, theta, make_tasks(new_rows()))
    plug_in = conditional(new_rows(), exact(ROWS)[0][-1])
    for task, (name, y) in enumerate(new_rows().items()):
        mean, covariance = exact(ROWS | {name: y})
        answer = mean[-2], covariance[-2, -2] ** 0.5
        effective = 4 * DRAWS * shared.ess * drawn.ess[task] / 2
        weight = drawn.log_weight[:, task]
        found = [f(values(drawn)[:, task], weight) for f in (weighted_mean, weighted_sd)]
        assert close(*found, answer, effective)
        a = chosen(drawn)[0][:, task]
        assert close(a.mean(), a.std(), answer, effective)
        assert not close(plug_in[0][task], plug_in[1][task], answer, effective)
        mu = weighted_mean(drawn.theta[:, 0].numpy(), weight)
        assert close(mu, covariance[-1, -1] ** 0.5, (mean[-1], covariance[-1, -1] ** 0.5), effective)
    assert not drawn.joint and set(drawn.flag) == {""}


def test_a_replaced_task_gives_its_evidence_back() -> None:
    density, guides, _ = setting(ROWS)
    shared = shared_draws(4 * DRAWS)
    theta = resample_theta(shared, 4 * DRAWS)
    now = {"c": [-1.0, -0.5]}
    drawn = weigh_new(density, guides, theta, make_tasks(now), replaced=make_tasks({"c": ROWS["c"]}))
    mean, covariance = exact({name: y for name, y in ROWS.items() if name != "c"} | now)
    found = [f(values(drawn)[:, 0], drawn.log_weight[:, 0]) for f in (weighted_mean, weighted_sd)]
    answer = mean[-2], covariance[-2, -2] ** 0.5
    assert close(*found, answer, 4 * DRAWS * shared.ess * drawn.ess[0] / 2)


def test_an_empty_task_is_the_prior() -> None:
    density, guides, _ = setting(ROWS)
    theta = resample_theta(shared_draws(), DRAWS)
    drawn = draw_empty(density, guides, theta, make_tasks({"x": [], "z": []}), joint=True)
    noise = drawn.noise[..., 0].numpy()
    assert close(noise.mean(0), noise.std(0), (np.zeros(2), np.ones(2)), DRAWS)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 4 / math.sqrt(DRAWS)
    assert drawn.method == ["prior"] * 2 and drawn.khat.tolist() == [0, 0] and drawn.flag == ["", ""]


def test_a_guide_that_misses_the_posterior_is_flagged() -> None:
    """Narrow and three sds off: the weights of its few draws under the posterior are huge."""
    density, guides, tasks = setting(ROWS)
    guides.task = Stuck()
    theta = resample_theta(shared_draws(), 500)
    new = weigh_new(density, guides, theta, make_tasks({"n": [9.0] * 40}))
    assert new.flag[0].startswith("importance sampling failed: k̂ ") and "relative ESS" in new.flag[0]
    old = weigh_known(density, guides, resample_theta(shared_draws(), 50), tasks)
    fine = psis_fine(old)
    assert [flag == "" for flag in old.flag] == fine


def psis_fine(drawn: TaskDraws) -> list[bool]:
    limit = min(0.7, 1 - 1 / math.log10(len(drawn.theta)))
    return [bool(k < limit and e >= 0.2) for k, e in zip(drawn.khat, drawn.ess, strict=True)]


class Stuck(ExactGuide):
    """Sees no data."""

    def condition(self, theta: Tensor, context: object) -> object:  # type: ignore[override]
        found = super().condition(theta, context)  # type: ignore[arg-type]
        zero = torch.zeros_like(found.sample())
        return type(found)(zero - 3.0, zero + 0.05)


def test_unchecked_draws_are_the_guides_and_say_so() -> None:
    density, guides, tasks = setting(ROWS)
    guides.task = ExactGuide(shift=3.0)
    theta = resample_theta(shared_draws(), DRAWS)
    new = draw_unchecked(density, guides, theta, tasks, joint=False)
    old = draw_unchecked(density, guides, theta, tasks, joint=True)
    sd = (1 / TAU**2 + np.array([len(y) for y in ROWS.values()]) / SIGMA**2) ** -0.5
    for drawn in (new, old):
        off = (chosen(drawn)[0] - conditional(ROWS, chosen(drawn)[1][:, 0])[0]) / sd
        assert close(off.mean(0), off.std(0), (np.full(len(ROWS), 3.0), np.ones(len(ROWS))), DRAWS)
        assert drawn.method[0] == "amortized" and drawn.flag[0] == "not checked (refine='none')"
        assert np.isnan(drawn.khat).all()
    assert old.joint and not new.joint


def test_thinned_draws_keep_the_candidates_and_their_pairing() -> None:
    drawn, _ = known(draws=100)
    fewer = drawn.thinned(7)
    assert fewer.index.shape == (7, 5) and fewer.theta is drawn.theta and fewer.log_weight is drawn.log_weight
    np.testing.assert_array_equal(fewer.index, drawn.index[[0, 14, 28, 42, 57, 71, 85]])
    a, mu = chosen(fewer)
    assert a.shape == (7, 5) and (mu == mu[:, :1]).all()
