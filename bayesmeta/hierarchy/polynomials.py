"""Whether a recorded graph is a polynomial of one of its inputs, as far as its operations tell.

A mixture, a kink or the end of a support may look like a quadratic wherever one looks, but is made of other operations.
"""

from __future__ import annotations

from torch import fx

from bayesmeta.hierarchy.predictors import BILINEAR, is_affine, occurrences
from bayesmeta.hierarchy.rewriting import name_of, number_of

_SHAPES = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
"""These see the shape of a tensor alone."""
_LINEAR = {"mean", "constant_pad_nd", "roll", "repeat", "diag_embed", "diagonal", "tril", "triu", "lift_fresh_copy"}
_LINEAR |= {"copy", "select_scatter", "slice_scatter", "diagonal_scatter", "index_add", "scatter_add", "addcmul"}
_LINEAR |= {"convolution", "embedding"}
_OF_FIRST, _OF_SECOND = {"triangular_solve", "cholesky_solve"}, {"linalg_solve_triangular", "_linalg_solve_ex"}
"""Linear in one argument whatever the other is."""


def is_polynomial(leaf: fx.Node) -> bool:
    """Whether all results of a graph are polynomials of its input `leaf`."""
    moving = {leaf}
    for node in leaf.graph.nodes:
        if node.op == "output" or moving.isdisjoint(node.all_input_nodes) or name_of(node) in _SHAPES:
            continue
        if not _keeps(node, moving):
            return False
        moving.add(node)
    return True


def _keeps(node: fx.Node, moving: set[fx.Node]) -> bool:
    """Whether an operation makes polynomials of polynomials."""
    name, arguments = name_of(node), occurrences(node, moving)
    if is_affine(node, moving) or name == "square" or name in BILINEAR | _LINEAR:
        return True
    if name in _OF_FIRST | _OF_SECOND:
        return arguments == [name in _OF_FIRST, name in _OF_SECOND]
    if name in ("pow", "pow_scalar"):
        power = number_of(node.args[1])
        return power is not None and power >= 0 and power == int(power)
    return False
