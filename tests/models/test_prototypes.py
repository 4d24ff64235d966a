"""Prototypical networks: the formula, what is done where rows or classes are missing, and that they learn."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import few_shot
import numpy as np
import pytest
import torch
from lines import code_lines
from torch import nn

import bayesmeta as bm
from bayesmeta.checks.metrics import expected_calibration_error
from bayesmeta.models import prototypes
from bayesmeta.models.prototypes import Prototypes, build


def module(classes: int | None = None) -> Prototypes:
    """Rows are their own embedding; scale 2 and the unseen at distance 3."""
    found = Prototypes(nn.Identity(), classes)
    found.log_scale.data, found.log_unseen.data = torch.tensor(math.log(2.0)), torch.tensor(math.log(3.0))
    return found


def context(x: list[Any], y: list[Any]) -> bm.Batch:
    arrays = [np.asarray(rows, dtype=float).reshape(-1, 2) for rows in x]
    return bm.Tasks.from_arrays(arrays, [np.asarray(row, dtype=int) for row in y]).batch(slice(None))


NEW = torch.tensor([[[0.5, 1.0]], [[2.0, -1.0]]], dtype=torch.float64)


def test_the_formula() -> None:
    ragged = context([[[0, 0], [1, 0], [3, 1]], [[2, 2], [0, 1]]], [[0, 0, 1], [1, 0]])
    found = module()(ragged, NEW).logits.exp()
    means = torch.tensor([[[0.5, 0.0], [3.0, 1.0]], [[0.0, 1.0], [2.0, 2.0]]])
    distance = (NEW[:, 0, None] - means).square().sum(-1) / math.sqrt(2)
    torch.testing.assert_close(found[:, 0], torch.softmax(-2 * distance, -1))


def test_a_class_without_a_row_stands_at_one_distance_and_without_any_row_all_do() -> None:
    found = module(4)(context([[[0.5, 0.0], [3, 1]], []], [[0, 2], []]), NEW).probs[:, 0].detach()
    torch.testing.assert_close(found[1], torch.full((4,), 0.25, dtype=torch.float64))
    near, unseen = math.exp(-2 / math.sqrt(2)), math.exp(-3)
    assert float(found[0, 1]) == float(found[0, 3])
    assert float(found[0, 0] / found[0, 1]) == pytest.approx(near / unseen, rel=1e-6)


def test_the_number_of_classes_may_differ_between_tasks() -> None:
    found = module()(context([[[0, 0], [1, 0], [3, 1]], [[2, 2], [0, 1]]], [[0, 1, 2], [1, 0]]), NEW)
    assert found.probs[1, 0, 2].tolist() == 0.0 and bool((found.probs[0] > 0).all())
    assert bool(torch.isfinite(found.log_prob(torch.tensor([[2], [1]]))).all())


def test_it_learns_nearly_the_best_answer_and_is_calibrated(tmp_path: pathlib.Path) -> None:
    """The oracle's loss is all but reached; what is left is that a mean of one row is not shrunk."""
    model, episode = build(few_shot.linear()), few_shot.evaluation()
    fit = few_shot.fitted(model, 400, 0.01)
    best, learned = few_shot.oracle(episode).mean(1), few_shot.score(fit, episode)
    start = few_shot.score(few_shot.fitted(model, 1, 1e-9), episode)
    gain, gap = (learned - start).double(), (best - learned).double()
    assert float(gain.mean()) > 4 * float(gain.std()) / math.sqrt(len(gain))
    assert -4 * float(gap.std()) / math.sqrt(len(gap)) < float(gap.mean()) < 0.1
    likely = fit.model(episode.context, episode.target.x).probs.max(-1)
    right = (likely.indices == episode.target.y).numpy()
    assert expected_calibration_error(likely.values.numpy(), right) < 0.04
    fit.save(tmp_path / "fit.bm")
    again = bm.load(tmp_path / "fit.bm", model)
    assert torch.equal(few_shot.score(again, episode), learned)


def test_a_fit_predicts_tasks_one_by_one_as_together() -> None:
    fit = few_shot.fitted(build(few_shot.linear()), 2, 0.01)
    old, new = few_shot.source(seed=1).simulate(5, seed=0)
    whole = fit.predict(old, new, draws=1).log_prob()
    alone = [fit.predict(old[i], new[i], draws=1).log_prob()[0] for i in range(5)]
    np.testing.assert_allclose(np.stack(alone), whole, rtol=1e-5, atol=1e-6)


def test_gradients_reach_every_parameter() -> None:
    model = build(few_shot.linear(), classes=5)
    episode = few_shot.source().draw(2, context=(0, 0), generator=torch.Generator().manual_seed(0))
    labels: Any = model(episode.context, episode.target.x)
    labels.log_prob(episode.target.y).sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.module.parameters())


def test_seeds() -> None:
    """The same weights from the same seed, others from another."""
    model = build(few_shot.linear())
    first, again, other = (
        few_shot.fitted(model, 2, 0.01, seed).modules["module"].state_dict().values() for seed in (0, 0, 1)
    )
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))


def test_the_file_is_read_in_one_sitting() -> None:
    assert code_lines(pathlib.Path(str(prototypes.__file__))) <= 150
