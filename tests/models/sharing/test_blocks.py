"""Blocks of φ are cut and centred, and the sites and options that all sharing priors have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Distribution

import bayesmeta as bm
from bayesmeta.models.sharing import Block, Blocks, Sharing
from bayesmeta.models.sharing.blocks import correlation, positive, whole


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


BLOCKS = Blocks((Block("weight", (2, 3)), Block("gate", (2,), 1.5), Block("bias", ()), Block("shift", (1,), 0.0)))


@dataclass(frozen=True)
class Plain(Sharing):
    """The least that a sharing prior is."""

    def distribution(self, shared: Mapping[str, Tensor], batch: bm.Batch) -> Distribution:
        return dist.Normal(self.blocks.centre(shared), shared["tau"][self.blocks.index]).to_event(1)

    def variance(self, shared: Mapping[str, Tensor]) -> Tensor:
        return shared["tau"][self.blocks.index].square()


def test_sizes() -> None:
    assert [block.size for block in BLOCKS.all] == [6, 2, 1, 1]
    assert (BLOCKS.d, BLOCKS.learned) == (10, 7) and (Blocks().d, Blocks().learned) == (0, 0)
    assert BLOCKS.index.tolist() == [0] * 6 + [1, 1, 2, 3] and BLOCKS.index.dtype == torch.int64


@pytest.mark.parametrize("lead", [(), (4,), (4, 1)])
def test_split(lead: tuple[int, ...]) -> None:
    phi = torch.randn(*lead, 10)
    numbers, found = phi.numpy(), BLOCKS.split(phi)
    want = {
        "weight": np.stack([numbers[..., :3], numbers[..., 3:6]], -2),
        "gate": numbers[..., 6:8],
        "bias": numbers[..., 8],
        "shift": numbers[..., 9:],
    }
    assert list(found) == list(want)
    for name, part in found.items():
        np.testing.assert_array_equal(part.numpy(), want[name])


def test_a_vector_of_another_length_is_no_phi() -> None:
    with pytest.raises(RuntimeError, match="split"):
        BLOCKS.split(torch.zeros(11))


def test_centres_are_learned_or_given() -> None:
    mu = torch.arange(7.0)
    assert BLOCKS.centre({"mu": mu}).tolist() == [0, 1, 2, 3, 4, 5, 1.5, 1.5, 6, 0]
    prior = Plain(blocks=BLOCKS)
    assert prior.origin.tolist() == [0, 0, 0, 0, 0, 0, 1.5, 1.5, 0, 0] and prior.d == 10


def test_over_keeps_the_options() -> None:
    prior = Plain(loc_scale=3.0, sd_scale=0.5)
    filled = prior.over(BLOCKS)
    assert (filled.loc_scale, filled.sd_scale, filled.blocks) == (3.0, 0.5, BLOCKS)
    assert prior.d == 0 and repr(filled) == "Plain(loc_scale=3.0, sd_scale=0.5)"


def test_priors_of_the_shared_sites() -> None:
    prior = Plain(loc_scale=3.0, sd_scale=0.5, blocks=BLOCKS)
    mu, tau = torch.randn(7), torch.rand(4)
    (centre,), scale = prior.centres().values(), prior.scales(4)["tau"]
    assert centre.event_shape == (7,) and scale.event_shape == (4,)
    assert centre.log_prob(mu).item() == pytest.approx(stats.norm(0, 3).logpdf(mu.numpy()).sum())
    assert scale.log_prob(tau).item() == pytest.approx(stats.halfnorm(0, 0.5).logpdf(tau.numpy()).sum())
    assert Plain(blocks=Blocks((Block("gate", (2,), 1.5),))).centres() == {}


def test_correlation_of_tasks() -> None:
    """Of what all draws and numbers say, a plain loop."""
    draws = torch.randn(6, 3, 2)
    u = draws.numpy()
    product = [[sum(u[s, i] @ u[s, j] for s in range(6)) for j in range(3)] for i in range(3)]
    length = np.sqrt(np.diag(product))
    np.testing.assert_allclose(correlation(draws).numpy(), np.array(product) / np.outer(length, length))


def test_similarity_is_in_units_of_the_prior() -> None:
    """Two tasks on one side of a moving centre, one on the other, in blocks whose scales differ by far."""
    prior = Plain(blocks=BLOCKS)
    shared = {"mu": torch.randn(50, 7), "tau": torch.tensor([1e-3, 1.0, 1e3, 1.0]) * (0.5 + torch.rand(50, 1))}
    noise = torch.randn(50, 1, 10) * torch.tensor([1.0, 1.0, -1.0]).unsqueeze(-1)
    centre = torch.stack([prior.blocks.centre({"mu": mu}) for mu in shared["mu"]])
    phi = centre.unsqueeze(1) + noise * shared["tau"][:, prior.blocks.index].unsqueeze(1)
    want = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    torch.testing.assert_close(prior.similarity(phi, shared), want)
    alone = centre.unsqueeze(1) + torch.randn(50, 3, 10) * shared["tau"][:, prior.blocks.index].unsqueeze(1)
    off = prior.similarity(alone, shared) - torch.eye(3)
    assert 0 < off.abs().max() < 4 / math.sqrt(500)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, True, "1", None])
def test_positive_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"Block: expected here as a finite number > 0, got {value!r}"):
        positive(Block("a", ()), fine=1, here=value)
    for option in ("loc_scale", "sd_scale"):
        with pytest.raises(ValueError, match=rf"Plain: expected {option} as a finite number > 0, got {value!r}"):
            Plain(**{option: value})


@pytest.mark.parametrize("value", [0, -2, 1.0, True, "1", None])
def test_whole_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"Block: expected here as a whole number ≥ 1, got {value!r}"):
        whole(Block("a", ()), fine=1, here=value)
