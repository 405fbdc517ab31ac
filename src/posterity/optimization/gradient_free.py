r"""Guess and check: networks that fit without any gradient, drawn until one does.

Does SGD find solutions that generalise, or do most solutions? Guessing has no bias of its own: draw
all parameters, each uniform in (-scale, scale), and keep the draw if every training example is right
and its loss lies in a range,

.. math:: \theta \sim U(-s, s)^P \quad\text{kept if}\quad \text{accuracy}(\theta) = 1
          \ \text{ and }\ \text{low} < L(\theta) \le \text{high}.

What is kept is an independent sample from all solutions of that loss, with which those of another
optimiser can be compared. Losses compare only at one size of the network: a ReLU network that scales
its weights up has a smaller loss and the same answers, so the logits are first divided by

.. math:: \prod_l \lVert W_l \rVert_F / u.                                                         \tag{1}

Thousands of networks are evaluated in one batched product, those that miss one of the first few
examples no further. `posterity.optimization.population_search` walks where guessing no longer hits.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.func import functional_call, vmap

from posterity._checks import at_least, finite, integer, one_of
from posterity._precision import wide
from posterity._random import draw_device

__all__ = ["GuessResult", "guess_and_check", "stacked_logits", "weight_norm_product"]

AT_ONCE = 20_000_000  # numbers in the largest tensor of a batched evaluation
FIRST = (4, 16)  # examples that reject most draws before the rest is looked at
ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Identity)


class GuessResult(NamedTuple):
    """Draws that solve the training set.

    Attributes
    ----------
    params : dict of str to Tensor of shape (n_found, *shape)
        Parameters for ``torch.func.functional_call``, in the order in which they were drawn; n_found may be 0.
    losses : Tensor of shape (n_found,)
        Training losses, normalised if asked for.
    n_tried : int
        Draws up to the last one kept, or all where fewer than asked for were found.
    success_rate : float
        n_found over ``n_tried``.
    """

    params: dict[str, Tensor]
    losses: Float[Tensor, " n_found"]
    n_tried: int
    success_rate: float


def stacked_logits(
    model: nn.Module, params: dict[str, Tensor], x: Shaped[Tensor, " n *shape"]
) -> Float[Tensor, "population n classes"]:
    """Return the logits of many parameters of one network.

    An ``nn.Sequential`` of linear layers, ``nn.Flatten()`` and activations is a batched product a layer;
    what else ``torch.func.vmap`` can take goes through that. Gradients go through.

    Parameters
    ----------
    model : nn.Module
        Not changed. In evaluation mode where it has dropout or batch normalisation.
    params : dict of str to Tensor of shape (population, *shape)
        All parameters of the model, by name.
    x : Tensor of shape (n, *shape)
        What the model takes.

    Returns
    -------
    Tensor
        Of shape (population, n, classes).

    Raises
    ------
    ValueError
        If the model draws or updates as it runs or has no such logits, or ``params`` are not its parameters.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import stacked_logits
    >>> params = {"weight": torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])}
    >>> stacked_logits(torch.nn.Linear(1, 2, bias=False), params, torch.tensor([[1.0]]))
    tensor([[[1., 2.]],
    <BLANKLINE>
            [[3., 4.]]])
    """
    population = _Population(model, x)
    shapes = {name: tuple(p.shape[1:]) for name, p in params.items()}
    expected = {name: tuple(p.shape) for name, p in population.params.items()}
    if shapes != expected:
        raise ValueError(f"params must have the shapes {expected} behind the population, got {shapes}")
    if len(sizes := {len(p) for p in params.values() if p.ndim}) != 1:
        raise ValueError(f"params must have one population, got sizes {sorted(sizes)}")
    return population.logits(params, x)


def weight_norm_product(params: dict[str, Tensor], *, unit: float = 1.0) -> Float[Tensor, " population"]:
    """Return the product of the weights' Frobenius norms, each over ``unit``, equation 1.

    Parameters
    ----------
    params : dict of str to Tensor of shape (population, *shape)
        Those with two axes or more in their shape count.
    unit : float, default=1.0
        Positive.

    Returns
    -------
    Tensor
        Of shape (population,), in float32 at least.

    Raises
    ------
    ValueError
        If no parameter has two axes, or ``unit`` is not positive.

    Examples
    --------
    >>> import torch
    >>> from posterity.optimization import weight_norm_product
    >>> weight_norm_product({"weight": torch.tensor([[[3.0, 4.0]]]), "bias": torch.tensor([[7.0]])})
    tensor([5.])
    """
    at_least("unit", unit, 0, strict=True)
    norms = _norms(params)
    if not norms:
        shapes = {name: tuple(p.shape[1:]) for name, p in params.items()}
        raise ValueError(f"params must have a weight of two axes or more, got shapes {shapes}")
    return (torch.stack(norms) / unit).prod(0)


@torch.no_grad()
def guess_and_check(
    model: nn.Module,
    x: Shaped[Tensor, " n *shape"],
    y: Int[Tensor, " n"],
    *,
    n_models: int = 1,
    loss_range: tuple[float, float] = (-math.inf, math.inf),
    init: Literal["uniform", "sphere"] | Callable = "uniform",
    scale: float = 1.0,
    normalize: bool = True,
    unit: float = 1.0,
    batch_size: int = 1024,
    max_tries: int = 10_000_000,
    generator: torch.Generator | None = None,
) -> GuessResult:
    """Draw networks until some are right on all examples, with a loss in a range.

    The share of draws that fit falls by about a half with each example of two classes: this is for tens of them.

    Parameters
    ----------
    model : nn.Module
        Gives the architecture; its parameters are neither used nor changed, all of them are drawn. In
        evaluation mode where it has dropout or batch normalisation.
    x : Tensor of shape (n, *shape)
        Inputs, finite.
    y : Tensor of shape (n,)
        Class indices.
    n_models : int, default=1
        How many to find.
    loss_range : tuple of float, default=(-inf, inf)
        Cross-entropy of a kept draw: above the first, at most the second; increasing.
    init : {"uniform", "sphere"} or callable, default="uniform"
        Every entry uniform in (-scale, scale); all entries together uniform on the sphere of radius
        ``scale``; or ``init(name, shape, generator)``, a tensor of this shape, whose first axis is the
        population.
    scale : float, default=1.0
        Positive.
    normalize : bool, default=True
        Divide the logits by `weight_norm_product` before the loss. It does not change the answers.
    unit : float, default=1.0
        Of the norms, positive. The official code takes 1 for perceptrons, 3 for LeNet.
    batch_size : int, default=1024
        Draws at a time.
    max_tries : int, default=10_000_000
        Draws after which to give up.
    generator : torch.Generator, optional
        Draws the parameters; by default torch's global one.

    Returns
    -------
    GuessResult
        With what was found, which may be fewer than ``n_models`` and nothing.

    Raises
    ------
    ValueError
        If data, model or a setting are not as said.

    See Also
    --------
    population_search : Improves one network instead, where no guess fits.

    Notes
    -----
    1. Nothing selects among the solutions: the first ``n_models`` in the order of drawing are kept, and
       those drawn after the last of them do not count as tried.
    2. Biases are drawn but not normalised, as in the official code: with them the loss is not quite free
       of scale.
    3. Draws are float32 at least, rounded to the parameters' dtype; the loss is float32 at least.

    References
    ----------
    Chiang, Ni, Miller, Bansal, Geiping, Goldblum, Goldstein, "Loss landscapes are all you need: neural network
    generalization can be explained without the implicit bias of gradient descent", ICLR 2023, Section 3.

    Examples
    --------
    >>> import torch
    >>> from torch.func import functional_call
    >>> from posterity.optimization import guess_and_check
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> x, y = torch.eye(2), torch.tensor([0, 1])
    >>> found = guess_and_check(net, x, y, n_models=500, generator=torch.Generator().manual_seed(0))
    >>> abs(found.success_rate - 1 / 4) < 0.05  # each of two examples is right by a coin
    True
    >>> first = {name: p[0] for name, p in found.params.items()}
    >>> functional_call(net, first, (x,)).argmax(1)
    tensor([0, 1])
    """
    for name, value in (("n_models", n_models), ("batch_size", batch_size), ("max_tries", max_tries)):
        integer(name, value, 1)
    low, high = _range(loss_range)
    at_least("scale", scale, 0, strict=True)
    if not callable(init):
        one_of("init", init, ("uniform", "sphere"))
    with _task(model, x, y, normalize, unit) as population:
        kept, losses = {name: [] for name in population.params}, []
        n_found = n_tried = 0
        last = 0  # draws up to the last one kept
        while n_found < n_models and n_tried < max_tries:
            size = min(batch_size, max_tries - n_tried)
            drawn = _draw(population.params, size, init, scale, generator)
            rows, loss = _solutions(population, drawn, x, y, unit if normalize else None)
            fits = (loss > low) & (loss <= high) & loss.isfinite()
            rows, loss = rows[fits][: n_models - n_found], loss[fits][: n_models - n_found]
            for name, p in drawn.items():
                kept[name].append(p[rows])
            losses.append(loss)
            n_found += len(rows)
            last = n_tried + int(rows[-1]) + 1 if len(rows) else last
            n_tried += size
    n_tried = last if n_found == n_models else n_tried
    params = {name: torch.cat(parts) for name, parts in kept.items()}
    return GuessResult(params, torch.cat(losses), n_tried, n_found / n_tried)


def _solutions(
    population: "_Population", drawn: dict[str, Tensor], x: Tensor, y: Tensor, unit: float | None
) -> tuple[Tensor, Tensor]:
    """Return which draws are right on all examples, and their losses; most fall at the first examples."""
    n = len(x)
    rows = torch.arange(len(next(iter(drawn.values()))), device=x.device)
    logits = x.new_zeros((0, n, 1), dtype=torch.float32)
    for part in (*(k for k in FIRST if 2 * k <= n), n):
        logits = population.logits(drawn, x[:part])
        right = (logits.argmax(2) == y[:part]).all(1)
        rows, logits = rows[right], logits[right]
        drawn = {name: p[right] for name, p in drawn.items()}
    return rows, _cross_entropy(_normalized(logits, drawn, unit), y)


def _draw(
    params: dict[str, Tensor], size: int, init: str | Callable, scale: float, generator: torch.Generator | None
) -> dict[str, Tensor]:  # fmt: skip
    """Return random parameters, ``size`` of each."""
    drawn = {}
    for name, p in params.items():
        shape = torch.Size((size, *p.shape))
        if callable(init):
            value = init(name, shape, generator)
            if not isinstance(value, Tensor) or value.shape != shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"init must return a tensor of shape {tuple(shape)} for {name}, got {got}")
        else:
            dtype = torch.promote_types(p.dtype, torch.float32)
            value = torch.empty(shape, dtype=dtype, device=draw_device(generator, p.device))
            if init == "uniform":
                value.uniform_(-1, 1, generator=generator)
                value = value.mul_(scale) if scale != 1 else value
            else:
                value.normal_(generator=generator)
        drawn[name] = value
    if init == "sphere":
        squares = [p.reshape(size, -1).square().sum(1) for p in drawn.values()]
        factor = scale / torch.stack([part.to(squares[0].device) for part in squares]).sum(0).sqrt()
        drawn = {name: p * factor.reshape(-1, *[1] * (p.ndim - 1)).to(p) for name, p in drawn.items()}
    return {name: p.to(params[name]) for name, p in drawn.items()}


def _range(loss_range: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in loss_range)
    except (TypeError, ValueError):
        raise ValueError(f"loss_range must be two increasing numbers, got {loss_range!r}") from None
    if not low < high:
        raise ValueError(f"loss_range must be two increasing numbers, got {loss_range!r}")
    return low, high


@contextmanager
def _task(
    model: nn.Module, x: Tensor, y: Tensor, normalize: bool, unit: float
) -> Iterator["_Population"]:  # fmt: skip
    """Give what evaluates a model once it, data and normalisation are checked; outside autocast."""
    at_least("unit", unit, 0, strict=True)
    if x.is_floating_point():
        finite("x", x)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"y must hold class indices, got dtype {y.dtype}")
    if not x.ndim or y.shape != x.shape[:1]:
        raise ValueError(f"y must have shape ({len(x) if x.ndim else 0}) for x, got {tuple(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"y must be on the device of x, {x.device}, got {y.device}")
    with torch.autocast(x.device.type, enabled=False):
        population = _Population(model, x)
        if not ((y >= 0) & (y < population.classes)).all():
            low, high = y.aminmax()
            raise ValueError(
                f"y must be in 0..{population.classes - 1} for the model, got values from {low} to {high}"
            )
        if normalize and not any(p.ndim > 1 for p in population.params.values()):
            raise ValueError("normalize must be False for a model without weights of two axes, got True")
        yield population


class _Population:
    """Evaluates many parameters of one model at a time.

    ``layers`` are the modules of a plain perceptron with the names of their parameters, or None.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.params = model, {name: p.detach() for name, p in model.named_parameters()}
        if not self.params:
            raise ValueError("model must have parameters, got none")
        for name, p in self.params.items():
            if not p.is_floating_point():
                raise ValueError(f"model must have floating-point parameters, got dtype {p.dtype} of {name}")
        for name, module in model.named_modules():
            batch = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
            if module.training and (batch or isinstance(module, nn.modules.dropout._DropoutNd)):
                kind = type(module).__name__
                raise ValueError(f"model must not draw or update, got {kind} {name!r} in training mode: call model.eval()")  # fmt: skip
        if not x.ndim or not len(x):
            raise ValueError(f"x must have at least one row, got shape {tuple(x.shape)}")
        self.layers = _perceptron(model, x)
        self.classes, self.width = self._probe(x[:1])

    def _probe(self, x: Tensor) -> tuple[int, int]:
        """Return how many classes there are, and the numbers in the widest layer of an example."""
        sizes = [x.numel()]

        def measure(_module: nn.Module, _given: object, out: object) -> None:
            sizes.append(out.numel() if isinstance(out, Tensor) else 0)

        handles = [module.register_forward_hook(measure) for module in self.model.modules()]
        try:
            with torch.no_grad():
                out = self.model(x)
        except RuntimeError as error:
            raise ValueError(
                f"x must be what model takes, got {x.dtype} of shape (n, {tuple(x.shape[1:])}): {error}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != 1 or not out.is_floating_point():
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"model must return logits of shape (n, classes), got {got} for one example")
        if out.shape[1] < 1:
            raise ValueError("model must return logits of at least one class, got none")
        return out.shape[1], max(sizes)

    def at_once(self, n: int) -> int:
        """Return how many parameters to evaluate in a go on n examples."""
        return max(1, AT_ONCE // max(n * self.width, sum(p.numel() for p in self.params.values()), 1))

    def logits(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        """Return logits of shape (population, n, classes)."""
        size, step = len(next(iter(params.values()))), self.at_once(len(x))
        if not size:
            return next(iter(params.values())).new_zeros((0, len(x), self.classes))
        if size <= step:
            return self._logits(params, x)
        parts = [
            self._logits({name: p[k : k + step] for name, p in params.items()}, x)
            for k in range(0, size, step)
        ]
        return torch.cat(parts)

    def _logits(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        if self.layers is None:
            one = lambda params: functional_call(self.model, params, (x,))  # noqa: E731
            return vmap(one, randomness="error")(params)
        hidden = x.flatten(1).T  # (features, n), for all alike; then (population, features, n)
        for module, weight, bias in self.layers:
            if not weight:
                hidden = module(hidden)
            elif hidden.ndim == 2:
                w = params[weight]
                hidden = (w.reshape(-1, w.shape[2]) @ hidden).view(len(w), w.shape[1], -1)
                hidden = hidden + params[bias][:, :, None] if bias else hidden
            elif bias:
                hidden = torch.baddbmm(params[bias][:, :, None], params[weight], hidden)
            else:
                hidden = torch.bmm(params[weight], hidden)
        return hidden.mT


def _perceptron(model: nn.Module, x: Tensor) -> list[tuple[nn.Module, str, str]] | None:
    """Return the layers of a model that is linear layers and activations, with names of weight and bias."""
    if type(model) is nn.Linear:
        modules = [model]
    elif type(model) is nn.Sequential:
        modules = list(model)
    else:
        return None
    names = {id(p): name for name, p in model.named_parameters()}
    layers, flat = [], x.ndim == 2
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        if type(module) is nn.Linear:
            bias = "" if module.bias is None else names[id(module.bias)]
            layers.append((module, names[id(module.weight)], bias))
        elif type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            flat = flat or not layers
        elif type(module) in ELEMENTWISE:
            layers.append((module, "", ""))
        else:
            return None
    linear = any(weight for _, weight, _ in layers)
    return layers if flat and linear and x.is_floating_point() and not model._forward_hooks else None


def _norms(params: dict[str, Tensor]) -> list[Tensor]:
    """Return the Frobenius norm of each weight, of shape (population,), in float32 at least."""
    return [wide(p).flatten(1).norm(dim=1) for p in params.values() if p.ndim > 2]


def _normalized(logits: Tensor, params: dict[str, Tensor], unit: float | None) -> Tensor:
    """Return logits over equation 1, in float32 at least; norm by norm, since the product may overflow."""
    logits = wide(logits)
    if unit is None:
        return logits
    for norm in _norms(params):
        logits = logits / (norm / unit).to(logits.device)[:, None, None]
    return logits


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy of each of a population."""
    chances = logits.mT.log_softmax(1)  # classes before examples, as they lie
    return -chances[:, y.long(), torch.arange(len(y), device=y.device)].mean(1)
