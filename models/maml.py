"""Model-agnostic meta-learning (MAML): gradient steps on a task's own rows, from learned first weights.

    w_0 = θ,   w_{k+1} = w_k − α_k ∇ L(w_k, C),   p(y | x, C) = output(f(x; w_K)),   min_{θ, α} L(w_K, T),

L the mean −log p of the rows, C and T a random context and target of the task, α a learned step size of each layer and
step. Second order: the steps are differentiated through. It is a point estimate, the baseline without a prior and
without uncertainty about w: its intervals are those of the noise that the output learns, too narrow for small contexts
where tasks differ. Read as inference the steps are `bm.guides.Gradient`, which ends in a Gaussian around w_K under a
prior, and `platipus` is that.

Deviations from the paper: step sizes are learned, as in Meta-SGD; α ∇ L is bent by tanh, so that no step moves a weight
by more than 1; any output family of `neural_processes.outputs`.

References:
    Finn, Abbeel, Levine: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017,
    https://arxiv.org/abs/1703.03400
    Li, Zhou, Chen, Li: Meta-SGD: Learning to Learn Quickly for Few-Shot Learning, 2017,
    https://arxiv.org/abs/1707.09835
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import bayesmeta as bm
from bayesmeta.models.bayesian_network import Network
from bayesmeta.models.neural_processes.outputs import Output
from bayesmeta.models.neural_processes.sets import NeuralProcess, Reader, Rows, check_sizes, sizes_of

FIRST_RATE = 0.03
"""Step sizes before training: with much larger ones the steps overshoot as soon as labels are predicted well."""


def build(
    tasks: bm.Tasks,
    *,
    output: Output | None = None,
    hidden: Sequence[int] = (40, 40),
    steps: int = 5,
    context: tuple[int, int] | None = None,
    seed: int = 0,
) -> bm.ConditionalModel:
    """An untrained MAML.

    Args:
        tasks: Training tasks, or others like them: they give shapes and units.
        output: Family of the labels, one of `neural_processes.outputs`; None is `Normal()`.
        hidden: Units of the hidden layers.
        steps: Gradient steps.
        context: Smallest and largest training context; None is 0 to all rows of the largest task but one.
        seed: Of the first weights.

    Raises:
        ValueError: If an option or the tasks cannot be used.
    """
    check_sizes("maml", steps=steps, **{f"hidden[{k}]": units for k, units in enumerate(hidden)})
    module = GradientSteps(Reader(tasks, output), hidden, steps, seed)
    return bm.ConditionalModel(module, context=sizes_of(tasks, context))


class GradientSteps(NeuralProcess):
    """A network that takes gradient steps on a context before it predicts.

    Args:
        reader: Of contexts; it knows the family of the labels.
        hidden: Units of the hidden layers.
        steps: Gradient steps.
        seed: Of the first weights.
    """

    def __init__(self, reader: Reader, hidden: Sequence[int], steps: int, seed: int) -> None:
        super().__init__(reader)
        self.network = Network([reader.dx, *hidden, reader.numbers])
        self.first = nn.ParameterDict(self.network.blocks.split(self.network.first(seed)))
        self.log_rate = nn.ParameterDict({name: torch.full((steps,), FIRST_RATE).log() for name in self.first})
        self.steps = steps

    def forward(self, context: bm.Batch, x: Tensor) -> torch.distributions.Distribution:
        """The distribution of the labels at x `(T, M, *dx)`, of batch shape `(T, M)`."""
        rows = self.reader(context)
        weights = self.adapted(rows, context.y)
        return self.reader.distribution(self.network.evaluate(weights, self.reader.inputs(x)))

    def adapted(self, rows: Rows, y: Tensor) -> dict[str, Tensor]:
        """The weights of each task after its steps, `(T, 1, *shape)`; those of a task without rows stay the first."""

        def loss(weights: dict[str, Tensor]) -> Tensor:
            labels = self.reader.distribution(self.network.evaluate(weights, rows.x))
            log_p = torch.where(rows.kept, labels.log_prob(y), 0.0)
            return -(log_p.sum(1) / rows.kept.sum(1).clamp(min=1)).sum()

        weights = {name: value.expand(len(y), 1, *value.shape) for name, value in self.first.items()}
        slope = torch.func.grad(loss)
        for k in range(self.steps):
            moves = slope(weights)
            weights = {name: w - torch.tanh(self.log_rate[name][k].exp() * moves[name]) for name, w in weights.items()}
        return weights
