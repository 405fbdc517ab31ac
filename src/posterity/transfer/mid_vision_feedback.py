"""Mid-vision feedback (MVF): what is expected of a scene acts in the middle of a network, not on its answers.

Classes are grouped into contexts: animals and furniture, land and sea. At a site in the middle of a network each
context e has an affine map of the channels, the same at every position, and the features h of a sample in which e
is expected go on as

    h  ->  A_e h + b_e .                                                                                (1)

Maps and network are trained together. So that one map a context is enough, features of different contexts are
held apart in angle: to the cross-entropy comes the mean over pairs of samples i, j of different contexts of

    |cos(f_i, f_j)| ,     f the features before the map, averaged over positions.                       (2)

A_e = I and b_e = 0 at first, which changes nothing in a pretrained network. Later features are seen in the light
of e: a classifier that knows of animals hardly calls anything a desk, and nothing has to be filtered afterwards.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from difflib import get_close_matches
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import floating, has_shape, integer, one_of
from posterity._models import evaluating
from posterity._precision import rounding, wide
from posterity.transfer.context_measures import contexts_of_classes, contexts_of_samples

__all__ = ["ContextAffine", "MidVisionFeedback", "expect_context"]

LARGE = 2**22  # numbers in the maps of all samples, beyond which they are not laid out side by side
OVER = 1e-4  # by how much shares may sum to more than 1

Context = Int[Tensor, " n"] | Float[Tensor, "n contexts"]


class ContextAffine(nn.Module):
    """An affine map of the channels, chosen for each sample by the context that is expected in it (equation 1).

    Parameters
    ----------
    n_contexts : int
        At least 1.
    channels : int
        At least 1.

    Attributes
    ----------
    weight : Parameter of shape (n_contexts, channels, channels)
        The maps, which start as identities.
    bias : Parameter of shape (n_contexts, channels)
        Starts at 0.

    Raises
    ------
    ValueError
        If a size is below 1; at the call if ``x`` has other channels, or ``context`` is none of its three forms.

    Notes
    -----
    1. Computed is h + (A_e - I) h + b_e: where nothing is expected, or nothing learned yet, the result is h bit for
       bit, in every precision. Under autocast the product follows it, the sum does not; the result has the dtype of h.
    2. Weight decay pulls maps to 0, not to the identity: give these parameters a group without it.
    3. Where there are more samples than contexts they may be grouped by context, not each given its map: for more
       than 4 million numbers of such maps, for which an accelerator waits once; on the CPU sooner.

    References
    ----------
    .. [1] Maynord, Dessalene, Fermuller, Aloimonos. Mid-Vision Feedback. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import ContextAffine
    >>> layer = ContextAffine(n_contexts=2, channels=2)
    >>> with torch.no_grad():
    ...     layer.bias[1] = torch.tensor([10.0, 20.0])
    >>> x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    >>> layer(x, torch.tensor([0, 1, -1])).tolist()  # nothing learned, learned, nothing expected
    [[1.0, 2.0], [11.0, 22.0], [1.0, 2.0]]
    >>> layer(x[:1], torch.tensor([[0.5, 0.5]])).tolist()
    [[6.0, 12.0]]
    """

    def __init__(self, n_contexts: int, channels: int) -> None:
        super().__init__()
        self.n_contexts, self.channels = (
            integer("n_contexts", n_contexts, 1),
            integer("channels", channels, 1),
        )
        self.weight = nn.Parameter(torch.eye(channels).repeat(n_contexts, 1, 1))
        self.bias = nn.Parameter(torch.zeros(n_contexts, channels))

    def forward(
        self, x: Float[Tensor, "n channels *spatial"], context: Context | None = None
    ) -> Float[Tensor, "n channels *spatial"]:
        """Return the features as the expected contexts let them be seen.

        Parameters
        ----------
        x : Tensor of shape (n, channels, *spatial)
        context : Tensor, optional
            Of shape (n,), integers: the context of each sample, -1 where none is expected. Of shape (n, n_contexts),
            floating-point: how much each is expected, not negative, a sum of at most 1 a sample; the maps are
            averaged, what is missing to 1 counts for the identity. None: nothing is expected of any.

        Returns
        -------
        Tensor of the shape and dtype of ``x``
        """
        if floating("x", x).ndim < 2 or x.shape[1] != self.channels:
            raise ValueError(
                f"x must have channels = {self.channels} at dimension 1, got shape {tuple(x.shape)}"
            )
        context = _expectation(context, len(x), self.n_contexts)
        if context is None:
            return x
        flat = x if x.ndim == 2 else x.flatten(2)
        # in the dtype of x: features under autocast may be narrower than the maps
        moves = (self.weight - torch.eye(self.channels, device=x.device, dtype=self.weight.dtype)).to(x.dtype)
        given, few = not context.is_floating_point(), len(x) <= self.n_contexts
        large = len(x) * self.channels**2 > LARGE
        if given and x.device.type == "cpu" and flat.numel() < len(x) * self.channels**2:
            large = True  # the maps are larger than what they act on, and grouping makes no one wait
        if few or not large:
            seen = self._gathered(flat, context, moves)
        else:
            seen = (self._grouped if given else self._weighed)(flat, context, moves)
        return seen.to(x.dtype).view(x.shape)

    def _gathered(self, x: Tensor, context: Tensor, moves: Tensor) -> Tensor:
        """Return (1) by a map for each sample."""
        if context.is_floating_point():
            maps = (context.to(moves.dtype) @ moves.flatten(1)).view(len(x), *moves.shape[1:])
            shifts = (wide(context)[:, :, None] * wide(self.bias)).sum(1)  # no product for autocast to narrow
        else:
            rows = context.long() % (self.n_contexts + 1)  # -1 is the last, which moves nothing
            maps = F.pad(moves, (0, 0, 0, 0, 0, 1)).index_select(0, rows)
            shifts = wide(F.pad(self.bias, (0, 0, 0, 1)).index_select(0, rows))
        columns = x[:, :, None] if x.ndim == 2 else x
        return (wide(columns) + shifts[:, :, None] + wide(torch.bmm(maps, columns))).view(x.shape)

    def _grouped(self, x: Tensor, context: Tensor, moves: Tensor) -> Tensor:
        """Return (1) by one product a context, of the samples in which it is expected."""
        context = context.long()
        order = context.argsort(stable=True)
        sizes = (context + 1).bincount(minlength=self.n_contexts + 1).tolist()
        seen = wide(x).clone()
        for rows, move, shift in zip(order.split(sizes)[1:], moves, self.bias, strict=True):
            if len(rows):
                moved = _moved(x.index_select(0, rows), move, shift)
                seen.index_add_(0, rows, moved.to(seen.dtype))
        return seen

    def _weighed(self, x: Tensor, context: Tensor, moves: Tensor) -> Tensor:
        """Return (1) by one product a context, of all samples, each weighed by its share."""
        seen = wide(x)
        for share, move, shift in zip(wide(context).unbind(1), moves, self.bias, strict=True):
            seen = seen + share.view(-1, *[1] * (x.ndim - 1)) * _moved(x, move, shift)
        return seen

    def extra_repr(self) -> str:
        return f"n_contexts={self.n_contexts}, channels={self.channels}"


class MidVisionFeedback(nn.Module):
    """A network with `ContextAffine` at named sites, called with what is expected.

    Parameters
    ----------
    model : nn.Module
        Yours, not copied and not changed; called as ``model(x)``.
    sites : mapping of str to int
        Name of a submodule whose output is a tensor with a row a sample, and how many channels it has at
        dimension 1; ``(channels, -1)`` where they are last, as in tokens. Better before a nonlinearity than
        behind it: there the contrast can win by features that are all 0.
    n_contexts : int
        At least 1.

    Attributes
    ----------
    model : nn.Module
    affines : nn.ModuleList
        A `ContextAffine` a site, in the order of ``sites``, on the model's device and in its dtype.

    Raises
    ------
    ValueError
        If ``sites`` is empty, or names a submodule that is not there or one twice; at the call if ``context`` does
        not fit, or a site is used twice or never in a pass, or its output is no tensor or has other channels.

    Notes
    -----
    1. Sites are caught by forward hooks, which are removed after each call, also after an error. So a site must not
       lie in a part that is run again in the backward pass (activation checkpointing).
    2. Train on ``cross_entropy(logits, y) + 0.1 * sum(context_contrast(f, context) for f in features.values())``.
       A network that shall also do without an expectation, or with a predicted one (`expect_context`), must see some
       samples without in training: -1 for a fifth of them.
    3. To train the maps alone, ``model.requires_grad_(False)`` on the inner model.

    References
    ----------
    .. [1] Maynord, Dessalene, Fermuller, Aloimonos. Mid-Vision Feedback. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.transfer import MidVisionFeedback
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> model = MidVisionFeedback(net, sites={"0": 8}, n_contexts=2)
    >>> x = torch.randn(5, 4)
    >>> logits, features = model(x, torch.tensor([0, 1, 1, 0, -1]), return_features=True)
    >>> torch.equal(logits, net(x)), features["0"].shape  # nothing is learned yet
    (True, torch.Size([5, 8]))
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, int | tuple[int, int]], n_contexts: int) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
        if not isinstance(sites, Mapping) or not sites:
            raise ValueError(f"sites must name at least one submodule and its channels, got {sites!r}")
        self.n_contexts = integer("n_contexts", n_contexts, 1)
        self.sites = {name: _site(model, name, size) for name, size in sites.items()}
        twins: dict[int, str] = {}
        for name in self.sites:
            twin = twins.setdefault(id(model.get_submodule(name)), name)
            if twin != name:
                raise ValueError(f"sites must be different submodules, {twin!r} and {name!r} are the same")
        self.model = model
        self.affines = nn.ModuleList(ContextAffine(n_contexts, size) for size, _ in self.sites.values())
        like = next((p for p in model.parameters() if p.is_floating_point()), None)
        if like is not None:
            self.affines.to(like.device, like.dtype)

    def forward(
        self, x: Shaped[Tensor, "n ..."], context: Context | None = None, *, return_features: bool = False
    ) -> Any:
        """Return what the model gives for samples seen in the light of their contexts.

        Parameters
        ----------
        x : Tensor of shape (n, ...)
            What the model takes.
        context : Tensor, optional
            As `ContextAffine` takes it.
        return_features : bool, default=False
            Whether to return the output of each site too, as it is before its map, by name; with the channels at
            dimension 1, as `context_contrast` takes them.

        Returns
        -------
        Tensor, or tuple of Tensor and dict of str to Tensor
        """
        if not isinstance(x, Tensor) or x.ndim == 0:
            raise ValueError(f"x must be a tensor with a row a sample, got {type(x).__name__}")
        one_of("return_features", return_features, (False, True))
        _expectation(context, len(x), self.n_contexts)
        found: dict[str, Tensor | None] = {}
        with ExitStack() as hooks:
            for affine, name in zip(self.affines, self.sites, strict=True):
                hook = self._hook(name, affine, context, len(x), found, return_features)
                hooks.callback(self.model.get_submodule(name).register_forward_hook(hook).remove)
            out = self.model(x)
        for name in self.sites:
            if name not in found:
                raise ValueError(f"sites must be used by model, {name!r} was not in this pass")
        return (out, {name: found[name] for name in self.sites}) if return_features else out

    def _hook(
        self, name: str, affine: nn.Module, context: Tensor | None, n: int, found: dict[str, Tensor | None],
        keep: bool,
    ) -> Callable[..., Tensor]:  # fmt: skip
        channels, axis = self.sites[name]

        def hook(module: nn.Module, args: Any, output: Any) -> Tensor:
            if name in found:
                raise ValueError(f"sites must be used once in a pass of model, {name!r} is used again")
            if not isinstance(output, Tensor) or not output.is_floating_point():
                what = output.dtype if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(f"sites must give floating-point tensors, {name!r} gives {what}")
            if output.ndim < 2 or len(output) != n or output.shape[axis] != channels:
                where = "last" if axis == -1 else "at dimension 1"
                raise ValueError(
                    f"sites must give {n} rows and the channels said, {name!r} should have {channels} {where}, "
                    f"gives shape {tuple(output.shape)}"
                )
            features = output.movedim(axis, 1)
            found[name] = features if keep else None
            seen = affine(features, context).movedim(1, axis)
            # what comes next may work in place
            return seen.clone() if keep and context is None else seen

        return hook


@torch.no_grad()
def expect_context(
    model: MidVisionFeedback, x: Shaped[Tensor, "n ..."], class_context: Int[Tensor, " classes"], *,
    n_passes: int = 1, soft: bool = True,
) -> tuple[Float[Tensor, "n classes"], Context]:  # fmt: skip
    """Predict without an expectation, expect the context that is predicted, and predict again with it.

    Parameters
    ----------
    model : MidVisionFeedback
        Trained on samples with and without a context; looked at in evaluation mode and without gradient. What it
        wraps gives logits, or an object with the attribute ``logits``.
    x : Tensor of shape (n, ...)
        What the model takes.
    class_context : Tensor of shape (classes,)
        The context to which each class belongs; each of the model's has a class.
    n_passes : int, default=1
        How often the expectation is fed back, at least 1.
    soft : bool, default=True
        Whether the probabilities of contexts are expected, or the most probable one (the first of equals).

    Returns
    -------
    logits : Tensor of shape (n, classes)
        Of the last pass.
    context : Tensor of shape (n, n_contexts) or (n,)
        What it expected.

    Raises
    ------
    ValueError
        If ``class_context`` does not fit the model, ``n_passes`` is below 1, or logits are NaN.

    References
    ----------
    .. [1] Maynord, Dessalene, Fermuller, Aloimonos. Mid-Vision Feedback. ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.transfer import MidVisionFeedback, expect_context
    >>> net = nn.Sequential(nn.Identity(), nn.Identity())
    >>> model = MidVisionFeedback(net, sites={"0": 3}, n_contexts=2)
    >>> x = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> expect_context(model, x, class_context=torch.tensor([0, 1, 1]))[1]
    tensor([[0.5000, 0.5000]])
    """
    if not isinstance(model, MidVisionFeedback):
        raise ValueError(f"model must be a MidVisionFeedback, got {type(model).__name__}")
    contexts_of_classes(class_context, n_contexts=model.n_contexts)
    integer("n_passes", n_passes, 1)
    one_of("soft", soft, (False, True))
    with evaluating(model):
        logits = _logits(model(x), len(class_context))
        for _ in range(n_passes):
            shares = wide(logits).softmax(1)
            columns = class_context.to(shares.device).long()
            # not a matrix product, which autocast would narrow
            context = shares.new_zeros(len(x), model.n_contexts).index_add(1, columns, shares)
            if context.device.type == "cpu" and bool(context.isnan().any()):
                raise ValueError("model must give logits without NaN, and not all infinite")
            # rounding may carry a sum of shares past 1
            context = context / context.sum(1, keepdim=True).clamp_min(1) if soft else context.argmax(1)
            logits = _logits(model(x, context), len(class_context))
    return logits, context


def _moved(x: Tensor, move: Tensor, shift: Tensor) -> Tensor:
    """Return (A - I) x + b at every position."""
    if x.ndim == 2:
        return wide(F.linear(x, move)) + wide(shift)
    return wide(F.conv1d(x, move[:, :, None])) + wide(shift)[:, None]


def _site(model: nn.Module, name: Any, size: Any) -> tuple[int, int]:
    """Return channels of a site and their dimension, 1 or -1."""
    known = [each for each, _ in model.named_modules(remove_duplicate=False) if each]
    if name not in known:
        near = get_close_matches(str(name), known, n=3, cutoff=0.3) or known[:3]
        raise ValueError(
            f"sites must be names of submodules of model, got {name!r}; close to it: {', '.join(map(repr, near))}"
        )
    pair = isinstance(size, tuple | list)
    if pair and len(size) != 2:
        raise ValueError(f"sites[{name!r}] must be channels, or channels and their dimension, got {size!r}")
    channels, axis = size if pair else (size, 1)
    one_of(f"sites[{name!r}][1]", axis, (1, -1))
    return integer(f"channels of sites[{name!r}]", channels, 1), axis


def _expectation(context: Any, n: int, n_contexts: int) -> Tensor | None:
    """Return an expectation of one of its three forms."""
    if not isinstance(context, Tensor) or not context.is_floating_point():
        return None if context is None else contexts_of_samples("context", context, n, n_contexts)
    has_shape("context", context, (n, n_contexts), "shares of the contexts a sample")
    if context.device.type == "cpu" and context.numel():
        if not bool((context >= 0).all()):  # NaN is not
            raise ValueError("context must have shares of at least 0, got NaN or a negative one")
        most = float(wide(context).detach().sum(1).max())
        if most > 1 + rounding(context.dtype, OVER):
            raise ValueError(f"context must have shares that sum to at most 1 a sample, got {most:g}")
    return context


def _logits(out: Any, classes: int) -> Tensor:
    """Return the logits of a model's output."""
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise ValueError(f"model must give logits, got {type(out).__name__}")
    return has_shape("logits of model", logits, (None, classes), "class_context")
