"""R-hat and effective sample sizes: of chains whose numbers are known, in whatever way they may be given."""

from __future__ import annotations

import numpy as np
import pytest

from bayesmeta.inference.mixing import mixing


def autoregressive(chains: int, count: int, memory: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    steps = [rng.normal(size=chains)]
    for _ in range(count - 1):
        steps.append(memory * steps[-1] + np.sqrt(1 - memory**2) * rng.normal(size=chains))
    return np.stack(steps, 1)


@pytest.mark.parametrize("memory", [-0.5, 0.0, 0.5, 0.9])
@pytest.mark.parametrize("chains", [1, 2, 4])
def test_the_effective_sample_size_of_an_autoregression(chains: int, memory: float) -> None:
    rhat, ess = mixing(autoregressive(chains, 8000, memory)[..., None])
    assert ess[0] == pytest.approx(8000 * chains * (1 - memory) / (1 + memory), rel=0.2)
    assert rhat[0] == pytest.approx(1.0, abs=0.01)


def test_quantities_are_judged_one_by_one() -> None:
    draws = np.stack([autoregressive(2, 2000, m) for m in (0.0, 0.9)], -1)
    draws[1, :, 0] += 3
    rhat, ess = mixing(draws)
    assert rhat[0] > 1.5 and rhat[1] < 1.05
    assert ess[0] < 20 and ess[1] > 100


def test_one_chain_that_wanders_is_seen() -> None:
    draws = autoregressive(1, 2000, 0.0)[..., None]
    draws[:, 1000:] += 3
    assert mixing(draws)[0][0] > 1.5


def test_a_chain_that_does_not_move_has_sampled_nothing_and_what_is_not_a_number_stays_so() -> None:
    draws = autoregressive(2, 100, 0.0)[..., None].repeat(5, -1)
    draws[..., 1] = 2.0
    draws[0, :, 2] = 1.0
    draws[..., 3] = [[1.0], [2.0]]
    draws[0, 3, 4] = np.nan
    rhat, ess = mixing(draws)
    assert (rhat[1:4] == np.inf).all() and (ess[1:4] == 0).all()
    assert np.isnan(rhat[4]) and np.isfinite(rhat[0])
