"""The main job on real data: learn from the radon measurements of 68 counties, then predict homes in 17 others.

    make demo            (or: python examples/radon.py --out FOLDER)

Radon was measured in 919 homes of 85 Minnesota counties, in the basement (floor 0) or on the first floor (floor 1).
Every county has its own intercept and slope; the prior that they share is learned from 68 counties. The 17 others are
given 0, 1, 2, 3 or 5 of their homes, and the rest are scored. Writes `radon.nc` and four pictures.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import torch

import bayesmeta as bm
from bayesmeta.checks import plots, sharing

DATA = pathlib.Path(bm.__file__).parent / "data" / "radon.csv"
CONTEXTS = (0, 1, 2, 3, 5)
LABELS = ("basement level, log(pCi/L)", "first floor / basement, log ratio")


def radon(batch: bm.Batch) -> None:
    """Intercept and slope of every county, as an ordinary Pyro model."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with batch.tasks():
        phi = pyro.sample("phi", dist.Normal(mu, tau).to_event(1))
        with batch.observations():
            mean = phi[..., 0] + phi[..., 1] * batch.x[..., 0]
            pyro.sample("y", dist.Normal(mean, sigma), obs=batch.y)


def components() -> bm.HierarchicalModel:
    """The same model of components, whose prior the comparison replaces by no pooling and complete pooling."""
    return bm.HierarchicalModel(
        bm.priors.Gaussian(2, loc_scale=10.0, sd_scale=1.0),
        lambda phi, x: phi[..., 0] + phi[..., 1] * x[..., 0],
        bm.likelihoods.Normal(prior_scale=1.0),
    )


def own_levels(counties: bm.Tasks, slope: float) -> np.ndarray:
    """What each county's homes alone say about its basement level: their mean, first floors corrected by `slope`."""
    level = counties.y.numpy() - slope * counties.x.numpy()[:, 0]
    edges = counties.offsets.numpy()
    return np.add.reduceat(level, edges[:-1]) / np.diff(edges)


def arriving(county: bm.Tasks, counts: list[int]) -> bm.Tasks:
    """Copies of one county given more and more of its homes, in a random order."""
    copies = county.copies([0] * len(counts), names=[f"{county.names[0]} given {count}" for count in counts])
    order = torch.randperm(len(county.y), generator=torch.Generator().manual_seed(0))
    given, _ = copies.split_rows(torch.cat([order < count for count in counts]))
    return given


def pictures(fit: bm.Fit, counties: bm.Tasks, new: bm.Tasks, result: sharing.Comparison, out: pathlib.Path) -> None:
    """Writes the four pictures."""
    everyone = fit.posterior(counties)
    level, slope = fit.shared.mean("mu")
    raw = own_levels(counties, float(slope))
    figure = plots.shrinkage(everyone, raw, centre=float(level), labels=("homes measured in the county", LABELS[0]))
    figure.savefig(out / "radon_shrinkage.png")
    name = new.names[int(np.argmax(new.sizes))]
    counts = [*CONTEXTS, int(np.max(new.sizes))]
    stages = fit.posterior(arriving(new[[name]], counts))
    reference = stages.mean("phi")[-1]
    figure = plots.arrival(stages, labels=LABELS, rows="homes measured", title=name, reference=reference)
    figure.savefig(out / "radon_arrival.png")
    plots.learned_prior(fit.prior(8000), everyone, labels=LABELS).savefig(out / "radon_prior.png")
    plots.calibration(result, rows="homes given").savefig(out / "radon_calibration.png")
    everyone.to_arviz().to_netcdf(str(out / "radon.nc"))


def main(
    *, out: pathlib.Path, steps: int | None = None, draws: int = 4000, progress: bool = True
) -> sharing.Comparison:
    """Fits, scores, prints the table, writes `radon.nc` and the pictures.

    Args:
        out: Folder for what is written.
        steps: Training steps; None stops by itself.
        draws: Draws of every posterior in the table.
        progress: Whether to show a bar while training.
    """
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    counties = bm.Tasks.from_dataframe(pandas.read_csv(DATA), task="county", x=["floor"], y="log_radon")
    known, new = counties.split(new=17, seed=0)
    print(f"{counties}\nlearning the prior from {len(known)} counties …", flush=True)
    fit = bm.fit(radon, known, method=bm.Amortized(optimizer=bm.Optimizer(steps=steps)), seed=0, progress=progress)
    print(fit, flush=True)
    print(f"\ngiving each of the {len(new)} other counties {CONTEXTS} homes and scoring the rest …", flush=True)
    result = sharing.compare(components(), known, new, fit=fit, contexts=CONTEXTS, draws=draws, seed=0)
    print("mean over counties ± standard error; log score: of a single home, in nats\n")
    print(result.table())
    flagged = result.flagged["learned prior"]
    print(f"\n{flagged} of {len(new) * len(CONTEXTS)} posteriors were flagged; drawing …", flush=True)
    pictures(fit, counties, new, result, out)
    written = ["radon.nc", *(f"radon_{name}.png" for name in ("shrinkage", "arrival", "prior", "calibration"))]
    print(f"wrote {', '.join(written)} to {out.resolve()} ({time.perf_counter() - start:.0f} s)")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."))
    torch.set_num_threads(1)
    main(out=parser.parse_args().out)
