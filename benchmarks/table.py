"""One table for all learners of functions: `python -m benchmarks.table SUITE [--models cnp tnp …] [--budget SECONDS]`.

Trains what is asked on the tasks of a suite (`suites.py`, `learners.py`), scores it on a fixed evaluation set
(`scores.py`), and prints Markdown (`report.py`), always with the rows oracle, trivial, no pooling and complete pooling.
`--also` scores the same learners on further suites, as they are. `--out` writes table.md and a picture for each suite.
Classifiers of images have `omniglot.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import bayesmeta as bm
from benchmarks.learners import LEARNERS, Refused, cpu_seconds
from benchmarks.predictors import trivial
from benchmarks.report import Row, Table
from benchmarks.scores import DRAWS, JOINT_ROWS, Predictor, score
from benchmarks.suites import DATA, Evaluation, Suite, suites

Trained = tuple[str, str, Predictor | None, float]
"""Name of the row, name of the learner ("" for fixed rows), what it learned, CPU seconds."""


def timed(learn: Callable[[], Predictor]) -> tuple[Predictor, float]:
    """What was learned, and the CPU seconds that it took."""
    start = cpu_seconds()
    return learn(), cpu_seconds() - start


def fixed_rows(suite: Suite, tasks: bm.Tasks) -> list[Trained]:
    """The rows that are always there; both ways of pooling are learned together and share their time."""
    simple, seconds = timed(lambda: trivial(tasks))
    found: list[Trained] = [("trivial", "", simple, seconds)]
    start = cpu_seconds()
    alone, together = suite.pooling(tasks)
    spent = (cpu_seconds() - start) / 2
    return [*found, ("no pooling", "", alone, spent), ("complete pooling", "", together, spent)]


def learned_rows(
    suite: Suite, tasks: bm.Tasks, models: Sequence[str], *, budget: float, seeds: Sequence[int]
) -> list[Trained]:
    """Trains learners, each with each seed; one that refuses such tasks keeps an empty row."""
    found: list[Trained] = []
    for name in models:
        for seed in seeds:
            try:
                predictor, seconds = timed(lambda: LEARNERS[name](suite, tasks, budget=budget, seed=seed))  # noqa: B023
            except Refused as error:
                say(f"{name} refuses {suite.about}: {error}")
                found.append((f"{name}: refused", name, None, 0.0))
                break
            say(f"trained {name}, seed {seed}: {seconds:.0f} CPU s")
            found.append((f"{name}, seed {seed}" if len(seeds) > 1 else name, name, predictor, seconds))
    return found


def scored(
    name: str,
    suite: Suite,
    at: Evaluation,
    trained: Sequence[Trained],
    *,
    draws: int = DRAWS,
    joint_rows: int = JOINT_ROWS,
) -> Table:
    """Scores predictors on an evaluation set.

    Args:
        name: Of the suite.
        suite: The suite of the evaluation set.
        at: The evaluation set; its oracle becomes the first row.
        trained: What is scored.
        draws: Outcomes drawn for each row.
        joint_rows: How many rows of a task are scored together at most.
    """
    rows = []
    oracle = suite.oracle if at.oracle is not None else f"{suite.oracle}: not known"
    for title, learner, predictor, seconds in [(oracle, "", at.oracle, 0.0), *trained]:
        if predictor is None:
            rows.append(Row(title, None))
            continue
        found = score(predictor, at.context, at.target, draws=draws, joint_rows=joint_rows, judge=at.judge)
        rows.append(Row(title, found, predictor.parameters, seconds, learner))
        say(f"scored {title} on {name}")
    return Table(name, suite.about, rows, len(at.target), suite.pooled, suite.judged, joint_rows)


def say(line: str) -> None:
    """Reports progress, apart from the table."""
    print(line, file=sys.stderr, flush=True)


def write(table: Table, folder: Path) -> None:
    """Adds a table to table.md, and writes its picture."""
    with (folder / "table.md").open("a", encoding="utf-8") as file:
        file.write(f"{table.markdown()}\n\n![{table.suite}]({table.suite}.png)\n\n")
    table.picture().savefig(folder / f"{table.suite}.png")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    names = list(suites())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=names)
    parser.add_argument("--models", nargs="*", choices=list(LEARNERS), default=list(LEARNERS), metavar="MODEL")
    parser.add_argument("--budget", type=float, default=60.0, help="training CPU seconds a model")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of training; the tasks stay the same")
    parser.add_argument("--tasks", type=int, help="tasks to score; by default what the suite says")
    parser.add_argument("--training", type=int, help="tasks to learn from; by default what the suite says")
    parser.add_argument("--also", nargs="+", choices=names, default=[], metavar="SUITE", help="zero-shot")
    parser.add_argument("--joint-rows", type=int, default=JOINT_ROWS, help="rows scored together at most; 0 saves time")
    parser.add_argument("--out", type=Path, help="folder for table.md and pictures")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with berkeley/")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    options = arguments(given)
    if "berkeley" in (options.suite, *options.also) and not (options.data / "berkeley").is_dir():
        print(f"skipped: {options.data / 'berkeley'} is not there; give --data a folder with berkeley/")
        return
    torch.set_num_threads(1)
    builders = suites(options.data)
    suite = builders[options.suite]()
    tasks = suite.training(options.training or suite.training_tasks)
    say(f"{options.suite}: {len(tasks)} training tasks")
    trained = fixed_rows(suite, tasks)
    trained += learned_rows(suite, tasks, options.models, budget=options.budget, seeds=options.seeds)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "table.md").write_text("", encoding="utf-8")
    for name in (options.suite, *options.also):
        other = builders[name]()
        at = other.evaluation(options.tasks or other.tasks)
        table = scored(name, other, at, trained, joint_rows=options.joint_rows)
        print(f"{table.markdown()}\n", flush=True)
        if options.out is not None:
            write(table, options.out)


if __name__ == "__main__":
    main()
