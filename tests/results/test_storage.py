"""Storage: bit-for-bit round trips, and one clear error for each way in which a file can be wrong."""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import stat
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bayesmeta.results import storage

TENSORS = {
    "scalar": torch.tensor(1.5, dtype=torch.float64),
    "empty": torch.zeros((0, 3), dtype=torch.float32),
    "flags": torch.tensor([[True, False], [False, True]]),
    "counts": torch.arange(6, dtype=torch.int64).reshape(2, 3),
    "bytes": torch.arange(4, dtype=torch.uint8),
    "half": torch.tensor([0.1, -2.0], dtype=torch.bfloat16),
    "special": torch.tensor([math.nan, math.inf, -0.0, 5e-324], dtype=torch.float64),
}
META = {"zeta": 1, "alpha": {"names": ["ä", "b"], "nothing": None, "flag": True, "x": 0.1}, "a list": []}


def saved(folder: pathlib.Path, tensors: dict[str, torch.Tensor] = TENSORS, meta: Any = META) -> pathlib.Path:
    path = folder / "fit.bm"
    storage.save(path, tensors=tensors, meta=meta)
    return path


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def rewritten(path: pathlib.Path, **changes: Any) -> pathlib.Path:
    """The same file with entries of its record changed and everything else left consistent."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    record = json.loads(header["__metadata__"][storage.FORMAT]) | changes
    header["__metadata__"][storage.FORMAT] = json.dumps(record)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    return path


def test_a_round_trip_keeps_bits_dtypes_shapes_and_order(tmp_path: pathlib.Path) -> None:
    tensors, meta = storage.load(saved(tmp_path))
    assert tensors.keys() == TENSORS.keys()
    for name, want in TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape) == (want.dtype, want.shape)
        assert bits(tensors[name]) == bits(want)
    assert meta == META
    assert list(meta) == list(META)


def test_nothing_at_all_is_a_round_trip_too(tmp_path: pathlib.Path) -> None:
    assert storage.load(saved(tmp_path, {}, {})) == ({}, {})


def test_nan_in_meta_and_tuples(tmp_path: pathlib.Path) -> None:
    _, meta = storage.load(saved(tmp_path, meta={"khat": math.nan, "low": -math.inf, "shape": (2, 3)}))
    assert math.isnan(meta["khat"])
    assert (meta["low"], meta["shape"]) == (-math.inf, [2, 3])


def test_views_shared_memory_and_gradients(tmp_path: pathlib.Path) -> None:
    base = torch.arange(6.0, requires_grad=True)
    given = {
        "base": base,
        "again": base,
        "transposed": base.reshape(2, 3).T,
        "strided": base[::2],
        "wide": base[:1].expand(4),
    }
    tensors, _ = storage.load(saved(tmp_path, given))
    for name, want in given.items():
        assert torch.equal(tensors[name], want.detach())
        assert not tensors[name].requires_grad
    tensors["base"][0] = 9.0
    assert tensors["again"][0] == 0.0


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path: pathlib.Path) -> None:
    path = saved(tmp_path)
    tensors, _ = storage.load(path)
    tensors["counts"][0, 0] = 7
    path.unlink()
    assert tensors["counts"].tolist() == [[7, 1, 2], [3, 4, 5]]


def test_the_same_content_gives_the_same_bytes_and_no_draft_stays(tmp_path: pathlib.Path) -> None:
    first = saved(tmp_path).read_bytes()
    assert saved(tmp_path).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["fit.bm"]


def test_the_file_has_ordinary_permissions(tmp_path: pathlib.Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(saved(tmp_path).stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_link_is_followed(tmp_path: pathlib.Path) -> None:
    link = tmp_path / "link.bm"
    link.symlink_to(saved(tmp_path))
    storage.save(link, tensors={}, meta={"new": 1})
    assert link.is_symlink()
    assert storage.load(tmp_path / "fit.bm") == ({}, {"new": 1})


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()

    def crash(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, crash)
        with pytest.raises(OSError, match="disk full"):
            storage.save(path, tensors={"new": torch.ones(1000)}, meta={})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["fit.bm"]


def test_every_truncation_is_an_error(tmp_path: pathlib.Path) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    for size in {*range(0, len(content), 37), len(content) - 1}:
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="cut short"):
            storage.load(path)


def test_a_long_enough_stump_is_known_to_be_ours(tmp_path: pathlib.Path) -> None:
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is cut short or damaged; restore a copy or save the fit again"):
        storage.load(path)


def test_one_flipped_bit_anywhere_in_the_tensors_is_an_error(tmp_path: pathlib.Path) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert len(content) - start > 50
    for place in range(start, len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match="does not match its checksum.*restore a copy"):
            storage.load(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"alpha", b"alphb"),
        (b'"counts"', b'"countz"'),
        (b'"I64","shape":[2,3]', b'"I64","shape":[3,2]'),
        (b'"F64","shape":[4]', b'"I64","shape":[4]'),
    ],
)
def test_a_changed_header_is_an_error(tmp_path: pathlib.Path, old: bytes, new: bytes) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    with pytest.raises(ValueError, match="does not match its checksum"):
        storage.load(path)


@pytest.mark.parametrize("changes", [{"meta": {"zeta": 2}}, {"meta": None}, {"checksum": "0" * 64}, {"checksum": None}])
def test_a_changed_record_is_an_error(tmp_path: pathlib.Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="does not match its checksum"):
        storage.load(rewritten(saved(tmp_path), **changes))


def test_a_rewritten_record_without_changes_still_loads(tmp_path: pathlib.Path) -> None:
    assert storage.load(rewritten(saved(tmp_path)))[1] == META


def test_a_newer_version_asks_for_an_upgrade(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="format version 2, and this bayesmeta reads up to 1; upgrade bayesmeta"):
        storage.load(rewritten(saved(tmp_path), version=2))


@pytest.mark.parametrize("changes", [{"format": "other"}, {"version": "1"}, {"version": None}])
def test_a_record_of_another_kind(tmp_path: pathlib.Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="was not saved by bayesmeta"):
        storage.load(rewritten(saved(tmp_path), **changes))


@pytest.mark.parametrize("content", [b"", b"county,floor\n1,0\n", b"\x80\x04\x95pickle" * 20])
def test_a_file_of_another_kind(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="was not saved by bayesmeta.*give a file written by fit.save"):
        storage.load(path)


@pytest.mark.parametrize("metadata", [None, {"bayesmeta": "no json"}, {"format": "pt"}, {"bayesmeta": "[1]"}])
def test_a_safetensors_file_of_somebody_else(tmp_path: pathlib.Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "other"
    save_file({"weight": torch.ones(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="was not saved by bayesmeta; give a file written by fit.save"):
        storage.load(path)


def test_a_missing_file_or_folder(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / 'no.bm'))}: there is no such file"):
        storage.load(tmp_path / "no.bm")
    with pytest.raises(ValueError, match="does not exist; create it first"):
        storage.save(tmp_path / "no" / "fit.bm", tensors={}, meta={})


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"a": [1, {"b": object()}]}, r"meta\['a'\]\[1\]\['b'\].*got object"),
        ({"a": torch.ones(1)}, r"meta\['a'\].*got Tensor.*put arrays into `tensors`"),
        ({"a": {3: 1}}, r"meta\['a'\]: expected string keys, got 3"),
    ],
)
def test_meta_that_json_cannot_hold(tmp_path: pathlib.Path, meta: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        saved(tmp_path, meta=meta)
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_no_storable_tensors(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="'a': expected a tensor, got list"):
        saved(tmp_path, {"a": [1.0]})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="'z'.*complex64 cannot be stored; convert it"):
        saved(tmp_path, {"z": torch.ones(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="'s'.*sparse_coo"):
        saved(tmp_path, {"s": torch.eye(2).to_sparse()})
