from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

from bayesmeta.data.families import mixtures
from bayesmeta.data.families.mixtures import Mixture, mixture_of_normals


def parts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    log_weight = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    loc = torch.randn(5, 4, 3, generator=generator, dtype=torch.float64)
    return log_weight, loc, 0.2 + torch.rand(5, 4, 3, generator=generator, dtype=torch.float64)


def reference() -> MixtureSameFamily:
    log_weight, loc, sd = parts()
    return MixtureSameFamily(Categorical(logits=log_weight.unsqueeze(1).expand(-1, 4, -1)), Normal(loc, sd))


@pytest.mark.parametrize("elements", [1 << 20, 30])
def test_it_agrees_with_torch_s_mixture_in_pieces_and_whole(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixtures, "ELEMENTS", elements)
    mixture, expected = mixture_of_normals(*parts()), reference()
    y = torch.linspace(-2, 2, 40, dtype=torch.float64).reshape(2, 5, 4)
    assert mixture.batch_shape == expected.batch_shape
    torch.testing.assert_close(mixture.log_prob(y), expected.log_prob(y))
    torch.testing.assert_close(mixture.log_prob(y[0, 0, 0]), expected.log_prob(y[0, 0, 0]))
    torch.testing.assert_close(mixture.mean, expected.mean)
    torch.testing.assert_close(mixture.variance, expected.variance)


def test_draws_have_its_moments() -> None:
    mixture = mixture_of_normals(*parts())
    draws = mixture.sample((4000,))
    assert draws.shape == (4000, 5, 4) and mixture.sample().shape == (5, 4)
    assert ((draws.mean(0) - mixture.mean) / (mixture.stddev / math.sqrt(4000))).abs().max() < 4
    squared = (draws - mixture.mean).square()
    assert ((squared.mean(0) - mixture.variance) / (squared.std(0) / math.sqrt(4000))).abs().max() < 4


def test_one_node_is_a_normal_distribution() -> None:
    log_weight, loc, sd = parts()
    single = mixture_of_normals(log_weight[:, :1], loc[..., :1], sd[..., :1])
    assert isinstance(single, Normal) and torch.equal(single.loc, loc[..., 0])
    assert isinstance(mixture_of_normals(log_weight, loc, sd), Mixture)
