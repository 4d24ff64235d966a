"""What every learner of the zoo with task parameters must do; a new one joins by a line in `LEARNERS`.

Its model is built from tasks, fitted by its own method, and answers through a `Posterior`. The generator of
`test_it_learns…` and `test_intervals_cover` is y = a + ε, a ~ N(0, 1), ε ~ N(0, .3²), whose predictive is known.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from levels import NOISE, code_lines, exact, levels

import bayesmeta as bm
from bayesmeta.models import abml, alpaca, bmaml, hierarchical_gp, latent_gp, pacoh_gp, pacoh_nn, platipus

SMALL = {"hidden": (4,)}


@dataclass(frozen=True)
class Learner:
    """A file of the zoo, options of its `build` and `method`, how long it is trained, and what likelihoods it takes."""

    file: ModuleType
    options: dict[str, Any]
    method: dict[str, Any]
    training: int = 250
    takes_likelihoods: bool = True

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
    "hierarchical gp": ByEvidence(hierarchical_gp, {}, {}, takes_likelihoods=False),
    "latent gp": FromTasks(latent_gp, {"likelihood": bm.likelihoods.Normal(), "basis": 3}, {}),
    "alpaca": ByEvidence(alpaca, {"features": 4, "hidden": (8,)}, {}),
}
TRAINING = 40


@pytest.fixture(scope="module", params=list(LEARNERS))
def learner(request: pytest.FixtureRequest) -> Learner:
    return LEARNERS[request.param]


@pytest.fixture(scope="module")
def early(learner: Learner) -> bm.Fit:
    return learner.fit(levels(TRAINING, 0), 5)


@pytest.fixture(scope="module")
def learned(learner: Learner) -> bm.Fit:
    return learner.fit(levels(TRAINING, 0), learner.training)


def posterior(fit: bm.Fit, tasks: bm.Tasks, draws: int = 200) -> bm.Posterior:
    return fit.posterior(tasks, draws=draws, refine="none")


X = np.linspace(-2, 2, 5)[:, None]


def test_a_learner_is_read_in_one_sitting(learner: Learner) -> None:
    assert code_lines(pathlib.Path(str(learner.file.__file__))) <= 150


def test_the_posterior_of_phi_goes_to_arviz(early: bm.Fit) -> None:
    post = posterior(early, levels(4, 1), draws=20)
    groups = post.to_arviz()
    assert groups["posterior"]["phi"].shape == (1, 20, 4, post.draws("phi").shape[-1])
    assert np.isfinite(post.mean("phi")).all() and (post.sd("phi") > 0).all()


@pytest.mark.parametrize("shots", [0, 1])
def test_no_row_and_one_row_have_an_answer(early: bm.Fit, shots: int) -> None:
    context, target = levels(4, 1).context_target(context=shots, seed=0)
    found = posterior(early, context).predict(target)
    assert np.isfinite(found.log_prob()).all() and np.isfinite(found.draws).all()


def test_without_rows_the_posterior_is_the_prior(early: bm.Fit) -> None:
    post, prior = posterior(early, levels(1, 1).without_rows(), 2000), early.prior(2000)
    error = prior.sd("phi") / np.sqrt(2000)
    assert (np.abs(post.mean("phi") - prior.mean("phi")) < 5 * np.sqrt(2) * error).all()


def test_padding_and_other_tasks_change_nothing(early: bm.Fit) -> None:
    whole = levels(3, 1)
    rows = [(t.x[:n].numpy(), t.y[:n].numpy()) for t, n in zip(whole, (2, 6, 6), strict=True)]
    tasks = bm.Tasks.from_arrays([x for x, _ in rows], [y for _, y in rows], names=list("abc"))
    together, alone = (early.posterior(t, draws=1000, refine="none") for t in (tasks, tasks[[0]]))
    error = np.hypot(together.sd("phi")[0], alone.sd("phi")[0]) / np.sqrt(1000)
    assert (np.abs(together.mean("phi")[0] - alone.mean("phi")[0]) < 5 * error).all()


def test_the_context_matters(early: bm.Fit) -> None:
    tasks = levels(3, 1)
    moved = bm.Tasks.from_arrays([t.x.numpy() for t in tasks], [t.y.numpy() + 3.0 for t in tasks])
    before, after = (posterior(early, t).predict(X, kind="mean").mean for t in (tasks, moved))
    assert ((after - before).mean(1) > 0.1).all()


def gumbel(f: torch.Tensor) -> torch.distributions.Distribution:
    """A likelihood that nobody ships."""
    return torch.distributions.Gumbel(f, 0.5)


@pytest.mark.parametrize(("dx", "kind"), [(0, "normal"), (3, "function")])
def test_any_likelihood_and_inputs_of_any_length(learner: Learner, dx: int, kind: str) -> None:
    rng = np.random.default_rng(0)
    sizes = (3, 1, 5, 2)
    y = [rng.normal(size=n) for n in sizes]
    x = [rng.normal(size=(n, dx)) for n in sizes] if dx else None
    tasks, new = (bm.Tasks.from_arrays(x, y, names=list(names)) for names in ("abcd", "efgh"))
    likelihood = {"normal": bm.likelihoods.Normal(), "function": gumbel}[kind]
    if not learner.takes_likelihoods and kind != "normal":
        with pytest.raises(TypeError, match="unexpected keyword argument 'likelihood'"):
            learner.build(tasks, likelihood=likelihood)
        return
    if said := learner.refused(tasks):
        with pytest.raises(ValueError, match=said):
            learner.build(tasks)
        return
    fit = learner.fit(tasks, 2, **({"likelihood": likelihood} if learner.takes_likelihoods else {}))
    found = posterior(fit, new.context_target(context=1, seed=0)[0], 5).predict(new)
    assert found.draws.shape[:3] == (5, 4, 5) and np.isfinite(found.draws[:, found.mask]).all()


def test_same_seed_same_fit_and_what_is_loaded_is_what_was_saved(
    learner: Learner, early: bm.Fit, tmp_path: pathlib.Path
) -> None:
    tasks = levels(TRAINING, 0)
    early.save(tmp_path / "fit.bm")
    loaded = bm.load(tmp_path / "fit.bm", learner.build(tasks), method=learner.steps(5))
    context = levels(6, 2).context_target(context=2, seed=0)[0]
    draws = [posterior(fit, context, 5).draws("phi") for fit in (early, learner.fit(tasks, 5), loaded)]
    np.testing.assert_array_equal(draws[0], draws[1])
    np.testing.assert_array_equal(draws[0], draws[2])


@pytest.mark.parametrize("shots", [0, 2, 4])
def test_it_learns_most_of_what_there_is_to_learn(learned: bm.Fit, shots: int) -> None:
    """Forty tasks leave the mean and scale of a uncertain: a few hundredths of a nat for whoever knows the family."""
    context, target = levels(200, 1).context_target(context=shots, seed=0)
    y = target.batch(slice(None)).y
    score = posterior(learned, context).predict(target).log_prob().mean(1)
    oracle = exact(context).log_prob(y).mean(1).numpy()
    trivial = torch.distributions.Normal(0.0, (1 + NOISE**2) ** 0.5).log_prob(y).mean(1).numpy()
    gap, gain = oracle - score, score - trivial
    error = gap.std() / np.sqrt(200)
    assert -4 * error < gap.mean() < 0.15 + 4 * error
    assert shots == 0 or gain.mean() > 4 * gain.std() / np.sqrt(200)


@pytest.mark.parametrize("prob", [0.5, 0.9])
def test_intervals_cover(learned: bm.Fit, prob: float) -> None:
    """Tolerance: 4 standard errors over tasks, and .05 for few training tasks and short training."""
    context, target = levels(200, 1).context_target(context=2, seed=0)
    lower, upper = posterior(learned, context).predict(target).interval(prob)
    y = target.batch(slice(None)).y.numpy()
    inside = ((lower < y) & (y < upper)).mean(1)
    assert abs(inside.mean() - prob) < 0.05 + 4 * inside.std() / np.sqrt(200)
