"""A million rows of 100,000 tasks: time to read them and to make a batch. `python -m benchmarks.loading`."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd

import bayesmeta as bm

ROWS, TASKS, BATCH, BATCHES = 1_000_000, 100_000, 256, 200


def main() -> None:
    """Prints the time of one reading and the median time of a batch."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"task": rng.integers(0, TASKS, ROWS), "x": rng.normal(size=ROWS), "y": rng.normal(size=ROWS)})
    start = time.perf_counter()
    tasks = bm.Tasks.from_dataframe(frame, task="task", x=["x"], y="y")
    print(f"{len(tasks)} tasks, {ROWS} rows read in {time.perf_counter() - start:.2f} s (bar 3)")
    seconds = []
    for _ in range(BATCHES):
        chosen = rng.integers(0, len(tasks), BATCH)
        start = time.perf_counter()
        tasks.batch(chosen)
        seconds.append(time.perf_counter() - start)
    print(f"a batch of {BATCH}: {1000 * np.median(seconds):.2f} ms (bar 1)")


if __name__ == "__main__":
    main()
