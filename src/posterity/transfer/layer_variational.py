"""Layer variational analysis (LVA): the last layer of a trained network moved to a new domain in closed form.

Of a network f = W z(x) trained on pairs (x, y), what do pairs (x~, y~) of a close domain ask of its
last layer? That (W + dW) z(x~) = y~, which is least squares in the latents Z = z(x~), a row a sample,

    Z dW' = q,    q = (y~ - y) - [what f makes of x~ - x] + (y - f(x)),                 (1)

where the transferal residue q is the change of the labels less what f explains of it itself, plus
what f had not fitted. The solution of least norm,

    dW' = pinv(Z) q,                                                                   (2)

is what gradient descent on the layer would end in, at once: directions of the latent space that the
new samples do not have stay as they were, and |q| says how much there is to adapt.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from posterity._checks import at_least, integer, one_of, within
from posterity._precision import wide
from posterity.transfer.affine_layer import _derivative, _fits, _join, _LastLayer, _Network
from posterity.transfer.domain_pairs import _sources
from posterity.transfer.last_layers import _FRACTIONS, _gauss_newton
from posterity.transfer.minimum_norm import _LeastSquares, _minimum_norm

__all__ = ["LayerVariation", "layer_variation", "transfer_last_layer", "transferal_residue"]

Align = bool | Literal["auto"]
Source = Shaped[Tensor, "n_source ..."] | None
_ROWS = 512  # samples at once where no batch size is given, and of derivatives: more leave the cache


class LayerVariation(NamedTuple):
    """The change of a layer.

    Attributes
    ----------
    weight : Tensor
        Of the shape, dtype and device of the layer's weight.
    bias : Tensor, or None
        Of the layer's bias, where it has one.
    residual_norm : Tensor
        Frobenius norm of q - Z dW' over all samples: what the layer cannot fit. A scalar, float32
        at least.
    rank : int
        Numerical rank of Z; with a bias, of Z and a column of ones.
    layers : tuple of LayerVariation
        For ``n_layers`` above 1, the changes of all those layers in module order, the last among
        them; of the others, ``residual_norm`` and ``rank`` are those of the last. Else empty.
    """

    weight: Tensor
    bias: Tensor | None
    residual_norm: Tensor
    rank: int
    layers: tuple["LayerVariation", ...] = ()


def layer_variation(
    model: nn.Module,
    layer: nn.Module | None,
    x_target: Shaped[Tensor, "n ..."],
    y_target: Float[Tensor, "n ..."],
    *,
    x: Source = None,
    y: Source = None,
    method: Literal["exact", "perturb"] = "exact",
    align: Align = "auto",
    ridge: float = 0.0,
    rcond: float | None = None,
    n_layers: int = 1,
    batch_size: int = 1024,
) -> LayerVariation:
    """Return the change of a network's last layer that fits samples of a new domain best, equation 2.

    Parameters
    ----------
    model : nn.Module
        Trained; ``model(x)`` returns the prediction, samples on the first axis. It is used in eval
        mode and left as it is.
    layer : nn.Module or None
        ``nn.Linear`` on the last axis, or ``nn.Conv2d`` of one group, whose output is that of the model
        or is only reshaped to it; None is the last of them in module order.
    x_target : Tensor
        Inputs of the new domain, at least one; taken to the model's device and, if floating, dtype.
    y_target : Tensor
        What the model should give for them, floating and in the shape of the prediction.
    x, y : Tensor, optional
        Inputs and labels of the old domain. Only ``method="perturb"`` needs them.
    method : {"exact", "perturb"}, default="exact"
        What f makes of the change of inputs, in (1): the difference of its predictions, by which the
        old domain drops out of (1) and q = y~ - f(x~); or the derivative of f along the change,
        which differs from it by the order of the squared change.
    align : bool or "auto", default="auto"
        Whether each new sample is paired with the nearest of the old ones, by `align_domains`, or
        with the one of its own number; "auto" pairs where the numbers of samples differ.
    ridge : float, default=0.0
        At least 0. Above it, the change is ``(Z'Z + ridge I)^-1 Z'q``, bias included. Where samples are
        about as many as latents the plain change fits their noise: choose it on held-out samples.
    rcond : float, optional
        In [0, 1]: singular values of Z below ``rcond`` times the largest count as 0. By default
        max(rows, columns) times the rounding of the model's dtype, float32 at least; with a ridge, none.
    n_layers : int, default=1
        How many affine layers up to ``layer`` change, at least 1. Above 1, first those of
        `LayerVariation` ``.layers`` take one Gauss-Newton step of least norm together, then the last
        is solved for anew.
    batch_size : int, default=1024
        Samples at once, at least 1; no effect on the result.

    Returns
    -------
    LayerVariation
        Add ``weight`` and ``bias`` to those of the layer, as `transfer_last_layer` does.

    Raises
    ------
    ValueError
        If an argument is out of range; ``layer`` is not such a layer, not in the model, used twice,
        shares its weight or is not at the model's end; inputs and labels do not fit or are not
        finite; labels are integers.

    Notes
    -----
    1. A bias is solved for with the weight, by a column of ones; the official layers have none.
    2. The official code inverts with the cut-off of its solver's dtype, and so amplifies the rounding
       of float32 latents without bound; here the cut-off is that of the latents' dtype.
    3. A ridge is not of the paper.
    4. Along the change of inputs f is differentiated exactly and at once, not by differences of each
       coordinate.
    5. ``n_layers`` above 1 is a reading of the paper, whose code has one layer only. Of the step all,
       a half, a quarter, down to 1/32, or nothing is taken: whatever the last layer then fits best.
    6. The official speech experiment repeats (2) batch by batch, which forgets earlier ones. Here
       rows of all batches are accumulated.
    7. Many rows (20 a column) are accumulated in Z'Z, if its condition number is below 1e10, else in
       a triangular factor. All of it is in float64.

    References
    ----------
    .. [1] Tseng, Lin, Hung, Tsao. Interpretations of Domain Adaptations via Layer Variational
       Analysis. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import layer_variation
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(net.weight)
    >>> x, y = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[4.0], [8.0]])
    >>> layer_variation(net, None, x, y).weight  # the second input is never seen and stays
    tensor([[3., 0.]])
    """
    one_of("method", method, ("exact", "perturb"))
    at_least("ridge", ridge, 0)
    if rcond is not None:
        within("rcond", rcond, 0, 1)
    n_layers, batch_size = integer("n_layers", n_layers, 1), integer("batch_size", batch_size, 1)
    old = _sources(x, y, x_target, y_target, method, align)
    network = _LastLayer(model, layer, n_layers)
    eps = torch.finfo(network.dtype).eps
    with network.at_rest():
        rows = network.examine(x_target, y_target)
        inputs = x_target.split(batch_size)
        aims = [network.aim(part) for part in y_target.split(batch_size)]
        if old is not None:  # what the last layer should then give is f(x~) + q
            given = zip(old[0].split(batch_size), inputs, aims, strict=True)
            aims = [_residue(network, *each) + network.predict(each[1]) for each in given]

        def solved(changed: dict[str, Tensor]) -> _LeastSquares:
            """Solve for the last layer, with other weights changed before."""

            def blocks() -> Iterator[tuple[Tensor, Tensor]]:
                for new, aim in zip(inputs, aims, strict=True):
                    latent, out = network.look(new, changed)
                    yield from network.rows(latent, aim - out)

            shape = (rows * len(x_target), network.columns)
            return _minimum_norm(blocks, shape, ridge=ridge, rcond=rcond, eps=eps)

        best, moved = solved({}), {}
        if n_layers > 1:
            left = [aim - network.predict(new) for new, aim in zip(inputs, aims, strict=True)]
            step = _gauss_newton(network, inputs, left, ridge=ridge, rcond=rcond)
            for fraction in _FRACTIONS:
                tried = {name: fraction * change for name, change in step.items()}
                try:
                    found = solved({name: network.tensors[name] + change for name, change in tried.items()})
                except ValueError:  # so far that the model overflows
                    continue
                if found.residual_norm < best.residual_norm:
                    best, moved = found, tried
        for name, change in network.parameters(best.change).items():
            moved[name] = moved.get(name, 0) + change
    size = best.residual_norm.to(network.dtype).to(network.device)
    changes = []
    for name, part in network.layers.items():
        weight, bias = (
            None
            if p is None
            else moved.get(_join(name, kind), torch.zeros_like(wide(p))).detach().to(p.dtype)
            for kind, p in (("weight", part.weight), ("bias", part.bias))
        )
        assert weight is not None
        changes.append(LayerVariation(weight, bias, size, best.rank))
    return changes[-1]._replace(layers=tuple(changes) if n_layers > 1 else ())


def transfer_last_layer(
    model: nn.Module,
    layer: nn.Module | None,
    x_target: Shaped[Tensor, "n ..."],
    y_target: Float[Tensor, "n ..."],
    *,
    x: Source = None,
    y: Source = None,
    method: Literal["exact", "perturb"] = "exact",
    align: Align = "auto",
    ridge: float = 0.0,
    rcond: float | None = None,
    n_layers: int = 1,
    batch_size: int = 1024,
) -> LayerVariation:
    """Adapt a network's last layer to samples of a new domain, in place, and return the change.

    Parameters
    ----------
    model : nn.Module
        Trained. Only weight and bias of ``layer`` change, or of the last ``n_layers``.
    layer : nn.Module or None
        As for `layer_variation`; so are all others.
    x_target : Tensor
        Inputs of the new domain.
    y_target : Tensor
        What the model should give for them.
    x, y : Tensor, optional
        Samples of the old domain, for ``method="perturb"``.
    method : {"exact", "perturb"}, default="exact"
        What f makes of the change of inputs.
    align : bool or "auto", default="auto"
        Whether to pair samples of both domains by distance.
    ridge : float, default=0.0
        At least 0.
    rcond : float, optional
        In [0, 1].
    n_layers : int, default=1
        At least 1.
    batch_size : int, default=1024
        At least 1.

    Returns
    -------
    LayerVariation
        What was added; subtract it to go back, up to rounding.

    Raises
    ------
    ValueError
        As `layer_variation`; nothing has changed then.

    References
    ----------
    .. [1] Tseng, Lin, Hung, Tsao. Interpretations of Domain Adaptations via Layer Variational
       Analysis. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import transfer_last_layer
    >>> net = torch.nn.Linear(1, 1)
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> change = transfer_last_layer(net, None, x, 3 * x + 1)
    >>> torch.cat([net.weight[0], net.bias]).detach().round(decimals=4)
    tensor([3., 1.])
    """
    change = layer_variation(
        model, layer, x_target, y_target, x=x, y=y, method=method, align=align, ridge=ridge, rcond=rcond,
        n_layers=n_layers, batch_size=batch_size,
    )  # fmt: skip
    network = _LastLayer(model, layer, n_layers)
    with torch.no_grad():
        for part, moved in zip(network.layers.values(), change.layers or (change,), strict=True):
            part.weight.add_(moved.weight)
            if part.bias is not None and moved.bias is not None:
                part.bias.add_(moved.bias)
    return change


def transferal_residue(
    model: nn.Module,
    x: Source,
    y: Source,
    x_target: Shaped[Tensor, "n ..."],
    y_target: Float[Tensor, "n ..."],
    *,
    method: Literal["exact", "perturb"] = "exact",
    align: Align = "auto",
) -> Float[Tensor, "n ..."]:
    """Return how much of the new labels the network does not explain, q of equation 1.

    Parameters
    ----------
    model : nn.Module
        Trained; ``model(x)`` returns the prediction, samples on the first axis. It is used in eval
        mode and left as it is.
    x, y : Tensor or None
        Samples of the old domain; "exact" goes without.
    x_target, y_target : Tensor
        Samples of the new domain; labels are floating, in the shape of the prediction.
    method : {"exact", "perturb"}, default="exact"
        As for `layer_variation`.
    align : bool or "auto", default="auto"
        As for `layer_variation`.

    Returns
    -------
    Tensor
        In the shape and dtype of ``y_target``, on the model's device.

    Raises
    ------
    ValueError
        If samples are missing, do not fit or are not finite, or an option is unknown.

    References
    ----------
    .. [1] Tseng, Lin, Hung, Tsao. Interpretations of Domain Adaptations via Layer Variational
       Analysis. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import transferal_residue
    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]])
    >>> transferal_residue(torch.nn.ReLU(), x, y, x + 1, y + 1, method="perturb").T  # y~ - f(x) - 1
    tensor([[0., 2.]])
    """
    old = _sources(x, y, x_target, y_target, one_of("method", method, ("exact", "perturb")), align)
    network = _Network(model)
    with network.at_rest():
        _fits(network(network.to(x_target[:1])), y_target)
        olds = [None] * len(x_target) if old is None else old[0].split(_ROWS)
        given = zip(olds, x_target.split(_ROWS), y_target.split(_ROWS), strict=False)
        parts = [_residue(network, before, now, network.aim(label)) for before, now, label in given]
    return torch.cat(parts).to(y_target.dtype).to(network.device)


def _residue(network: _Network, old: Tensor | None, new: Tensor, aim: Tensor) -> Tensor:
    """Return q of a batch in float64; of (1) what the old labels say cancels."""
    if old is None:
        return aim - network.predict(new)
    x, dx = network.to(old), network.to(new) - network.to(old)
    parts = list(zip(x.split(_ROWS), dx.split(_ROWS), strict=True))
    try:
        found = [_derivative(network, [point], [way]) for point, way in parts]
    except RuntimeError:  # fused kernels, as of recurrent layers, have no second derivative
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            found = [_derivative(network, [point], [way]) for point, way in parts]
    out, slope = (network.checked(torch.cat(part)) for part in zip(*found, strict=True))
    return aim - out - slope
