"""Task-level calibration of 500 data sets: a right model passes, a likelihood with a deliberate bug does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scenarios

from bayesmeta import checks
from bayesmeta.checks.calibration import Calibration, ranked
from bayesmeta.data.batch import Batch
from bayesmeta.data.tasks import Tasks
from bayesmeta.inference.amortized import Amortized
from bayesmeta.inference.training import Optimizer

SIZES = (2, 5, 10)
QUICK = Amortized(optimizer=Optimizer(steps=1200))


def lines(*, noise: float = 1.0) -> Callable[[Batch], None]:
    """Intercept and slope; `noise` is a bug of the likelihood."""

    def model(batch: Batch) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(-0.5, 0.5))
        with batch.tasks():
            phi = pyro.sample("phi", dist.Normal(mu, 0.7).expand([2]).to_event(1))
            with batch.observations():
                mean = phi[..., 0] + phi[..., 1] * batch.x[..., 0]
                pyro.sample("y", dist.Normal(mean, noise * sigma), obs=batch.y)

    return model


def like() -> Tasks:
    rng = np.random.default_rng(0)
    x = [rng.uniform(-1, 1, (n, 1)) for n in SIZES]
    return Tasks.from_arrays(x, [np.zeros(n) for n in SIZES])


@pytest.fixture(scope="module")
def right() -> Calibration:
    # Of 50 seeds two or three fail by chance: seed 0 does (p = 0.002), 7,000 replicates of five others are uniform.
    return checks.sbc(lines(), like(), draws=63, method=QUICK, seed=1)


def test_a_right_model_passes(right: Calibration) -> None:
    assert right.passed, right.table()
    assert right.accepted.mean() > 0.9
    assert set(right.ranks) == {"mu", "sigma", "phi[0]", "phi[1]", "log likelihood"}
    assert all(ranks.shape == (500,) and ranks.max() == 63 for ranks in right.ranks.values())
    by_size = right.by_size()
    assert set(by_size) == set(SIZES)
    assert min(p for of_size in by_size.values() for p in of_size.values()) > 0.05 / (5 * len(SIZES))


def test_a_likelihood_with_a_deliberate_bug_fails() -> None:
    found = checks.sbc(lines(), like(), truth=lines(noise=1.3), draws=63, method=QUICK, seed=1)
    assert not found.passed
    assert found.p["sigma"] < 1e-6
    assert found.inside["mu"]
    assert "OUTSIDE" in found.table()


def test_flagged_replicates_are_left_out_and_counted() -> None:
    rng = np.random.default_rng(0)
    ranks, bad = rng.integers(0, 100, 400), np.arange(400) < 200
    found = calibration({"a": np.where(bad, 0, ranks)}, flag=np.where(bad, "bad", "").astype(object))
    assert found.passed
    assert found.table().startswith("200 of 400 replicates, 200 flagged")
    assert not calibration({"a": np.where(bad, 0, ranks)}).passed
    with pytest.raises(ValueError, match=r"all 400 replicates are flagged \(bad\); train longer"):
        _ = calibration({"a": ranks}, flag=np.full(400, "bad", dtype=object)).p


def test_many_parameters_raise_no_more_false_alarms_than_one() -> None:
    rng = np.random.default_rng(0)
    trials = 400
    failed = [
        not calibration({str(k): rng.integers(0, 20, 60) for k in range(10)}, draws=19).passed for _ in range(trials)
    ]
    assert np.mean(failed) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)
    single = [p < 0.05 for _ in range(40) for p in _uniform(rng).p.values()]
    assert 0.02 < np.mean(single) < 0.08


def _uniform(rng: np.random.Generator) -> Calibration:
    return calibration({str(k): rng.integers(0, 20, 60) for k in range(10)}, draws=19)


def calibration(
    ranks: dict[str, Any], *, draws: int = 99, flag: np.ndarray | None = None, sizes: np.ndarray | None = None
) -> Calibration:
    count = len(next(iter(ranks.values())))
    sizes = np.ones(count, dtype=int) if sizes is None else sizes
    return Calibration(ranks, draws, sizes, np.full(count, "", dtype=object) if flag is None else flag)


def test_ranks_break_ties_at_random_and_leave_constants_out() -> None:
    drawn = {"a": np.zeros((9, 2000, 2)), "only drawn": np.zeros((9, 2000))}
    drawn["a"][..., 1] = 5.0
    true = {"a": np.zeros((2000, 2)), "only true": np.zeros(2000)}
    true["a"][:, 1] = 5.0
    true["a"][0, 0] = 1.0
    found = ranked(drawn, true, seed=0)
    assert set(found) == {"a[0]"}
    assert found["a[0]"][0] == 9
    counts = np.bincount(found["a[0]"][1:], minlength=10)
    assert counts.min() > 120
    assert len(counts) == 10


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(ValueError, match="shared site 'mu' has a flat"):
        checks.sbc(scenarios.flat, scenarios.make_tasks())
    with pytest.raises(ValueError, match="without weights"):
        checks.sbc(scenarios.radon, scenarios.make_tasks(weighted=True))
    with pytest.raises(ValueError, match=r"truth: expected the sites of the model, \{'mu'"):
        checks.sbc(lines(), scenarios.make_tasks(sizes=(2, 3)), truth=scenarios.known_prior)
    with pytest.raises(ValueError, match="replicates must be a whole number"):
        checks.sbc(lines(), like(), replicates=0)


def test_the_picture_shows_every_parameter(right: Calibration, tmp_path: Any) -> None:
    right.plot(tmp_path / "sbc.png")
    right.plot(tmp_path / "small.png", size=SIZES[0])
    assert all((tmp_path / name).stat().st_size > 20_000 for name in ("sbc.png", "small.png"))
    with pytest.raises(ValueError, match=r"plot: expected the size of some accepted tasks, \[.*\], got 99"):
        right.plot(tmp_path / "none.png", size=99)


def test_the_table_judges_tasks_of_each_size() -> None:
    rng = np.random.default_rng(0)
    ranks, sizes = rng.integers(0, 100, (2, 400)), np.repeat([2, 9], 200)
    found = calibration({"a": ranks[0], "b": np.where(sizes == 2, 0, ranks[1])}, sizes=sizes)
    small, large = found.table().splitlines()[-2:]
    assert small.split() == ["2", "rows", "200", "0.0000", "OUTSIDE", "b"]
    assert large.split()[:3] == ["9", "rows", "200"] and large.split()[4] == "inside"
