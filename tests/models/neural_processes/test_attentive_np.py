"""The attentive process: both paths, and the deterministic one alone."""

from __future__ import annotations

from typing import Any

import torch
from neural_tasks import ragged

from bayesmeta.models.neural_processes import Draws, attentive_np, elbo, importance_weighted


def test_rows_reach_the_deterministic_path_also_where_z_is_given() -> None:
    module: Any = attentive_np.build(ragged(), width=16, depth=1, latent=Draws(3)).module
    batch = ragged().batch(slice(None))
    z, x = torch.randn(4, 5, 3), torch.randn(4, 2, 1)
    other = module.reader(batch.replace(batch.tensors | {"y": batch.y + 1}))
    moved = (module.given(z, other, x).mean - module.given(z, module.reader(batch), x).mean).abs().amax((1, 2))
    assert (moved[[0, 1, 3]] > 1e-4).all() and moved[2] == 0, "the third task has no rows"


def test_a_row_is_decoded_from_r_and_z_and_x() -> None:
    module: Any = attentive_np.build(ragged(), width=16, depth=2, latent=Draws(3)).module
    rows = module.reader(ragged().batch(slice(None)))
    z, x = torch.randn(4, 5, 3), torch.randn(4, 2, 1)
    r = module.path(rows, x)
    hidden = module.from_row(torch.cat([r[3, 1], x[3, 1]])) + module.from_z(z[3, 2])
    torch.testing.assert_close(module.decode_given(z, rows, x)[3, 1, 2], module.decoder(hidden))


def test_attention_depends_on_x_and_values_on_labels() -> None:
    """With all values alike it does not matter where attention goes; a far key changes only its share."""
    module: Any = attentive_np.build(ragged(), width=16, depth=1, latent=None).module
    rows = module.reader(ragged().batch([0]))
    found = module.path(rows, torch.tensor([[[-2.0], [2.0]]]))
    assert (found[0, 0] - found[0, 1]).abs().max() > 1e-4
    with torch.no_grad():
        module.path.values[-1].weight.zero_()
        module.path.null_value.row.copy_(module.path.values[-1].bias)
    found = module.path(rows, torch.tensor([[[-2.0], [2.0]]]))
    torch.testing.assert_close(found[0, 0], found[0, 1])


def test_objectives() -> None:
    assert attentive_np.build(ragged()).objective is elbo
    assert attentive_np.build(ragged(), objective="iw").objective is importance_weighted
    conditional = attentive_np.build(ragged(), latent=None)
    assert conditional.objective == "predictive" and not hasattr(conditional.module, "latent")
