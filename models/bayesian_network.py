"""Networks all of whose weights are a task's own: the hierarchical model behind ABML, PLATIPUS, BMAML and PACOH-NN.

    φ_i ~ N(μ, diag(τ²)),   y = f(x; φ_i) + noise, or any likelihood of f,

f a perceptron with tanh. The hyper-prior lies around the network's first random weights w, μ ~ N(w, s²), since 0, where
all hidden units are alike, is a saddle; log τ ~ N(log t, r²), one τ a weight. These files differ by how φ and θ = (μ,
τ) are inferred, not by the model. Inputs and labels are in standard units inside.

For some hundred weights: what is learned of them is diagonal or a set of particles, and no importance weight corrects
it in so many dimensions. Take posteriors as they are, `fit.posterior(tasks, refine="none")`: "auto" would search and
sample each task's weights by Laplace and Markov chains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

import bayesmeta as bm
from bayesmeta.models.arguments import check_tasks
from bayesmeta.models.conditioning.base import Conditioned
from bayesmeta.models.conditioning.units import standardized, width
from bayesmeta.models.sharing import Block, Blocks


def build(
    tasks: bm.Tasks,
    *,
    hidden: Sequence[int] = (16, 16),
    likelihood: Any = None,
    outputs: int = 1,
    centre_scale: float = 1.0,
    tau: float = 0.2,
    tau_spread: float = 0.5,
    seed: int = 0,
) -> bm.HierarchicalModel:
    """A hierarchical Bayesian network.

    Args:
        tasks: Training tasks, or others like them: they give shapes and units.
        hidden: Units of the hidden layers.
        likelihood: One of `bm.likelihoods`, or a function of any of `(f, batch, shared)`; default
            `bm.likelihoods.Normal()`. Locations and scales are in the units of the labels; a function gets f of order
            one, whatever these are: give it labels of order one, or let it scale f.
        outputs: Numbers that a function as the likelihood takes for a row: f is `(T, N)` for 1, else `(T, N, outputs)`.
            Those of `bm.likelihoods` know theirs.
        centre_scale: s, sd of μ around the first weights, in standard units.
        tau: t, the prior median of each τ, in standard units.
        tau_spread: r, the prior sd of log τ.
        seed: Of the first weights.

    Returns:
        A model with the task site `phi` `(d,)`, all weights; its predictor's `blocks` name them.

    Raises:
        ValueError: If a number is out of range, or not that of the likelihood, inputs are text, or there are no labels.
    """
    check_tasks("bayesian_network", tasks)
    observed = bm.likelihoods.Normal() if likelihood is None else likelihood
    outputs = _outputs(observed, outputs)
    network = Network([math.prod(tasks.schema.x_shape), *_units(hidden), outputs])
    first = network.first(seed)
    prior = WeightPrior(first, centre_scale=centre_scale, tau=tau, tau_spread=tau_spread)
    function, observed = standardized(network, observed, tasks)
    function.scalar = outputs == 1
    return bm.HierarchicalModel(prior, function, observed)


class Network(Conditioned):
    """A perceptron with tanh, its weights given: f `(T, N, k)` of φ `(T, 1, d)` and x `(T, N, *dx)`.

    Args:
        sizes: Inputs, units of the hidden layers, outputs.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        pairs = list(enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True)))
        self.depth = len(pairs)
        blocks = [[Block(f"weight_{k}", (out, into)), Block(f"bias_{k}", (out,))] for k, (into, out) in pairs]
        self.blocks = Blocks(tuple(block for pair in blocks for block in pair))

    def evaluate(self, parts: dict[str, Tensor], x: Tensor) -> Tensor:
        """Layer after layer."""
        h = x.flatten(2)
        for k in range(self.depth):
            h = (torch.tanh(h) if k else h) @ parts[f"weight_{k}"][:, 0].mT + parts[f"bias_{k}"]
        return h

    def first(self, seed: int) -> Tensor:
        """Random weights of a new network `(d,)`: variance 1 over the inputs of a layer, of biases too."""
        generator, found = torch.Generator().manual_seed(seed), []
        for block in self.blocks.all:
            fan_in = self.sizes[int(block.name[-1])]
            found.append(torch.randn(block.size, generator=generator) / math.sqrt(max(1, fan_in)))
        return torch.cat(found)


class WeightPrior(bm.priors.Prior):
    """φ ~ N(μ, diag(τ²)) with shared sites `mu` around first weights and log-normal `tau`.

    Args:
        first: Weights `(d,)`.
        centre_scale: Sd of `mu`, in units of an input's share in a layer.
        tau: Median of `tau`.
        tau_spread: Sd of log `tau`.
    """

    def __init__(self, first: Tensor, *, centre_scale: float, tau: float, tau_spread: float) -> None:
        for name, value in (("centre_scale", centre_scale), ("tau", tau), ("tau_spread", tau_spread)):
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(f"bayesian_network: expected {name} as a finite number > 0, got {value!r}")
        self.first, self.scale = first, float(centre_scale)
        self.log_tau, self.spread = math.log(tau), float(tau_spread)

    @property
    def shared(self) -> dict[str, Distribution]:
        """`mu` and `tau`, `(d,)` each."""
        first = self.first.to(torch.get_default_dtype())
        tau = dist.LogNormal(torch.full_like(first, self.log_tau), self.spread)
        return {"mu": dist.Normal(first, self.scale).to_event(1), "tau": tau.to_event(1)}

    def distribution(self, shared: Mapping[str, Tensor], batch: bm.Batch) -> Distribution:
        """Independent normals."""
        return dist.Normal(shared["mu"], shared["tau"]).to_event(1)


def _outputs(likelihood: Any, outputs: int) -> int:
    """How many numbers a row takes: those of the likelihood, where it knows."""
    if isinstance(outputs, bool) or not isinstance(outputs, int) or outputs < 1:
        raise ValueError(f"bayesian_network: expected outputs as a whole number ≥ 1, got {outputs!r}")
    own = width(likelihood)
    if own > 1 and outputs not in (1, own):
        raise ValueError(
            f"bayesian_network: expected outputs={own}, the numbers that {likelihood!r} takes for a row, or none, "
            f"got {outputs}"
        )
    return max(own, outputs)


def _units(hidden: Sequence[int]) -> list[int]:
    if not all(isinstance(units, int) and not isinstance(units, bool) and units >= 1 for units in hidden):
        raise ValueError(f"bayesian_network: expected hidden as whole numbers ≥ 1, got {hidden!r}")
    return list(hidden)
