"""Objectives of latent processes on a model whose integrals are known: y_m = z + ε_m, ε ~ N(0, .5²).

q(z | C) = N(0, 1); q(z | C ∪ T) is somewhere between it and the exact posterior.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from neural_tasks import ragged
from scipy.stats import multivariate_normal
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

import bayesmeta as bm
from bayesmeta.data.episodes import Episode
from bayesmeta.inference.conditional import predictive
from bayesmeta.models.neural_processes import latent_np
from bayesmeta.models.neural_processes.latent import (
    Draws,
    LatentPath,
    LatentProcess,
    elbo,
    importance_weighted,
    maximum_likelihood,
    objective_of,
)
from bayesmeta.models.neural_processes.sets import Reader, Rows

NOISE = 0.5
GUESS = (0.4, 0.6)


class Known(nn.Module):
    """q(z | ·) is N(0, 1) for a context of no rows, and `GUESS` with rows."""

    def forward(self, rows: Rows) -> Independent:
        some = rows.kept.any(1, keepdim=True)
        loc, scale = (torch.where(some, guess, prior) for guess, prior in zip(GUESS, (0.0, 1.0), strict=True))
        return Independent(Normal(loc, scale), 1)


class Level(LatentProcess):
    def given(self, z: Tensor, rows: Rows, x: Tensor) -> Distribution:
        return Normal(z.transpose(1, 2).expand(-1, x.shape[1], -1), NOISE)


def level(training: int) -> bm.ConditionalModel:
    module: Any = Level(Reader(ragged()), LatentPath(2, 4, 1, 1), Draws(1, training=training))
    module.latent = Known()
    return bm.ConditionalModel(module)


def episode(**options: Any) -> Episode:
    y = [[0.5, 1.0, 0.2], [-0.5, 0.3], [1.5]]
    tasks = bm.Tasks.from_arrays([np.zeros((len(row), 1)) for row in y], y, **options)
    return Episode(tasks.without_rows().batch(slice(None)), tasks.batch(slice(None)))


def evidence(drawn: Episode) -> Tensor:
    """log p(y) a row, the exact answer."""
    rows = [y[kept].numpy() for y, kept in zip(drawn.target.y, drawn.target.mask, strict=True)]
    return torch.tensor(
        [multivariate_normal(np.zeros(len(y)), 1 + NOISE**2 * np.eye(len(y))).logpdf(y) / len(y) for y in rows]
    ).float()


def exact_elbo(drawn: Episode) -> Tensor:
    loc, scale = GUESS
    kl = -math.log(scale) + (scale**2 + loc**2 - 1) / 2
    error = (drawn.target.y - loc).square() + scale**2
    fitted = -0.5 * error / NOISE**2 - math.log(NOISE * math.sqrt(2 * math.pi))
    return (((fitted * drawn.target.mask).sum(1) - kl) / drawn.target.n).float()


@pytest.mark.parametrize(
    ("objective", "exact", "error"),
    [(elbo, exact_elbo, 0.025), (importance_weighted, evidence, 0.02), (maximum_likelihood, evidence, 0.02)],
)
def test_objectives_are_what_they_say(objective: Any, exact: Any, error: float) -> None:
    """200,000 draws: log p(y | z) of the last task has sd 2.6, an error of .006; weights have relative sd 2 or less."""
    torch.manual_seed(0)
    drawn = episode()
    loss, info = objective(level(200_000), drawn)
    torch.testing.assert_close(info["log_p"], exact(drawn), atol=error, rtol=0)
    torch.testing.assert_close(loss, -info["log_p"].mean())


def test_few_draws_give_bounds_in_order() -> None:
    torch.manual_seed(0)
    drawn, model = episode(), level(4)
    bound, tighter = (
        -torch.stack([objective(model, drawn)[0] for _ in range(2000)]).mean()
        for objective in (elbo, importance_weighted)
    )
    assert bound + 0.02 < tighter < evidence(drawn).mean() + 0.01


def test_rows_and_tasks_are_weighed_and_masked_as_by_the_engine() -> None:
    """Where z says nothing all objectives are the engine's own predictive one."""

    class Silent(Level):
        def given(self, z: Tensor, rows: Rows, x: Tensor) -> Distribution:
            return Normal(0 * z.transpose(1, 2).expand(-1, x.shape[1], -1), NOISE)

        def forward(self, context: bm.Batch, x: Tensor) -> Distribution:
            return Normal(torch.zeros(x.shape[:2]), NOISE)

    class Prior(nn.Module):
        def forward(self, rows: Rows) -> Independent:
            return Independent(Normal(torch.zeros(len(rows.x), 1), 1.0), 1)

    module: Any = Silent(Reader(ragged()), LatentPath(2, 4, 1, 1), Draws(1))
    module.latent = Prior()
    model = bm.ConditionalModel(module)
    drawn = episode(weight=[[2.0, 1.0, 1.0], [1.0, 3.0], [1.0]], task_weight=[1.0, 0.5, 2.0])
    hidden = drawn.target.observed.clone()
    hidden[1, 0] = False
    drawn = Episode(drawn.context, drawn.target.replace(drawn.target.tensors | {"observed": hidden}))
    expected, each = predictive(model, drawn)
    for objective in (elbo, importance_weighted, maximum_likelihood):
        loss, info = objective(model, drawn)
        torch.testing.assert_close(loss, expected, check_dtype=False)
        torch.testing.assert_close(info["log_p"], each["log_p"], check_dtype=False)


def test_predictions_are_mixtures_over_fixed_draws() -> None:
    tasks = ragged()
    module: Any = latent_np.build(tasks, width=8, depth=1, draws=Draws(3, mixture=5)).module
    batch, x = tasks.batch(slice(None)), torch.zeros(4, 2, 1)
    state = torch.get_rng_state()
    first, again = (module(batch, x).log_prob(torch.ones(4, 2)) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(state, torch.get_rng_state())
    rows = module.reader(batch)
    q = module.latent(rows).base_dist
    each = [module.given((q.loc + q.scale * noise).unsqueeze(1), rows, x) for noise in module.noise]
    expected = torch.cat([part.log_prob(torch.ones(4, 2, 1)) for part in each], -1).logsumexp(-1) - math.log(5)
    torch.testing.assert_close(first, expected)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"objective: expected one of \['elbo', 'iw', 'ml'\] or a function, got 'x'"):
        objective_of("x")
    assert objective_of(elbo) is elbo
    with pytest.raises(ValueError, match="latent: expected mixture as a whole number ≥ 1, got 0"):
        Draws(2, mixture=0)
    reader = Reader(ragged())
    with pytest.raises(NotImplementedError):
        LatentProcess(reader, LatentPath(2, 4, 1, 1), Draws(1))(ragged().batch([0]), torch.zeros(1, 1, 1))
