"""Options as plain data: everything that is data comes back, everything else must be given again."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from bayesmeta.inference.amortized import Amortized
from bayesmeta.inference.training import Optimizer
from bayesmeta.results.fit_options import check_same, describe, restored

KINDS = {"amortized": Amortized}


def loss(density: Any, guides: Any, step: Any) -> Any:
    return torch.zeros(()), {}


@pytest.mark.parametrize(
    "options",
    [
        Amortized(),
        Amortized(shared="map", objective="iw", optimizer=Optimizer(steps=7, batch_tasks=3, lr=0.1)),
    ],
)
def test_plain_options_come_back(options: Amortized) -> None:
    plain = json.loads(json.dumps(describe(options)))
    assert restored("f.bm", plain, KINDS, None) == options
    assert restored("f.bm", plain, KINDS, options) is options


def test_objects_must_be_given_again() -> None:
    options = Amortized(objective=loss, embed=nn.Linear(2, 2))
    plain = json.loads(json.dumps(describe(options)))
    with pytest.raises(ValueError, match="cannot be stored: objective=loss, embed=Linear; give the same") as e:
        restored("f.bm", plain, KINDS, None)
    assert str(e.value).endswith("bm.load(path, model, method=bm.Amortized(objective=…, embed=…))")
    assert restored("f.bm", plain, KINDS, options) is options
    with pytest.raises(ValueError, match=r"options differ \(embed: Linear in the file, None here\); give the same"):
        restored("f.bm", plain, KINDS, Amortized(objective=loss))


def test_differences_are_named() -> None:
    first, second = describe(Amortized(shared="map")), describe(Amortized(optimizer=Optimizer(steps=3)))
    check_same("f.bm", first, first)
    with pytest.raises(ValueError, match=r"shared: 'map' in the file, 'normal' here; optimizer: Optimizer\("):
        check_same("f.bm", first, second)


def test_unknown_options_ask_for_an_upgrade() -> None:
    with pytest.raises(ValueError, match="cannot load f.bm: it uses the options Magic, unknown here; upgrade"):
        restored("f.bm", {"options": "Magic"}, KINDS, None)
