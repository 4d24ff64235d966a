"""Few-shot Omniglot on the official split: `python -m benchmarks.omniglot [--model versa] [--data DIR]`.

Trains once on one thread on the background alphabets, then prints accuracy and log score a query ± standard error over
episodes of the evaluation alphabets, the expected calibration error, and the official 20 one-shot runs within
alphabets (20-way).
`DIR` holds `omniglot_28_gray.npz` (x `(N, 28, 28)` uint8, class_id, evaluation) and `all_runs.zip`.
"""

from __future__ import annotations

import argparse
import io
import math
import pathlib
import time
import zipfile

import numpy as np
import torch
from torch import Tensor

import bayesmeta as bm
from bayesmeta.checks.metrics import expected_calibration_error, mean_and_error

DATA = pathlib.Path(__file__).parents[1].parent / "shared" / "data" / "omniglot"
WAY, SHOT, QUERY = 60, 1, 5
LEARNING_RATE = 3e-3
SECONDS = 285.0
TRIALS, SAFETY = (2, 2, 22), 0.9
EPISODES, AT_ONCE = 600, 10
CASES = {(5, 1): 0.955, (5, 5): 0.985, (20, 1): 0.86}
ECE_BAR, CPU_BAR = 0.03, 300.0
RUNS, SIDE = 20, 28


def model(name: str, seed: int) -> bm.ConditionalModel:
    """An untrained learner on four convolutions that see images turned and shifted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embed = bm.models.embeddings.Conv4(augment=bm.models.embeddings.RandomAffine())
        if name == "versa":
            return bm.models.versa.build(embed, features=embed.features)
        return bm.models.prototypes.build(embed)


def affordable(learner: bm.ConditionalModel, source: bm.Source, seconds: float, seed: int) -> int:
    """Steps that take so much processor time, with what it takes to find out; the machine's load must not change."""
    times = [time.process_time()]
    for steps in TRIALS:
        train(learner, source, steps, seed)
        times.append(time.process_time())
    _, short, long = np.diff(times)  # the first also warms up; what a fit needs besides steps is in both others
    return max(1, int(SAFETY * (seconds - (times[-1] - times[0])) / ((long - short) / (TRIALS[2] - TRIALS[1]))))


def train(learner: bm.ConditionalModel, source: bm.Source, steps: int, seed: int) -> bm.ConditionalFit:
    """One 60-way episode a step; classes that are held out choose the state that is kept."""
    optimizer = bm.Optimizer(steps=steps, batch_tasks=1, lr=LEARNING_RATE)
    return bm.fit(learner, source, method=bm.Amortized(optimizer=optimizer), seed=seed, progress=False)


def evaluate(fit: bm.ConditionalFit, source: bm.families.ImageClasses) -> dict[str, float]:
    """Accuracy and log score of a query, their standard errors over episodes, and expected calibration error."""
    generator, scores, confidence, correct = torch.Generator().manual_seed(1), [], [], []
    for _ in range(EPISODES // AT_ONCE):
        episode = source.draw(AT_ONCE, context=(0, 0), generator=generator)
        with torch.no_grad():
            labels = fit.model(episode.context, episode.target.x)
        likely = labels.probs.max(-1)
        scores.append(labels.log_prob(episode.target.y).mean(1).numpy())
        confidence.append(likely.values.numpy())
        correct.append((likely.indices == episode.target.y).numpy())
    confident, right = np.concatenate(confidence), np.concatenate(correct)
    accuracy, error = mean_and_error(right.mean(1))
    score, score_error = mean_and_error(np.concatenate(scores))
    ece = expected_calibration_error(confident, right)
    return {"accuracy": accuracy, "error": error, "score": score, "score error": score_error, "ece": ece}


def runs(folder: pathlib.Path, known: np.ndarray) -> tuple[bm.Tasks, bm.Tasks]:
    """The official runs as tasks (context, target).

    Raises:
        ValueError: An image, made small, is none of the evaluation images: it is not made small as those were.
    """
    stored = {image.tobytes() for image in known}
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    with zipfile.ZipFile(folder / "all_runs.zip") as archive:
        for run in range(1, RUNS + 1):
            pairs = [line.split() for line in archive.read(f"run{run:02d}/class_labels.txt").decode().splitlines()]
            classes = sorted(shown for _, shown in pairs)
            parts[0].append(np.stack([_small(archive.read(shown)) for shown in classes]))
            parts[1].append(np.stack([_small(archive.read(asked)) for asked, _ in pairs]))
            parts[2].append(np.array([classes.index(shown) for _, shown in pairs]))
    if not all(image.tobytes() in stored for part in parts[:2] for images in part for image in images):
        raise ValueError("all_runs.zip: expected images that are in the npz file too, got others; reduce them alike")
    names = [f"run {run}" for run in range(1, RUNS + 1)]
    context, target = ([images.astype(np.float32) / 255 for images in part] for part in parts[:2])
    labels = [np.arange(len(images)) for images in context]
    return bm.Tasks.from_arrays(context, labels, names=names), bm.Tasks.from_arrays(target, parts[2], names=names)


def _small(png: bytes) -> np.ndarray:
    """Black ink on 105 × 105 as 28 × 28 uint8 with ink 255, averaged over areas."""
    from PIL import Image

    ink = Image.fromarray(255 * (1 - np.array(Image.open(io.BytesIO(png)), dtype=np.uint8)))
    return np.array(ink.resize((SIDE, SIDE), Image.Resampling.BOX))


def within_alphabets(fit: bm.ConditionalFit, context: bm.Tasks, target: bm.Tasks) -> tuple[float, float]:
    """Mean accuracy of the runs and its standard error over runs."""
    old, new = (tasks.batch(slice(None)).to(dtype=torch.float32) for tasks in (context, target))
    with torch.no_grad():
        guessed: Tensor = fit.model(old, new.x).probs.argmax(-1)
    return mean_and_error((guessed == new.y).double().mean(1).numpy())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("prototypes", "versa"), default="versa")
    parser.add_argument("--data", type=pathlib.Path, default=DATA)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="processor time of training")
    parser.add_argument("--steps", type=int, help="of training, in place of seconds")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    file = arguments.data / "omniglot_28_gray.npz"
    if not file.exists():
        print(f"skipped: no Omniglot images in {arguments.data}")
        return
    torch.set_num_threads(1)
    data = np.load(file)
    new = data["evaluation"]
    learner = model(arguments.model, arguments.seed)
    start = time.process_time()
    source = bm.families.ImageClasses(
        data["x"][~new], data["class_id"][~new], way=WAY, shot=SHOT, query=QUERY, rotations=True
    )
    steps, seed, seconds = arguments.steps, arguments.seed, arguments.seconds
    fit = train(learner, source, affordable(learner, source, seconds, seed) if steps is None else steps, seed)
    spent = time.process_time() - start
    weights = sum(weight.numel() for weight in fit.modules["module"].parameters())
    print(f"{arguments.model}: {fit.history.stages[-1]['steps']} steps, {weights:,} weights")
    print(f"training {spent:.0f} CPU s (bar {CPU_BAR:.0f})")
    for (way, shot), bar in CASES.items():
        start = time.process_time()
        images = bm.families.ImageClasses(data["x"][new], data["class_id"][new], way=way, shot=shot)
        found = evaluate(fit, images)
        each = 1e3 * (time.process_time() - start) / EPISODES
        print(
            f"{way:2d}-way {shot}-shot  accuracy {found['accuracy']:.4f} ± {found['error']:.4f} (bar {bar}), "
            f"log score {found['score']:.4f} ± {found['score error']:.4f} (trivial {-math.log(way):.4f}), "
            f"ECE {found['ece']:.4f} (bar {ECE_BAR}), {EPISODES} episodes, {each:.0f} ms each"
        )
    accuracy, error = within_alphabets(fit, *runs(arguments.data, data["x"][new]))
    print(f"official runs, 20-way 1-shot within alphabets  accuracy {accuracy:.4f} ± {error:.4f}")


if __name__ == "__main__":
    main()
