"""Recording: a Python function of tensors becomes a flat graph of tensor operations, checked against the original.

Running a Pyro model costs Python time a site; the recorded graph costs only its arithmetic, can be batched over draws
with `torch.func.vmap` and can be compiled. What cannot be recorded runs eagerly and gives the same numbers. Used by
`density.py`; knows nothing of models.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.func import functionalize, vmap
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bayesmeta.hierarchy.derivatives import Prepared, curvature, record, traced, value_and_gradient
from bayesmeta.hierarchy.factoring import factor_anything, unchecked
from bayesmeta.hierarchy.random_graphs import check_noise, independent_fills
from bayesmeta.hierarchy.simplify import simplify

logger = logging.getLogger("bayesmeta")

_LOCK = threading.RLock()

TensorFunction = Callable[..., Any]


_IS_TRAINABLE = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]


class Captured(TorchFunctionMode):
    """Stands in for the tensors that a user's function has captured, and changes none of them.

    Registered parameters are replaced by the fit's own copies; floating tensors of another precision are promoted.
    Trainable parameters nobody registered are collected in `unregistered`.
    """

    def __init__(self, replacements: Mapping[int, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self._replacements = replacements
        self._dtype = dtype
        self.unregistered: dict[int, Tensor] = {}
        self.frozen: dict[int, Tensor] = {}

    def _swap(self, tensor: Tensor) -> Tensor:
        replacement = self._replacements.get(id(tensor))
        if replacement is not None:
            return replacement
        if isinstance(tensor, nn.Parameter) or (tensor.requires_grad and tensor.is_leaf):
            (self.unregistered if tensor.requires_grad else self.frozen)[id(tensor)] = tensor
        if tensor.is_floating_point() and tensor.dtype != self._dtype:
            return tensor.to(self._dtype)
        return tensor

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replaces captured tensors in the arguments of every torch call."""
        if func == _IS_TRAINABLE:  # pyro.module asks a parameter itself, before it registers it
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            args, kwargs = self._replace(args), self._replace(kwargs or {})
        return func(*args, **kwargs)

    def _replace(self, value: Any) -> Any:
        # exact types only: a torch.Size must stay one, for tensor.new(size) reads a tuple as data
        if isinstance(value, Tensor):
            return self._swap(value)
        if type(value) in (tuple, list):
            return type(value)(map(self._replace, value))
        return {key: self._replace(v) for key, v in value.items()} if type(value) is dict else value


@contextlib.contextmanager
def model_context(dtype: torch.dtype) -> Iterator[None]:
    """Sets the default dtype and switches argument validation off while a user's function runs; restores both."""
    with _LOCK, pyro.validation_enabled(False):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextlib.contextmanager
def seeded(seed: int, purpose: str = "") -> Iterator[None]:
    """Seeds torch for a block and gives the caller's random state back afterwards.

    Args:
        seed: The seed.
        purpose: One seed gives every purpose random numbers of its own; without, they would repeat each other.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed ^ zlib.crc32(purpose.encode()))
        yield


def signature(leaves: list[Any]) -> tuple[Any, ...]:
    """What a graph depends on besides values: shapes and dtypes."""
    return tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def _trace(flat: TensorFunction, examples: list[Tensor], *, strict: bool) -> torch.fx.GraphModule:
    table = independent_fills() if strict else independent_fills() | unchecked()
    try:
        return traced(functionalize(flat, remove="mutations"), examples, table)
    except RuntimeError:  # functionalize refuses autograd functions, such as Dirichlet's draws
        return traced(flat, examples, table)


def _pin_dtypes(graph: torch.fx.GraphModule) -> None:
    """Gives factories (zeros, eye, …) the dtype they had when recorded: the default may differ at the call."""
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and "tensor_meta" in node.meta:
            names = {argument.name for argument in node.target._schema.arguments}
            if "dtype" in names and not node.all_input_nodes and node.kwargs.get("dtype") is None:
                node.kwargs = {**node.kwargs, "dtype": node.meta["tensor_meta"].dtype}
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _count(leaves: Sequence[Tensor], dims: tuple[int | None, ...]) -> int:
    return next(leaf.shape[0] for leaf, d in zip(leaves, dims, strict=True) if d is not None)


def _flatten(args: Sequence[Any]) -> tuple[list[Any], Any]:
    """The leaves of `args` and its structure: quickly for tensors and flat dictionaries, as `pytree` otherwise."""
    leaves: list[Any] = []
    keys: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            leaves.append(arg)
            keys.append(None)
        elif type(arg) is dict and all(isinstance(leaf, Tensor) for leaf in arg.values()):
            leaves.extend(arg.values())
            keys.append(tuple(arg))
        else:
            return pytree.tree_flatten(tuple(args))
    return leaves, tuple(keys)


def _dense(args: Sequence[Any]) -> tuple[tuple[Any, ...], list[Any], Any]:
    """Arguments, their leaves and structure without strides of their own: a graph of derivatives depends on them."""
    leaves, keys = _flatten(args)
    if not all(leaf.is_contiguous() for leaf in leaves):
        args = pytree.tree_map(Tensor.contiguous, tuple(args))
        leaves, keys = _flatten(args)
    return tuple(args), leaves, keys


def _second_first(function: TensorFunction, second: Tensor, first: Tensor, *others: Tensor) -> Any:
    return function(first, second, *others)


def _refill(arg: Any, found: Iterator[Tensor]) -> Any:
    if isinstance(arg, Tensor):
        return next(found)
    return pytree.tree_map(lambda _: next(found), arg)


class Recorded:
    """A function whose graph is recorded once for every set of input shapes.

    Args:
        function: Maps pytrees of tensors to a pytree of tensors.
        context: Makes the context in which `function` runs.
        random: The function draws random numbers, so a graph cannot be checked by its values.
        vary: How many leading arguments a check may move to other points (the others are data).
        strict: A matrix without a Cholesky factor is an error in graphs too; otherwise a density is 0 there.

    `status` says per signature whether the graph is used ("recorded") or why not.
    """

    def __init__(
        self,
        function: TensorFunction,
        *,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        random: bool = False,
        vary: int = 2,
        strict: bool = False,
    ) -> None:
        self._function = function
        self._context = context
        self._random = random
        self._vary = vary
        self._strict = strict
        self._graphs: dict[Any, TensorFunction] = {}
        self._mapped: dict[Any, TensorFunction] = {}
        self._gradients: dict[Any, tuple[TensorFunction, pytree.TreeSpec]] = {}
        self._curvatures: dict[Any, Prepared] = {}
        self.status: dict[Any, str] = {}

    def __call__(self, *args: Any) -> Any:
        """Calls the graph recorded for these shapes, recording it first if needed."""
        return self.graph(*args)(*_flatten(args)[0])

    def graph(self, *args: Any) -> TensorFunction:
        """The graph for the shapes of `args`, a function of their flat leaves."""
        leaves, keys = _flatten(args)
        key = (signature(leaves), keys)
        if key not in self._graphs:
            self._graphs[key] = self._record(key, *pytree.tree_flatten(args))
        return self._graphs[key]

    def inputs(self, judge: Callable[[torch.fx.Node], int], *args: Any, eagerly: int) -> Any:
        """What a function says of the node of each leaf of `args`, a pytree; `eagerly` where there is no graph."""
        graph = self.graph(*args)
        _, spec = pytree.tree_flatten(args)
        found = [eagerly] * spec.num_leaves
        if isinstance(graph, torch.fx.GraphModule):
            found = [judge(node) for node in graph.graph.nodes if node.op == "placeholder"]
        return pytree.tree_unflatten(found, spec)

    def eager(self, *args: Any) -> Any:
        """Runs the original function."""
        with self._context():
            return self._function(*args)

    def mapped(self, *args: Any, in_dims: Any) -> Any:
        """Maps over a leading dimension of some arguments (`in_dims` as in `torch.func.vmap`, one entry an argument).

        The graph is recorded for one slice and mapped; where that fails the slices are run one by one.
        """
        return self.mapped_graph(*args, in_dims=in_dims)(*_flatten(args)[0])

    def mapped_graph(self, *args: Any, in_dims: Any) -> TensorFunction:
        """The graph that `mapped` calls, a function of the flat leaves of `args`."""
        leaves, spec = _flatten(args)
        key = (signature(leaves), spec, tuple(in_dims))
        if key not in self._mapped:
            dims = tuple(d for a, d in zip(args, in_dims, strict=True) for _ in pytree.tree_leaves(a))
            one = [a if d is None else pytree.tree_map(lambda t: t[0], a) for a, d in zip(args, in_dims, strict=True)]
            self._mapped[key] = self._map(key, self.graph(*one), leaves, dims)
        return self._mapped[key]

    def gradient(
        self,
        *args: Any,
        wrt: Sequence[int] = (0, 1),
        in_dims: Any = None,
        weights: Sequence[float] = (1.0,),
        compiled: bool = False,
    ) -> tuple[Any, tuple[Any, ...]]:
        """The function's value and the gradient of its sum: forward and backward recorded as one graph.

        Args:
            *args: The function's arguments.
            wrt: Which arguments to differentiate for; their pytrees must hold floating tensors only.
            in_dims: As in `mapped`; None does not map.
            weights: Of each output of the function in the sum.
            compiled: Compile the graph; where that fails it runs as it is, with one line in the log.

        Returns:
            The value, and a tuple with the gradient of each argument in `wrt`.
        """
        args, leaves, keys = _dense(args)
        key = (signature(leaves), keys, in_dims, tuple(wrt), tuple(weights), compiled)
        if key not in self._gradients:
            self._gradients[key] = self._differentiate(args, wrt, in_dims, weights, compiled)
        function, spec = self._gradients[key]
        with torch.no_grad():
            found = list(function(*leaves))
        value = pytree.tree_unflatten(found[: spec.num_leaves], spec)
        gradients = iter(found[spec.num_leaves :])
        return value, tuple(_refill(args[i], gradients) for i in wrt)

    def curvature(self, *args: Any, in_dims: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Value `(*batch)`, gradient `(*batch, d)` and Hessian `(*batch, d, d)` for the second argument `(*batch, d)`.

        Args:
            *args: The function's arguments; the first two are one tensor each.
            in_dims: As in `mapped`; None does not map.
        """
        return self.curvature_at(args[0], *args[2:], example=args[1], in_dims=in_dims)(args[1])

    def curvature_at(
        self, *others: Any, example: Tensor, in_dims: Any = None
    ) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        """`curvature` as a function of the second argument alone: what depends on the others is computed once.

        Args:
            *others: All arguments but the second.
            example: Of the second argument.
            in_dims: As in `curvature`.
        """
        args, leaves, keys = _dense((others[0], example, *others[1:]))
        key = (signature(leaves), keys, in_dims)
        if key not in self._curvatures:
            call = self.graph(*args) if in_dims is None else self.mapped_graph(*args, in_dims=in_dims)
            first, second, *rest = (leaf.detach() for leaf in leaves)
            moved = functools.partial(_second_first, functools.partial(curvature, call, 1))
            recordable = isinstance(call, torch.fx.GraphModule)
            self._curvatures[key] = Prepared(moved, [second], [first, *rest], recordable=recordable)
        function = self._curvatures[key].of([leaves[0], *leaves[2:]])

        def at(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            value, gradient, hessian = (part.detach() for part in function(point.contiguous()))
            return value, gradient, hessian

        return at

    def _differentiate(
        self, args: Any, wrt: Sequence[int], in_dims: Any, weights: Sequence[float], compiled: bool
    ) -> tuple[TensorFunction, pytree.TreeSpec]:
        call = self.graph(*args) if in_dims is None else self.mapped_graph(*args, in_dims=in_dims)
        owners = [i for i, a in enumerate(args) for _ in pytree.tree_leaves(a)]
        targets = [j for i in wrt for j, owner in enumerate(owners) if owner == i]
        leaves = [leaf.detach() for leaf in pytree.tree_leaves(args)]
        spec = pytree.tree_structure(call(*leaves))
        both = functools.partial(value_and_gradient, call, targets, weights)
        if not isinstance(call, torch.fx.GraphModule):
            return both, spec
        return record(both, leaves, compiled=compiled), spec

    def _map(self, key: Any, graph: TensorFunction, leaves: list[Tensor], dims: tuple[int | None, ...]) -> Any:
        """A graph over the leading dimension; where it cannot be recorded, a loop over its slices."""
        batched = vmap(graph, in_dims=dims, randomness="different")
        examples = [leaf.detach() for leaf in leaves]
        try:
            with seeded(0), self._context():
                recorded = traced(batched, examples)
            check_noise(graph, recorded, _count(leaves, dims))
            _pin_dtypes(recorded)
            simplify(recorded)
            self.status[key] = "recorded"
            return recorded
        except (RuntimeError, NotImplementedError) as error:
            logger.info("a graph could not be mapped over draws, its slices run one by one: %s", error)
            self.status[key] = f"loop: {error}"
            return functools.partial(self._loop, graph, dims)

    @staticmethod
    def _loop(graph: TensorFunction, dims: tuple[int | None, ...], *leaves: Tensor) -> Any:
        count = _count(leaves, dims)
        slices = [
            graph(*[leaf if d is None else leaf[i] for leaf, d in zip(leaves, dims, strict=True)]) for i in range(count)
        ]
        return pytree.tree_map(lambda *parts: torch.stack(parts), *slices)

    def _record(self, key: Any, leaves: list[Any], spec: pytree.TreeSpec) -> TensorFunction:
        def flat(*values: Any) -> Any:
            return self.eager(*pytree.tree_unflatten(list(values), spec))

        try:
            examples = [leaf.detach() for leaf in leaves]
            with seeded(0), self._context():
                graph = _trace(flat, examples, strict=self._strict)
            _pin_dtypes(graph)
            if not self._strict:
                factor_anything(graph)
            simplify(graph)
            moving = len(pytree.tree_leaves(pytree.tree_unflatten(leaves, spec)[: self._vary]))
            agrees = self._random or self._agrees(flat, graph, examples, moving)
            reason = "recorded" if agrees else "the recorded graph gives other numbers at another point"
        except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
        self.status[key] = reason
        if reason == "recorded":
            return graph
        logger.info("a function runs eagerly, it could not be recorded: %s", reason)
        return flat

    @staticmethod
    def _agrees(flat: TensorFunction, graph: TensorFunction, examples: list[Tensor], moving: int) -> bool:
        """Compares graph and function at two points beside the one that was recorded."""
        with seeded(1), torch.no_grad():
            for step in (0.1, -0.2):
                point = [e + step * torch.rand_like(e) for e in examples[:moving]] + examples[moving:]
                if not _same(functools.partial(flat, *point), pytree.tree_leaves(graph(*point))):
                    return False
        return True


def _same(function: Callable[[], Any], found: list[Tensor]) -> bool:
    """Whether a function gives these numbers; where it fails for want of a Cholesky factor some must not be finite."""
    try:
        pairs = zip(pytree.tree_leaves(function()), found, strict=True)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return not all(bool(leaf.isfinite().all()) for leaf in found)
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-6, equal_nan=True) for a, b in pairs)
