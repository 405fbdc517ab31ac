"""Pruning: train is (network, (x, y), share, of), predict is a network that has not more than this share left.

A convolutional network is trained on three quarters of the images; an entry gets a copy of it and the images, and
returns a network of any shape that does as well with less: of the weights of Linear and Conv layers (those that are
not 0 count), or with ``of="multiply-adds"`` of the multiplications of a forward pass, where a 0 is multiplied as well as
any number, so that filters have to go. All may train for four times as long as the dense network was. Beside the
accuracy stand that of the dense network, the bytes of the file (deflated, as zeros are not stored twice), and the
seconds of a pass as a share of the dense network's, timed in turns.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from posterity.claims import Between
from posterity.lab.costs import saved_bytes, seconds_in_turns
from posterity.lab.data import Images, load_images, split
from posterity.lab.data.needs import require_classes
from posterity.lab.nets import cnn
from posterity.lab.tasks import Task, entry
from posterity.lab.tasks.image_classification import image_epochs
from posterity.lab.training import fit

__all__ = ["RATE", "TIMES", "Left", "descend", "left_of", "weights_of"]

Left = Literal["weights", "multiply-adds"]
PartOfAll = Annotated[float, Between(0.001, 1)]
TIMES = 4  # epochs of an entry, in those of the dense network
RATE = 0.05


def descend(
    net: nn.Module, x: Tensor, y: Tensor, *, epochs: int, seed: int, after: Callable[[], object] | None = None,
    lr: float = RATE,
) -> nn.Module:  # fmt: skip
    """Train a network in place as the dense one is: SGD with momentum, batches of 64, a falling rate.

    Parameters
    ----------
    net : nn.Module
    x, y : Tensor
    epochs, seed : int
    after : callable, optional
        Called after every step.
    lr : float

    Returns
    -------
    nn.Module
        The network, in eval mode.
    """

    def sgd(parameters: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)

    def done(step: int, loss: float) -> None:
        if after is not None:
            after()

    fit(net.train(), lambda net, x, y: F.cross_entropy(net(x), y), (x, y), epochs=epochs, batch_size=64, lr=lr,
        weight_decay=5e-4, optimizer=sgd, schedule="cosine", seed=seed,
        callback=done)  # fmt: skip
    return net.eval()


def weights_of(net: nn.Module) -> list[Tensor]:
    """Return the weights of the Linear and Conv layers, each once.

    Parameters
    ----------
    net : nn.Module

    Returns
    -------
    list of Tensor
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    own: list[Any] = [module.weight for module in net.modules() if isinstance(module, kinds)]
    return list({id(weight): weight.detach() for weight in own}.values())


def left_of(net: nn.Module, of: Left, x: Tensor) -> int:
    """Return the weights of a network that are not 0, or the multiplications of a pass.

    Parameters
    ----------
    net : nn.Module
    of : {"weights", "multiply-adds"}
    x : Tensor of shape (1, channels, height, width)

    Returns
    -------
    int
    """
    if of == "weights":
        return sum(int(weight.count_nonzero()) for weight in weights_of(net))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops() // 2


@torch.no_grad()
def _accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((torch.cat([net(part) for part in x.split(1000)]).argmax(1) == y).double().mean())


@torch.no_grad()
def _time_share(net: nn.Module, dense: nn.Module, x: Tensor) -> float:
    """Return the least time of a pass over the dense network's, of 20 in turns: what else runs only adds to it."""
    seconds = seconds_in_turns([partial(net, x), partial(dense, x)], 20).min(0)
    return float(seconds[0] / seconds[1])


def _score(
    fit: Callable[..., Any], seed: int, data: str, target: str | None, *, of: Left = "weights", share: PartOfAll = 0.05
) -> dict[str, float]:  # fmt: skip
    images = load_images(data)
    train, test = split(len(images.y), (0.75, 0.25), seed)
    x, y = torch.from_numpy(images.x - images.x[train].mean()), torch.from_numpy(images.y)
    dense = cnn(x.shape[1], len(images.classes), width=16, seed=seed)
    descend(dense, x[train], y[train], epochs=image_epochs(len(train)), seed=seed)
    net = fit((copy.deepcopy(dense), (x[train].clone(), y[train].clone()), share, of), seed).eval()
    whole, left = (left_of(each, of, x[:1]) for each in (dense, net))
    if left > share * whole + len(weights_of(dense)):  # rounded up in each layer
        raise ValueError(f"entry must leave at most {share:g} of the {of}, left {left / whole:.4f}")
    return {
        "test accuracy": _accuracy(net, x[test], y[test]),
        "dense": _accuracy(dense, x[test], y[test]),
        "left": left / whole,
        "bytes": saved_bytes(net.state_dict(), deflated=True),
        "seconds": _time_share(net, dense, x[test[:256]]),
    }


def _needs(images: Any, **_: Any) -> None:
    require_classes(images.y, images.classes, "images")


TASK = Task("pruning", Images, "test accuracy", "higher", "digits", _score, needs=_needs)


@entry("pruning", "magnitude")
def magnitude(train: Any, seed: int) -> nn.Module:
    """Return the network without its smallest weights (or filters of smallest norm), trained further."""
    net, (x, y), share, of = train
    sizes = [weight.abs() for weight in weights_of(net)]
    norms = [size.flatten(1).mean(1) / size.mean() for size in sizes[:-1]]
    return _pruned(net, x, y, share, of, seed, sizes, norms)


@entry("pruning", "random")
def at_random(train: Any, seed: int) -> nn.Module:
    """Return the network without random weights (or filters), trained further."""
    net, (x, y), share, of = train
    rng = torch.Generator().manual_seed(seed)
    sizes = [torch.rand(weight.shape, generator=rng) for weight in weights_of(net)]
    return _pruned(net, x, y, share, of, seed, sizes, [size.flatten(1)[:, 0] for size in sizes[:-1]])


def _pruned(
    net: Any, x: Tensor, y: Tensor, share: float, of: Left, seed: int, sizes: list[Tensor], norms: list[Tensor]
) -> nn.Module:  # fmt: skip
    epochs = TIMES * image_epochs(len(x))
    if of == "multiply-adds":
        return descend(_without_filters(net, norms, share, x[:1]), x, y, epochs=epochs, seed=seed)
    weights, flat = weights_of(net), torch.cat([size.flatten() for size in sizes])
    edge = flat.sort(descending=True).values[min(int(share * len(flat)), len(flat) - 1)]
    gone = [size <= edge for size in sizes]

    def zero() -> None:
        for weight, lost in zip(weights, gone, strict=True):
            weight.masked_fill_(lost, 0)

    zero()
    return descend(net, x, y, epochs=epochs, seed=seed, after=zero)


def _without_filters(net: nn.Sequential, scores: Sequence[Tensor], share: float, x: Tensor) -> nn.Sequential:
    """Return the task's own network without as many of the lowest filters as it takes, one at least left a layer."""
    order = sorted((float(s), layer, k) for layer, each in enumerate(scores) for k, s in enumerate(each))
    wanted = share * left_of(net, "multiply-adds", x)

    def cut(n: int) -> nn.Sequential:
        kept = [list(range(len(each))) for each in scores]
        for _, layer, k in order[:n]:
            if len(kept[layer]) > 1:
                kept[layer].remove(k)
        small, read, turn = copy.deepcopy(net), list(range(x.shape[1])), 0
        for place, layer in enumerate(net):
            if isinstance(layer, nn.Conv2d):
                made = nn.Conv2d(len(read), len(kept[turn]), layer.kernel_size, layer.stride, layer.padding)  # type: ignore[arg-type]
                made.weight.data = layer.weight.data[kept[turn]][:, read].clone()
                made.bias.data = layer.bias.data[kept[turn]].clone()  # type: ignore[union-attr]
                read, turn = kept[turn], turn + 1
                small[place] = made
            elif isinstance(layer, nn.BatchNorm2d):
                small[place] = norm = nn.BatchNorm2d(len(read))
                norm.load_state_dict({n: t[read] if t.ndim else t for n, t in layer.state_dict().items()})
            elif isinstance(layer, nn.Linear):
                small[place] = head = nn.Linear(len(read), layer.out_features)
                head.load_state_dict({"weight": layer.weight.data[:, read], "bias": layer.bias.data})
        return small.eval()

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if left_of(cut(middle), "multiply-adds", x) <= wanted else (middle + 1, high)
        )
    return cut(low)
