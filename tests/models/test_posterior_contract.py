"""What every learner of the zoo with task parameters must do; a new one joins by a line in `LEARNERS`.

Its model is built from tasks, fitted by its own method, and answers through a `Posterior`. The generator is `Lines`,
whose predictive is known; whoever ignores x is caught.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from lines import Lines, code_lines, lines

import bayesmeta as bm
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.hierarchy.recording import seeded
from bayesmeta.inference.amortized import build_guides
from bayesmeta.models import abml, alpaca, bmaml, hierarchical_gp, latent_gp, pacoh_gp, pacoh_nn, platipus

SMALL = {"hidden": (4,)}
LATENT = {"likelihood": bm.likelihoods.Normal(), "basis": 3}
STATIONARY = Lines(tilt=0.0, spread=0.5)
"""For processes without a mean function."""


@dataclass(frozen=True)
class Learner:
    """A file of the zoo, options of its `build` and `method`, and how long it is trained.

    `family` is what it is to learn; `takes_likelihoods` and `takes_outputs` say which options of `build` are tried.
    """

    file: ModuleType
    options: dict[str, Any]
    method: dict[str, Any]
    training: int = 250
    takes_likelihoods: bool = True
    takes_outputs: bool = True
    family: Lines = Lines()

    def build(self, tasks: bm.Tasks, **more: Any) -> Any:
        return self.file.build(tasks, **self.options, **more)

    def steps(self, count: int) -> Any:
        made: bm.Amortized = self.file.method(**self.method, optimizer=bm.Optimizer(steps=count, lr=2e-2))
        return made

    def refused(self, tasks: bm.Tasks) -> str | None:
        """What is said of tasks that it does not take."""
        return None

    def fit(self, tasks: bm.Tasks, count: int, *, seed: int = 0, **more: Any) -> bm.Fit:
        return bm.fit(self.build(tasks, **more), tasks, method=self.steps(count), seed=seed, progress=False)


@dataclass(frozen=True)
class ByEvidence(Learner):
    """One that is built without tasks and climbs their evidence, without steps."""

    def build(self, tasks: bm.Tasks, **more: Any) -> Any:
        return self.file.build(**{"dim": tasks.x.shape[1], **self.options, **more})

    def steps(self, count: int) -> Any:
        return bm.Marginal(shared="map", chains=1)

    def refused(self, tasks: bm.Tasks) -> str | None:
        return None if tasks.x.shape[1] else "expected dim"


@dataclass(frozen=True)
class FromTasks(ByEvidence):
    """One that climbs the evidence, but sees tasks first."""

    def build(self, tasks: bm.Tasks, **more: Any) -> Any:
        return self.file.build(tasks, **{**self.options, **more})

    def refused(self, tasks: bm.Tasks) -> str | None:
        return None if tasks.x.shape[1] else "expected one to three inputs"


LEARNERS = {
    "abml": Learner(abml, SMALL, {"steps": 3, "draws": 4}),
    "platipus": Learner(platipus, SMALL, {"steps": 3, "context": (0, 5)}, training=500),
    "bmaml": Learner(bmaml, SMALL, {"steps": 3, "particles": 4, "context": (0, 5)}),
    "pacoh gp": Learner(pacoh_gp, SMALL, {}, takes_likelihoods=False),
    "pacoh nn": Learner(pacoh_nn, SMALL, {"lam": np.inf}),
    "hierarchical gp": ByEvidence(hierarchical_gp, {}, {}, takes_likelihoods=False, family=STATIONARY),
    "latent gp": FromTasks(latent_gp, LATENT, {}, takes_outputs=False, family=STATIONARY),
    "alpaca": ByEvidence(alpaca, {"features": 4, "hidden": (8,)}, {}, takes_outputs=False),
}
TRAINING = 40


@pytest.fixture(scope="module", params=list(LEARNERS))
def learner(request: pytest.FixtureRequest) -> Learner:
    return LEARNERS[request.param]


@pytest.fixture(scope="module")
def early(learner: Learner) -> bm.Fit:
    return learner.fit(learner.family.tasks(TRAINING, 0), 5)


@pytest.fixture(scope="module")
def learned(learner: Learner, early: bm.Fit) -> bm.Fit:
    if isinstance(learner, ByEvidence):
        return early
    return learner.fit(learner.family.tasks(TRAINING, 0), learner.training)


def posterior(fit: bm.Fit, tasks: bm.Tasks, draws: int = 200) -> bm.Posterior:
    return fit.posterior(tasks, draws=draws, refine="none")


X = np.linspace(-2, 2, 5)[:, None]
ENDS = np.array([[-1.5], [1.5]])


def test_a_learner_is_read_in_one_sitting(learner: Learner) -> None:
    assert code_lines(pathlib.Path(str(learner.file.__file__))) <= 150


def test_the_posterior_of_phi_goes_to_arviz(early: bm.Fit) -> None:
    post = posterior(early, lines(4, 1), draws=20)
    groups = post.to_arviz()
    assert groups["posterior"]["phi"].shape == (1, 20, 4, post.draws("phi").shape[-1])
    assert np.isfinite(post.mean("phi")).all() and (post.sd("phi") > 0).all()


@pytest.mark.parametrize("shots", [0, 1])
def test_no_row_and_one_row_have_an_answer(early: bm.Fit, shots: int) -> None:
    context, target = lines(4, 1).context_target(context=shots, seed=0)
    found = posterior(early, context).predict(target)
    assert np.isfinite(found.log_prob()).all() and np.isfinite(found.draws).all()


def test_without_rows_the_posterior_is_the_prior(early: bm.Fit) -> None:
    post, prior = posterior(early, lines(1, 1).without_rows(), 2000), early.prior(2000)
    error = prior.sd("phi") / np.sqrt(2000)
    assert (np.abs(post.mean("phi") - prior.mean("phi")) < 5 * np.sqrt(2) * error).all()


def test_padding_and_other_tasks_change_nothing(early: bm.Fit) -> None:
    whole = lines(3, 1)
    rows = [(t.x[:n].numpy(), t.y[:n].numpy()) for t, n in zip(whole, (2, 6, 6), strict=True)]
    tasks = bm.Tasks.from_arrays([x for x, _ in rows], [y for _, y in rows], names=list("abc"))
    together, alone = (early.posterior(t, draws=1000, refine="none") for t in (tasks, tasks[[0]]))
    error = np.hypot(together.sd("phi")[0], alone.sd("phi")[0]) / np.sqrt(1000)
    assert (np.abs(together.mean("phi")[0] - alone.mean("phi")[0]) < 5 * error).all()


def test_the_context_matters(early: bm.Fit) -> None:
    """Labels that are tilted tilt the function; labels that are moved move it."""
    tasks = lines(3, 1)
    x, y = ([getattr(t, name).numpy() for t in tasks] for name in "xy")
    moved = bm.Tasks.from_arrays(x, [labels + 3.0 for labels in y])
    tilted = bm.Tasks.from_arrays(x, [labels + 3.0 * rows[:, 0] for rows, labels in zip(x, y, strict=True)])
    before, level, slope = (posterior(early, t).predict(X, kind="mean").mean for t in (tasks, moved, tilted))
    assert ((level - before).mean(1) > 0.1).all()
    assert ((slope - before)[:, -1] - (slope - before)[:, 0] > 0.1).all()


def gumbel(f: torch.Tensor) -> torch.distributions.Distribution:
    """A likelihood that nobody ships."""
    return torch.distributions.Gumbel(f, 0.5)


def uneven(f: torch.Tensor) -> torch.distributions.Distribution:
    """One whose scale is predicted too."""
    return torch.distributions.Normal(f[..., 0], f[..., 1].exp())


@pytest.mark.filterwarnings("ignore:the point estimate of the shared parameters may be off")
@pytest.mark.parametrize(("dx", "kind"), [(0, "normal"), (3, "function")])
def test_any_likelihood_and_inputs_of_any_length(learner: Learner, dx: int, kind: str) -> None:
    """Eleven rows of noise in three dimensions: Laplace's evidence may be poor, as a warning then says."""
    rng = np.random.default_rng(0)
    sizes = (3, 1, 5, 2)
    y = [rng.normal(size=n) for n in sizes]
    x = [rng.normal(size=(n, dx)) for n in sizes] if dx else None
    tasks, new = (bm.Tasks.from_arrays(x, y, names=list(names)) for names in ("abcd", "efgh"))
    options: dict[str, Any] = {"likelihood": bm.likelihoods.Normal() if kind == "normal" else gumbel}
    if kind == "function" and learner.takes_outputs:
        options = {"likelihood": uneven, "outputs": 2}
    if not learner.takes_likelihoods and kind != "normal":
        with pytest.raises(TypeError, match="unexpected keyword argument 'likelihood'"):
            learner.build(tasks, likelihood=gumbel)
        return
    if said := learner.refused(tasks):
        with pytest.raises(ValueError, match=said):
            learner.build(tasks)
        return
    fit = learner.fit(tasks, 2, **(options if learner.takes_likelihoods else {}))
    found = posterior(fit, new.context_target(context=1, seed=0)[0], 5).predict(new)
    assert found.draws.shape[:3] == (5, 4, 5) and np.isfinite(found.draws[:, found.mask]).all()


def test_same_seed_same_fit_and_what_is_loaded_is_what_was_saved(
    learner: Learner, early: bm.Fit, tmp_path: pathlib.Path
) -> None:
    tasks = learner.family.tasks(TRAINING, 0)
    early.save(tmp_path / "fit.bm")
    loaded = bm.load(tmp_path / "fit.bm", learner.build(tasks), method=learner.steps(5))
    context = lines(6, 2).context_target(context=2, seed=0)[0]
    draws = [posterior(fit, context, 5).draws("phi") for fit in (early, learner.fit(tasks, 5), loaded)]
    np.testing.assert_array_equal(draws[0], draws[1])
    np.testing.assert_array_equal(draws[0], draws[2])


def test_another_seed_another_fit(learner: Learner, early: bm.Fit) -> None:
    """Evidence has one maximum, whatever the seed."""
    tasks = learner.family.tasks(TRAINING, 0)
    if isinstance(learner, ByEvidence):
        context = lines(2, 1).context_target(context=2, seed=0)[0]
        pair = [early.posterior(context, draws=5, refine="none", seed=seed).draws("phi") for seed in (0, 1)]
    else:
        pair = [fit.shared.mean("sigma") for fit in (early, learner.fit(tasks, 2, seed=1))]
    assert (pair[0] != pair[1]).all()


def test_gradients_reach_every_parameter(learner: Learner, early: bm.Fit) -> None:
    """What none reaches stays as it was before the first step."""
    tasks = learner.family.tasks(TRAINING, 0)
    density = TaskDensity(learner.build(tasks), tasks)
    first = density.shared_values(density.initial_theta())
    assert [name for name, value in first.items() if np.array_equal(early.shared.mean(name), value.numpy())] == []
    method, guides = learner.steps(5), early._guides
    if isinstance(method, bm.Amortized):
        with seeded(0):
            start = build_guides(density, tasks, method)
        pairs = [tuple(dict(one.task.named_parameters()) | one.values for one in (start, guides))]
    else:
        pairs = [(density.learned.values, guides.values)]
    for before, after in pairs:
        assert [name for name, value in before.items() if torch.equal(value, after[name])] == []


@pytest.mark.parametrize("shots", [0, 2, 4])
def test_it_learns_most_of_what_there_is_to_learn(learner: Learner, learned: bm.Fit, shots: int) -> None:
    """Forty tasks leave the mean and scale of a uncertain: a few hundredths of a nat for whoever knows the family."""
    family = learner.family
    context, target = family.tasks(200, 1).context_target(context=shots, seed=0)
    rows = target.batch(slice(None))
    score = posterior(learned, context).predict(target).log_prob().mean(1)
    oracle, trivial = (
        family.exact(given, rows.x).log_prob(rows.y).mean(1).numpy() for given in (context, context.without_rows())
    )
    gap, gain = oracle - score, score - trivial
    error = gap.std() / np.sqrt(200)
    assert -4 * error < gap.mean() < 0.15 + 4 * error
    assert shots == 0 or gain.mean() > 4 * gain.std() / np.sqrt(200)


def test_predictions_follow_x_and_the_slope_of_each_context(learner: Learner, learned: bm.Fit) -> None:
    """Correlation with the best means over tasks and places, and of differences between places: without x 0."""
    context, _ = learner.family.tasks(200, 1).context_target(context=4, seed=0)
    found = posterior(learned, context).predict(ENDS, kind="mean").mean
    best = learner.family.exact(context, torch.as_tensor(ENDS).expand(200, -1, -1)).mean.numpy()
    assert np.corrcoef(found.ravel(), best.ravel())[0, 1] > 0.95
    assert np.corrcoef(found[:, 1] - found[:, 0], best[:, 1] - best[:, 0])[0, 1] > 0.6


@pytest.mark.parametrize("prob", [0.5, 0.9])
def test_intervals_cover(learner: Learner, learned: bm.Fit, prob: float) -> None:
    """Tolerance: 4 standard errors over tasks, and .05 for few training tasks and short training."""
    context, target = learner.family.tasks(200, 1).context_target(context=2, seed=0)
    lower, upper = posterior(learned, context).predict(target).interval(prob)
    y = target.batch(slice(None)).y.numpy()
    inside = ((lower < y) & (y < upper)).mean(1)
    assert abs(inside.mean() - prob) < 0.05 + 4 * inside.std() / np.sqrt(200)


HYPER_POSTERIORS = {
    "pacoh gp, svgd": (pacoh_gp, {"hidden": ()}, {"shared": "svgd"}),
    "pacoh gp, normal": (pacoh_gp, {"hidden": ()}, {"shared": "normal"}),
    "pacoh nn, normal": (
        pacoh_nn,
        {"hidden": (2,)},
        {"shared": "normal", "guide": bm.guides.Variational(steps=1, draws=2)},
    ),
}


@pytest.mark.parametrize("kind", list(HYPER_POSTERIORS))
def test_the_hyper_posterior_may_be_particles_or_a_normal(kind: str) -> None:
    file, options, method = HYPER_POSTERIORS[kind]
    fit = Learner(file, options, method).fit(lines(4, 0), 3)
    assert fit.shared.status in ("corrected", "uncorrected") and len(np.unique(fit.shared.draws("sigma"))) > 100
    post = posterior(fit, lines(3, 1), draws=20)
    found = post.predict(X)
    assert found.draws.shape == (20, 3, 5) and np.isfinite(found.log_prob(np.zeros((3, 5)))).all()
