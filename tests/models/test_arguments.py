"""What is no `Tasks` is refused by every model that is built from tasks, with the cure."""

from __future__ import annotations

from typing import Any

import pytest

import bayesmeta as bm

networks = bm.models.neural_processes
BUILT = [networks.cnp, networks.latent_np, networks.attentive_np, networks.tnp, networks.conv_cnp]
BUILT += [bm.models.maml, bm.models.abml, bm.models.pacoh_gp, bm.models.shared_process]


@pytest.mark.parametrize("module", BUILT, ids=lambda module: module.__name__.rsplit(".", 1)[-1])
def test_a_list_is_no_tasks(module: Any) -> None:
    with pytest.raises(ValueError, match="expected training tasks as bm.Tasks, .* got list; make them by"):
        module.build([1, 2])
