"""The Gaussian sharing prior against scipy: scales by block and by coordinate, fixed ones, and full covariances."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from bayesmeta.models.sharing import Block, Blocks, Gaussian
from bayesmeta.models.sharing.gaussian import HARD


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


BLOCKS = Blocks((Block("weight", (2,)), Block("gate", (1,), 1.5)))
MU, CENTRE = [0.4, -2.0], np.array([0.4, -2.0, 1.5])


def log_prob(prior: Gaussian, phi: torch.Tensor, **shared: torch.Tensor) -> np.ndarray:
    fn: Any = prior.distribution({"mu": torch.tensor(MU)} | shared, None)  # type: ignore[arg-type]
    assert (fn.batch_shape, fn.event_shape) == ((), (3,))
    return fn.log_prob(phi).numpy()


@pytest.mark.parametrize(
    ("options", "tau", "sd"),
    [
        ({}, [0.3, 2.0], [0.3, 0.3, 2.0]),
        ({"by": "coordinate"}, [0.3, 0.7, 2.0], [0.3, 0.7, 2.0]),
        ({"scale": 0.6}, None, [0.6] * 3),
        ({"scale": 2, "by": "coordinate"}, None, [2.0] * 3),
    ],
)
@pytest.mark.parametrize("cov", ["diag", "full"])
def test_density(options: dict[str, Any], tau: list[float] | None, sd: list[float], cov: Any) -> None:
    prior = Gaussian(**options, cov=cov).over(BLOCKS)
    shared = {} if tau is None else {"tau": torch.tensor(tau)}
    correlation = np.eye(3)
    if cov == "full":
        correlation = np.array([[1.0, 0.5, -0.2], [0.5, 1.0, 0.3], [-0.2, 0.3, 1.0]])
        shared["corr"] = torch.as_tensor(np.linalg.cholesky(correlation))
    assert {name: tuple(fn.event_shape) for name, fn in prior.shared.items()} == {
        "mu": (2,),
        **{name: tuple(value.shape) for name, value in shared.items()},
    }
    phi = torch.randn(4, 1, 3)
    want = stats.multivariate_normal(CENTRE, np.outer(sd, sd) * correlation).logpdf(phi.numpy())
    np.testing.assert_allclose(log_prob(prior, phi, **shared), want.reshape(4, 1), rtol=1e-10)
    np.testing.assert_allclose(prior.variance(shared).numpy(), np.square(sd))


def test_pooled_scales_lie_around_their_blocks() -> None:
    prior = Gaussian(by="coordinate", spread=0.5).over(BLOCKS)
    tau, ratio = torch.tensor([0.3, 2.0]), torch.tensor([0.5, -1.0, 0.2])
    sd = np.array([0.3, 0.3, 2.0]) * np.exp(ratio.numpy())
    shared = {"tau": tau, "log_ratio": ratio}
    phi = torch.randn(4, 1, 3)
    want = stats.multivariate_normal(CENTRE, np.diag(sd**2)).logpdf(phi.numpy())
    np.testing.assert_allclose(log_prob(prior, phi, **shared), want.reshape(4, 1), rtol=1e-10)
    sites: Any = prior.shared
    assert sites["tau"].event_shape == (2,)
    np.testing.assert_allclose(
        sites["log_ratio"].log_prob(ratio).item(), stats.norm(0, 0.5).logpdf(ratio.numpy()).sum(), rtol=1e-10
    )
    draws = {name: value.expand(7, -1) for name, value in shared.items()}
    np.testing.assert_allclose(prior.learned_scales(draws).numpy(), np.tile(sd, (7, 1)))


def test_all_correlation_matrices_are_equally_likely() -> None:
    """d = 2: the correlation is uniform on (-1, 1), and the factor [[1, 0], [r, √(1 - r²)]] has its density 1/2."""
    prior = Gaussian(cov="full").over(Blocks((Block("weight", (2,)),)))
    corr: Any = prior.shared["corr"]
    for r in (-0.9, 0.0, 0.6):
        factor = torch.tensor([[1.0, 0.0], [r, math.sqrt(1 - r * r)]])
        assert corr.log_prob(factor).item() == pytest.approx(-math.log(2))


def test_hard_sharing_leaves_no_distance() -> None:
    prior = Gaussian(scale=0).over(BLOCKS)
    assert list(prior.shared) == ["mu"] and prior.tau({}).tolist() == [HARD] * 3
    fn: Any = prior.distribution({"mu": torch.tensor(MU)}, None)  # type: ignore[arg-type]
    np.testing.assert_allclose(fn.sample((5,)).numpy(), np.tile(CENTRE, (5, 1)), rtol=0, atol=10 * HARD)


@pytest.mark.parametrize("scale", [0, 3.0])
@pytest.mark.parametrize("by", ["block", "coordinate"])
def test_a_free_block_keeps_its_learned_scale(scale: float, by: Any) -> None:
    blocks = Blocks((Block("weight", (2,)), Block("noise", (2,), free=True)))
    prior = Gaussian(scale=scale, by=by).over(blocks)
    assert {name: tuple(fn.event_shape) for name, fn in prior.shared.items()} == {"mu": (4,), "tau": (1,)}
    assert prior.tau({"tau": torch.tensor([0.7])}).tolist() == [scale or HARD] * 2 + [0.7] * 2
    assert prior.scaled == ["noise"]
    assert Gaussian(by=by).over(blocks).scaled == (["weight", "noise"] if by == "block" else blocks.names)


@pytest.mark.parametrize("scale", [-0.1, math.inf, math.nan, "1"])
def test_scales_out_of_range(scale: Any) -> None:
    with pytest.raises(ValueError, match=rf"Gaussian: expected scale as None or a finite number ≥ 0, got {scale!r}"):
        Gaussian(scale=scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "row"}, 'Gaussian: expected by="block" or by="coordinate", got \'row\''),
        ({"cov": "low"}, 'Gaussian: expected cov="diag" or cov="full", got \'low\''),
        ({"cov": "full", "scale": 0}, 'scale=0 is hard sharing, which has no correlations; use cov="diag"'),
        ({"spread": 0.0, "by": "coordinate"}, "Gaussian: expected spread as a finite number > 0, got 0.0"),
        ({"spread": 0.5}, 'spread pools learned scales; expected by="coordinate" and scale=None with it'),
        ({"spread": 0.5, "by": "coordinate", "scale": 1.0}, 'expected by="coordinate" and scale=None with it'),
        ({"sd_scale": 0.0}, "Gaussian: expected sd_scale as a finite number > 0, got 0.0"),
        ({"loc_scale": -1.0}, "Gaussian: expected loc_scale as a finite number > 0, got -1.0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gaussian(**options)


def test_one_parameter_has_no_correlations() -> None:
    with pytest.raises(ValueError, match='one task parameter has no correlations; use cov="diag"'):
        Gaussian(cov="full").over(Blocks((Block("level", ()),)))
