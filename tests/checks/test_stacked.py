"""The stack of ways of sharing: densities are weighted means, draws come from all candidates, units are the user's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor

import bayesmeta as bm
from bayesmeta.checks.folds import COMPLETE_POOLING, LEARNED, NO_POOLING
from bayesmeta.checks.stacked import Stacked, _of_mixture, _of_site, _together, mixed

WEIGHTS = {LEARNED: 0.2, NO_POOLING: 0.5, COMPLETE_POOLING: 0.3}
METHOD = bm.Marginal(shared="map", chains=1, draws=50)
LEVELS = np.array([900.0, 1000.0, 1100.0])


def tasks() -> bm.Tasks:
    """Levels far from 0 with noise 10, so that standard units are not the user's."""
    y = LEVELS[:, None] + 10.0 * np.random.default_rng(0).normal(size=(3, 6))
    return bm.Tasks.from_arrays(None, list(y), names=["a", "b", "c"])


def model() -> bm.HierarchicalModel:
    def level(phi: Tensor, x: Tensor) -> Tensor:
        return phi[..., 0].expand(x.shape[:2])

    prior = bm.priors.Gaussian(1, loc_scale=1000.0, sd_scale=100.0)
    return bm.HierarchicalModel(prior, level, bm.likelihoods.Normal(10.0))


@pytest.fixture(scope="module")
def stack() -> Stacked:
    return bm.stack_sharing(model(), tasks(), WEIGHTS, method=METHOD, draws=400)


def test_the_density_is_the_weighted_mean(stack: Stacked) -> None:
    """Of what each candidate is scored by; labels may come with the rows or by themselves, padded or in a list."""
    known = tasks()
    prediction = stack.predict(known, known)
    scores = {name: member.scores(known, known)[0] for name, member in stack.members.items()}
    expected = np.log(sum(weight * np.exp(scores[name]) for name, weight in WEIGHTS.items()))
    np.testing.assert_allclose(prediction.log_prob(), expected)
    y = known.y.numpy().reshape(3, 6)
    np.testing.assert_allclose(prediction.log_prob(y), expected)
    np.testing.assert_allclose(prediction.log_prob(list(y)), expected)
    assert prediction.flag == ("", "", "")


def test_draws_are_in_the_users_units(stack: Stacked) -> None:
    """No pooling and the learned prior lie at a task's own level, complete pooling at that of all, 1000."""
    prediction = stack.predict(tasks(), tasks())
    own = tasks().y.numpy().reshape(3, 6).mean(1)
    mean = 0.7 * own + 0.3 * own.mean()
    np.testing.assert_allclose(prediction.mean.mean(1), mean, atol=4 * 60 / np.sqrt(400))
    lower, upper = prediction.interval(0.9)
    assert (prediction.sd[[0, 2]] > 30).all() and ((lower < prediction.mean) & (prediction.mean < upper)).all()
    with pytest.raises(ValueError, match="prob must lie in"):
        prediction.interval(90)


def test_new_tasks_and_inputs_alone(stack: Stacked) -> None:
    new = tasks().copies([0, 2], names=["d", "e"])
    prediction = stack.predict(new, np.zeros((2, 0)))
    assert prediction.names == ("d", "e") and prediction.draws.shape == (400, 2, 2)
    assert np.isfinite(prediction.log_prob(np.array([900.0, 1100.0]))).all()
    with pytest.raises(ValueError, match="inputs alone; pass y"):
        prediction.log_prob()
    with pytest.raises(ValueError, match=r"site= as one of \['y'\], got 'z'"):
        stack.predict(new, np.zeros((2, 0)), site="z")


def test_weights_are_those_of_the_candidates() -> None:
    with pytest.raises(ValueError, match="robust=True finds them"):
        bm.stack_sharing(model(), tasks(), {}, method=METHOD)


def test_a_mixture_is_the_weighted_mean_density() -> None:
    scores = {"a": np.log([[0.2, 0.5]]), "b": np.log([[0.6, 0.1]])}
    np.testing.assert_allclose(np.exp(mixed(scores, {"a": 0.75, "b": 0.25})), [[0.3, 0.4]])
    np.testing.assert_allclose(np.exp(mixed(scores, {"a": 1.0, "b": 0.0})), [[0.2, 0.5]])


def test_each_candidate_has_its_share_of_draws() -> None:
    draws = [np.full((100, 1, 1), float(i)) for i in range(3)]
    chosen = _of_mixture(draws, np.array([0.25, 0.0, 0.75]), seed=0)
    assert [int((chosen == i).sum()) for i in range(3)] == [25, 0, 75]


def test_flags_say_whose_they_are() -> None:
    assert _together({"one": ("", "k̂"), "other": ("", "ess")}) == ("", "one: k̂; other: ess")


def test_a_site_is_chosen_where_there_are_several() -> None:
    class Site:
        def __init__(self, site: str) -> None:
            self.site = site

    one, other = Site("y"), Site("z")
    both: Any = [one, other]
    assert _of_site(both, "z") is other and _of_site(both[:1], None) is one
    with pytest.raises(ValueError, match=r"one of \['y', 'z'\], got None"):
        _of_site(both, None)
