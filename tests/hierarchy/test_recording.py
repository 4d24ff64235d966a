from __future__ import annotations

import logging
import shutil
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

from bayesmeta.hierarchy import recording
from bayesmeta.hierarchy.recording import Captured, Recorded, model_context, seeded


def smooth(theta: Tensor, noise: Tensor, data: dict[str, Tensor]) -> Tensor:
    scale = theta[1].exp()
    mean = theta[0] + scale * noise
    return -0.5 * ((data["y"] - mean) / scale).square().sum(-1) - data["y"].shape[-1] * scale.log()


def branching(x: Tensor) -> Tensor:
    return x.sum() if float(x.detach().sum()) > 0 else -2 * x.sum()


def arguments(*draws: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    theta = torch.randn(*draws, 2, dtype=torch.float64)
    noise = torch.randn(*draws, 4, 1, dtype=torch.float64)
    return theta, noise, {"y": torch.randn(4, 3, dtype=torch.float64)}


def test_the_graph_gives_the_numbers_of_the_function_and_is_recorded_once_a_shape() -> None:
    calls: list[int] = []

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return smooth(*args)

    recorded = Recorded(counted)
    args = arguments()
    torch.testing.assert_close(recorded(*args), smooth(*args))
    after_recording = len(calls)
    for _ in range(3):
        args = arguments()
        torch.testing.assert_close(recorded(*args), smooth(*args))
    assert len(calls) == after_recording
    assert list(recorded.status.values()) == ["recorded"]
    theta, noise, data = args
    recorded(theta, noise[:2], {"y": data["y"][:2]})
    assert len(calls) > after_recording and len(recorded.status) == 2


def test_equal_shapes_under_other_names_are_other_graphs() -> None:
    recorded = Recorded(lambda d: d["a"] - d["b"] if "b" in d else d["a"] + d["c"])
    one, two = torch.tensor([1.0]), torch.tensor([2.0])
    assert recorded({"a": one, "b": two}).item() == -1
    assert recorded({"a": one, "c": two}).item() == 3


def test_what_branches_on_values_runs_eagerly_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    recorded = Recorded(branching)
    with caplog.at_level(logging.INFO, logger="bayesmeta"):
        for sign in (1.0, -1.0):
            x = sign * torch.ones(3)
            torch.testing.assert_close(recorded(x), branching(x))
    assert [r.message for r in caplog.records if "runs eagerly" in r.message] == [caplog.records[0].message]
    assert "recorded" not in recorded.status.values()


def test_a_graph_that_gives_other_numbers_elsewhere_is_not_used() -> None:
    state = {"factor": 0.0}

    def drifting(x: Tensor) -> Tensor:
        state["factor"] += 1.0
        return state["factor"] * x

    recorded = Recorded(drifting, vary=1)
    first, second = recorded(torch.ones(1)), recorded(torch.ones(1))
    assert "other numbers" in next(iter(recorded.status.values()))
    assert second == first + 1


def test_mapped_is_a_loop_over_slices() -> None:
    recorded = Recorded(smooth)
    theta, noise, data = arguments(5)
    mapped = recorded.mapped(theta, noise, data, in_dims=(0, 0, None))
    torch.testing.assert_close(mapped, torch.stack([smooth(t, z, data) for t, z in zip(theta, noise, strict=True)]))
    assert set(recorded.status.values()) == {"recorded"}
    transposed = torch.randn(4, 1, 5, dtype=torch.float64).movedim(-1, 0)
    again = recorded.mapped(theta, transposed, data, in_dims=(0, 0, None))
    torch.testing.assert_close(again[2], smooth(theta[2], transposed[2], data))


def test_what_cannot_be_mapped_runs_slice_by_slice(caplog: pytest.LogCaptureFixture) -> None:
    recorded = Recorded(branching)
    x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    with caplog.at_level(logging.INFO, logger="bayesmeta"):
        assert recorded.mapped(x, in_dims=(0,)).tolist() == [3.0, 6.0]
    assert any("run one by one" in r.message for r in caplog.records)
    value, (gradient,) = recorded.gradient(x, wrt=(0,), in_dims=(0,))
    assert value.tolist() == [3.0, 6.0] and gradient.tolist() == [[1.0, 1.0], [-2.0, -2.0]]


def by_autograd(function: Any, args: Any, weights: tuple[float, ...]) -> list[Tensor]:
    leaves = [args[0].clone().requires_grad_(), args[1].clone().requires_grad_()]
    outputs = function(*leaves, *args[2:])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum(w * out.sum() for w, out in zip(weights, outputs, strict=True))
    return [*[out.detach() for out in outputs], *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("draws", [None, 5])
def test_the_gradient_is_that_of_autograd(draws: int | None) -> None:
    args = arguments(*[] if draws is None else [draws])
    in_dims = None if draws is None else (0, 0, None)
    single = Recorded(smooth)
    value, gradients = single.gradient(*args, in_dims=in_dims)
    function = smooth if draws is None else torch.func.vmap(smooth, in_dims=(0, 0, None))
    for found, right in zip([value, *gradients], by_autograd(function, args, (1.0,)), strict=True):
        torch.testing.assert_close(found, right)
        assert not found.requires_grad


def test_the_gradient_weighs_several_outputs_and_differentiates_dictionaries() -> None:
    def two(theta: Tensor, noise: Tensor, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return smooth(theta, noise, data), theta.square().sum()

    args = arguments()
    recorded = Recorded(two)
    values, gradients = recorded.gradient(*args, weights=(3.0, -1.0))
    for found, right in zip([*values, *gradients], by_autograd(two, args, (3.0, -1.0)), strict=True):
        torch.testing.assert_close(found, right)
    _, (by_data,) = recorded.gradient(*args, weights=(3.0, -1.0), wrt=(2,))
    y = args[2]["y"].clone().requires_grad_()
    (3 * smooth(args[0], args[1], {"y": y})).sum().backward()
    torch.testing.assert_close(by_data["y"], y.grad)


def test_the_gradient_leaves_no_trace_in_autograd() -> None:
    theta, noise, data = arguments()
    theta.requires_grad_()
    _, (by_theta, _) = Recorded(smooth).gradient(theta, noise, data)
    assert theta.grad is None and not by_theta.requires_grad


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_gradients_are_the_same() -> None:
    recorded = Recorded(smooth)
    args = arguments()
    plain = recorded.gradient(*args)
    compiled = recorded.gradient(*args, compiled=True)
    torch.testing.assert_close(compiled[0], plain[0])
    torch.testing.assert_close(compiled[1], plain[1])


def test_without_a_compiler_the_graph_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*args: Any, **options: Any) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch._inductor, "compile", missing)
    recorded = Recorded(smooth)
    args = arguments()
    with caplog.at_level(logging.INFO, logger="bayesmeta"):
        compiled = [recorded.gradient(*args, compiled=True) for _ in range(2)]
    torch.testing.assert_close(compiled[1][1], recorded.gradient(*args)[1])
    assert [r.message for r in caplog.records] == ["a graph runs uncompiled, the compiler failed: no C++ compiler"]


def test_recording_leaves_the_random_state_as_it_is() -> None:
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    Recorded(smooth).gradient(torch.zeros(2), torch.zeros(4, 1), {"y": torch.zeros(4, 3)})
    assert torch.equal(torch.randn(2), expected)
    with seeded(0):
        torch.randn(5)
    torch.manual_seed(3)
    with seeded(1):
        torch.randn(5)
    assert torch.equal(torch.randn(2), expected)


def test_the_context_of_a_model_is_undone_after_an_error() -> None:
    validation = pyro.settings.get("validate_distributions_pyro")
    with pytest.raises(RuntimeError), model_context(torch.float64):
        assert torch.get_default_dtype() is torch.float64
        raise RuntimeError
    assert torch.get_default_dtype() is torch.float32
    assert pyro.settings.get("validate_distributions_pyro") == validation


def test_captured_tensors_are_replaced_promoted_and_collected() -> None:
    registered, loose = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    frozen, constant = nn.Parameter(torch.ones(2), requires_grad=False), torch.ones(2)
    captured = Captured({id(registered): torch.full((2,), 5.0, dtype=torch.float64)}, torch.float64)
    with captured:
        total = torch.stack([registered.double(), loose, frozen, constant]).sum()
    assert total.dtype is torch.float64 and total.item() == 16
    assert list(captured.unregistered) == [id(loose)] and list(captured.frozen) == [id(frozen)]
    assert loose.dtype is torch.float32


def test_a_graph_keeps_the_precision_it_was_recorded_with() -> None:
    recorded = Recorded(lambda x: x + torch.zeros(2) + torch.eye(2)[0], context=lambda: model_context(torch.float64))
    assert recorded(torch.ones(2, dtype=torch.float64)).dtype is torch.float64
    assert recorded.eager(torch.ones(2, dtype=torch.float64)).dtype is torch.float64


def test_flattening_agrees_with_pytree() -> None:
    tensor = torch.ones(1)
    for args in ((tensor, {"b": tensor, "a": tensor}), ({}, [tensor, (tensor,)]), ({"a": [tensor]},)):
        leaves, _ = recording._flatten(args)
        expected = torch.utils._pytree.tree_leaves(args)
        assert [id(leaf) for leaf in leaves] == [id(leaf) for leaf in expected]


def test_derivatives_do_not_depend_on_strides() -> None:
    """Recorded at dense tensors, called with expanded and transposed ones, and the other way round."""

    def reshaped(theta: Tensor, noise: Tensor) -> Tensor:
        return (theta.view(-1)[0] * noise.view(2, -1).reshape(noise.shape).sin()).sum(-1)

    theta = torch.randn(4, 1, dtype=torch.float64)
    dense = torch.randn(4, 3, 2, dtype=torch.float64)
    loose = dense.mT.contiguous().mT
    for first, second in ((dense, loose), (loose, dense)):
        for call in ("gradient", "curvature"):
            recorded = Recorded(reshaped)
            options = {"in_dims": (0, 0)} | ({"wrt": (1,)} if call == "gradient" else {})
            for theta_now in (theta, theta[:1].expand(4, 1)):
                found = [
                    pytree_leaves(getattr(recorded, call)(theta_now, point, **options)) for point in (first, second)
                ]
                for one, two in zip(*found, strict=True):
                    torch.testing.assert_close(one, two)


def pytree_leaves(value: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(value)
