"""Images as sets of pixels."""

from __future__ import annotations

import numpy as np
import pytest

import bayesmeta as bm
from bayesmeta.models.neural_processes import cnp, pixel_tasks


def test_places_and_colours_belong_together() -> None:
    images = np.arange(2 * 3 * 5).reshape(2, 3, 5).astype(float)
    tasks = pixel_tasks(images, names=["a", "b"])
    assert tasks.names == ("a", "b") and tasks.sizes.tolist() == [15, 15]
    down, right = tasks["b"].x.T.numpy()
    assert right.min() == -1 and right.max() == 1 and abs(down).max() == 0.5
    row, column = np.rint(down * 2 + 1).astype(int), np.rint(right * 2 + 2).astype(int)
    np.testing.assert_array_equal(tasks["b"].y.numpy(), images[1][row, column])


def test_colours_are_vectors() -> None:
    tasks = pixel_tasks(np.random.default_rng(0).random((2, 4, 4, 3)))
    assert tasks.schema.y_shape == (3,) and tasks.schema.x_shape == (2,)


def test_one_pixel() -> None:
    assert pixel_tasks(np.ones((1, 1, 1))).x.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("channels", [(), (3,)])
def test_a_neural_process_completes_images(channels: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).random((6, 3, 4, *channels))
    tasks = pixel_tasks(images)
    method = bm.Amortized(optimizer=bm.Optimizer(steps=3))
    fit = bm.fit(cnp.build(tasks, width=8, depth=1), tasks, method=method, progress=False)
    context, _ = tasks.context_target(context=5, seed=0)
    found = fit.predict(context, tasks[0].x.numpy(), draws=7)
    assert found.draws.shape == (7, 6, 12, *channels) and found.log_prob(tasks.batch(slice(None)).y).shape == (6, 12)
    assert np.isfinite(found.draws).all() and found.mean.reshape(images.shape).shape == images.shape


@pytest.mark.parametrize("shape", [(3, 4), (0, 4, 4), (1, 2, 3, 4, 5)])
def test_other_arrays_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pixel_tasks: expected images \(T, height, width\)"):
        pixel_tasks(np.zeros(shape))
