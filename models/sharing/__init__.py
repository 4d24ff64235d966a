"""Sharing priors of `multitask`: how the task parameters relate, p(φ_i | θ).

Each is a `bm.priors.Prior` over the blocks that a conditioning names; `over` gives it the blocks.
"""

from bayesmeta.models.sharing.blocks import Block, Blocks, Sharing
from bayesmeta.models.sharing.clusters import Clusters
from bayesmeta.models.sharing.contaminated import Contaminated
from bayesmeta.models.sharing.factors import Factors
from bayesmeta.models.sharing.gaussian import Gaussian
from bayesmeta.models.sharing.laplace import Laplace

__all__ = ["Block", "Blocks", "Clusters", "Contaminated", "Factors", "Gaussian", "Laplace", "Sharing"]
