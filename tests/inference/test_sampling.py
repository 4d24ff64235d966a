"""Chains of known densities, and what is said of those that are bad."""

from __future__ import annotations

import itertools
import math
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from bayesmeta.inference.sampling import Drawn, Lengths, climbed, sample


def normal(position: np.ndarray) -> tuple[float, np.ndarray]:
    return -0.5 * float(position @ position), -position


def start(size: int = 1) -> np.ndarray:
    return 0.1 + 0.1 * torch.rand(size, dtype=torch.float64).numpy()


def short(function: Any, *, warmup: int = 300, draws: int = 700, chains: int = 2) -> Drawn:
    return sample(lambda: function, start, Lengths(chains, warmup, draws))


def test_a_normal_is_sampled() -> None:
    drawn = short(normal)
    assert drawn.draws.shape == (2, 700, 1) and drawn.stats["diverging"].shape == (2, 700)
    rhat, ess = drawn.mixing
    assert abs(drawn.draws.mean()) < 4 / np.sqrt(ess[0])
    assert abs(drawn.draws.std() - 1) < 4 / np.sqrt(2 * ess[0])
    assert rhat[0] < 1.05 and ess[0] > 100


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_what_is_not_finite_is_never_accepted(bad: float) -> None:
    def half(position: np.ndarray) -> tuple[float, np.ndarray]:
        return (bad, np.zeros(1)) if position[0] > 1 else normal(position)

    with pytest.warns(UserWarning, match="the chains have not mixed well.*divergent transitions; take more warmup"):
        drawn = short(half)
    assert drawn.draws.max() <= 1


def test_singular_matrices_are_rejected_and_other_errors_come_out() -> None:
    def singular(position: np.ndarray) -> tuple[float, np.ndarray]:
        if position[0] > 4:
            torch.linalg.cholesky(-torch.eye(2))
        return normal(position)

    assert short(singular).draws.max() <= 4

    def broken(position: np.ndarray) -> tuple[float, np.ndarray]:
        if position[0] > 1:
            raise KeyError("a bug")
        return normal(position)

    with pytest.raises((KeyError, ValueError), match="a bug"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        short(broken)

    def hopeless(position: np.ndarray) -> tuple[float, np.ndarray]:
        raise KeyError("a bug at once")

    with pytest.raises(ValueError, match="sampling has failed: 'a bug at once'; check that the density is finite"):
        short(hopeless)


def test_what_a_thread_knows_outlives_a_call() -> None:
    """As in threads that Python starts; to make it anew would take longer than a small density."""
    known, counts = threading.local(), []

    def counted(position: np.ndarray) -> tuple[float, np.ndarray]:
        known.calls = getattr(known, "calls", 0) + 1
        counts.append(known.calls)
        return normal(position)

    short(counted, chains=1)
    assert counts == list(range(1, len(counts) + 1))


def test_two_islands_draw_a_warning_with_the_cure() -> None:
    places = itertools.cycle((-30.0, 30.0))

    def islands(position: np.ndarray) -> tuple[float, np.ndarray]:
        return normal(position - np.sign(position) * 30.0)

    with pytest.warns(UserWarning, match=r"largest R-hat .*; take more warmup and draws, or tighter priors$"):
        sample(lambda: islands, lambda: start() + next(places), Lengths(2, 200, 200))


def test_short_chains_have_no_diagnostics() -> None:
    with pytest.warns(UserWarning, match="largest R-hat inf"):
        drawn = short(normal, warmup=20, draws=3, chains=1)
    assert drawn.draws.shape == (1, 3, 1)


def test_a_climb_that_fails_ends_where_it_began() -> None:
    origin = torch.tensor([3.0, -2.0], dtype=torch.float64)

    def nowhere(position: np.ndarray) -> tuple[float, np.ndarray]:
        return math.nan, np.zeros(2)

    def singular(position: np.ndarray) -> tuple[float, np.ndarray]:
        raise torch.linalg.LinAlgError("not positive definite")

    def parabola(position: np.ndarray) -> tuple[float, np.ndarray]:
        return -float(((position - 1) ** 2).sum()), -2 * (position - 1)

    def endless(position: np.ndarray) -> tuple[float, np.ndarray]:
        return float(position.sum()), np.ones(2)

    def failing(position: np.ndarray) -> tuple[float, np.ndarray]:
        if abs(position).max() > 3:
            raise ValueError("out of range")
        return float(position.sum()), np.ones(2)

    for function in (nowhere, singular, endless, failing):
        np.testing.assert_array_equal(climbed(function, origin), origin)
    np.testing.assert_allclose(climbed(parabola, origin), 1.0)


def test_progress_is_shown_only_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    short(normal)
    assert capfd.readouterr() == ("", "")


def test_an_impossible_density_is_one_line_with_the_cure() -> None:
    with pytest.raises(
        ValueError, match=r"^sampling has failed: .*; check that the density is finite where the prior is$"
    ) as error:
        short(lambda position: (math.nan, np.zeros(1)))
    assert "\n" not in str(error.value)
