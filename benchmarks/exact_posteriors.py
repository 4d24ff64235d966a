"""Five published hierarchical models whose posteriors are known by quadrature, and how draws are held against them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
from pyro.distributions import constraints

import bayesmeta as bm
from bayesmeta.inference.mixing import mixing

EXACT = Path(__file__).parents[1] / "tests" / "data" / "exact"
HOMES = Path(bm.__file__).parent / "data" / "radon.csv"

Places = Mapping[str, tuple[str, Any]]
"""Name of a parameter in the exact posterior -> (site, index into its event)."""
Moments = dict[str, tuple[float, float]]
"""Mean and sd by name."""


def partially_pooled(batch: bm.Batch) -> None:
    """Radon: one mean a county."""
    mu = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    tau = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with batch.tasks():
        alpha = pyro.sample("alpha", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Normal(alpha, sigma), obs=batch.y)


def intercepts(batch: bm.Batch) -> None:
    """Radon: one intercept a county, one slope of the floor for all."""
    mu = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    tau = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with batch.tasks():
        alpha = pyro.sample("alpha", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Normal(alpha + beta * batch.x[..., 0], sigma), obs=batch.y)


def slopes(batch: bm.Batch) -> None:
    """Radon: an intercept and a slope of the floor a county."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau).to_event(1))
        with batch.observations():
            mean = phi[..., 0] + phi[..., 1] * batch.x[..., 0]
            pyro.sample("y", dist.Normal(mean, sigma), obs=batch.y)


def growth(batch: bm.Batch) -> None:
    """Rats: a weight and a growth rate each, flat priors on the standard deviations."""
    flat = dist.ImproperUniform(constraints.positive, (), ())
    mu = [pyro.sample(name, dist.Normal(0.0, 100.0)) for name in ("mu_alpha", "mu_beta")]
    tau = [pyro.sample(name, flat) for name in ("sigma_alpha", "sigma_beta")]
    sigma = pyro.sample("sigma_y", flat)
    with batch.tasks():
        alpha, beta = (pyro.sample(n, dist.Normal(m, t)) for n, m, t in zip(("alpha", "beta"), mu, tau, strict=True))
        with batch.observations():
            pyro.sample("y", dist.Normal(alpha + beta * batch.x[..., 0], sigma), obs=batch.y)


def eight_schools(batch: bm.Batch) -> None:
    """Effects of coaching with known standard errors."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with batch.tasks():
        effect = pyro.sample("effect", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Normal(effect, batch["error"]), obs=batch.y)


def counties() -> bm.Tasks:
    """919 homes in 85 counties, the counties in the order of the exact posteriors."""
    homes = pd.read_csv(HOMES).sort_values("county", kind="stable")
    return bm.Tasks.from_dataframe(homes, task="county", x=["floor"], y="log_radon")


def rats() -> bm.Tasks:
    """Weights of 30 rats at five ages, in days from the middle one."""
    data = json.loads((EXACT / "rats" / "data.json").read_text())
    frame = pd.DataFrame({"rat": data["rat"], "day": np.array(data["x"]) - data["xbar"], "weight": data["y"]})
    return bm.Tasks.from_dataframe(frame, task="rat", x=["day"], y="weight")


def schools() -> bm.Tasks:
    """One effect and its standard error a school."""
    data = json.loads((EXACT / "eight_schools" / "data.json").read_text())
    y, errors = ([[float(v)] for v in data[key]] for key in ("y", "sigma"))
    return bm.Tasks.from_arrays(None, y, columns={"error": errors}, names=list("abcdefgh"))


@dataclass(frozen=True)
class ExactPosterior:
    """A model, its data, and where its parameters are called what in the exact posterior.

    Attributes:
        model: The Pyro model.
        tasks: Reads the data.
        shared: Places of the shared parameters.
        task: Places of the task parameters; `{}` in a name is the number of the task, from 1.
    """

    model: Callable[[bm.Batch], None]
    tasks: Callable[[], bm.Tasks]
    shared: Places
    task: Places

    def draws(self, post: bm.Posterior) -> dict[str, np.ndarray]:
        """Draws of every parameter by its name, those of θ first."""
        found = {name: post.shared[site][(..., *at)] for name, (site, at) in self.shared.items()}
        for name, (site, at) in self.task.items():
            values = post.draws(site)
            found |= {name.format(i + 1): values[(slice(None), i, *at)] for i in range(values.shape[1])}
        return found


_INTERCEPT = {name: (name, ()) for name in ("mu_alpha", "sigma_alpha", "sigma_y")}
_SLOPE = {"mu_beta": ("mu", (1,)), "sigma_beta": ("tau", (1,)), "sigma_y": ("sigma_y", ())}
_RATS = {name: (name, ()) for name in ("mu_alpha", "mu_beta", "sigma_alpha", "sigma_beta", "sigma_y")}
POSTERIORS = {
    "eight_schools": ExactPosterior(
        eight_schools, schools, {"mu": ("mu", ()), "tau": ("tau", ())}, {"theta[{}]": ("effect", ())}
    ),
    "radon_mn_partially_pooled": ExactPosterior(partially_pooled, counties, _INTERCEPT, {"alpha.{}": ("alpha", ())}),
    "radon_mn_variable_intercept": ExactPosterior(
        intercepts, counties, _INTERCEPT | {"beta": ("beta", ())}, {"alpha.{}": ("alpha", ())}
    ),
    "radon_mn_variable_intercept_slope": ExactPosterior(
        slopes,
        counties,
        {"mu_alpha": ("mu", (0,)), "sigma_alpha": ("tau", (0,))} | _SLOPE,
        {"alpha.{}": ("phi", (0,)), "beta.{}": ("phi", (1,))},
    ),
    "rats": ExactPosterior(growth, rats, _RATS, {"alpha.{}": ("alpha", ()), "beta.{}": ("beta", ())}),
}


@functools.cache
def exact(posterior: str) -> Moments:
    """Exact posterior means and sds by name."""
    lines = json.loads((EXACT / posterior / "exact_moments.json").read_text())["summary"]
    return {line["name"]: (line["mean"], line["sd"]) for line in lines}


@dataclass(frozen=True)
class Agreement:
    """Draws of one parameter against its exact moments.

    Attributes:
        error: Mean − exact mean, in exact sds.
        ratio: Sd / exact sd.
        mcse: Monte Carlo error of the mean, in exact sds.
        sd_mcse: Monte Carlo error of the sd, in exact sds.
    """

    error: float
    ratio: float
    mcse: float
    sd_mcse: float

    @property
    def z(self) -> float:
        """Error of the mean in Monte Carlo errors."""
        return self.error / self.mcse

    @property
    def mean_agrees(self) -> bool:
        """The mean is within 4 Monte Carlo errors."""
        return abs(self.z) <= 4

    @property
    def sd_agrees(self) -> bool:
        """The sd is within 2 %, or 4 Monte Carlo errors where those are larger."""
        return abs(self.ratio - 1) <= max(0.02, 4 * self.sd_mcse)


def agreement(draws: np.ndarray, moments: tuple[float, float], *, chains: int) -> Agreement:
    """Holds draws `(S,)` of one parameter, chain after chain, against its exact mean and sd."""
    mean, sd = draws.mean(), draws.std()
    squares = (draws - mean) ** 2
    spread = _mcse(squares, chains) / (2 * sd)
    return Agreement((mean - moments[0]) / moments[1], sd / moments[1], _mcse(draws, chains) / moments[1], spread / sd)


def _mcse(values: np.ndarray, chains: int) -> float:
    _, size = mixing(values.reshape(chains, -1, 1))
    return float(values.std() / np.sqrt(size[0]))


def agreements(posterior: str, post: bm.Posterior, *, chains: int) -> dict[str, Agreement]:
    """Every parameter of a posterior held against the exact one."""
    moments, draws = exact(posterior), POSTERIORS[posterior].draws(post)
    if draws.keys() != moments.keys():
        raise ValueError(f"{posterior}: expected parameters {sorted(moments)}, got {sorted(draws)}")
    return {name: agreement(values, moments[name], chains=chains) for name, values in draws.items()}
