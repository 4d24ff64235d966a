"""Outputs against torch's own distributions, in the user's units."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Independent

import bayesmeta as bm
from bayesmeta.models.neural_processes import cnp
from bayesmeta.models.neural_processes.outputs import (
    TINY,
    Bernoulli,
    Categorical,
    Normal,
    NormalMixture,
    Output,
    StudentT,
    mixture,
    positive,
)

T, M = 3, 4
LOC, SCALE = torch.tensor(5.0), torch.tensor(2.0)
PAIR = torch.tensor([5.0, -1.0]), torch.tensor([2.0, 0.5])
REAL = [Normal(), NormalMixture(3), StudentT()]
ALL = [*REAL, Bernoulli(), Categorical(4)]


def numbers(output: Output, labels: int) -> Tensor:
    return torch.randn(T, M, output.numbers(labels), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("output", ALL, ids=repr)
@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_shapes(output: Output, shape: tuple[int, ...]) -> None:
    labels = output.distribution(numbers(output, math.prod(shape)), torch.zeros(shape), torch.ones(shape))
    assert (labels.batch_shape, labels.event_shape) == ((T, M), shape)
    drawn = labels.sample()
    assert drawn.shape == (T, M, *shape) and labels.log_prob(drawn).isfinite().all()
    assert output.read(drawn, torch.zeros(shape), torch.ones(shape)).shape == (*drawn.shape, output.inputs)


def test_a_normal_in_the_users_units() -> None:
    raw = numbers(Normal(), 2)
    labels = Normal().distribution(raw, *PAIR)
    assert isinstance(labels, Independent)
    torch.testing.assert_close(labels.mean, PAIR[0] + PAIR[1] * raw[..., :2])
    torch.testing.assert_close(labels.stddev, PAIR[1] * positive(raw[..., 2:]))


@pytest.mark.parametrize("output", REAL, ids=repr)
@pytest.mark.parametrize("units", [(LOC, SCALE), PAIR])
def test_units_change_the_log_density_by_their_log_scale(output: Output, units: tuple[Tensor, Tensor]) -> None:
    loc, scale = units
    raw, z = numbers(output, max(1, loc.numel())), torch.randn(T, M, *loc.shape)
    standard = output.distribution(raw, torch.zeros_like(loc), torch.ones_like(scale)).log_prob(z)
    shifted = output.distribution(raw, loc, scale).log_prob(loc + scale * z)
    torch.testing.assert_close(shifted, standard - scale.log().sum())


@pytest.mark.parametrize("output", REAL, ids=repr)
def test_an_untrained_output_is_about_the_labels_of_training(output: Output) -> None:
    labels = output.distribution(torch.zeros(1, 1, output.numbers(1)), LOC, SCALE)
    drawn = labels.sample((20000,))
    assert abs(float(drawn.median()) - 5.0) < 0.1
    assert 0.8 < float((drawn - LOC).abs().median() / (0.6745 * SCALE)) < 1.6


def test_no_floor_of_the_scale() -> None:
    assert float(positive(torch.tensor(0.0))) == pytest.approx(1.0, abs=1e-5)
    assert float(positive(torch.tensor(-1e4))) == pytest.approx(TINY)
    tight = Normal().distribution(torch.tensor([[[0.0, -12.0]]]), LOC, SCALE)
    assert float(tight.stddev) == pytest.approx(2 * math.exp(-12 + math.log(math.e - 1)), rel=0.1)


def test_a_mixture_against_its_parts() -> None:
    output, y = NormalMixture(3), torch.tensor([1.0, 7.0])
    raw = numbers(output, 2)[0, 0]
    labels = output.distribution(raw, *PAIR)
    logits, rest = raw[:3], raw[3:].reshape(2, 3, 2)
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([1 / 6, 1 / 2, 5 / 6]))
    parts = torch.distributions.Normal(PAIR[0] + PAIR[1] * (rest[0] + quantiles[:, None]), PAIR[1] * positive(rest[1]))
    expected = (logits.log_softmax(0) + parts.log_prob(y).sum(-1)).logsumexp(0)
    torch.testing.assert_close(labels.log_prob(y), expected)


def test_tails_of_a_t_are_predicted_and_leave_a_mean() -> None:
    raw = torch.zeros(1, 1, 3)
    raw[..., 2] = -50.0
    labels = StudentT().distribution(raw, LOC, SCALE)
    assert 1 < float(labels.df) < 1.001 and float(labels.mean) == 5.0
    torch.testing.assert_close(StudentT().distribution(torch.zeros(1, 1, 3), LOC, SCALE).df, torch.full((1, 1), 5.0))


def test_classes() -> None:
    raw = numbers(Categorical(4), 1)
    labels = Categorical(4).distribution(raw, LOC, SCALE)
    torch.testing.assert_close(labels.log_prob(torch.full((T, M), 2)), raw.log_softmax(-1)[..., 2])
    assert Categorical(3).read(torch.tensor([2, 0]), LOC, SCALE).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert Bernoulli().read(torch.tensor([1, 0]), LOC, SCALE).tolist() == [[1], [-1]]
    raw = numbers(Bernoulli(), 1)
    ones = Bernoulli().distribution(raw, LOC, SCALE).log_prob(torch.ones(T, M))
    torch.testing.assert_close(ones, raw[..., 0].sigmoid().log())


@pytest.mark.parametrize("output", ALL, ids=repr)
@pytest.mark.parametrize("units", [(LOC, SCALE), PAIR])
def test_an_equal_mixture_averages_densities(output: Output, units: tuple[Tensor, Tensor]) -> None:
    raw = torch.randn(T, M, 5, output.numbers(max(1, units[0].numel())))
    parts = output.distribution(raw, *units)
    whole = mixture(parts)
    y = whole.sample()
    assert whole.batch_shape == (T, M) and whole.event_shape == units[0].shape
    torch.testing.assert_close(whole.log_prob(y), parts.log_prob(y.unsqueeze(2)).logsumexp(-1) - math.log(5))


class Poisson(Output):
    """A family of a user's own."""

    def numbers(self, labels: int) -> int:
        return labels

    def distribution(self, numbers: Tensor, loc: Tensor, scale: Tensor) -> torch.distributions.Distribution:
        return torch.distributions.Poisson(loc * numbers[..., 0].exp())


def test_an_output_of_the_users_own() -> None:
    """Counts whose rate is each task's own: after four rows most of it is known, and no prediction is negative."""
    rng = np.random.default_rng(0)
    rate = np.exp(1.5 + rng.normal(size=(200, 1)))
    tasks = bm.Tasks.from_arrays(None, list(rng.poisson(rate, (200, 8))))
    method = bm.Amortized(optimizer=bm.Optimizer(steps=150, batch_tasks=64, lr=5e-3))
    fit = bm.fit(
        cnp.build(tasks[:150], output=Poisson(), width=16, depth=2), tasks[:150], method=method, progress=False
    )
    context, target = tasks[150:].context_target(context=4, seed=0)
    found = fit.predict(context, target, draws=200)
    assert np.corrcoef(np.log(found.mean[:, 0]), np.log(rate[150:, 0]))[0, 1] > 0.8
    assert (found.draws >= 0).all() and (found.draws == found.draws.round()).all()


@pytest.mark.parametrize(("output", "bad"), [(Bernoulli(), 2), (Categorical(3), 3), (Categorical(3), -1)])
def test_labels_outside_the_support_are_refused(output: Output, bad: int) -> None:
    output.check(bm.Tasks.from_arrays(None, [[0, 1], [1], [0, 1, 0]], names=["a", "b", "c"]))
    with pytest.raises(ValueError, match=rf"expected labels 0 … \d, got {bad} in task 'c'; recode"):
        output.check(bm.Tasks.from_arrays(None, [[0, 1], [1], [0, bad, 0]], names=["a", "b", "c"]))
    with pytest.raises(ValueError, match="got 0.5 in task 'b'"):
        output.check(bm.Tasks.from_arrays(None, [[0.0, 1.0], [0.5]], names=["a", "b"]))


def test_a_missing_label_is_not_refused() -> None:
    tasks = bm.Tasks.from_arrays(None, [[0.0, np.nan], [1.0]], missing="mask")
    Bernoulli().check(tasks)
    assert tasks.observed.tolist() == [True, False, True]


@pytest.mark.parametrize("make", [lambda: NormalMixture(0), lambda: Categorical(1), lambda: Categorical(2.0)])  # type: ignore[arg-type, return-value]
def test_counts_are_checked(make: object) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match="expected (components|classes) as a whole number"):
        make()
