"""Ambiguous tasks: three points may come from a sinusoid or from a line, and the posterior keeps both answers.

φ holds amplitude and phase of a sinusoid a sin(x + b) and slope and intercept of a line, each from an interval that all
tasks share and that is learned; which of them a task is, is summed over, with a share that is learned too. The rows of
a task then hang together through its kind, so that the model says itself how new rows are predicted (`conditional`).
Given few points the posterior of φ has two modes; how much mass each has depends on the form of the prior.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

import bayesmeta as bm


def curves(phi: Tensor, x: Tensor) -> Tensor:
    """The sinusoid and the line at each input: `(T, N, 2)`."""
    at, (amplitude, phase, slope, intercept) = x[..., 0], phi.unbind(-1)
    return torch.stack([amplitude * (at + phase).sin(), slope * at + intercept], -1)


def intervals(shared: Mapping[str, Tensor]) -> dist.Distribution:
    """Each of the four numbers is uniform."""
    return dist.Uniform(shared["centre"] - shared["reach"], shared["centre"] + shared["reach"]).to_event(1)


def kinds(f: Tensor, batch: bm.Batch, shared: Mapping[str, Tensor]) -> dist.Distribution:
    """All labels of a task at once: a mixture of two kinds."""
    rows = dist.Normal(f.mT.unsqueeze(1), shared["sigma"]).to_event(1)
    share = torch.stack([shared["share"], 1 - shared["share"]]).expand(rows.batch_shape)
    return dist.MixtureSameFamily(dist.Categorical(share), rows)


def is_sinusoid(phi: Tensor, shared: Mapping[str, Tensor], context: bm.Batch) -> Tensor:
    """Probability of a sinusoid given φ and the rows of the context, `(T, 1)`."""
    each = dist.Normal(curves(phi, context.x), shared["sigma"]).log_prob(context.y.unsqueeze(-1))
    score = (each * context.mask.unsqueeze(-1)).sum(1)
    return torch.sigmoid(score[:, :1] - score[:, 1:] + torch.logit(shared["share"]))


def new_rows(phi: Tensor, shared: Mapping[str, Tensor], context: bm.Batch, x: Tensor) -> dist.Distribution:
    """New labels: each kind's, weighed by how well it explains the context."""
    share = is_sinusoid(phi, shared, context).unsqueeze(-1)
    rows = dist.Normal(curves(phi, x).mT.unsqueeze(1), shared["sigma"]).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.cat([share, 1 - share], -1)), rows)


def build() -> bm.HierarchicalModel:
    """The model; σ, the share of sinusoids and the intervals of the four numbers are learned."""
    shared = {
        "centre": dist.Normal(torch.zeros(4), 3.0).to_event(1),
        "reach": dist.LogNormal(torch.ones(4), 1.0).to_event(1),
        "sigma": dist.HalfNormal(1.0),
        "share": dist.Beta(2.0, 2.0),
    }
    return bm.HierarchicalModel(intervals, curves, kinds, shared=shared, conditional=new_rows)


def main(*, count: int = 300, new: int = 200, steps: int | None = 3000, progress: bool = True) -> dict[str, float]:
    """Fits, and returns how the probability of a sinusoid compares with the exact one, for tasks of three points.

    Args:
        count: Tasks to learn from.
        new: Tasks of three points.
        steps: Training steps; None stops by itself.
        progress: Whether to show a bar.
    """
    family = bm.families.SinusoidOrLine(context_rows=3, target_rows=20)
    model = build()
    known, _ = family.simulate(count, rows=20, seed=0)
    optimizer = bm.Optimizer(steps=steps, lr=0.01)
    method = bm.Amortized(shared="map", encoder="attention", optimizer=optimizer)  # the kind is told by rows together
    fit = bm.fit(model, known, method=method, progress=progress)
    print(fit)
    context, _ = family.episodes(new, seed=1)
    batch = context.batch(slice(None))
    exact = family.kind_probability(batch).numpy()
    post = fit.posterior(context, draws=400)
    shared = {name: torch.as_tensor(fit.shared.mean(name)) for name in ("sigma", "share")}
    draws = torch.as_tensor(post.draws("phi")).unsqueeze(2)
    found = torch.stack([is_sinusoid(phi, shared, batch)[:, 0] for phi in draws]).mean(0).numpy()
    ambiguous = (exact > 0.1) & (exact < 0.9)
    kept = (found > 0.05) & (found < 0.95)
    decided = np.abs(found - exact)[~ambiguous] < 0.2
    print(
        f"{ambiguous.sum()} of {new} tasks are ambiguous; both answers are kept in {kept[ambiguous].mean():.0%} of them"
    )
    print(f"of the others {decided.mean():.0%} are decided, as the exact posterior does")
    flagged = np.asarray(post.flag) != ""
    print(f"methods: { {name: list(post.method).count(name) for name in set(post.method)} }; {flagged.sum()} flagged")
    print(f"probability of a sinusoid: mean error {np.abs(found - exact).mean():.3f}")
    return {
        "kept": float(kept[ambiguous].mean()),
        "decided": float(decided.mean()),
        "error": float(np.abs(found - exact).mean()),
        "flagged": float(flagged.mean()),
        "ambiguous": float(ambiguous.sum()),
    }


if __name__ == "__main__":
    main()
