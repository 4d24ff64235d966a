"""What every learner of the zoo must do, whatever it is; a new one joins by a line in `LEARNERS`.

The generator, `Lines`, has a known normal as its exact predictive; whoever ignores x or the context is caught.
"""

from __future__ import annotations

import functools
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lines import ROWS, Lines, code_lines

import bayesmeta as bm
from bayesmeta.data.episodes import Episode
from bayesmeta.inference.conditional import predictive
from bayesmeta.models import maml, neural_processes

SMALL = {"width": 32, "depth": 2}
DRAWS = neural_processes.Draws(8, training=8, mixture=32)
LEARNERS: dict[str, Callable[..., bm.ConditionalModel]] = {
    "cnp": functools.partial(neural_processes.cnp.build, **SMALL),
    "latent np": functools.partial(neural_processes.latent_np.build, **SMALL, draws=DRAWS),
    "attentive np": functools.partial(neural_processes.attentive_np.build, **SMALL, latent=DRAWS),
    "attentive cnp": functools.partial(neural_processes.attentive_np.build, **SMALL, latent=None),
    "tnp": functools.partial(neural_processes.tnp.build, **SMALL),
    "conv cnp": functools.partial(neural_processes.conv_cnp.build, width=32, depth=3, points=8),
    "maml": functools.partial(maml.build, hidden=(16,)),
}
OUTPUTS = [
    neural_processes.outputs.Normal(),
    neural_processes.outputs.NormalMixture(3),
    neural_processes.outputs.StudentT(),
    neural_processes.outputs.Bernoulli(),
    neural_processes.outputs.Categorical(3),
]
FAMILY, NEW = Lines(spread=0.15), 400
UNDERFITTING = ("cnp", "latent np")
"""They pool rows by a mean: in so short a training they learn the mean slope of all tasks, not that of each."""


def steps(count: int) -> bm.Amortized:
    return bm.Amortized(optimizer=bm.Optimizer(steps=count, batch_tasks=64, lr=5e-3))


def fitted(name: str, count: int = 20, seed: int = 0) -> bm.ConditionalFit:
    tasks = FAMILY.tasks(600, 0)
    return bm.fit(LEARNERS[name](tasks), tasks, method=steps(count), seed=seed, progress=False)


def features(dx: int, dy: tuple[int, ...], classes: int) -> bm.Tasks:
    """Ragged tasks with inputs of any length and labels of any shape, real or 0 … classes - 1."""
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(n, dx)) for n in (3, 1, 5, 2)]
    y = [rng.normal(size=(len(row), *dy)) for row in x]
    return bm.Tasks.from_arrays(
        x if dx else None, [np.digitize(v, [0.0, 0.7][: classes - 1]) for v in y] if classes else y
    )


@pytest.fixture(scope="module", params=list(LEARNERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> bm.ConditionalModel:
    return LEARNERS[name](FAMILY.tasks(20, 0))


@pytest.fixture(scope="module")
def learned(name: str) -> bm.ConditionalFit:
    return fitted(name, 400)


def predicted(model: Any, context: bm.Batch, x: torch.Tensor) -> torch.Tensor:
    """Log densities of three labels under the distribution at x: its answer, whatever its family."""
    model.module.eval()
    with torch.no_grad():
        labels = model(context.to(dtype=torch.float32), x)
    return torch.stack([labels.log_prob(torch.full(x.shape[:2], value)) for value in (-1.0, 0.0, 2.0)])


X = torch.linspace(-2, 2, 5)[:, None]
ENDS = np.array([[-1.5], [1.5]])


def test_a_learner_is_read_in_one_sitting(name: str) -> None:
    build: Any = LEARNERS[name]
    assert code_lines(pathlib.Path(inspect.getfile(build.func))) <= 150


def test_shapes(model: Any) -> None:
    context = FAMILY.tasks(4, 1).batch(slice(None))
    labels = model(context, X.expand(4, 5, 1))
    assert labels.batch_shape == (4, 5) and labels.event_shape == ()
    assert labels.sample((7,)).shape == (7, 4, 5)


def test_gradients_reach_every_parameter(model: Any) -> None:
    context, target = FAMILY.tasks(8, 1).context_target(context=2, seed=0)
    episode = Episode(context.batch(slice(None)), target.batch(slice(None)))
    model.module.zero_grad()
    objective = predictive if isinstance(model.objective, str) else model.objective
    objective(model, episode)[0].backward()
    assert [key for key, p in model.module.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("output", OUTPUTS, ids=repr)
@pytest.mark.parametrize(("dx", "dy"), [(0, ()), (1, ()), (2, (2,)), (3, ())])
def test_any_output_and_inputs_of_any_length(name: str, output: Any, dx: int, dy: tuple[int, ...]) -> None:
    """Joint draws, scores, and answers where nothing is given."""
    tasks = features(dx, dy, output.codes)
    if name == "conv cnp" and dx != 1:
        with pytest.raises(ValueError, match="expected x to be one number"):
            LEARNERS[name](tasks, output=output)
        return
    fit = bm.fit(LEARNERS[name](tasks, output=output), tasks, method=steps(1), progress=False)
    for context in (tasks.context_target(context=1, seed=0)[0], tasks.without_rows()):
        found = fit.predict(context, tasks, joint=True, draws=2)
        assert found.draws.shape == (2, 4, 5, *dy) and np.isfinite(found.draws[:, found.mask]).all()
        assert np.isfinite(found.log_prob()[found.mask]).all() and np.isfinite(found.log_prob(joint=True)).all()


@pytest.mark.parametrize("shots", [0, 1])
def test_no_row_and_one_row_have_an_answer(model: Any, shots: int) -> None:
    context, _ = FAMILY.tasks(4, 1).context_target(context=shots, seed=0)
    assert predicted(model, context.batch(slice(None)), X.expand(4, 5, 1)).isfinite().all()


def test_padding_and_other_tasks_change_nothing(model: Any) -> None:
    tasks = FAMILY.tasks(2, 1)
    rows = (2, ROWS)
    context = bm.Tasks.from_arrays(
        [t.x[:n].numpy() for t, n in zip(tasks, rows, strict=True)],
        [t.y[:n].numpy() for t, n in zip(tasks, rows, strict=True)],
    )
    both = context.batch(slice(None))
    rubbish = {
        k: torch.where(both.mask.reshape(2, ROWS, *[1] * (v.dim() - 2)), v, 1e3)
        for k, v in both.tensors.items()
        if k in "xy"
    }
    alone = predicted(model, context.batch([0]), X[None])
    for batch in (both, both.replace(both.tensors | rubbish)):
        torch.testing.assert_close(predicted(model, batch, X.expand(2, 5, 1))[:, :1], alone, rtol=1e-4, atol=1e-4)


def test_the_order_of_rows_changes_nothing(model: Any) -> None:
    batch = FAMILY.tasks(3, 1).batch(slice(None))
    turned = batch.replace(
        {k: v.flip(1) if k in ("x", "y", "mask", "observed") else v for k, v in batch.tensors.items()}
    )
    x = X.expand(3, 5, 1)
    torch.testing.assert_close(predicted(model, turned, x), predicted(model, batch, x), rtol=1e-4, atol=1e-4)


def test_the_context_matters(model: Any) -> None:
    batch = FAMILY.tasks(3, 1).batch(slice(None))
    moved = batch.replace(batch.tensors | {"y": batch.y + 1.0})
    x = X.expand(3, 5, 1)
    assert ((predicted(model, moved, x) - predicted(model, batch, x)).abs().amax((0, 2)) > 1e-4).all()


def test_same_seed_same_fit_and_what_is_loaded_is_what_was_saved(name: str, tmp_path: pathlib.Path) -> None:
    first, second = fitted(name), fitted(name)
    states = [fit.modules["module"].state_dict() for fit in (first, second)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    first.save(tmp_path / "fit.bm")
    loaded = bm.load(tmp_path / "fit.bm", LEARNERS[name](FAMILY.tasks(20, 5)))
    context, target = FAMILY.tasks(6, 2).context_target(context=2, seed=0)
    before, after = (fit.predict(context, target, draws=5, joint=True) for fit in (first, loaded))
    np.testing.assert_array_equal(after.draws, before.draws)
    np.testing.assert_array_equal(after.log_prob(), before.log_prob())


def test_other_seed_other_fit(name: str) -> None:
    states = [fitted(name, 20, seed).modules["module"].state_dict() for seed in (0, 1)]
    assert any(not torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("shots", [0, 1, 4])
def test_it_learns_most_of_what_there_is_to_learn(learned: bm.ConditionalFit, shots: int) -> None:
    context, target = FAMILY.tasks(NEW, 1).context_target(context=shots, seed=0)
    rows = target.batch(slice(None))
    score = learned.predict(context, target, draws=1).log_prob().mean(1)
    oracle, trivial = (
        FAMILY.exact(given, rows.x).log_prob(rows.y).mean(1).numpy() for given in (context, context.without_rows())
    )
    gap, gain = oracle - score, score - trivial
    error = gap.std() / np.sqrt(NEW)
    assert gap.mean() > -4 * error, "nothing beats the exact predictive"
    assert gap.mean() < 0.08 + 4 * error
    assert shots == 0 or gain.mean() > 4 * gain.std() / np.sqrt(NEW)


def test_predictions_follow_x_and_the_slope_of_each_context(name: str, learned: bm.ConditionalFit) -> None:
    """Correlation with the best means over tasks and places: without x .6. Of differences between places: without 0."""
    context, _ = FAMILY.tasks(NEW, 1).context_target(context=4, seed=0)
    found = learned.predict(context, ENDS, kind="mean").mean
    best = FAMILY.exact(context, torch.as_tensor(ENDS).expand(NEW, -1, -1)).mean.numpy()
    assert np.corrcoef(found.ravel(), best.ravel())[0, 1] > 0.97
    if name not in UNDERFITTING:
        assert np.corrcoef(found[:, 1] - found[:, 0], best[:, 1] - best[:, 0])[0, 1] > 0.7


@pytest.mark.parametrize("prob", [0.5, 0.9])
def test_intervals_cover(learned: bm.ConditionalFit, prob: float) -> None:
    """Tolerance: 4 standard errors over tasks, and .05 for what short training leaves."""
    context, target = FAMILY.tasks(NEW, 1).context_target(context=2, seed=0)
    lower, upper = learned.predict(context, target, draws=500).interval(prob)
    y = target.batch(slice(None)).y.numpy()
    inside = ((lower < y) & (y < upper)).mean(1)
    assert abs(inside.mean() - prob) < 0.05 + 4 * inside.std() / np.sqrt(NEW)


def test_joint_draws_hang_together(learned: bm.ConditionalFit) -> None:
    """Two rows of a task nothing is known of have correlation (1 − .08²) / (1 + .08² + .3²) = .91; alone, none."""
    nothing = FAMILY.tasks(1, 1).without_rows()
    x = np.array([[-0.5], [0.5]])
    together, alone = (learned.predict(nothing, x, joint=joint, draws=1000).draws[:, 0] for joint in (True, False))
    assert np.corrcoef(together.T)[0, 1] > 0.6
    assert abs(np.corrcoef(alone.T)[0, 1]) < 4 / np.sqrt(1000)
