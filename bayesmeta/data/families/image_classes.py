"""N-way K-shot classification from labelled images: every episode is a choice of classes, renumbered at random.

Images are kept as they come and become numbers when they are drawn. `ImageClasses` is a `Source` (`episodes.py`);
embeddings and learners are in `models/`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.arrays import to_numpy
from bayesmeta.data.episodes import Episode, full_batch
from bayesmeta.data.ragged import whole
from bayesmeta.data.schema import Schema, listing
from bayesmeta.data.tasks import Tasks

QUARTERS = 4


class ImageClasses:
    """Classification tasks out of labelled images.

    A task has `way` classes, drawn uniformly without replacement and called 0 … way - 1 in random order; its context
    holds `shot` images of each, its target `query` others of each, the rows of both in random order.

    Attributes:
        names: Names of all classes, as text.
        schema: Names and shapes of the data.
        way: Classes of a task.
        shot: Context images of each class.
        query: Target images of each class.

    References:
        Vinyals et al.: Matching Networks for One Shot Learning, 2016, https://arxiv.org/abs/1606.04080

    Example:
        >>> import numpy as np
        >>> images = np.random.default_rng(0).random((60, 8, 8))
        >>> source = ImageClasses(images, np.repeat(np.arange(6), 10), way=3, shot=2, query=4)
        >>> context, target = source.simulate(5, seed=0)
        >>> context.sizes.tolist(), target.sizes.tolist()
        ([6, 6, 6, 6, 6], [12, 12, 12, 12, 12])
    """

    def __init__(
        self, images: Any, labels: Any, *, way: int = 5, shot: int = 1, query: int = 15, rotations: bool = False
    ) -> None:
        """Sorts the images by class.

        Args:
            images: `(N, *dx)`, the last two dimensions height and width; uint8 is divided by 255, floats are taken as
                they are.
            labels: The class of each image `(N,)`, numbers or text.
            way: Classes of a task.
            shot: Context images of each class.
            query: Target images of each class.
            rotations: Whether images turned by 90, 180 and 270 degrees are further classes.

        Raises:
            ValueError: Shapes do not fit, values are not finite, or there are too few classes, or images of one.
        """
        self.way, self.shot, self.query = _sizes(way=way, shot=shot, query=query)
        self._images, classes = _images(images), to_numpy(labels)
        if classes.shape != (len(self._images),):
            raise ValueError(
                f"ImageClasses: expected one label an image, {len(self._images)} in all, got labels of shape "
                f"{classes.shape}"
            )
        if rotations and (self._images.dim() < 3 or self._images.shape[-1] != self._images.shape[-2]):
            raise ValueError(
                f"ImageClasses: expected square images to turn, got shape {tuple(self._images.shape[1:])}; pad or crop "
                "them, or leave rotations=False"
            )
        names, codes = np.unique(classes.astype(str), return_inverse=True)
        self.names: tuple[str, ...] = tuple(names.tolist())
        self._turns = QUARTERS if rotations else 1
        self._members, self._counts = _members(torch.from_numpy(codes))
        self._classes = torch.arange(len(self.names))
        self._check()
        self.schema: Schema = self._tasks(self._episode_rows(1, torch.Generator().manual_seed(0)), "")[0].schema

    def __len__(self) -> int:
        """How many classes there are, rotations included."""
        return len(self._classes) * self._turns

    def __repr__(self) -> str:
        return f"ImageClasses({len(self)} classes, {self.way}-way, {self.shot}-shot, {self.query} to be scored)"

    def draw(self, count: int, *, context: tuple[int, int], generator: torch.Generator) -> Episode:
        """Draws `count` tasks; their context has `shot` images of each class, whatever sizes the learner asks for."""
        (x, y), (new_x, new_y) = self._episode_rows(count, generator)
        return Episode(full_batch(x, y, self.schema), full_batch(new_x, new_y, self.schema))

    def simulate(self, n: int, *, seed: int) -> tuple[Tasks, Tasks]:
        """Draws tasks to evaluate on.

        Args:
            n: Number of tasks.
            seed: Of the draw.

        Returns:
            (context, target): the same tasks, x `(R, *dx)` float32, y the class in the task.
        """
        return self._tasks(self._episode_rows(n, torch.Generator().manual_seed(seed)), f"seed {seed}, ")

    def split(self, *, new: int | float, seed: int) -> tuple[ImageClasses, ImageClasses]:
        """Splits at random by class; all rotations of a class stay together.

        Args:
            new: How many classes are new, or a fraction between 0 and 1.
            seed: Of the choice.

        Returns:
            (known, new), of the same way, shot and query.

        Raises:
            ValueError: If one side has too few classes.
        """
        count = len(self._classes)
        wanted = max(1, round(new * count)) if isinstance(new, float) and 0 < new < 1 else whole(new)
        if wanted is None or not 0 < wanted < count:
            raise ValueError(f"new: expected a number of classes from 1 to {count - 1} or a fraction, got {new!r}")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return self._only(order[wanted:].sort().values), self._only(order[:wanted].sort().values)

    def hold_out(self, share: float, *, fewest: int, seed: int) -> tuple[ImageClasses, ImageClasses | None]:
        """Sets aside a share of at least `fewest` classes, enough for a task; nothing where too few would stay."""
        count, needed = len(self._classes), -(-self.way // self._turns)
        wanted = max(round(share * count), needed)
        if count < fewest or count - wanted < needed:
            return self, None
        return self.split(new=wanted, seed=seed)

    def _only(self, positions: Tensor) -> ImageClasses:
        chosen = object.__new__(type(self))
        chosen.__dict__.update(self.__dict__)
        chosen._classes = self._classes[positions]
        chosen._check()
        return chosen

    def _check(self) -> None:
        needed = self.shot + self.query
        few = [f"{self.names[c]} ({self._counts[c]})" for c in self._classes.tolist() if self._counts[c] < needed]
        if few:
            raise ValueError(
                f"ImageClasses: expected at least shot + query = {needed} images of each class, got {listing(few)}; "
                "lower query or shot, or drop these classes"
            )
        if len(self) < self.way:
            raise ValueError(
                f"ImageClasses: expected at least way = {self.way} classes, got {len(self)}: "
                f"{listing(self.names[c] for c in self._classes.tolist())}; lower way, or make more with rotations=True"
            )

    def _episode_rows(self, count: int, generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], ...]:
        """Inputs `(T, N, *dx)` and labels `(T, N)` of the context and of the target of `count` tasks."""
        drawn = torch.rand(count, len(self), generator=generator).argsort(1)[:, : self.way]
        turns, classes = drawn % self._turns, self._classes[drawn // self._turns]
        keys = torch.rand(count, self.way, self._members.shape[1], generator=generator)
        keys[torch.arange(keys.shape[2]) >= self._counts[classes].unsqueeze(2)] = 2.0  # places without an image
        chosen = keys.argsort(2)[..., : self.shot + self.query]
        rows = self._members[classes.unsqueeze(2), chosen]
        parts = rows[..., : self.shot], rows[..., self.shot :]
        return tuple(self._shuffled(part, turns, generator) for part in parts)

    def _shuffled(self, rows: Tensor, turns: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images `(T, N, *dx)` and labels `(T, N)` of rows `(T, way, k)`, in random order."""
        count, way, each = rows.shape
        order = torch.rand(count, way * each, generator=generator).argsort(1)
        y = torch.arange(way).repeat_interleave(each).expand(count, -1).gather(1, order)
        x = self._numbers(rows.flatten(1).gather(1, order))
        turn = turns.gather(1, y)
        for quarter in range(1, self._turns):
            x[turn == quarter] = torch.rot90(x[turn == quarter], quarter, (-2, -1))
        return x, y

    def _numbers(self, rows: Tensor) -> Tensor:
        images = self._images[rows]
        return images.float() / 255 if images.dtype == torch.uint8 else images

    def _tasks(self, parts: tuple[tuple[Tensor, Tensor], ...], prefix: str) -> tuple[Tasks, Tasks]:
        names = [f"{prefix}episode {position}" for position in range(len(parts[0][1]))]
        target = Tasks.from_arrays(list(parts[1][0]), list(parts[1][1]), names=names)
        return Tasks.from_arrays(list(parts[0][0]), list(parts[0][1]), names=names), target


def _sizes(**sizes: int) -> tuple[int, int, int]:
    for name, value in sizes.items():
        least = 2 if name == "way" else 1
        if whole(value) is None or value < least:
            raise ValueError(f"ImageClasses: {name} must be a whole number of at least {least}, got {value!r}")
    return sizes["way"], sizes["shot"], sizes["query"]


def _images(images: Any) -> Tensor:
    found = torch.from_numpy(np.ascontiguousarray(to_numpy(images)))
    if found.dim() < 2 or not (found.dtype == torch.uint8 or found.is_floating_point()):
        raise ValueError(
            f"ImageClasses: expected images (N, *dx) of uint8 or floats, got shape {tuple(found.shape)} of "
            f"{found.dtype}; convert them to floats in [0, 1]"
        )
    found = found if found.dtype == torch.uint8 else found.float()
    bad = (~torch.isfinite(found.flatten(1)).all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"ImageClasses: expected finite images, got NaN or inf in image {bad[0]} (and {len(bad) - 1} more); drop "
            "them"
        )
    return found


def _members(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The images of each class `(classes, most)`, padded with any image, and how many there are `(classes,)`."""
    counts = torch.bincount(codes)
    order = codes.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    places = starts.unsqueeze(1) + torch.arange(int(counts.max())).minimum(counts.unsqueeze(1) - 1)
    return order[places], counts
