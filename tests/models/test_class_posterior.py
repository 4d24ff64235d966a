"""The Bayesian classifier: a posterior like any other, and one that its own Markov chains agree with."""

from __future__ import annotations

import pathlib

import few_shot
import numpy as np
import pytest
import torch
from lines import code_lines

import bayesmeta as bm
from bayesmeta.models import class_posterior, versa

WAY, FEATURES = 4, 6


def tasks(count: int, seed: int, rows: int = 6) -> bm.Tasks:
    """Each task `rows` rows of each of four classes."""
    found = few_shot.source(way=WAY, shot=rows, query=1, seed=seed).simulate(count, seed=seed)
    return found[0]


def model() -> bm.HierarchicalModel:
    return class_posterior.build(few_shot.linear(FEATURES), features=FEATURES, classes=WAY)


def method(built: bm.HierarchicalModel) -> bm.Amortized:
    optimizer = bm.Optimizer(steps=600, lr=0.01, batch_tasks=16)
    return class_posterior.method(built, context=(0, 20), optimizer=optimizer)


@pytest.fixture(scope="module")
def fit() -> bm.Fit:
    built = model()
    return bm.fit(built, tasks(200, 0), method=method(built), progress=False)


def test_it_learns_from_other_classes(fit: bm.Fit) -> None:
    context, target = tasks(60, 1).context_target(context=8, seed=0)
    score = np.nanmean(fit.posterior(context, draws=200, refine="none").predict(target).log_prob(), 1)
    gain = score + np.log(WAY)
    assert gain.mean() > 4 * gain.std() / np.sqrt(len(gain))


def test_the_posterior_goes_to_arviz_and_is_the_prior_without_rows(fit: bm.Fit) -> None:
    post = fit.posterior(tasks(3, 1).without_rows(), draws=1000, refine="none")
    assert post.to_arviz()["posterior"]["phi"].shape == (1, 1000, 3, WAY * (FEATURES + 1))
    sd = np.r_[np.full(WAY * FEATURES, fit.shared.mean("weight_scale")), np.full(WAY, fit.shared.mean("bias_scale"))]
    assert (np.abs(post.mean("phi")) < 5 * sd / np.sqrt(1000)).all()
    np.testing.assert_allclose(post.sd("phi"), np.tile(sd, (3, 1)), rtol=5 / np.sqrt(2000))


def test_refinement_gives_the_posterior_of_the_model(fit: bm.Fit) -> None:
    """Held against the gradient at the modes: sampled means of the log density's slope are zero at the posterior."""
    context, target = tasks(6, 2).context_target(context=8, seed=0)
    post = fit.posterior(context, draws=1000)
    assert list(post.flag) == [""] * 6 and set(post.method) <= {"psis", "laplace", "nuts"}
    draws = torch.as_tensor(post.draws("phi"))
    h = fit.modules["predictor"].embed(context.x.to(torch.get_default_dtype())).detach().double()
    one_hot = torch.nn.functional.one_hot(context.y.long(), WAY).double()
    weights, biases = draws[..., : WAY * FEATURES].unflatten(-1, (WAY, FEATURES)), draws[..., WAY * FEATURES :]
    scale = float(fit.shared.mean("weight_scale"))
    start = 0
    for task, size in enumerate(context.sizes.tolist()):
        rows = slice(start, start + size)
        probability = torch.softmax(h[rows] @ weights[:, task].mT + biases[:, task].unsqueeze(1), -1)
        slope = (one_hot[rows] - probability).mT @ h[rows] - weights[:, task] / scale**2
        z = slope.mean(0) / (slope.std(0) / len(draws) ** 0.5)
        assert float(z.square().mean().sqrt()) < 3
        start += size


def test_a_class_without_rows_keeps_the_prior(fit: bm.Fit) -> None:
    x = np.random.default_rng(0).normal(size=(5, 3, 5))
    some = bm.Tasks.from_arrays([x], [np.array([0, 1, 0, 1, 1])])
    post = fit.posterior(some, draws=2000, refine="none")
    unseen = post.mean("phi")[0][: WAY * FEATURES].reshape(WAY, FEATURES)
    error = float(fit.shared.mean("weight_scale")) / np.sqrt(2000)
    assert (np.abs(unseen[2:]) < 5 * error).all() and np.abs(unseen[:2]).max() > 10 * error


def test_it_is_saved_and_loaded(fit: bm.Fit, tmp_path: pathlib.Path) -> None:
    fit.save(tmp_path / "fit.bm")
    built = model()
    again = bm.load(tmp_path / "fit.bm", built, method=method(built))
    pair = [one.posterior(tasks(2, 1), draws=50, refine="none").mean("phi") for one in (fit, again)]
    np.testing.assert_array_equal(*pair)


def test_seeds() -> None:
    """The guide's first weights belong to the method, as the embedding does to the model."""
    built = model()
    options = class_posterior.method(built, optimizer=bm.Optimizer(steps=3, lr=0.01, batch_tasks=8))
    first, again, other = (
        bm.fit(built, tasks(30, 0), method=options, seed=seed, progress=False)
        .modules["predictor"]
        .state_dict()
        .values()
        for seed in (0, 0, 1)
    )
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))


def test_the_embedding_may_be_that_of_a_trained_versa() -> None:
    """Batch normalisation and all: in evaluation mode a row's features are its own."""
    normed = torch.nn.Sequential(few_shot.linear(FEATURES), torch.nn.BatchNorm1d(FEATURES))
    trained = few_shot.fitted(versa.build(normed, features=FEATURES), 60, 0.01).modules["module"].embed
    with pytest.raises(ValueError, match=r"embed.eval\(\)"):
        class_posterior.build(trained.train(), features=FEATURES, classes=WAY)
    built = class_posterior.build(trained.eval(), features=FEATURES, classes=WAY)
    options = class_posterior.method(built, optimizer=bm.Optimizer(steps=5, lr=0.01, batch_tasks=16))
    fit = bm.fit(built, tasks(30, 0), method=options, progress=False)
    context, target = tasks(8, 1).context_target(context=12, seed=0)
    post = fit.posterior(context, draws=50, refine="none")
    groups = post.to_arviz()
    assert groups["posterior"]["phi"].shape == (1, 50, 8, WAY * (FEATURES + 1))
    assert groups["log_likelihood"]["y"].shape == (1, 50, 8, 12)
    score = post.predict(target).log_prob()
    assert score.shape == (8, 12) and np.isfinite(score).all()


def test_other_models_and_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="class_posterior.build made"):
        class_posterior.method(bm.models.alpaca.build())
    with pytest.raises(ValueError, match=r"embed.eval\(\)"):
        class_posterior.build(bm.models.embeddings.Conv4(size=8, width=4), features=16, classes=2)
    class_posterior.build(bm.models.embeddings.Conv4(size=8, width=4).eval(), features=16, classes=2)
    with pytest.raises(ValueError, match="embed as a module"):
        class_posterior.build(lambda x: x, features=16, classes=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="classes as a whole number ≥ 2"):
        class_posterior.build(few_shot.linear(), features=6, classes=1)


def test_the_file_is_read_in_one_sitting() -> None:
    assert code_lines(pathlib.Path(str(class_posterior.__file__))) <= 150
