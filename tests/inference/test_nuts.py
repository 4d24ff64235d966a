"""NUTS on the joint density against exact moments, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bayesmeta as bm
from bayesmeta.inference.nuts import from_chains
from bayesmeta.inference.sampling import Drawn
from benchmarks.exact_posteriors import eight_schools, schools


def test_chains_are_stored_and_exported(tmp_path: Path) -> None:
    fit = bm.fit(eight_schools, schools(), method=bm.NUTS(chains=2), progress=False)
    fit.save(tmp_path / "fit.bm")
    loaded = bm.load(tmp_path / "fit.bm", eight_schools)
    before, after = (f.posterior(schools(), draws=2000) for f in (fit, loaded))
    assert np.array_equal(before.draws("effect"), after.draws("effect"))
    assert set(after.method) == {"nuts"}
    assert dict(after.to_arviz()["posterior"].sizes)["chain"] == 2


def test_without_nutpie_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nutpie", None)
    with pytest.raises(ValueError, match=r"bayesmeta\[nuts\]"):
        bm.fit(eight_schools, schools(), method=bm.NUTS(chains=1, warmup=5, draws=5), progress=False)


def test_lengths_are_whole_numbers() -> None:
    with pytest.raises(ValueError, match="chains must be a whole number of at least 1, got 0"):
        bm.NUTS(chains=0)


def test_draws_of_chains_weigh_alike() -> None:
    drawn = Drawn(np.zeros((2, 50, 1)), {}, np.ones(1), np.array([30.0]))
    shared = from_chains(torch.zeros(100, 1), drawn)
    assert shared.chains == 2 and shared.ess == 0.3 and shared.status == "sampled"
    np.testing.assert_allclose(np.exp(shared.log_weight), 0.01)
