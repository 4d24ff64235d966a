"""Eight schools with exact moments, which tests of samplers share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
from pyro.ops.stats import effective_sample_size
from torch import as_tensor

import bayesmeta as bm
from bayesmeta.data.batch import Batch

EXACT = Path(__file__).parent / "data" / "exact" / "eight_schools" / "exact_moments.json"
EFFECTS, ERRORS = [28, 8, -3, 7, -1, 1, 18, 12], [15, 10, 16, 11, 9, 11, 10, 18]


def eight_schools(batch: Batch) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with batch.tasks():
        effect = pyro.sample("effect", dist.Normal(mu, tau))
        with batch.observations():
            pyro.sample("y", dist.Normal(effect, batch["error"]), obs=batch.y)


def schools() -> bm.Tasks:
    return bm.Tasks.from_arrays(
        None, [[float(y)] for y in EFFECTS], columns={"error": [[float(s)] for s in ERRORS]}, names=list("abcdefgh")
    )


def check_moments(fit: bm.Fit, draws: int) -> None:
    """Every mean within 4 Monte Carlo standard errors of the exact one."""
    exact = {line["name"]: line["mean"] for line in json.loads(EXACT.read_text())["summary"]}
    post = fit.posterior(schools(), draws=draws)
    found = {name: fit.shared.draws(name) for name in ("mu", "tau")}
    found |= {f"theta[{i + 1}]": post.draws("effect")[:, i] for i in range(8)}
    for name, values in found.items():
        size = float(effective_sample_size(as_tensor(values.reshape(2, -1).copy())))
        assert abs(values.mean() - exact[name]) < 4 * values.std() / np.sqrt(min(size, len(values))), name
    assert post.joint
    assert (post.flag == "").all()
