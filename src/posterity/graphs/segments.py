"""Two operations on groups of rows: a hard choice with a soft gradient, and a sum between mean and sum.

Of each group of candidates with logits a one is drawn, and weighed by a 1 that has a gradient,

    argmax_c (a_c + g_c),   g Gumbel noise,      w = 1 + s - stopgrad(s),                    (1)

where s is the softmax of (a + g) / temperature at the one that was drawn. So what is drawn
follows the softmax of a, and training sees how its chance depends on a. Values v_1 .. v_n of a
group are gathered as

    mean(v) log2(n + 1),                                                                     (2)

between a mean, which does not count, and a sum.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posterity._checks import at_least, floating, has_shape, integer
from posterity._precision import wide
from posterity._random import draw_device
from posterity.graphs._graph import check_index, uncompiled

__all__ = ["log_aggregate", "straight_through_choice"]


def straight_through_choice(
    logits: Float[Tensor, " candidates"], index: Int[Tensor, " candidates"], num_groups: int, *,
    temperature: float = 2 / 3, generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, " groups"], Float[Tensor, " groups"]]:  # fmt: skip
    """Return one candidate of each group, drawn by its softmax, and a weight for the gradient.

    Parameters
    ----------
    logits : Tensor
        Of the candidates.
    index : Tensor
        Sorted group of each; no group is empty.
    num_groups : int
        How many.
    temperature : float, default=2/3
        Of the soft choice, positive; it changes the gradient, and not the law of the draw.
    generator : torch.Generator, optional
        Decides.

    Returns
    -------
    tuple of Tensor
        Positions in ``logits``, and weights that are 1 and have the gradient of the chosen
        candidate's soft probability.

    Raises
    ------
    ValueError
        If the arguments do not fit, or (on the CPU, where reading is free) a group is empty.

    References
    ----------
    .. [1] Jang, Gu, Poole. Categorical reparameterization with Gumbel-softmax. ICLR 2017.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import straight_through_choice
    >>> logits = torch.tensor([0.0, 50.0, 3.0])
    >>> straight_through_choice(logits, torch.tensor([0, 0, 1]), 2)
    (tensor([1, 2]), tensor([1., 1.]))
    """
    has_shape("logits", floating("logits", logits), (None,))
    integer("num_groups", num_groups, 0)
    index = check_index("index", index, logits.shape, num_groups, "groups", source="logits")
    at_least("temperature", temperature, 0, strict=True)
    if logits.device.type == "cpu":
        _check_groups(index, num_groups)
    return _choose(logits, index, num_groups, temperature, generator)


@uncompiled
def _check_groups(index: Tensor, num_groups: int) -> None:
    empty = torch.bincount(index, minlength=num_groups) == 0
    if bool(empty.any()):
        raise ValueError(f"index must leave no group empty, got none of group {int(empty.nonzero()[0])}")


def _choose(
    logits: Tensor, index: Tensor, num_groups: int, temperature: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    dtype, logits = logits.dtype, wide(logits)
    uniform = torch.empty(
        logits.shape, dtype=logits.dtype, device=draw_device(generator, logits.device)
    ).uniform_(generator=generator)  # torch.rand with a generator has no compiled form
    uniform = uniform.to(logits.device)
    noisy = logits - (-uniform.clamp_min(torch.finfo(logits.dtype).tiny).log()).clamp_min(1e-30).log()
    highest = noisy.new_full((num_groups,), -torch.inf).scatter_reduce(0, index, noisy.detach(), "amax")
    place = torch.arange(len(logits), device=logits.device)
    place = torch.where(noisy.detach() < highest[index], len(logits), place)  # so that NaN is not below
    chosen = place.new_full((num_groups,), len(logits)).scatter_reduce(0, index, place, "amin")
    power = ((noisy - highest[index]) / temperature).exp()
    total = power.new_zeros(num_groups).index_add(0, index, power)
    soft = power[chosen] / total
    return chosen, (1 + (soft - soft.detach())).to(dtype)  # exactly 1


def log_aggregate(
    values: Float[Tensor, "rows features"], index: Int[Tensor, " rows"], num_groups: int,
    weight: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "groups features"]:  # fmt: skip
    """Return, for each group, its mean times log2(count + 1): between a mean and a sum.

    Parameters
    ----------
    values : Tensor
        Rows.
    index : Tensor
        Group of each row.
    num_groups : int
        How many; an empty one gives 0.
    weight : Tensor, optional
        Of each row, by default 1; the count is their sum, at least 1, without gradient.

    Returns
    -------
    Tensor
        One row a group.

    Raises
    ------
    ValueError
        If the arguments do not fit.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import log_aggregate
    >>> log_aggregate(torch.ones(3, 1), torch.zeros(3, dtype=torch.long), 1)
    tensor([[2.]])
    """
    has_shape("values", floating("values", values), (None, None))
    integer("num_groups", num_groups, 0)
    index = check_index("index", index, (len(values),), num_groups, "groups", source="values")
    if weight is not None:
        has_shape("weight", floating("weight", weight), (len(values),), "values")
    return _aggregate(values, index, num_groups, weight, "log")


def _aggregate(values: Tensor, index: Tensor, num_groups: int, weight: Tensor | None, reduce: str) -> Tensor:
    dtype, values = values.dtype, wide(values)
    weight = None if weight is None else weight.to(values.dtype)
    weighted = values if weight is None else values * weight[:, None]
    total = values.new_zeros(num_groups, values.shape[1]).index_add(0, index, weighted)
    if reduce != "sum":
        ones = values.new_ones(len(index)) if weight is None else weight.detach()
        count = values.new_zeros(num_groups).index_add(0, index, ones).clamp_min(1)[:, None]
        total = total / count if reduce == "mean" else total * ((count + 1).log2() / count)
    return total.to(dtype)
