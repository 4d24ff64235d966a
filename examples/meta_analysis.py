"""A meta-analysis: the eight schools, whose coaching effects come with known standard errors, and their forest plot.

One row a school: the estimate and, in a column, its standard error. This model is normal throughout, so that
`bm.models.meta_analysis` knows the answer exactly: the learned posterior is compared with it. Writes
`eight_schools.png`, as learned, and `eight_schools_exact.png`.

Reference: Rubin, Estimation in Parallel Randomized Experiments, 1981, https://doi.org/10.3102/10769986006004377
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
import pyro
import pyro.distributions as dist

import bayesmeta as bm
from bayesmeta.checks import plots

EFFECT = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(batch: bm.Batch) -> None:
    """y_j ~ N(theta_j, se_j), theta_j ~ N(mu, tau)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with batch.tasks():
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Normal(theta, batch["se"]), obs=batch.y)


def main(
    *, out: pathlib.Path = pathlib.Path("."), steps: int | None = None, draws: int = 4000, progress: bool = True
) -> dict[str, np.ndarray]:
    """Fits, draws forest plots; returns the schools' posterior means, sds, and errors of means in exact sds.

    Args:
        out: Folder of the picture.
        steps: Training steps; None stops by itself.
        draws: Draws of the posterior.
        progress: Whether to show a bar.
    """
    tasks = bm.Tasks.from_arrays(
        None, EFFECT[:, None], columns={"se": ERROR[:, None]}, names=[f"school {letter}" for letter in "ABCDEFGH"]
    )
    fit = bm.fit(schools, tasks, method=bm.Amortized(optimizer=bm.Optimizer(steps=steps)), progress=progress)
    print(fit)
    post = fit.posterior(tasks, draws=draws)
    print(post.summary()[["task", "mean", "sd", "q05", "q95", "khat", "flag"]].to_string(index=False))
    figure = plots.forest(
        post, EFFECT, ERROR, site="theta", shared=fit.shared, label="effect of coaching on the score, points"
    )
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "eight_schools.png")
    print(f"wrote {out / 'eight_schools.png'}")
    found = bm.models.meta_analysis(
        EFFECT, ERROR, tau_prior=dist.HalfCauchy(5.0), mu_prior=(0.0, 5.0), names=tasks.names
    )
    print(found.summary().round(3).to_string(index=False))
    print(found.shrinkage().round(2).to_string(index=False))
    print(f"tau = 0 against its prior: Bayes factor {found.bayes_factor_tau0:.2f}")
    off = np.abs(post.mean("theta") - found.phi.mean) / found.phi.sd
    print(f"learned posterior means are off by at most {off.max():.3f} exact posterior sds")
    found.forest_plot(out / "eight_schools_exact.png", label="effect of coaching on the score, points")
    shared = {name: np.array([fit.shared.mean(name), fit.shared.sd(name)]) for name in ("mu", "tau")}
    return {"mean": post.mean("theta"), "sd": post.sd("theta"), "off": off, **shared}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."))
    main(out=parser.parse_args().out)
