"""The amortization gap: nothing for an exact guide, what it must be for one that is wrong by a known amount."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import bayesmeta as bm
from bayesmeta import checks
from bayesmeta.data.batch import Batch
from bayesmeta.inference.exact import ExactGuide, ExactTasks
from bayesmeta.inference.gaussian import GaussianTasks
from bayesmeta.inference.protocols import Context, TaskGuide

SHIFT, WIDTH = 0.5, 1.25


def normal(batch: Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, 1.0))
        with batch.observations():
            pyro.sample("y", dist.Normal(phi.expand(batch.y.shape), 1.0), obs=batch.y)


class Wrong(TaskGuide):
    """The exact posterior, moved by SHIFT sds and WIDTH times as wide."""

    def attach(self, density: Any, tasks: bm.Tasks) -> None:
        self._exact = ExactGuide()
        self._exact.attach(density, tasks)

    def condition(self, theta: torch.Tensor, context: Context) -> GaussianTasks:
        right: ExactTasks = self._exact.condition(theta, context)
        sd = 1 / right.factor.squeeze(-1)
        return GaussianTasks(right.loc + SHIFT * sd, right.factor / WIDTH)


def tasks() -> bm.Tasks:
    draw = np.random.default_rng(0)
    return bm.Tasks.from_arrays(None, [draw.normal(draw.normal(), 1.0, n) for n in (1, 2, 3, 5, 8, 13, 21, 34)])


@pytest.fixture(scope="module")
def wrong() -> bm.Fit:
    method = bm.Amortized(guide=Wrong(), shared="map", optimizer=bm.Optimizer(steps=1))
    return bm.fit(normal, tasks(), method=method, progress=False)


def test_a_known_error_is_measured(wrong: bm.Fit, tmp_path: Path) -> None:
    gap = checks.amortization_gap(wrong, tasks(), draws=20_000)
    expected = 0.5 * (WIDTH**2 + SHIFT**2 - 1) - np.log(WIDTH)
    error = WIDTH * np.sqrt(SHIFT**2 + 0.5 * WIDTH**2) / np.sqrt(64 * 64)
    assert np.abs(gap.nats - expected).max() < 4 * error
    assert np.abs(gap.shift - SHIFT).max() < 0.06
    assert np.abs(gap.ratio - WIDTH).max() < 0.06
    assert set(gap.flag) == {""}
    assert gap.sizes.tolist() == tasks().sizes.tolist()
    gap.plot(tmp_path / "gap.png")
    assert (tmp_path / "gap.png").stat().st_size > 10_000


def test_the_largest_gap_stands_first_in_the_table(wrong: bm.Fit) -> None:
    gap = checks.amortization_gap(wrong, tasks(), draws=1000, reference="nuts")
    lines = gap.table().splitlines()
    assert lines[1].startswith(gap.names[int(gap.nats.argmax())])
    assert len(lines) == 1 + len(gap.names)


def test_another_fit_as_reference(wrong: bm.Fit) -> None:
    gap = checks.amortization_gap(wrong, tasks(), draws=1000, reference=wrong)
    assert np.abs(gap.shift - SHIFT).max() < 0.3


def test_bad_input(wrong: bm.Fit) -> None:
    with pytest.raises(ValueError, match=r"reference must be one of \['laplace', 'nuts'\], got 'exact'"):
        checks.amortization_gap(wrong, tasks(), reference="exact")
    empty = bm.Tasks.from_arrays(None, [[1.0], []], names=["full", "hollow"])
    with pytest.raises(ValueError, match=r"task\(s\) \['hollow'\] have no rows"):
        checks.amortization_gap(wrong, empty)
