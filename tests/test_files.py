"""Sealed bytes and packed tensors: exact, small, and never misread."""

import json
import struct
import zlib

import pytest
import torch
from torch import nn

from posterity._files import DTYPES, HEAD, pack_tensors, restored, seal, unpack_tensors, unseal

MARK = b"TEST"


def test_every_dtype_and_shape_comes_back():
    tensors = {}
    for name, dtype in DTYPES.items():
        for shape in [(), (0,), (3,), (2, 0, 3), (2, 3)]:
            tensors[f"{name} {shape}"] = (
                (torch.arange(torch.Size(shape).numel()) % 2).reshape(shape).to(dtype)
            )
    tensors["strided"] = torch.arange(12.0).reshape(3, 4).mT[::2]
    tensors["nan"] = torch.tensor([float("nan"), -0.0, float("inf")])
    about, got, blobs = unpack_tensors(
        pack_tensors({"a": [1, None, "é"]}, tensors, {"b": b"\0\1", "empty": b""})
    )
    assert about == {"a": [1, None, "é"]}
    assert blobs == {"b": b"\0\1", "empty": b""}
    assert list(got) == list(tensors)
    for name, want in tensors.items():
        assert got[name].dtype == want.dtype and got[name].shape == want.shape
        same = got[name].reshape(-1).view(torch.uint8), want.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(*same), name
    got["strided"].add_(1)  # what comes back may be written to


def test_tied_tensors_are_written_once():
    weight = torch.randn(100, 100)
    once, twice = (len(pack_tensors({}, t)) for t in ({"a": weight}, {"a": weight, "b": weight}))
    assert twice - once < 32
    _, got, _ = unpack_tensors(pack_tensors({}, {"a": weight, "b": weight, "c": weight[:50]}))
    assert torch.equal(got["b"], weight) and torch.equal(got["c"], weight[:50])


def test_overhead_is_small():
    net = nn.Sequential(*[nn.Linear(7, 7) for _ in range(40)])
    state = net.state_dict()
    raw = sum(t.numel() * t.element_size() for t in state.values())
    assert len(seal(MARK, pack_tensors({}, state))) - raw < 16 * len(state) + 64


def test_every_damaged_byte_and_every_cut_is_refused():
    data = seal(MARK, pack_tensors({}, {"a": torch.arange(4)}))
    assert unseal(MARK, data) == unseal(MARK, bytearray(data)) == unseal(MARK, memoryview(data))
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        with pytest.raises(ValueError, match="data must"):
            unseal(MARK, bytes(broken))
        with pytest.raises(ValueError, match="data must"):
            unseal(MARK, data[:place])
    with pytest.raises(ValueError, match="tail"):
        unseal(MARK, data + b"\0")
    for foreign in (b"", b"PK\3\4", None, "text", b"\x89PNG" + data):
        with pytest.raises(ValueError, match="data must"):
            unseal(MARK, foreign)
    with pytest.raises(ValueError, match=r"version 1\.2, got 1\.1"):
        unseal(MARK, data, version=2)
    with pytest.raises(ValueError, match="version"):
        unseal(MARK, data[:4] + b"\2" + data[5:])


def listing(**changes: object) -> bytes:
    what = {"about": {}, "tensors": [["a", "float32", [2]]], "blobs": [], **changes}
    head = zlib.compress(json.dumps(what).encode())
    return struct.pack("<I", len(head)) + head + bytes(8)


@pytest.mark.parametrize("payload", [
    b"", b"\0", b"\xff" * 8, listing()[:-1], listing() + b"\0", listing(about=3), listing(tensors=3),
    listing(tensors=[["a", "float32", [2**60]]]), listing(tensors=[["a", "float32", [-2]]]),
    listing(tensors=[["a", "float32", [True, 2]]]), listing(tensors=[["a", "object", [2]]]),
    listing(tensors=[["a", "float32", [2]], ["b", 1]]), listing(tensors=[["a", "float32", [2]], ["b", 7]]),
    listing(tensors=[[["a"], "float32", [2]]]), listing(tensors=[[]]), listing(tensors=["a"]),
    listing(blobs=[["x", -8]]), listing(blobs=[["x", 1e3]]), listing(tensors=[["a", "float32", [2.0]]]),
    struct.pack("<I", 40) + zlib.compress(b"[" * 10**5), struct.pack("<I", 2**32 - 1) + zlib.compress(b"{}"),
])  # fmt: skip
def test_payloads_made_to_harm_are_refused(payload: bytes):
    with pytest.raises(ValueError, match="data must be a list of tensors"):
        unpack_tensors(payload)


def test_restored_names_what_does_not_fit():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = {name: value + 1 for name, value in net.state_dict().items()}
    got = restored(net, state)
    assert got is not net and all(torch.equal(got.state_dict()[name], state[name]) for name in state)
    assert not torch.equal(net[0].weight, got[0].weight)
    with pytest.raises(ValueError, match=r"none for '1\.running_mean'"):
        restored(net, {name: value for name, value in state.items() if name != "1.running_mean"})
    with pytest.raises(ValueError, match=r"'0\.weight' of shape \(3,\) for \(2, 3\)"):
        restored(net, {**state, "0.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"'other', which it does not have"):
        restored(net, {**state, "other": torch.zeros(3)})


def test_what_cannot_be_packed_is_refused_by_name():
    for value in (3, torch.zeros(2, 2).to_sparse()):
        with pytest.raises(ValueError, match="'odd'"):
            pack_tensors({}, {"odd": value})
    assert HEAD.size == 18
