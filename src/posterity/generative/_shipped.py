"""Weights that ship beside a method: trained, in 16 bits, checked by their SHA-256, only of the networks that they fit."""

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from posterity._branches import follow, momentum_copy
from posterity._checks import needs

__all__ = ["read_weights", "train", "write_weights"]

RATE = 2e-3
DECAY = 0.995


def train(modules: list[nn.Module], loss: Callable[[], Tensor], n_steps: int) -> None:
    """Minimise the loss of networks by Adam with warm-up and a cosine; leave averaged weights, as a file keeps them."""
    nets = nn.ModuleList(modules)
    params, average = list(nets.parameters()), momentum_copy(nets)
    adam = torch.optim.Adam(params, lr=RATE)
    rate = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda k: min((k + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * k / n_steps))
    )
    for k in range(n_steps):
        adam.zero_grad()
        with torch.enable_grad():
            loss().backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        adam.step()
        rate.step()
        follow(average, nets, min(DECAY, (k + 1) / (k + 10)))
    with torch.no_grad():
        for p, mean in zip(params, average.parameters(), strict=True):
            p.copy_(mean.half())
    nets.eval().requires_grad_(False)


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
