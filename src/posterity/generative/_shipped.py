"""Weights that ship beside a method: in 16 bits, checked by their SHA-256, and only of the networks that they fit."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from posterity._checks import needs

__all__ = ["read_weights", "write_weights"]


def read_weights(path: Path, sha256: str, modules: Mapping[str, nn.Module]) -> None:
    """Put the parameters of a file into networks, by their names; in eval mode, none asks for a gradient."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not in {path.parent}: train() makes a model in its place")
    data = path.read_bytes()
    if (digest := hashlib.sha256(data).hexdigest()) != sha256:
        raise ValueError(f"{path.name} must have SHA-256 {sha256[:12]}, got {digest[:12]}: it is damaged")
    weights = needs("safetensors.torch", "generative").load(data)
    for name, module in modules.items():
        own = {
            key.partition(".")[2]: value.float()
            for key, value in weights.items()
            if key.startswith(f"{name}.")
        }
        # what is no parameter, as the numbers of positions, is not in the file
        missing, unknown = module.load_state_dict(own, strict=False)
        if unknown or set(missing) & {key for key, _ in module.named_parameters()}:
            raise ValueError(
                f"{path.name} must fit the networks as these versions of the libraries build them"
            )
        module.eval().requires_grad_(False)


def write_weights(path: Path, modules: Mapping[str, nn.Module]) -> None:
    """Write the file that `read_weights` reads."""
    weights = {
        f"{name}.{key}": p.detach().to("cpu", torch.float16).contiguous()
        for name, module in modules.items()
        for key, p in module.named_parameters()
    }
    path.write_bytes(needs("safetensors.torch", "generative").save(weights))
