"""FoRDE: ensembles whose members disagree in what they look at, their input gradients.

For member i and sample b let u_ib be the gradient of the true class's logit in the input,
scaled to length 1 and stretched along the directions in which the data vary. The members
are particles: each fits the labels, and each is pushed away from the others, held still
(a bar), by a kernel of these directions,

    D_ijb = |u_ib - bar u_jb|^2,   h_jb = median_i D_ijb / log M,                        (1)
    R = (1/B) sum_i log( (1/B) sum_b sum_j exp(-D_ijb / h_jb) ),                         (2)
    L = sum_i mean_b CE_ib + repulsion R.                                                (3)

R is largest where all members look at the same pixels. Members that look at different
ones do not fall for the same corruption, and their average is less sure where they part.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from posterity._checks import at_least, finite, floating, has_shape, integer, within
from posterity._precision import wide, widened

__all__ = ["FoRDELoss", "RepulsiveEnsemble", "fit_input_components", "input_gradient_repulsion"]

FLOOR = 1e-12  # of the bandwidth, by the largest scale: identical members have a median distance of 0


@widened
def input_gradient_repulsion(
    gradients: Float[Tensor, "members batch *shape"],
    *,
    components: Float[Tensor, "d r"] | None = None,
    scales: Float[Tensor, " r"] | None = None,
    eps: float = 1e-24,
) -> Float[Tensor, ""]:
    """Return R, equation 2: how alike the directions of the members' input gradients are.

    Parameters
    ----------
    gradients : Tensor of shape (n_models, batch, *input_shape)
        Input gradients; only their directions count. R is differentiated with respect to
        each member with the others and the bandwidths held still, so the result is the
        force on a particle, not the gradient of the value.
    components : Tensor of shape (d, r), optional
        Orthonormal directions of the flattened inputs, of `fit_input_components`.
    scales : Tensor of shape (r,), optional
        Their lengths; given together with ``components``.
    eps : float, default=1e-24
        Share of the largest squared length that is added to all, positive, so that a gradient
        of zero stays zero.

    Returns
    -------
    Tensor
        A scalar in [0, (n_models / batch) log n_models]: the upper end for identical
        members, 0 for a single one.

    Raises
    ------
    ValueError
        If ``gradients`` has fewer than 2 dimensions or no entries, or ``components`` and
        ``scales`` do not fit.

    References
    ----------
    .. [1] Trinh, Heinonen, Acerbi, Kaski. Input-gradient space particle inference for
       neural network ensembles. ICLR 2024.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import input_gradient_repulsion
    >>> u = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> input_gradient_repulsion(u[:, None, :])  # D / h = 2 log 2: R = 2 log(1 + 1/4)
    tensor(0.4463)
    >>> input_gradient_repulsion(u[:1].expand(2, 1, 2))  # the same twice: 2 log 2
    tensor(1.3863)
    """
    floating("gradients", gradients)
    if gradients.ndim < 2 or gradients.numel() == 0:
        raise ValueError(
            "gradients must have shape (n_models, batch, *input_shape), none of them 0, "
            f"got {tuple(gradients.shape)}"
        )
    at_least("eps", eps, 0, strict=True)
    n_models, batch = gradients.shape[:2]
    u = gradients.reshape(n_models, batch, -1)
    tiny, floor = torch.finfo(u.dtype).tiny, FLOOR
    if components is not None or scales is not None:
        components, scales = _check_components(components, scales)
        has_shape("components", components, (u.shape[2], None), "the inputs' gradients")
        u, scales = u @ components.to(u), scales.to(u)
    square = u.square().sum(2, keepdim=True)
    u = u / (square + (eps * square.detach().amax()).clamp_min(tiny)).sqrt()
    if scales is not None:
        u, floor = u * scales, (FLOOR * scales.square().amax()).clamp_min(tiny)
    # seen from the first member distances are the same, and those of near members keep their digits
    u = (u - u[:1].detach()).transpose(0, 1)  # (batch, members, r)
    inner = torch.bmm(u, u.detach().transpose(1, 2))  # <u_i, bar u_j>
    own = inner.diagonal(dim1=1, dim2=2)
    # |u_i|^2 has twice the gradient of <u_i, bar u_i>, at the same value; D_ii is exactly 0
    distance = (2 * own - own.detach())[:, :, None] + own.detach()[:, None, :] - 2 * inner
    distance = distance.clamp_min(0)  # (batch, i, j)
    middle = distance.detach().sort(1).values[:, (n_models - 1) // 2 : n_models // 2 + 1].mean(1)
    bandwidth = middle / math.log(max(n_models, 2)) + floor  # (batch, j)
    kernel = torch.logsumexp(-distance / bandwidth[:, None, :], dim=(0, 2))
    return (kernel - math.log(batch)).sum() / batch


@widened
def fit_input_components(
    inputs: Float[Tensor, " n *shape"], *, rank: int | None = None
) -> tuple[Float[Tensor, "d r"], Float[Tensor, " r"]]:
    """Return the directions in which inputs vary and by how much, for the repulsion.

    They are eigenvectors and roots of eigenvalues of the uncentred second moment
    ``X' X / (n - 1)``, largest first. With them members are told apart foremost by what
    they do along directions in which the data vary.

    Parameters
    ----------
    inputs : Tensor of shape (n, *shape)
        Training inputs as the networks see them (normalised), n at least 2.
    rank : int, optional
        How many directions to keep, from 1 to their number d, the entries of an input;
        None keeps all.

    Returns
    -------
    components : Tensor of shape (d, r)
        Orthonormal columns.
    scales : Tensor of shape (r,)
        Not negative, descending.

    Raises
    ------
    ValueError
        If ``inputs`` has fewer than 2 rows or is not finite, or ``rank`` is out of range.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import fit_input_components
    >>> components, scales = fit_input_components(torch.tensor([[0.0, 3.0], [4.0, 0.0]]))
    >>> components.abs(), scales
    (tensor([[1., 0.], [0., 1.]]), tensor([4., 3.]))
    """
    finite("inputs", floating("inputs", inputs))
    if inputs.ndim < 1 or len(inputs) < 2 or inputs.numel() == 0:
        raise ValueError(f"inputs must have shape (n, *shape), n at least 2, got {tuple(inputs.shape)}")
    x = inputs.detach().reshape(len(inputs), -1)
    d = x.shape[1]
    rank = d if rank is None else integer("rank", rank, 1)
    if rank > d:
        raise ValueError(f"rank must be at most the number of entries of an input, {d}, got {rank}")
    values, vectors = torch.linalg.eigh(x.T @ x / (len(x) - 1))
    return vectors.flip(1)[:, :rank], values.flip(0)[:rank].clamp_min(0).sqrt()


class RepulsiveEnsemble(nn.Module):
    """An ensemble of members that are evaluated in one vectorised call.

    Members of one structure, without hooks, and without batch statistics in train mode are
    stacked; others are called one after the other, with the same result. Each must start
    from weights of its own: identical members feel no force.

    Parameters
    ----------
    make_model : callable
        Returns a new module, with new random weights, at each call.
    n_models : int, default=10
        At least 1.

    Attributes
    ----------
    members : nn.ModuleList
        The members, each of which can be used alone.

    Raises
    ------
    ValueError
        If ``n_models`` is less than 1, ``make_model`` returns one module twice, or members
        give outputs of different sizes.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import FoRDELoss, RepulsiveEnsemble
    >>> ensemble = RepulsiveEnsemble(lambda: torch.nn.Linear(4, 3), n_models=5)
    >>> x, y = torch.randn(8, 4), torch.arange(8) % 3
    >>> FoRDELoss()(ensemble, x, y).backward()
    >>> ensemble(x).shape, ensemble.predict_proba(x).shape
    (torch.Size([5, 8, 3]), torch.Size([8, 3]))
    """

    def __init__(self, make_model: Callable[[], nn.Module], n_models: int = 10) -> None:
        super().__init__()
        members = [make_model() for _ in range(integer("n_models", n_models, 1))]
        if len({id(member) for member in members}) < len(members):
            raise ValueError("make_model must return a new module at each call, got one module twice")
        self.members = nn.ModuleList(members)

    def forward(self, x: Shaped[Tensor, " n *shape"]) -> Float[Tensor, "members n *outputs"]:
        """Return the outputs of all members.

        Parameters
        ----------
        x : Tensor of shape (n, *shape)
            Inputs, the same for all.

        Returns
        -------
        Tensor of shape (n_models, n, classes)
            Logits, or whatever a member returns.
        """
        return _evaluate(list(self.members), x)[0]

    def predict_proba(self, x: Shaped[Tensor, " n *shape"]) -> Float[Tensor, "n classes"]:
        """Return the mean of the members' softmaxes.

        Parameters
        ----------
        x : Tensor of shape (n, *shape)
            Inputs; call ``eval()`` first where the mode matters.

        Returns
        -------
        Tensor of shape (n, classes)
            Probabilities.
        """
        outputs = self(x)
        has_shape("the members' outputs", outputs, (len(self.members), len(x), None), "classes of x")
        return wide(outputs).softmax(-1).mean(0).to(x.dtype if x.is_floating_point() else outputs.dtype)


class FoRDELoss(nn.Module):
    """Cross-entropy of all members plus the repulsion of their input gradients, equation 3.

    The value belongs to the batch and the ensemble, so there is no ``reduction``. Weight
    decay, the prior of the particles, is the optimiser's.

    Parameters
    ----------
    components : Tensor of shape (d, r), optional
        Directions of the inputs, of `fit_input_components`: what the paper uses for images.
        None treats all inputs alike.
    scales : Tensor of shape (r,), optional
        Their lengths; given together with ``components``.
    repulsion : float, default=1.0
        Weight of R, at least 0; at 0 this is a deep ensemble, without a second backward.
    label_smoothing : float, default=0.0
        Of the cross-entropy, in [0, 1]; regression has none.

    Raises
    ------
    ValueError
        If ``components`` and ``scales`` do not fit, a parameter is out of range, there are
        no members, their outputs differ in size or do not fit ``target``, ``x`` is not
        floating (it has no gradient), or a member's output does not depend on ``x``.

    Notes
    -----
    1. Gradients are those of the force on each member with the others held still; they are
       not the gradient of the returned value.
    2. For a floating target the loss of a member is half the squared error, summed over
       outputs (a Gaussian of variance 1), and its input gradient that of the sum of outputs.
    3. ``eps`` is 1e-24 where the official code has 1e-12: small gradients keep direction.

    References
    ----------
    .. [1] Trinh, Heinonen, Acerbi, Kaski. Input-gradient space particle inference for
       neural network ensembles. ICLR 2024.

    Examples
    --------
    >>> import torch
    >>> from posterity.uncertainty import FoRDELoss, RepulsiveEnsemble, fit_input_components
    >>> x, y = torch.randn(32, 6), torch.arange(32) % 3
    >>> ensemble = RepulsiveEnsemble(lambda: torch.nn.Linear(6, 3), n_models=4)
    >>> criterion = FoRDELoss(*fit_input_components(x))
    >>> criterion(ensemble, x, y).backward()
    """

    components: Tensor | None
    scales: Tensor | None

    def __init__(
        self,
        components: Float[Tensor, "d r"] | None = None,
        scales: Float[Tensor, " r"] | None = None,
        *,
        repulsion: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if components is not None or scales is not None:
            with torch.inference_mode(False):  # what was found there serves training here
                components, scales = (x.clone() for x in _check_components(components, scales))
        self.register_buffer("components", components)
        self.register_buffer("scales", scales)
        self.repulsion = at_least("repulsion", repulsion, 0)
        self.label_smoothing = within("label_smoothing", label_smoothing, 0, 1)

    def forward(
        self,
        members: Sequence[nn.Module] | RepulsiveEnsemble | nn.ModuleList,
        x: Float[Tensor, " n *shape"],
        target: Shaped[Tensor, " n *outputs"],
    ) -> Float[Tensor, ""]:
        """Return the loss.

        Parameters
        ----------
        members : sequence of modules or RepulsiveEnsemble
            Each maps inputs to logits (n, classes), in the mode in which it is.
        x : Tensor of shape (n, *shape)
            Inputs.
        target : Tensor of shape (n,) or (n, k)
            Classes; or floating values of k outputs.

        Returns
        -------
        Tensor
            A scalar.
        """
        modules = list(members.members if isinstance(members, RepulsiveEnsemble) else members)
        if not modules:
            raise ValueError("members must be at least one module, got none")
        floating("x", x, "it has no gradient: embed or cast it first")
        if x.ndim < 1 or len(x) == 0:
            raise ValueError(f"x must have at least one row, got shape {tuple(x.shape)}")
        repel = self.repulsion > 0 and len(modules) > 1
        if repel and not torch.is_grad_enabled():  # as in validation: input gradients need a graph
            with torch.inference_mode(False):  # grad mode too
                return self(modules, x.clone(), target.clone()).detach()
        if repel and not x.requires_grad:
            x = x.detach().requires_grad_()
        outputs, inputs = _evaluate(modules, x)
        fit, score = self._fit(outputs, target)
        if not repel:
            return fit.to(x.dtype)
        found = torch.autograd.grad(score, inputs, create_graph=True, allow_unused=True)
        blind = [number for number, gradient in enumerate(found) if gradient is None]
        if blind:
            raise ValueError(f"members must depend on x, but the output of member {blind[0]} does not")
        gradients = found[0] if len(found) == 1 else torch.stack(found)
        apart = input_gradient_repulsion(wide(gradients), components=self.components, scales=self.scales)
        return (fit + self.repulsion * apart).to(x.dtype)

    def _fit(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum over members of the mean loss, and the score whose gradient is compared."""
        outputs, (n_models, n) = wide(outputs), outputs.shape[:2]
        if target.is_floating_point():
            has_shape("target", target, tuple(outputs.shape[1:]), "the members' outputs")
            return (outputs - target).square().sum() / (2 * n), outputs.sum()
        has_shape("target", target, (n,), "x")
        has_shape("members' outputs", outputs, (n_models, n, None), "classes")
        classes = outputs.shape[2]
        if target.dtype != torch.int64:
            raise ValueError(f"target must hold class indices of dtype int64, got dtype {target.dtype}")
        if target.device.type == "cpu" and not ((target >= 0) & (target < classes)).all():
            low, high = target.aminmax()
            raise ValueError(
                f"target must be in 0..{classes - 1} for the members, got values from {low} to {high}"
            )
        every = target.repeat(n_models)
        mean = F.cross_entropy(outputs.flatten(0, 1), every, label_smoothing=self.label_smoothing)
        return n_models * mean, outputs.flatten(0, 1).gather(1, every[:, None]).sum()


def _check_components(components: Tensor | None, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    if components is None or scales is None:
        missing = "components" if components is None else "scales"
        raise ValueError(f"components and scales must be given together, got no {missing}")
    has_shape("components", floating("components", components), (None, None))
    has_shape("scales", floating("scales", scales), (components.shape[1],), "the columns of components")
    return components, scales


def _evaluate(members: list[nn.Module], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return all outputs (members, n, ...) and what they were computed from.

    That is one stack of inputs, whose gradient has all members in it, or one input a member.
    """
    state = _stack(members)
    if state is not None:
        inputs = x.expand(len(members), *x.shape)
        try:
            return vmap(
                lambda own, x: functional_call(members[0], own, (x,)), randomness="different"
            )(state, inputs), [inputs]  # fmt: skip
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            pass  # vmap cannot follow control flow on values; any other error the loop meets again
    each = [x.view_as(x) for _ in members]
    outputs = [member(own) for member, own in zip(members, each, strict=True)]
    for number, output in enumerate(outputs):
        if output.shape != outputs[0].shape:
            raise ValueError(
                f"members must have outputs of one size, got {tuple(outputs[0].shape)} of member 0 "
                f"and {tuple(output.shape)} of member {number}"
            )
    return torch.stack(outputs), each


def _stack(members: list[nn.Module]) -> dict[str, Tensor] | None:
    """Return the members' weights in stacks, if they differ in nothing else."""
    layouts = [_layout(member) for member in members]
    parts, tensors = layouts[0]
    for part in parts:
        if part.training and part._buffers:  # statistics of the batch are written to the member itself
            return None
    settings = [[(k, v) for k, v in vars(part).items() if not k.startswith("_")] for part in parts]
    for others, named in layouts:
        if named.keys() != tensors.keys() or len(others) != len(parts):
            return None
        for part, other, wanted in zip(parts, others, settings, strict=True):
            if type(part) is not type(other) or len(vars(part)) != len(vars(other)):
                return None
            if other._forward_hooks or other._forward_pre_hooks:  # of which a stack has those of the first
                return None
            for key, value in wanted:
                own = vars(other).get(key)
                plain = isinstance(value, bool | int | float | str | tuple)
                if own is not value and not (plain and type(own) is type(value) and own == value):
                    return None
        if any(named[k].shape != t.shape or named[k].dtype != t.dtype for k, t in tensors.items()):
            return None
    return {name: torch.stack([named[name] for _, named in layouts]) for name in tensors}


def _layout(member: nn.Module) -> tuple[list[nn.Module], dict[str, Tensor]]:
    """Return a member's layers and its weights by name."""
    parts, tensors = [], {}
    for prefix, part in member.named_modules():
        parts.append(part)
        for source in (part._parameters, part._buffers):
            for name, tensor in source.items():
                if tensor is not None:
                    tensors[f"{prefix}.{name}" if prefix else name] = tensor
    return parts, tensors
