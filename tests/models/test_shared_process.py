"""The shared process against brute force: one joint normal of all rows of all tasks."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch
from lines import code_lines
from scipy import stats

import bayesmeta as bm
from bayesmeta.models import shared_process
from bayesmeta.models.shared_process import JITTER, START, SharedProcess

SIZES = (6, 3, 5)


def waves(sizes: tuple[int, ...] = SIZES, seed: int = 0, dx: int = 1) -> bm.Tasks:
    """A wave that all tasks share, in thousands, and a level of each task's own."""
    rng = np.random.default_rng(seed)
    x = [rng.uniform(-3, 3, (n, dx)) for n in sizes]
    y = [1000 * (np.sin(2 * r.sum(1)) + rng.normal() + 0.1 * rng.normal(size=len(r))) for r in x]
    return bm.Tasks.from_arrays(x, y, names=[f"wave {seed}-{i}" for i in range(len(sizes))])


def numbers_of(module: SharedProcess) -> dict[str, float]:
    return dict(zip(START, module.log_numbers.exp().tolist(), strict=True))


def covariance(module: SharedProcess, x: np.ndarray, task: np.ndarray) -> np.ndarray:
    """Of labels in standard units, written out again in NumPy."""
    k, apart = numbers_of(module), x[:, None] - x[None]
    if int(module.kernel):
        wave = np.square(np.sin(np.pi * apart / k["period"])).sum(-1)
        smooth = {which: np.exp(-2 * wave / k[which] ** 2) for which in ("length", "own_length")}
    else:
        smooth = {which: np.exp(-0.5 * np.square(apart).sum(-1) / k[which] ** 2) for which in ("length", "own_length")}
    product = x @ x.T
    shared = k["scale"] ** 2 * smooth["length"] + k["linear"] ** 2 * product + k["level"] ** 2
    own = k["own_scale"] ** 2 * smooth["own_length"] + k["own_linear"] ** 2 * product + k["own_level"] ** 2
    found: np.ndarray = shared + (task[:, None] == task) * own + k["noise"] ** 2 * np.eye(len(x))
    return found


@pytest.mark.parametrize("kernel", ["rbf", "periodic"])
@pytest.mark.parametrize("dx", [1, 2])
def test_predictions_are_those_of_one_joint_normal(kernel: str, dx: int) -> None:
    tasks, new = waves(dx=dx), waves((4, 0, 2), seed=1, dx=dx)
    model = shared_process.build(tasks, kernel=kernel)
    module = model.module
    assert isinstance(module, SharedProcess)
    at = np.linspace(-3, 3, 5)[:, None] * np.ones(dx)
    labels = model(new.batch(slice(None)), torch.as_tensor(at).expand(3, -1, -1))
    centre, sd = tasks.x.numpy().mean(0), tasks.x.numpy().std(0, ddof=1)
    loc, scale = float(tasks.y.mean()), float(tasks.y.std())
    for i, name in enumerate(new.names):
        own = new[name]
        x = np.concatenate([tasks.x.numpy(), own.x.numpy(), at])
        group = np.repeat([0, 1, 2, 3], [*SIZES, len(own.y) + len(at)])
        whole, known = covariance(module, (x - centre) / sd, group), len(tasks.y) + len(own.y)
        jittered = whole[:known, :known] + JITTER * np.diag(np.arange(known) < len(tasks.y))
        weights = np.linalg.solve(jittered, whole[:known, known:])
        y = (np.concatenate([tasks.y.numpy(), own.y.numpy()]) - loc) / scale
        variance = np.diag(whole)[known:] - (weights * whole[:known, known:]).sum(0)
        np.testing.assert_allclose(labels.mean[i], loc + scale * (y @ weights), rtol=1e-6)
        np.testing.assert_allclose(labels.stddev[i], scale * np.sqrt(variance), rtol=1e-6)


def test_evidence_with_the_prior_of_the_numbers() -> None:
    tasks = waves()
    module = SharedProcess(tasks, "rbf").learned()
    x, y = tasks.x.numpy(), tasks.y.numpy()
    group = np.repeat([0, 1, 2], SIZES)
    matrix = covariance(module, (x - x.mean(0)) / x.std(0, ddof=1), group) + JITTER * np.eye(len(y))
    want = stats.multivariate_normal(np.zeros(len(y)), matrix).logpdf((y - y.mean()) / y.std(ddof=1))
    off = module.log_numbers.numpy() - np.array(list(START.values()))
    assert float(module.log_evidence()) == pytest.approx(want - 0.5 * (off**2).sum(), rel=1e-9)


def test_numbers_are_at_a_maximum_that_no_start_beats() -> None:
    tasks = waves((8, 8, 8, 8))
    start, module = SharedProcess(tasks, "periodic"), SharedProcess(tasks, "periodic").learned()
    best = float(module.log_evidence())
    assert best > float(start.log_evidence()) + 1
    for step in 0.05 * torch.eye(len(START), dtype=torch.float64):
        for sign in (-1, 1):
            moved = SharedProcess(tasks, "periodic")
            moved.log_numbers = module.log_numbers + sign * step
            assert float(moved.log_evidence()) < best


def test_the_kernel_of_the_higher_evidence_is_taken() -> None:
    tasks = waves((10,) * 6)
    by_name = {kernel: shared_process.build(tasks, kernel=kernel).module for kernel in ("rbf", "periodic")}
    chosen = shared_process.build(tasks).module
    assert isinstance(chosen, SharedProcess)
    best = max(float(module.log_evidence()) for module in by_name.values() if isinstance(module, SharedProcess))
    assert float(chosen.log_evidence()) == best
    assert numbers_of(chosen)["period"] * float(tasks.x.std()) == pytest.approx(np.pi, rel=0.1)


def test_with_two_inputs_no_common_period_is_looked_for() -> None:
    module = shared_process.build(waves(dx=2)).module
    assert isinstance(module, SharedProcess) and int(module.kernel) == 0


def test_a_new_task_is_predicted_from_the_others_and_kept_in_a_file(tmp_path: pathlib.Path) -> None:
    tasks, new = waves((10,) * 6), waves((30,) * 20, seed=2)
    model = shared_process.build(tasks)
    fit = bm.fit(model, tasks, progress=False)
    context, target = new.context_target(context=2, seed=0)
    prediction = fit.predict(context, target, draws=500)
    y = target.y.numpy().reshape(20, 28)
    error = np.sqrt(np.mean((fit.predict(context, target, kind="mean").mean - y) ** 2))
    assert error < 300 < 0.4 * y.std()
    lower, upper = prediction.interval(0.9)
    inside = ((lower < y) & (y < upper)).mean(1)
    assert abs(inside.mean() - 0.9) < 4 * inside.std(ddof=1) / np.sqrt(20) + 0.01
    fit.save(tmp_path / "waves.bm")
    again = bm.load(tmp_path / "waves.bm", shared_process.build(tasks, kernel="rbf"))
    assert again.predict(context, target, draws=500).draws.tolist() == prediction.draws.tolist()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="expected kernel as one of"):
        shared_process.build(waves(), kernel="cubic")
    with pytest.raises(ValueError, match="one label each, none missing"):
        shared_process.build(bm.Tasks.from_arrays(None, [[1.0, 2.0], [3.0]]), kernel="rbf")
    gaps = bm.Tasks.from_arrays([[[0.0], [1.0]]] * 2, [[1.0, np.nan], [0.0, 1.0]], missing="mask")
    with pytest.raises(ValueError, match="none missing"):
        shared_process.build(gaps)


def test_the_file_is_read_in_one_sitting() -> None:
    assert code_lines(pathlib.Path(str(shared_process.__file__))) <= 150
