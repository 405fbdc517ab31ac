"""What an old network can cost on a new domain, before and after its last layer is moved.

With L a bound of how fast the latents change with the inputs, and norms over all samples,

    |f(x~) - y~|  <=  |f(x) - y| + |W| L |x~ - x| + |y~ - y|,                           (1)

the loss on the old domain, what the network makes of the shift of the inputs, and the shift of the
labels. After the transfer |(I - Z pinv(Z)) q| is left, never more than |q| = |f(x~) - y~|.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad

from posterity._checks import floating
from posterity.transfer.affine_layer import _exactly, _LastLayer, _unfolded
from posterity.transfer.domain_pairs import _sources
from posterity.transfer.layer_variational import _ROWS
from posterity.transfer.minimum_norm import _minimum_norm

__all__ = ["TransferBound", "transfer_bound"]

# The steepest slope of what acts on single numbers, and 1 for what only moves them.
_SLOPES: dict[type[nn.Module], float] = {
    nn.Identity: 1, nn.Flatten: 1, nn.Unflatten: 1, nn.Dropout: 1, nn.Dropout1d: 1, nn.Dropout2d: 1,
    nn.ReLU: 1, nn.ReLU6: 1, nn.Tanh: 1, nn.Hardtanh: 1, nn.Softplus: 1, nn.Softsign: 1, nn.LogSigmoid: 1,
    nn.Tanhshrink: 1, nn.Sigmoid: 0.25, nn.GELU: 1.13, nn.SiLU: 1.1, nn.Mish: 1.09, nn.SELU: 1.76, nn.CELU: 1,
}  # fmt: skip
_SAMPLES = 64  # that show how the modules are chained


class TransferBound(NamedTuple):
    """The terms of equation 1, norms over all samples.

    Attributes
    ----------
    source_loss : float
        ``|f(x) - y|`` of the old samples that are paired with new ones.
    input_shift, label_shift : float
        ``|x~ - x|`` and ``|y~ - y|``.
    lipschitz : float
        ``|W| L``, a bound for the whole network.
    residue : float
        What is left after the transfer, the loss of the best last layer.
    bound : float
        ``source_loss + lipschitz * input_shift + label_shift``, which the loss of the network as it
        is cannot pass.
    """

    source_loss: float
    input_shift: float
    label_shift: float
    lipschitz: float
    residue: float
    bound: float


def transfer_bound(
    model: nn.Module,
    layer: nn.Module | None,
    x: Float[Tensor, "n_source ..."],
    y: Float[Tensor, "n_source ..."],
    x_target: Float[Tensor, "n ..."],
    y_target: Float[Tensor, "n ..."],
) -> TransferBound:
    """Return how much a shift of domain can cost a network, and what a new last layer leaves of it.

    This is the elementary form of such a bound, the triangle inequality of equation 1; the paper's
    theorem has other constants.

    Parameters
    ----------
    model : nn.Module
        Trained: up to ``layer`` a chain of modules, each of which gets what the one before it gave, reshaped
        at most. Linear layers, convolutions in two dimensions padded with zeros, activations
        and batch normalisation (in eval mode) may be in it. It is left as it is.
    layer : nn.Module or None
        The last layer, as `layer_variation` takes it; None is the last affine one.
    x, y : Tensor
        Samples of the old domain.
    x_target, y_target : Tensor
        Samples of the new one; where their numbers differ, each is paired with the nearest old one.

    Returns
    -------
    TransferBound
        L is a product of spectral norms and slopes, so the bound is far above the loss for deep networks.

    Raises
    ------
    ValueError
        If samples or layer do not fit, as for `layer_variation`, or the model is no such chain.

    Notes
    -----
    1. The norm of a convolution is bounded by that of its matrix of patches times the square root
       of how many patches a pixel is in.

    References
    ----------
    .. [1] Tseng, Lin, Hung, Tsao. Interpretations of Domain Adaptations via Layer Variational
       Analysis. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import transfer_bound
    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(net.weight, 2.0)
    >>> x = torch.tensor([[3.0], [4.0]])
    >>> found = transfer_bound(net, None, x, 2 * x, 2 * x, 3 * x)
    >>> found.input_shift, found.label_shift, found.lipschitz, found.bound
    (5.0, 5.0, 2.0, 15.0)
    >>> round(found.residue, 6)  # 1.5 in place of 2 fits all
    0.0
    """
    floating("x_target", x_target)
    pairs = _sources(x, y, x_target, y_target, "perturb", "auto")
    assert pairs is not None
    network = _LastLayer(model, layer)
    with network.at_rest():
        rows = network.examine(x_target, y_target)
        steepness = _lipschitz(network, x_target[:_SAMPLES])
        before = [
            network.aim(b) - network.predict(a) for a, b in zip(*(v.split(_ROWS) for v in pairs), strict=True)
        ]

        def blocks() -> Iterator[tuple[Tensor, Tensor]]:
            for new, label in zip(x_target.split(_ROWS), y_target.split(_ROWS), strict=True):
                latent, out = network.look(new)
                yield from network.rows(latent, network.aim(label) - out)

        shape, eps = (rows * len(x_target), network.columns), torch.finfo(network.dtype).eps
        residue = float(_minimum_norm(blocks, shape, ridge=0.0, rcond=None, eps=eps).residual_norm)
    loss = float(torch.cat(before).norm())
    shifts = [float((network.aim(new) - network.aim(old)).norm())
              for new, old in zip((x_target, y_target), pairs, strict=True)]  # fmt: skip
    return TransferBound(
        loss, shifts[0], shifts[1], steepness, residue, loss + steepness * shifts[0] + shifts[1]
    )


def _lipschitz(network: _LastLayer, x: Tensor) -> float:
    """Return the product of the norms of all modules up to the last layer, each called to see that they are a chain."""
    names = {module: name for name, module in network.model.named_modules() if not list(module.children())}
    last, said, product, done = network.to(x), "x_target", 1.0, False

    def before(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal product, done
        if done:
            return
        given = [v for v in (*args, *named.values()) if isinstance(v, Tensor)]
        if len(given) != 1 or not _same_numbers(given[0], last):
            raise ValueError(
                f"model must be a chain of modules up to layer, but what comes into {names[module]!r} "
                f"({type(module).__name__}) is not what {said} gave"
            )
        product *= _steepest(names[module], module, given[0])
        done = module is network.layer

    def after(module: nn.Module, _: Any, out: Any) -> None:
        nonlocal last, said
        if isinstance(out, Tensor):  # a copy: the next may work in place
            last, said = out.clone(), repr(names[module])

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in names]
    handles += [module.register_forward_hook(after) for module in names]
    try:
        network(network.to(x))
    finally:
        for handle in handles:
            handle.remove()
    return product


def _same_numbers(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same numbers, in any shape and order."""
    return a.numel() == b.numel() and torch.equal(a.flatten().sort().values, b.flatten().sort().values)


def _steepest(name: str, module: nn.Module, x: Tensor) -> float:
    """Return a bound of how much further apart a module's outputs can be than its inputs."""
    if type(module) in _SLOPES:
        return float(_SLOPES[type(module)])
    if isinstance(module, nn.Linear):
        return float(torch.linalg.matrix_norm(_exactly(module.weight.detach()), 2))
    if isinstance(module, nn.Conv2d):
        parts = _exactly(module.weight.detach()).flatten(1).unflatten(0, (module.groups, -1))
        size = float(torch.linalg.matrix_norm(parts, 2).max())
        image = torch.ones(1, 1, *x.shape[-2:], dtype=torch.float64)
        patches = grad(lambda v: _unfolded(module, v).sum())(image)  # that a pixel is in
        return size * math.sqrt(float(patches.max()))
    if (
        isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        and module.running_var is not None
    ):
        scale = (_exactly(module.running_var) + module.eps).rsqrt()
        return float(
            (scale if module.weight is None else scale * _exactly(module.weight.detach()).abs()).max()
        )
    if isinstance(module, nn.LeakyReLU):
        return max(1.0, abs(module.negative_slope))
    if isinstance(module, nn.ELU):
        return max(1.0, abs(module.alpha))
    if isinstance(module, nn.PReLU):
        return max(1.0, float(module.weight.detach().abs().max()))
    raise ValueError(
        f"model must be made of affine layers and activations up to layer, got {type(module).__name__} {name!r}, "
        "of which no slope is known"
    )
