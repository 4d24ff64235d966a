"""One file for named tensors and a JSON-able dictionary: versioned, checksummed, complete or not at all, no pickle.

What a fit keeps, and how to build one from it, is not decided here: `Fit.save` and `bayesmeta.load` call `save` and
`load` with what they need. The file is an ordinary safetensors file whose metadata hold one entry, a JSON record
`{"format", "version", "checksum", "meta"}`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

FORMAT = "bayesmeta"
VERSION = 1
DTYPES = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)


def save(path: str | os.PathLike[str], *, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and a dictionary to one file, which replaces an older one only when it is complete.

    Args:
        path: The file; its folder must exist.
        tensors: Tensors by name, of any shape, with or without entries; views and shared storage are written in full.
        meta: Strings, numbers, booleans, None, and lists, tuples (read back as lists) and string-keyed dictionaries
            of these. The order of keys is kept; NaN and infinities are allowed.

    Raises:
        ValueError: If the folder does not exist, a value is no tensor or has a dtype that cannot be stored, or an entry
            of `meta` cannot be written as JSON.
    """
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise ValueError(f"cannot save to {path}: the folder {target.parent} does not exist; create it first")
    _check_json(meta, "meta")
    owned = {name: _owned(name, tensor) for name, tensor in tensors.items()}
    record = {"format": FORMAT, "version": VERSION, "checksum": _checksum(owned, meta), "meta": meta}
    _replace(target, to_bytes(owned, metadata={FORMAT: json.dumps(record)}))


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote.

    Args:
        path: The file.

    Returns:
        The tensors, on the CPU, bit for bit with their dtypes and shapes, and `meta`.

    Raises:
        ValueError: If there is no such file, or it is not from bayesmeta, is cut short or damaged, was changed after it
            was written, or comes from a newer version.
    """
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"cannot load {path}: there is no such file; check the path")
    try:
        with safe_open(source, framework="pt") as file:
            record = _record(path, (file.metadata() or {}).get(FORMAT, ""))
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(_unreadable(source)) from error
    if record["checksum"] != _checksum(tensors, record["meta"]):
        raise ValueError(
            f"cannot load {path}: its content does not match its checksum, so it was changed or damaged after it was "
            "saved; restore a copy or save the fit again"
        )
    return tensors, record["meta"]


def _owned(name: str, tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares no memory, which is what safetensors asks for."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"cannot save {name!r}: expected a tensor, got {type(tensor).__name__}; put it into `meta`")
    if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
        raise ValueError(
            f"cannot save {name!r}: a {tensor.layout} tensor of dtype {tensor.dtype} cannot be stored; convert it to a "
            f"dense tensor of one of {', '.join(sorted(str(dtype) for dtype in DTYPES))}"
        )
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _check_json(value: Any, where: str) -> None:
    """Raise for the first entry that JSON would refuse or silently change."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ValueError(f"cannot save {where}: expected string keys, got {key!r}; convert it with str()")
            _check_json(entry, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            _check_json(entry, f"{where}[{index}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise ValueError(
            f"cannot save {where}: expected strings, numbers, booleans, None, lists or dictionaries, got "
            f"{type(value).__name__}; convert it, or put arrays into `tensors`"
        )


def _checksum(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    """SHA-256 of the format, `meta` and every tensor with its name, dtype and shape."""
    digest = hashlib.sha256(json.dumps([FORMAT, VERSION, meta]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _replace(target: Path, content: bytes) -> None:
    """Write beside the target, force it to the disk, then rename: a crash leaves the old file or the new one."""
    draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with draft.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _record(path: str | os.PathLike[str], text: str) -> dict[str, Any]:
    """The record of a file's metadata, its format and version checked."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("version"), int):
        raise ValueError(f"cannot load {path}: it was not saved by bayesmeta; give a file written by fit.save")
    if record["version"] > VERSION:
        raise ValueError(
            f"cannot load {path}: it has format version {record['version']}, and this bayesmeta reads up to {VERSION}; "
            "upgrade bayesmeta"
        )
    return {"checksum": record.get("checksum"), "meta": record.get("meta")}


def _unreadable(source: Path) -> str:
    """Why safetensors could not read the file: its first bytes tell a damaged file of ours from a foreign one."""
    with source.open("rb") as file:
        head = file.read(64)
    if f'"__metadata__":{{"{FORMAT}"'.encode() in head:
        return f"cannot load {source}: the file is cut short or damaged; restore a copy or save the fit again"
    return f"cannot load {source}: it was not saved by bayesmeta, or is cut short; give a file written by fit.save"
