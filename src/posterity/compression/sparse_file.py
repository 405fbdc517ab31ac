"""A file of what pruning left: for each tensor a bitmap of its places, and the values that are not zero."""

import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posterity._files import pack_tensors, restored, seal, unpack_tensors, unseal

__all__ = ["pack_sparse", "unpack_sparse"]

MARK = b"PSPR"


def pack_sparse(model: nn.Module) -> bytes:
    """Return the state of a model as bytes, without the zeros of its tensors.

    Parameters
    ----------
    model : nn.Module
        Any, with zeros where it was pruned. Tensors that a bitmap does not make smaller are written whole.

    Returns
    -------
    bytes
        With version and checksum; without pickle.

    Raises
    ------
    ValueError
        If the state of the model holds what is not a dense tensor.

    Notes
    -----
    1. A bitmap that zlib makes shorter, as of clustered or very few values, is stored so.
    2. A negative zero is read back as zero.

    Examples
    --------
    >>> import torch
    >>> from posterity.compression import pack_sparse, unpack_sparse
    >>> net = torch.nn.Linear(100, 100, bias=False)
    >>> _ = net.weight.data[1:].zero_()
    >>> len(pack_sparse(net)) < 700  # of 40,000
    True
    >>> torch.equal(unpack_sparse(torch.nn.Linear(100, 100, bias=False), pack_sparse(net)).weight, net.weight)
    True
    """
    whole: dict[str, Any] = {}
    blobs: dict[str, bytes] = {}
    sparse: dict[str, Any] = {}
    first: dict[tuple[Any, ...], str] = {}  # a tied tensor is written once
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise ValueError(
                f"model must have dense tensors for its state, got {type(value).__name__} for {name!r}"
            )
        flat = value.detach().cpu().reshape(-1)
        places = flat != 0
        kept = int(places.sum())
        if kept * value.itemsize + math.ceil(len(flat) / 8) >= len(flat) * value.itemsize:
            whole[name] = value
            continue
        own = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if own in first:
            sparse[name] = first[own]
            continue
        first[own] = name
        bitmap = np.packbits(places.numpy()).tobytes()
        blobs[name] = min(bitmap, zlib.compress(bitmap, 9), key=len)
        sparse[name] = list(value.shape)
        whole[name] = flat[places]
    return seal(MARK, pack_tensors({"sparse": sparse}, whole, blobs))


def unpack_sparse(model: nn.Module, data: bytes) -> nn.Module:
    """Return a copy of a model with the state of a file.

    Parameters
    ----------
    model : nn.Module
        An instance of the class that was packed, with any weights; not changed.
    data : bytes
        Of `pack_sparse`. Safe to read from elsewhere.

    Returns
    -------
    nn.Module
        Of the model's class, dtype and device.

    Raises
    ------
    ValueError
        If data are cut, damaged, of another kind or version, or do not fit the model: the message names the tensor.
    """
    about, state, blobs = unpack_tensors(unseal(MARK, data))
    own = model.state_dict()
    try:
        for name, shape in about["sparse"].items():
            if isinstance(shape, str):
                continue
            if name not in own:
                raise _Misfit(f"data must fit {type(model).__name__}, got {name!r}, which it does not have")
            if list(own[name].shape) != shape:  # before anything of that size is made
                raise _Misfit(
                    f"data must fit {type(model).__name__}, got {name!r} of shape {tuple(shape)} for {tuple(own[name].shape)}"
                )
            state[name] = _dense(state[name], blobs[name], shape)
        for name, shape in about["sparse"].items():
            if isinstance(shape, str):
                state[name] = state[shape]
    except _Misfit:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, zlib.error) as error:
        raise ValueError(f"data must be a sparse network, got one that cannot be read: {error}") from error
    return restored(model, state)


class _Misfit(ValueError):
    """Of another network, in words of its own."""


def _dense(values: Tensor, blob: bytes, shape: list[int]) -> Tensor:
    """Return a tensor from its bitmap and the values at its places."""
    n = math.prod(shape)
    size = math.ceil(n / 8)
    bitmap = blob if len(blob) == size else zlib.decompressobj().decompress(blob, size)
    if len(bitmap) != size:
        raise ValueError(f"a bitmap of {n} places has {size} bytes, got {len(bitmap)}")
    places = torch.from_numpy(np.unpackbits(np.frombuffer(bitmap, np.uint8), count=n).astype(bool))
    if values.ndim != 1 or len(values) != int(places.sum()):
        raise ValueError(
            f"a bitmap has {int(places.sum())} places, and values have shape {tuple(values.shape)}"
        )
    flat = torch.zeros(n, dtype=values.dtype)
    flat[places] = values
    return flat.reshape(shape)
