"""PsCo: pseudo-supervised tasks from unlabelled data, out of the queue of momentum contrast.

Each image of a batch is a class, and its shots are found among past embeddings: of similarities S of the batch's
keys with the queue a few Sinkhorn steps make assignments whose columns are nearly even, and the largest entries of
row i are the shots s_i1 .. s_iK of image i. With queries p the meta loss is that of an n-way K-shot task,

    mean_i [ log sum over all shots exp(p_i.s / t) - p_i . mean_k s_ik / t ] ,                     (1)

and it is added to the contrast of query and key. At test a few labelled images make prototypes in the same way.
"""

import copy
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._branches import follow, momentum_copy, projection_head
from posterity._checks import at_least, class_indices, floating, has_shape, integer, one_of, within
from posterity._models import evaluating
from posterity._precision import unit_rows, wide, widened
from posterity._random import draw_device
from posterity.representation._pairs import joint_views
from posterity.representation.few_shot import prototype_scores

__all__ = ["PsCo", "PsCoLoss", "PsCoTerms", "adapt_few_shot", "sinkhorn_assign"]


@torch.no_grad()
@widened
def sinkhorn_assign(
    similarity: Float[Tensor, "n m"], *, epsilon: float = 0.05, n_iter: int = 3
) -> Float[Tensor, "n m"]:
    """Return assignments of rows to columns whose columns are nearly even: a few Sinkhorn steps, columns first.

    Parameters
    ----------
    similarity : Tensor of shape (n, m)
        Of rows and columns; of any size.
    epsilon : float, default=0.05
        Positive; similarities are divided by it.
    n_iter : int, default=3
        Of a step over columns and one over rows.

    Returns
    -------
    Tensor of shape (n, m)
        Rows sum to 1, columns to about n / m. No gradient. Computed in logarithms.

    Raises
    ------
    ValueError
        If an argument does not fit.

    References
    ----------
    .. [1] Jang, Lee, Shin. Unsupervised Meta-learning via Few-shot Pseudo-supervised Contrastive Learning.
       ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import sinkhorn_assign
    >>> torch.allclose(sinkhorn_assign(torch.randn(4, 9)).sum(1), torch.ones(4))
    True
    """
    has_shape("similarity", floating("similarity", similarity), (None, None))
    if 0 in similarity.shape:
        raise ValueError(f"similarity must have a row and a column, got shape {tuple(similarity.shape)}")
    at_least("epsilon", epsilon, 0, strict=True)
    integer("n_iter", n_iter, 1)
    log = similarity / epsilon
    for _ in range(n_iter):  # what all columns and all rows have in common drops out
        log = log - log.logsumexp(0, keepdim=True)
        log = log - log.logsumexp(1, keepdim=True)
    return log.exp()


class PsCoTerms(NamedTuple):
    """The parts of the loss ``moco + meta_weight * meta``.

    Attributes
    ----------
    moco : Tensor of shape ()
        Contrast of each query with its key and the queue.
    meta : Tensor of shape ()
        Equation (1).
    """

    moco: Tensor
    meta: Tensor


class PsCoLoss(nn.Module):
    """Momentum contrast and the pseudo-supervised task, over a queue of past keys.

    Parameters
    ----------
    dim : int
        Width of embeddings.
    queue_size : int, default=16384
        Keys that are kept. They start at random, so that shots mean little for as many batches as fill it.
    n_shots : int, default=4
        K, at most ``queue_size``.
    temperature, meta_temperature : float, default=0.2, 1.0
        Of the contrast, and t of (1).
    meta_weight : float, default=1.0
        Of the pseudo-supervised task; 0 is momentum contrast alone.
    epsilon, n_iter
        As for `sinkhorn_assign`.
    sampling : {"topk", "multinomial"}, default="topk"
        Whether shots are the largest assignments, or drawn by them.

    Attributes
    ----------
    queue : Tensor of shape (queue_size, dim)
        Unit rows.
    pointer : Tensor of shape ()
        Where the next key goes.

    Raises
    ------
    ValueError
        If a parameter is out of range; at the call if query and key are not (batch, dim), or more than the queue.

    Notes
    -----
    Departs from the official code: 1. Sinkhorn steps are made in logarithms where exp could leave the range of
    float32. 2. A batch of any size wraps around the end of the queue, whose length need not be a multiple of it.
    With ``torch.distributed`` the batch is that of all processes: each must start from the same queue and generator.

    References
    ----------
    .. [1] Jang, Lee, Shin. Unsupervised Meta-learning via Few-shot Pseudo-supervised Contrastive Learning.
       ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import PsCoLoss
    >>> loss = PsCoLoss(16, queue_size=64)
    >>> query, key = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
    >>> loss(query, key).backward()
    """

    queue: Tensor
    pointer: Tensor

    def __init__(
        self, dim: int, *, queue_size: int = 16384, n_shots: int = 4, temperature: float = 0.2,
        meta_temperature: float = 1.0, meta_weight: float = 1.0, epsilon: float = 0.05, n_iter: int = 3,
        sampling: Literal["topk", "multinomial"] = "topk",
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim, self.queue_size = integer("dim", dim, 1), integer("queue_size", queue_size, 1)
        self.n_shots = integer("n_shots", n_shots, 1)
        if n_shots > queue_size:
            raise ValueError(f"n_shots must be at most queue_size={queue_size}, got {n_shots}")
        self.temperature = at_least("temperature", temperature, 0, strict=True)
        self.meta_temperature = at_least("meta_temperature", meta_temperature, 0, strict=True)
        self.meta_weight = at_least("meta_weight", meta_weight, 0)
        self.epsilon, self.n_iter = at_least("epsilon", epsilon, 0, strict=True), integer("n_iter", n_iter, 1)
        self.sampling = one_of("sampling", sampling, ("topk", "multinomial"))
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def forward(
        self, query: Float[Tensor, "n dim"], key: Float[Tensor, "n dim"], *, update: bool = True,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:  # fmt: skip
        """Return the loss of a batch, and let its keys enter the queue.

        Parameters
        ----------
        query : Tensor of shape (n, dim)
            Of the online branch, of any length.
        key : Tensor of shape (n, dim)
            Of the momentum branch, row i the same image; no gradient enters it.
        update : bool, default=True
            Whether the keys enter the queue afterwards.
        generator : torch.Generator, optional
            For ``sampling="multinomial"``.

        Returns
        -------
        Tensor of shape ()
        """
        query, key = self._joint(query, key)
        value = self._moco(query, key)
        if self.meta_weight:
            value = value + self.meta_weight * self._meta(query, key, generator)
        if update:
            self._enter(key)
        return value

    def terms(
        self, query: Float[Tensor, "n dim"], key: Float[Tensor, "n dim"], *, generator: torch.Generator | None = None
    ) -> PsCoTerms:  # fmt: skip
        """Return both parts; the queue stays.

        Parameters
        ----------
        query, key, generator
            As for the call.

        Returns
        -------
        PsCoTerms
        """
        query, key = self._joint(query, key)
        return PsCoTerms(self._moco(query, key), self._meta(query, key, generator))

    @torch.no_grad()
    def shots(
        self, key: Float[Tensor, "n dim"], *, generator: torch.Generator | None = None
    ) -> Int[Tensor, "n k"]:
        """Return the places in the queue of each key's shots.

        Parameters
        ----------
        key : Tensor of shape (n, dim)
        generator : torch.Generator, optional

        Returns
        -------
        Tensor of shape (n, n_shots)
        """
        has_shape("key", floating("key", key), (None, self.dim))
        return self._shots(key, generator)

    def _joint(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        query, key = joint_views(query, key, least=1, names=("query", "key"))
        has_shape("query", query, (None, self.dim))
        if len(query) > self.queue_size:
            raise ValueError(f"query must have at most queue_size={self.queue_size} rows, got {len(query)}")
        # squares of what is huge are no numbers; a power of two, one for both terms, rounds nothing
        largest = wide(query.detach()).abs().amax(1, keepdim=True)
        power = torch.frexp(largest).exponent.to(largest).clamp(-120, 120)
        return (query / torch.exp2(power)).to(query.dtype), key.detach()

    @widened
    def _moco(self, query: Tensor, key: Tensor) -> Tensor:
        p, z = F.normalize(query, dim=1) / self.temperature, unit_rows(key)
        own, others = (p * z).sum(1), p @ self.queue.to(p.dtype).T
        return (torch.logaddexp(own, others.logsumexp(1)) - own).mean()

    @widened
    def _meta(self, query: Tensor, key: Tensor, generator: torch.Generator | None) -> Tensor:
        p = F.normalize(query, dim=1) / self.meta_temperature
        shots = self.queue.to(p.dtype)[self._shots(key, generator)]  # (n, k, dim)
        return ((p @ shots.flatten(0, 1).T).logsumexp(1) - (p * shots.mean(1)).sum(1)).mean()

    @torch.no_grad()
    @widened
    def _shots(self, key: Tensor, generator: torch.Generator | None) -> Tensor:
        similarity = unit_rows(key) @ self.queue.to(key.dtype).T
        assign = sinkhorn_assign if self.epsilon < 1 / 30 else _scaled  # exp would leave the range of float32
        assigned = assign(similarity, epsilon=self.epsilon, n_iter=self.n_iter)
        if self.sampling == "topk":
            return assigned.topk(self.n_shots, dim=1).indices
        where = draw_device(generator, key.device)
        odds = assigned.clamp_min(torch.finfo(assigned.dtype).tiny).to(where)
        return torch.multinomial(odds, self.n_shots, generator=generator).to(key.device)

    @torch.inference_mode(False)  # a queue made in it could not be trained with
    @torch.no_grad()
    def _enter(self, key: Tensor) -> None:
        n = len(key)
        place = (self.pointer + torch.arange(n, device=self.queue.device)) % self.queue_size
        # not in place: the backward pass needs the old queue
        self.queue = self.queue.index_copy(0, place, unit_rows(key).to(self.queue.dtype))
        self.pointer.copy_((self.pointer + n) % self.queue_size)


def _scaled(cosines: Tensor, epsilon: float, n_iter: int) -> Tensor:
    """Return `sinkhorn_assign` of cosines: factors of rows and columns, so that a step is two products."""
    kernel = ((cosines - 1) / epsilon).exp_()
    rows, columns = kernel.new_ones(len(kernel)), kernel.new_ones(kernel.shape[1])
    for _ in range(n_iter):
        columns = 1 / (rows @ kernel)
        rows = 1 / (kernel @ columns)
    return kernel.mul_(columns).mul_(rows[:, None])


class PsCo(nn.Module):
    """An encoder that learns from two views of unlabelled images, and classifies from a few labels.

    Parameters
    ----------
    backbone : nn.Module
        Of images to features (n, backbone_dim).
    backbone_dim : int
        Width of the features.
    hidden_dim, dim : int, default=4096, 256
        Of projector and predictor: units between their layers, and width of embeddings.
    momentum : float, default=0.99
        What stays of the momentum branch in a step, in [0, 1].
    predictor : bool, default=True
        Whether the online branch has a second head.
    **loss_options
        Of `PsCoLoss`.

    Attributes
    ----------
    projector, predictor, target_backbone, target_projector : nn.Module
    criterion : PsCoLoss

    Raises
    ------
    ValueError
        If an argument is out of range.

    References
    ----------
    .. [1] Jang, Lee, Shin. Unsupervised Meta-learning via Few-shot Pseudo-supervised Contrastive Learning.
       ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import PsCo
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16))
    >>> model = PsCo(net, 16, hidden_dim=32, dim=8, queue_size=32)
    >>> model.loss(torch.rand(8, 1, 8, 8), torch.rand(8, 1, 8, 8)).backward()  # a strong and a weak view
    >>> support, labels, query = torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1]), torch.rand(6, 1, 8, 8)
    >>> model.predict(support, labels, query).shape
    torch.Size([6, 2])
    """

    def __init__(
        self, backbone: nn.Module, backbone_dim: int, *, hidden_dim: int = 4096, dim: int = 256,
        momentum: float = 0.99, predictor: bool = True, **loss_options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone_dim = integer("backbone_dim", backbone_dim, 1)
        integer("hidden_dim", hidden_dim, 1)
        integer("dim", dim, 1)
        self.momentum = within("momentum", momentum, 0, 1)
        self.backbone = backbone
        self.projector = projection_head((backbone_dim, hidden_dim, dim), last_norm=True)
        self.predictor = projection_head((dim, hidden_dim, dim)) if predictor else nn.Identity()
        self.target_backbone, self.target_projector = momentum_copy(backbone), momentum_copy(self.projector)
        self.criterion = PsCoLoss(dim, **loss_options)

    def loss(
        self, x1: Tensor, x2: Tensor, *, update: bool | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, ""]:
        """Move the momentum branch, then return the loss of two views and let the keys enter the queue.

        Parameters
        ----------
        x1, x2 : Tensor of shape (n, ...)
            A strong and a weak view of the same images: queries and keys.
        update : bool, optional
            Whether branch and queue move; by default in training mode only.
        generator : torch.Generator, optional

        Returns
        -------
        Tensor of shape ()
        """
        if len(x1) > (most := self.criterion.queue_size) or len(x2) != len(x1):
            got = f"got {len(x1)} and {len(x2)}"
            raise ValueError(f"x2 must have as many images as x1, and queue_size={most} at most, {got}")
        update = self.training if update is None else update
        if update:
            follow(self.target_backbone, self.backbone, self.momentum)
            follow(self.target_projector, self.projector, self.momentum)
        query = self.predictor(self.projector(self._features(self.backbone, x1)))
        with torch.no_grad():
            key = self.target_projector(self._features(self.target_backbone, x2))
        return self.criterion(query, key, update=update, generator=generator)

    def _features(self, backbone: nn.Module, x: Tensor) -> Tensor:
        found = backbone(x)
        if not isinstance(found, Tensor) or found.shape != (len(x), self.backbone_dim):
            came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"backbone must return ({len(x)}, backbone_dim={self.backbone_dim}), got {came}")
        return found

    @torch.no_grad()
    def embed(self, x: Tensor, *, role: Literal["query", "support"] = "support") -> Float[Tensor, "n dim"]:
        """Return embeddings of norm 1 of the online branch, in eval mode.

        Parameters
        ----------
        x : Tensor of shape (n, ...)
        role : {"support", "query"}, default="support"
            A query goes through the predictor too.

        Returns
        -------
        Tensor of shape (n, dim)
        """
        one_of("role", role, ("query", "support"))
        with evaluating(self):
            z = self.projector(self._features(self.backbone, x))
            return F.normalize(self.predictor(z) if role == "query" else z, dim=1)

    def predict(
        self, support: Tensor, support_labels: Int[Tensor, " s"], query: Tensor
    ) -> Float[Tensor, "n_query n_way"]:
        """Return cosines of queries with the prototypes of a few labelled images.

        Parameters
        ----------
        support : Tensor of shape (n_support, ...)
        support_labels : Tensor of shape (n_support,)
        query : Tensor of shape (n_query, ...)

        Returns
        -------
        Tensor of shape (n_query, n_way)
            Classes in sorted order.
        """
        return prototype_scores(self.embed(query, role="query"), self.embed(support), support_labels)

    def adapt(self, support: Tensor, labels: Int[Tensor, " s"]) -> "PsCo":
        """Return `adapt_few_shot` of this model, at its defaults."""
        return adapt_few_shot(self, support, labels)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the online branch."""
        for part in (self.backbone, self.projector, self.predictor):
            yield from part.parameters()


@torch.inference_mode(False)
@torch.enable_grad()
def adapt_few_shot(
    model: PsCo, support: Tensor, labels: Int[Tensor, " s"], *, n_steps: int = 50, lr: float = 0.01,
    momentum: float = 0.9, weight_decay: float = 1e-3,
) -> PsCo:  # fmt: skip
    """Adapt projector and predictor to a task of another domain, the backbone frozen.

    Parameters
    ----------
    model : PsCo
        Not changed.
    support : Tensor of shape (n_support, ...)
        The task's samples, as the backbone takes them.
    labels : Tensor of shape (n_support,)
        Two classes at least.
    n_steps : int, default=50
        Of SGD on all of the support.
    lr, momentum, weight_decay : float, default=0.01, 0.9, 1e-3
        Of SGD.

    Returns
    -------
    PsCo
        A copy, in eval mode.

    Raises
    ------
    ValueError
        If an argument does not fit.

    References
    ----------
    .. [1] Jang, Lee, Shin. Unsupervised Meta-learning via Few-shot Pseudo-supervised Contrastive Learning.
       ICLR 2023. Section 3.3.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import PsCo, adapt_few_shot
    >>> model = PsCo(torch.nn.Linear(6, 6), 6, hidden_dim=8, dim=4, queue_size=16)
    >>> adapted = adapt_few_shot(model, torch.randn(6, 6), torch.arange(6) % 2, n_steps=3)
    """
    if not isinstance(model, PsCo):
        raise ValueError(f"model must be a PsCo, got {type(model).__name__}")
    class_indices("labels", labels, len(support))
    if len(labels.unique()) < 2:
        raise ValueError("labels must have at least two classes")
    integer("n_steps", n_steps, 1)
    at_least("lr", lr, 0, strict=True)
    within("momentum", momentum, 0, 1, open_high=True)
    at_least("weight_decay", weight_decay, 0)
    own = copy.deepcopy(model)
    with evaluating(own), torch.no_grad():
        features = own._features(own.backbone, support.clone() if support.is_inference() else support)
    given, features = features.dtype, wide(features)  # small steps would be lost in half precision
    heads = [part.to(features.dtype).train() for part in (own.projector, own.predictor)]
    trained = [p.requires_grad_() for part in heads for p in part.parameters()]
    opt = torch.optim.SGD(trained, lr=lr, momentum=momentum, weight_decay=weight_decay)
    alike = labels[:, None] == labels
    for _ in range(n_steps):
        raw = own.projector(features)
        z, p = F.normalize(raw, dim=1), F.normalize(own.predictor(raw), dim=1)
        similar = p @ z.T / own.criterion.meta_temperature
        value = (similar.logsumexp(1) - (similar * alike).sum(1) / alike.sum(1)).mean()
        opt.zero_grad()
        value.backward()
        opt.step()
    nn.ModuleList(heads).to(given)
    return own.eval()
