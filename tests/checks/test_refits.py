"""Calibration of whole fits: resumable, the same with and without an interruption, and one reading of the model."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from conjugate import ExactGuide, centre, known_mean, make_tasks

from bayesmeta import checks
from bayesmeta.checks import refits
from bayesmeta.hierarchy.density import TaskDensity
from bayesmeta.inference.amortized import Amortized
from bayesmeta.inference.training import Optimizer

LIKE = make_tasks({name: [0.0] * 4 for name in "abcdef"})


class Named(ExactGuide):
    """An exact guide that reads the same in every run."""

    def __repr__(self) -> str:
        return "Named()"


def run(path: Any, replicates: int, **options: Any) -> checks.Calibration:
    method = Amortized(guide=Named(), optimizer=Optimizer(steps=150))
    return checks.sbc_fit(centre, LIKE, replicates=replicates, draws=19, method=method, file=path, **options)


def test_a_rerun_goes_on_and_ends_as_an_uninterrupted_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole.json", 3)
    write, calls = refits._write, []

    def interrupted(path: pathlib.Path, content: Any) -> None:
        write(path, content)
        calls.append(len(content["replicates"]))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(refits, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part.json", 3)
    assert len(json.loads((tmp_path / "part.json").read_text())["replicates"]) == 2
    resumed = run(tmp_path / "part.json", 3)
    assert calls == [1, 2, 3]
    assert set(whole.ranks) == {"mu", "a"}
    for name, ranks in whole.ranks.items():
        np.testing.assert_array_equal(resumed.ranks[name], ranks)
    assert list(resumed.flag) == list(whole.flag)
    assert list(tmp_path.glob("*.part")) == []


def test_the_model_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = []
    read = TaskDensity._read
    monkeypatch.setattr(TaskDensity, "_read", lambda self, tasks: (readings.append(1), read(self, tasks))[1])
    run(None, 2)
    assert len(readings) == 1


def test_ranks_are_those_of_exact_posteriors_and_a_bug_shows() -> None:
    right = run(None, 50, seed=1)
    assert right.accepted.mean() > 0.8
    assert right.passed, right.table()

    def wide(batch: Any) -> None:
        import pyro
        import pyro.distributions as dist

        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with batch.tasks():
            a = pyro.sample("a", dist.Normal(mu, 1.0))
            with batch.observations():
                pyro.sample("y", dist.Normal(a + 1.0, 0.8), obs=batch.y)

    wrong = run(None, 30, seed=1, truth=wide)
    assert not wrong.inside["a"]


def test_a_file_of_another_run_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "sbc.json"
    run(path, 1)
    with pytest.raises(ValueError, match=r"belongs to another run \(seed: 0 there, 7 here\); choose another file"):
        run(path, 2, seed=7)
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected results of sbc_fit"):
        run(path, 2)
    with pytest.raises(ValueError, match="truth: expected the sites"):
        run(None, 1, truth=known_mean)
