"""Fingerprints of tasks: by them a fit knows again the data it has learned from.

A fingerprint covers all data of a task in the order of its rows (inputs, labels, columns, task columns, weights), but
not its name, nor how text is coded, nor whether whole numbers are stored as floats, nor what stands in for a missing
label.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data.ragged import Ragged
from bayesmeta.data.schema import COLUMN, TASK_COLUMN, Schema


def fingerprints(data: Ragged) -> tuple[str, ...]:
    """Returns one fingerprint a task, 32 hexadecimal digits of BLAKE2b."""
    edges = data.offsets.tolist()
    hashes = [hashlib.blake2b(digest_size=16) for _ in data.names]
    rows = data.rows | {"y": torch.where(data.rows["observed"], data.rows["y"], 0)}
    for tensors, spans in ((rows, edges), (data.per_task, range(len(edges)))):
        for key in sorted(tensors):
            tag, buffer, width = key.encode(), *_bytes(key, tensors[key], data.schema)
            for task, digest in enumerate(hashes):
                digest.update(tag)
                digest.update(buffer[spans[task] * width : spans[task + 1] * width])
    return tuple(digest.hexdigest() for digest in hashes)


def collection_fingerprint(parts: Iterable[str]) -> str:
    """Returns the fingerprint of a collection from those of its tasks, in order."""
    return hashlib.blake2b("".join(parts).encode(), digest_size=16).hexdigest()


class Origin:
    """The collection that tasks without given names come from; its fingerprint is computed when first asked for."""

    def __init__(self, data: Ragged | None, key: str | None = None) -> None:
        self._data, self._key = data, key

    @property
    def key(self) -> str:
        """The fingerprint of the collection."""
        if self._key is None and self._data is not None:
            self._key, self._data = collection_fingerprint(fingerprints(self._data)), None
        return str(self._key)


def _bytes(key: str, values: Tensor, schema: Schema) -> tuple[memoryview, int]:
    """Returns the bytes of a tensor, text as hashes of its levels, and how many there are in a row."""
    array: np.ndarray = values.numpy()
    if values.dtype != torch.bool:
        array = _texts_hashed(key, values, schema).double().numpy() + 0.0  # makes -0.0 equal to 0.0
    width = array.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
    return memoryview(array.tobytes()), width


def _texts_hashed(key: str, values: Tensor, schema: Schema) -> Tensor:
    name = key.removeprefix(TASK_COLUMN).removeprefix(COLUMN)
    if key != "x":
        return _hashed(values, schema.levels[name]) if name in schema.levels else values
    if not any(name in schema.levels for name in schema.x):
        return values
    parts = values.reshape(len(values), -1).unbind(1)
    hashed = [
        _hashed(part, schema.levels[name]) if name in schema.levels else part.double()
        for name, part in zip(schema.x, parts, strict=True)
    ]
    return torch.stack(hashed, 1)


def _hashed(codes: Tensor, levels: tuple[str, ...]) -> Tensor:
    digests = [hashlib.blake2b(level.encode(), digest_size=6).digest() for level in levels]
    table = torch.tensor([float(int.from_bytes(digest, "big")) for digest in digests], dtype=torch.float64)
    return table[codes.long()]
