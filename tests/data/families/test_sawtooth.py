from __future__ import annotations

import math

import numpy as np
import pytest

from bayesmeta.data.families import Sawtooth


@pytest.mark.parametrize("dim", [1, 3])
def test_labels_are_the_wave(dim: int) -> None:
    tasks, truth = Sawtooth(dim=dim).simulate(200, rows=8)
    assert truth["direction"].shape == (200, dim)
    np.testing.assert_allclose(np.linalg.norm(truth["direction"], axis=1), 1)
    along = (tasks.x.numpy() * truth["direction"].repeat(8, 0)).sum(1) - truth["offset"].repeat(8)
    np.testing.assert_allclose(tasks.y.numpy(), (truth["frequency"].repeat(8) * along) % 1.0)
    frequency = truth["frequency"] * math.sqrt(dim)
    assert 2 <= frequency.min() and frequency.max() <= 4
    assert abs(frequency.mean() - 3) < 4 * 2 / math.sqrt(12 * 200)
    phase = truth["offset"] * truth["frequency"]
    assert 0 <= phase.min() and phase.max() <= 1 and abs(phase.mean() - 0.5) < 4 / math.sqrt(12 * 200)
    assert abs(truth["direction"].mean()) < 4 / math.sqrt(200 * dim)


def test_targets_have_their_own_inputs() -> None:
    context, target = Sawtooth(target_interval=(2.0, 6.0)).episodes(20)
    assert context.x.abs().max() <= 2 and 2 <= target.x.min() and 5 < target.x.max() <= 6


def test_constants_are_checked() -> None:
    with pytest.raises(ValueError, match="Sawtooth: expected noise as a number from 0"):
        Sawtooth(noise=-0.1)
    with pytest.raises(ValueError, match="Sawtooth: expected dim"):
        Sawtooth(dim=0)
    with pytest.raises(ValueError, match="Sawtooth: expected target_interval"):
        Sawtooth(target_interval=(1.0, 0.0))
