"""PACOH with Gaussian processes: a prior of functions, learned with a hyper-prior so that few tasks do not overfit it.

    y_i ~ N(m(x) + φ_i, s² exp(−|h(x) − h(x')|² / 2) + σ² δ),   φ_i ~ N(0, τ²),
    log Q*(θ) = log p(θ) + λ / (n β + λ) Σ_i ln p(D_i | θ),

mean m and features h networks whose weights belong to θ, all normal a priori. The function is integrated out; the task
parameter is its level φ_i, whose posterior is Gaussian. Q*, the objective `bm.PACBayes`, is found as a point
(`shared="map"`) or by particles (`"svgd"`).

Deviations from the paper: by default h(x) = x; features have scales instead of length scales; a level of each task; σ,
s and τ are log-normal; new tasks weigh particles of θ by their own evidence.

References:
    Rothfuss, Fortuin, Josifoski, Krause: PACOH: Bayes-Optimal Meta-Learning with PAC-Guarantees, 2021,
    https://arxiv.org/abs/2002.05551
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

import bayesmeta as bm
from bayesmeta.models.arguments import check_tasks
from bayesmeta.models.bayesian_network import Network
from bayesmeta.models.neural_processes.sets import Reader

JITTER = 1e-8
"""Of the kernel's diagonal, relative to its variance."""


def build(
    tasks: bm.Tasks,
    *,
    hidden: Sequence[int] = (16, 16),
    features: int | None = None,
    weight_scale: float = 0.3,
    seed: int = 0,
) -> bm.HierarchicalModel:
    """An unfitted PACOH-GP.

    Args:
        tasks: Training tasks, or others like them: they give shapes and units. One label a row, none missing.
        hidden: Units of the hidden layers of both networks.
        features: Numbers in h(x); None: h(x) = x, which few tasks cannot overfit.
        weight_scale: Sd of the hyper-prior of each weight around the first ones, in standard units. It decides how far
            networks may follow the training tasks: a wide one overfits few of them as training goes on.
        seed: Of the first weights.

    Returns:
        A model with the task site `phi`, the level, and the shared sites `mean_weights`, `feature_weights` (where there
        are features), `log_scales` of the features, and the log-normal `sigma`, `scale` and `tau`; labels are in units
        of their sd.

    Raises:
        ValueError: If an option or the tasks cannot be used.
    """
    check_tasks("pacoh_gp", tasks)
    if tasks.schema.y_shape != ():
        raise ValueError(f"pacoh_gp: expected one label a row, got labels of shape {tasks.schema.y_shape}")
    function = GaussianProcess(Reader(tasks), hidden, features).double()
    shared = function.hyper_priors(weight_scale, seed)

    def level(shared: Mapping[str, Tensor]) -> Distribution:
        return dist.Normal(torch.zeros(1), shared["tau"]).to_event(1)

    return bm.HierarchicalModel(level, function, function.labels, shared=shared)


def method(*, shared: str = "map", lam: float | None = math.inf, optimizer: bm.Optimizer | None = None) -> bm.Amortized:
    """How it is fitted: `bm.fit(model, tasks, method=pacoh_gp.method())`.

    Args:
        shared: The hyper-posterior: "map", "svgd" (particles), "normal" or "lowrank".
        lam: λ of `bm.PACBayes`. ∞, the evidence in full, is near the published experiments, which weigh the log
            hyper-prior by 1e-3 or less; None, λ = n, lets it outweigh few tasks.
        optimizer: Steps, batch size and learning rate.
    """
    guide = bm.guides.Variational(steps=1, draws=2)  # A full step is exact for the level; weights mend others.
    return bm.Amortized(shared=shared, objective=bm.PACBayes(lam), guide=guide, optimizer=optimizer or bm.Optimizer())


class GaussianProcess(nn.Module):
    """Mean and features of the rows `(T, N, 1 + features)`, and the normal distribution of their labels.

    Args:
        reader: Units of inputs and labels.
        hidden: Units of the hidden layers of both networks.
        features: Numbers in h(x), None for x itself.
    """

    def __init__(self, reader: Reader, hidden: Sequence[int], features: int | None) -> None:
        super().__init__()
        self.reader = reader
        self.mean = Network([reader.dx, *hidden, 1])
        self.features = None if features is None else Network([reader.dx, *hidden, features])

    def hyper_priors(self, weight_scale: float, seed: int) -> dict[str, Distribution]:
        """The priors of the shared sites."""
        networks = {"mean_weights": self.mean, "feature_weights": self.features}
        first = [(name, net.first(seed + k)) for k, (name, net) in enumerate(networks.items()) if net is not None]
        count = self.reader.dx if self.features is None else self.features.sizes[-1]
        medians = {"sigma": 0.1, "scale": 1.0, "tau": 0.3}
        return {
            **{name: dist.Normal(weights, weight_scale).to_event(1) for name, weights in first},
            "log_scales": dist.Normal(torch.zeros(count), 1.0).to_event(1),
            **{name: dist.LogNormal(math.log(median), 1.0) for name, median in medians.items()},
        }

    def forward(self, phi: Tensor, x: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """Mean with the task's level, and scaled features, of x `(T, N, *dx)` for φ `(T, 1, 1)`."""
        rows = self.reader.inputs(x).to(phi.dtype)
        mean = _evaluated(self.mean, shared["mean_weights"], rows)
        h = rows if self.features is None else _evaluated(self.features, shared["feature_weights"], rows)
        return torch.cat([mean + phi, h * shared["log_scales"].exp()], -1)

    def labels(self, f: Tensor, batch: bm.Batch, shared: Mapping[str, Tensor]) -> Distribution:
        """All labels of a task together, in the user's units."""
        mean, h = f[..., 0], f[..., 1:]
        squares = (h.unsqueeze(2) - h.unsqueeze(1)).square().sum(-1)
        variance = shared["scale"].square()
        noise = (shared["sigma"].square() + JITTER * variance) * torch.eye(h.shape[1])
        loc, unit = self.reader.y_loc.to(f.dtype), self.reader.y_scale.to(f.dtype)
        covariance = unit.square() * (variance * torch.exp(-0.5 * squares) + noise)
        return dist.MultivariateNormal((loc + unit * mean).unsqueeze(1), covariance.unsqueeze(1))


def _evaluated(network: Network, weights: Tensor, x: Tensor) -> Tensor:
    """A network of shared weights `(d,)`."""
    return network.evaluate(network.blocks.split(weights[None, None]), x)
