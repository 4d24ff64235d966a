"""One run of one sampler in a fresh process, for `against_numpyro.py`: prints CPU seconds and the least ESS as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import warnings
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import bayesmeta as bm
from bayesmeta.inference.mixing import mixing
from benchmarks.exact_posteriors import counties, eight_schools, schools, slopes

CHAINS, WARMUP, DRAWS = 2, 1000, 1000
COUNTED, ROWS = 500, 6
"""Tasks with counts, and rows of each."""

IMPORTED_LATE = ("arviz", "nutpie.compiled_pyfunc", "torch._dynamo", "torch._inductor.compile_fx")
"""What fits import when they need it; NumPyro's imports are not counted either."""

Sampler = Callable[[], np.ndarray]
"""Draws of all parameters, `(chain, draw, parameter)`."""


def counts(batch: bm.Batch) -> None:
    """Log rates of counts."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Poisson(phi.exp()), obs=batch.y)


def counted() -> bm.Tasks:
    """500 tasks with 6 counts each, log rates normal around .5 with sd .7."""
    rng = np.random.default_rng(0)
    rates = np.exp(rng.normal(0.5, 0.7, COUNTED))
    return bm.Tasks.from_arrays(None, [rng.poisson(rate, ROWS).astype(float) for rate in rates])


MODELS = {
    "radon": (slopes, counties, ("phi",)),
    "schools": (eight_schools, schools, ("effect",)),
    "counts": (counts, counted, ("phi",)),
}


def ours(name: str, method: str, seed: int) -> Sampler:
    """A sampler of this package."""
    for needed in IMPORTED_LATE:
        importlib.import_module(needed)
    model, read, sites = MODELS[name]
    tasks = read()
    lengths = {"chains": CHAINS, "warmup": WARMUP, "draws": DRAWS}
    chosen = bm.Marginal(**lengths) if method == "marginal" else bm.NUTS(**lengths)

    def run() -> np.ndarray:
        fit = bm.fit(model, tasks, method=chosen, seed=seed, progress=False)
        post = fit.posterior(tasks, draws=CHAINS * DRAWS, seed=seed)
        values = [*post.shared.values(), *(post.draws(site) for site in sites)]
        return np.concatenate([value.reshape(CHAINS, DRAWS, -1) for value in values], -1)

    return run


def numpyros(name: str, variant: str, seed: int) -> Sampler:
    """NumPyro's NUTS: `variant` is "centred" or "non-centred" and "32" or "64", with "/" between them."""
    import jax
    import numpyro
    from numpyro.infer import MCMC, NUTS

    from benchmarks import numpyro_models

    centring, bits = variant.split("/")
    numpyro.enable_x64(bits == "64")
    tasks, model = MODELS[name][1](), numpyro_models.MODELS[name]

    def run() -> np.ndarray:
        lengths = {"num_warmup": WARMUP, "num_samples": DRAWS, "num_chains": CHAINS}
        mcmc = MCMC(NUTS(model), chain_method="sequential", progress_bar=False, **lengths)
        mcmc.run(jax.random.PRNGKey(seed), tasks, centring == "centred")
        found = mcmc.get_samples(group_by_chain=True)
        kept = [np.asarray(value, float) for key, value in found.items() if not key.endswith("_raw")]
        return np.concatenate([value.reshape(CHAINS, DRAWS, -1) for value in kept], -1)

    return run


def cpu_seconds() -> float:
    """Of this process and of the compilers it started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    """Runs one sampler on one core."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("sampler", help="marginal, nuts, or a variant of NumPyro, such as non-centred/64")
    parser.add_argument("seed", type=int)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    own = options.sampler in ("marginal", "nuts")
    run = (ours if own else numpyros)(options.model, options.sampler, options.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = cpu_seconds()
        draws = run()
        seconds = cpu_seconds() - start
        rhat, ess = mixing(draws)
    print(json.dumps({"cpu": seconds, "ess": float(ess.min()), "rhat": float(rhat.max()), "size": draws.shape[-1]}))


if __name__ == "__main__":
    main()
