"""The neural process against its formula, and what its objectives are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from neural_tasks import ragged

from bayesmeta.models.neural_processes import Draws, elbo, importance_weighted, latent_np, maximum_likelihood


def test_a_row_is_decoded_from_z_and_x() -> None:
    module: Any = latent_np.build(ragged(), width=8, depth=2, draws=Draws(3)).module
    z, x = torch.randn(4, 5, 3), torch.randn(4, 2, 1)
    found = module.decode_given(z, None, x)
    assert found.shape == (4, 2, 5, 2)
    expected = module.decoder(module.from_z(z[2, 4]) + module.from_x(x[2, 1]))
    torch.testing.assert_close(found[2, 1, 4], expected)


def test_a_context_reaches_rows_through_z_alone() -> None:
    module: Any = latent_np.build(ragged(), width=8).module
    batch = ragged().batch(slice(None))
    z, x = torch.randn(4, 5, 8), torch.randn(4, 2, 1)
    other = module.reader(batch.replace(batch.tensors | {"y": batch.y + 1}))
    torch.testing.assert_close(module.given(z, other, x).mean, module.given(z, module.reader(batch), x).mean)
    assert (module.latent(other).mean - module.latent(module.reader(batch)).mean)[[0, 1, 3]].abs().amax(1).min() > 1e-4


def test_objectives_by_name() -> None:
    assert latent_np.build(ragged()).objective is elbo
    for name, objective in (("iw", importance_weighted), ("ml", maximum_likelihood)):
        assert latent_np.build(ragged(), objective=name).objective is objective
    with pytest.raises(ValueError, match="objective: expected one of"):
        latent_np.build(ragged(), objective="vi")


def test_z_is_as_wide_as_the_layers_unless_said() -> None:
    assert latent_np.build(ragged(), width=8).module.draws.size == 8  # type: ignore[attr-defined]
