"""Bytes that say what they are: a mark, a version, a length and a checksum; and tensors without pickle.

`seal` closes a payload with 18 bytes in front, `unseal` opens it, or says why it cannot: so that a file that
is cut, damaged or of another kind is an error before anything of it is read. `pack_tensors` makes a payload
of named tensors and blobs, `unpack_tensors` reads it: data only, safe on files from elsewhere.
"""

import copy
import json
import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["pack_tensors", "restored", "seal", "unpack_tensors", "unseal"]

HEAD = struct.Struct("<4sBBQI")  # mark, container's version, kind's version, length and CRC-32 of the payload
CONTAINER = 1
LONGEST_INDEX = 2**26  # bytes of the list of tensors, unpacked: some 500,000 of them
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64,
)}  # fmt: skip


def seal(mark: bytes, payload: bytes, version: int = 1) -> bytes:
    """Return a payload behind its mark (four bytes), version (0 to 255), length and checksum."""
    return HEAD.pack(mark, CONTAINER, version, len(payload), _checksum(mark, version, payload)) + payload


def unseal(mark: bytes, data: Any, version: int = 1) -> bytes:
    """Return the payload of what `seal` made.

    Raises
    ------
    ValueError
        If data is not bytes of this mark and version, is cut short or too long, or its checksum is wrong.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ValueError(f"data must be bytes, got {type(data).__name__}")
    data = bytes(data)
    if data[:4] != mark[: len(data)] or not data:
        raise ValueError(f"data must begin with {mark!r}, got {data[:4]!r}: it is not of this kind")
    if len(data) < HEAD.size:
        raise ValueError(f"data must have at least {HEAD.size} bytes, got {len(data)}: it is cut short")
    _, container, found, length, checksum = HEAD.unpack_from(data)
    if (container, found) != (CONTAINER, version):
        raise ValueError(
            f"data must be of version {CONTAINER}.{version}, got {container}.{found}: written by another release, or damaged"
        )
    if len(data) - HEAD.size != length:
        raise ValueError(
            f"data must have {HEAD.size + length} bytes, got {len(data)}: it is cut short or has a tail"
        )
    payload = data[HEAD.size :]
    if _checksum(mark, version, payload) != checksum:
        raise ValueError("data must have the checksum in its header, got another: it is damaged")
    return payload


def pack_tensors(
    about: Mapping[str, Any], tensors: Mapping[str, Any], blobs: Mapping[str, bytes] | None = None
) -> bytes:
    """Return JSON data, named tensors in their dtype and named bytes as one payload.

    A tensor under several names, as a tied weight is in a state_dict, is written once.
    """
    index: list[list[Any]] = []
    parts: list[bytes] = []
    first: dict[tuple[Any, ...], int] = {}
    for place, (name, tensor) in enumerate(tensors.items()):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"state must be tensors, got {name!r} of type {type(tensor).__name__}")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES or tensor.layout != torch.strided:
            raise ValueError(
                f"state must be dense tensors of a plain dtype, got {name!r} of {tensor.dtype}, {tensor.layout}"
            )
        own = (tensor.data_ptr() if tensor.numel() else name, dtype, tensor.shape, tensor.stride())
        if own in first:
            index.append([name, first[own]])
            continue
        first[own] = place
        index.append([name, dtype, list(tensor.shape)])
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        parts.append(flat.view(torch.uint8).numpy().tobytes())
    blobs = blobs or {}
    listing = {"about": dict(about), "tensors": index, "blobs": [[name, len(b)] for name, b in blobs.items()]}
    head = zlib.compress(json.dumps(listing, separators=(",", ":")).encode(), 9)
    return b"".join([struct.pack("<I", len(head)), head, *parts, *blobs.values()])


def unpack_tensors(payload: bytes) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, bytes]]:
    """Return the JSON data, tensors and blobs of what `pack_tensors` made.

    Nothing is allocated that the payload does not hold. Raises ValueError if it is not such a payload.
    """
    try:
        (length,) = struct.unpack_from("<I", payload)
        unzip = zlib.decompressobj()
        text = unzip.decompress(payload[4 : 4 + length], LONGEST_INDEX)
        listing = json.loads(text) if unzip.eof else None
        return _read(payload, 4 + length, listing["about"], listing["tensors"], listing["blobs"])  # type: ignore[index]
    except (struct.error, zlib.error, KeyError, IndexError, TypeError, RecursionError, ValueError) as error:
        raise ValueError(f"data must be a list of tensors, got one that cannot be read: {error}") from error


def _read(
    payload: bytes, at: int, about: dict[str, Any], index: list[list[Any]], sizes: list[list[Any]]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, bytes]]:
    def take(name: str, length: int) -> bytes:
        nonlocal at
        if not isinstance(name, str) or length < 0 or at + length > len(payload):
            raise ValueError(f"{name!r} says that it has {length} bytes, {len(payload) - at} are there")
        at += length
        return payload[at - length : at]

    if not isinstance(about, dict):
        raise ValueError("no description")
    tensors: dict[str, Tensor] = {}
    names = []
    for name, *what in index:
        names.append(name)
        if len(what) == 1:  # the tensor of an earlier name
            tensors[name] = tensors[names[: len(names) - 1][what[0]]]
            continue
        dtype, shape = DTYPES[what[0]], what[1]
        if any(type(size) is not int or size < 0 for size in shape):
            raise ValueError(f"{name!r} has the shape {shape}")
        raw = bytearray(take(name, math.prod(shape) * dtype.itemsize))
        tensors[name] = (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)).reshape(shape)  # fmt: skip
    blobs = {name: take(name, length) for name, length in sizes}
    if at != len(payload):
        raise ValueError(f"{len(payload) - at} bytes belong to nothing")
    return about, tensors, blobs


def restored(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model with these tensors as its state, which must fit name by name."""
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name, value in own.items():
        if name not in tensors:
            raise ValueError(f"data must hold the state of {type(model).__name__}, got none for {name!r}")
        if tensors[name].shape != value.shape:
            raise ValueError(
                f"data must fit {type(model).__name__}, got {name!r} of shape {tuple(tensors[name].shape)} for {tuple(value.shape)}"
            )
    unknown = [name for name in tensors if name not in own]
    if unknown:
        raise ValueError(f"data must fit {type(model).__name__}, got {unknown[0]!r}, which it does not have")
    model = copy.deepcopy(model)
    model.load_state_dict(dict(tensors), strict=False)  # all are there: what is left is no tensor
    return model


def _checksum(mark: bytes, version: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(mark + bytes([CONTAINER, version])))
