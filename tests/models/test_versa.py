"""VERSA: its posterior of classifiers, the logits drawn from it, and that it learns."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import few_shot
import numpy as np
import torch
from lines import code_lines
from torch import nn

import bayesmeta as bm
from bayesmeta.models import prototypes, versa
from bayesmeta.models.versa import DRAWS, Versa, build


def episode(count: int = 3) -> bm.Episode:
    return few_shot.source().draw(count, context=(0, 0), generator=torch.Generator().manual_seed(0))


def module(**options: Any) -> Versa:
    """Untrained, but with all networks away from their start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found = Versa(nn.Flatten(), few_shot.SIGNAL + few_shot.NUISANCE, **options)
        for name, value in found.named_parameters():
            if name.endswith("4.weight"):
                nn.init.normal_(value, std=0.1)
    found.bias_log_var[4].bias.data.fill_(1.0)
    return found


def test_predictions_are_those_of_classifiers_drawn_from_the_posterior() -> None:
    """Weights drawn 4,000 times against the fixed draws of the logits; the sds of both averages are known."""
    drawn, learner = episode(), module().eval()
    with torch.no_grad():
        phi = learner.classifier(drawn.context)
        assert phi.batch_shape == (3,) and phi.event_shape == (4, few_shot.SIGNAL + few_shot.NUISANCE + 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            weights = phi.sample((4000,))
        rows = torch.cat([drawn.target.x.flatten(2), torch.ones(3, 20, 1)], -1)
        each = torch.softmax(rows @ weights.mT, -1)
        found = learner(drawn.context, drawn.target.x).probs
    error = each.std(0) * math.sqrt(1 / DRAWS + 1 / 4000)
    assert float(each.std(0).mean()) > 0.05, "the test would not see a missing variance"
    z = ((found - each.mean(0)) / error.clamp(min=1e-4)).square().mean().sqrt()
    assert 0.1 < float(z) < 2.0
    assert float((found - torch.softmax(rows @ phi.mean.mT, -1)).abs().max()) > 10 * float(error.mean()) / 3


def test_the_mean_over_draws_is_taken_of_probabilities() -> None:
    drawn, learner = episode(), module(draws=3)
    state = torch.get_rng_state()
    found = learner(drawn.context, drawn.target.x).logits
    torch.set_rng_state(state)
    phi = learner.classifier(drawn.context)
    rows = torch.cat([drawn.target.x.flatten(2), torch.ones(3, 20, 1)], -1)
    loc, sd = rows @ phi.mean.mT, (rows.square() @ phi.variance.mT).sqrt()
    each = torch.softmax(loc + sd * torch.randn(3, *loc.shape), -1)
    torch.set_rng_state(state)
    torch.testing.assert_close(found.exp(), each.mean(0))


def test_it_starts_as_prototypes() -> None:
    drawn, flat = episode(), nn.Flatten()
    old, new = drawn.context, drawn.target.x
    learner: Any = build(flat, features=15).module.eval()
    expected = prototypes.build(flat).module(old, new)
    small = Versa(flat, 15).eval()
    for network in (small.weight_log_var, small.bias_log_var):
        network[4].bias.data.fill_(-60.0)
    torch.testing.assert_close(small(old, new).probs, expected.probs)
    assert float((learner(old, new).probs - expected.probs).detach().abs().max()) < 0.1


def test_predictions_are_reproducible_and_leave_the_random_state_alone() -> None:
    drawn, learner = episode(), module().eval()
    state = torch.get_rng_state()
    pair = [learner(drawn.context, drawn.target.x).probs for _ in range(2)]
    assert torch.equal(*pair) and torch.equal(torch.get_rng_state(), state)


def test_without_context_classes_are_equally_likely_and_absent_classes_are_not_predicted() -> None:
    x = [np.zeros((0, 15)), np.random.default_rng(0).normal(size=(2, 15))]
    batch = bm.Tasks.from_arrays(x, [np.zeros(0, int), np.array([0, 1])]).batch(slice(None)).to(dtype=torch.float32)
    new = torch.randn(2, 3, 15, generator=torch.Generator().manual_seed(0))
    found = module(classes=3).eval()(batch, new).probs
    torch.testing.assert_close(found[0], torch.full((3, 3), 1 / 3))
    assert float((found[1] - 1 / 3).detach().abs().max()) > 0.05
    both = bm.Tasks.from_arrays([x[1], x[1][:1]], [np.array([0, 1]), np.array([0])]).batch([0, 1])
    found = module().eval()(both.to(dtype=torch.float32), new).probs
    assert found[1, :, 1].tolist() == [0.0] * 3 and bool((found[0] > 0).all())


def test_it_learns_nearly_the_best_answer(tmp_path: pathlib.Path) -> None:
    model, drawn = build(few_shot.linear(), features=6), few_shot.evaluation()
    fit = few_shot.fitted(model, 400, 0.01)
    best, learned = few_shot.oracle(drawn).mean(1), few_shot.score(fit, drawn)
    start = few_shot.score(few_shot.fitted(model, 1, 1e-9), drawn)
    gain, gap = (learned - start).double(), (best - learned).double()
    assert float(gain.mean()) > 4 * float(gain.std()) / math.sqrt(len(gain))
    assert -4 * float(gap.std()) / math.sqrt(len(gap)) < float(gap.mean()) < 0.05
    fit.save(tmp_path / "fit.bm")
    assert torch.equal(few_shot.score(bm.load(tmp_path / "fit.bm", model), drawn), learned)


def test_gradients_reach_every_parameter() -> None:
    learner, drawn = module(), episode()
    learner.embed = few_shot.linear(15)
    state = torch.get_rng_state()
    learner(drawn.context, drawn.target.x).log_prob(drawn.target.y).sum().backward()
    torch.set_rng_state(state)
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in learner.parameters())


def test_seeds() -> None:
    """The same weights from the same seed, others from another."""
    model = build(few_shot.linear(), features=6)
    first, again, other = (
        few_shot.fitted(model, 2, 0.01, seed).modules["module"].state_dict().values() for seed in (0, 0, 1)
    )
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))


def test_the_file_is_read_in_one_sitting() -> None:
    assert code_lines(pathlib.Path(str(versa.__file__))) <= 150
