"""The models of the comparison with NumPyro, in its language: centred and non-centred. Only the worker imports this."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import bayesmeta as bm


def effects(name: str, loc: Any, scale: Any, count: int, centred: bool) -> Any:
    """One parameter a task around a shared mean."""
    with numpyro.plate(f"{name}_tasks", count):
        if centred:
            return numpyro.sample(name, dist.Normal(loc, scale))
        raw = numpyro.sample(f"{name}_raw", dist.Normal(0.0, 1.0))
        return numpyro.deterministic(name, loc + scale * raw)


def radon(tasks: bm.Tasks, centred: bool) -> None:
    """Intercepts and slopes."""
    task, x, y = flat(tasks)
    mu = [numpyro.sample(f"mu_{name}", dist.Normal(0.0, 10.0)) for name in ("alpha", "beta")]
    tau = [numpyro.sample(f"sigma_{name}", dist.HalfNormal(1.0)) for name in ("alpha", "beta")]
    sigma = numpyro.sample("sigma_y", dist.HalfNormal(1.0))
    pairs = zip(("alpha", "beta"), mu, tau, strict=True)
    alpha, beta = (effects(name, m, t, len(tasks), centred) for name, m, t in pairs)
    numpyro.sample("y", dist.Normal(alpha[task] + beta[task] * x, sigma), obs=y)


def schools(tasks: bm.Tasks, centred: bool) -> None:
    """Eight schools."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    effect = effects("effect", mu, tau, len(tasks), centred)
    errors = tasks.batch(np.arange(len(tasks)))["error"][:, 0]
    numpyro.sample("y", dist.Normal(effect, jnp.asarray(errors.numpy())), obs=flat(tasks)[2])


def counts(tasks: bm.Tasks, centred: bool) -> None:
    """Log rates of counts."""
    task, _, y = flat(tasks)
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    phi = effects("phi", mu, tau, len(tasks), centred)
    numpyro.sample("y", dist.Poisson(jnp.exp(phi[task])), obs=y)


def flat(tasks: bm.Tasks) -> tuple[Any, Any, Any]:
    """Task of each row, inputs and labels, `(R,)` each."""
    index = np.repeat(np.arange(len(tasks)), np.asarray(tasks.sizes))
    x = jnp.asarray(tasks.x.numpy()[:, 0]) if tasks.x.numel() else None
    return jnp.asarray(index), x, jnp.asarray(tasks.y.numpy())


MODELS: dict[str, Callable[[bm.Tasks, bool], None]] = {"radon": radon, "schools": schools, "counts": counts}
