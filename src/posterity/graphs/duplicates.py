"""Duplicate nodes, which tell whether the test has been seen in training.

Nodes with equal neighbours and an equal label, one of them in training, give the answer
away. Such groups are found by sums of random weights over each node's neighbours, equal for
equal sets, and what only collides is told apart by comparing the sets themselves.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from posterity._checks import floating, has_shape, integer, one_of
from posterity.graphs._graph import check_edges, check_index

__all__ = ["DuplicateReport", "duplicate_leakage", "find_duplicate_nodes", "remove_duplicate_nodes"]

Direction = Literal["out", "in", "both"]


@dataclass(frozen=True)
class DuplicateReport:
    """What duplicates there are, and how many of the test's answers they give away.

    Attributes
    ----------
    num_groups : int
        Groups of more than one node.
    num_nodes : int
        Nodes in them.
    num_surplus : int
        Nodes that would go if each group kept one.
    leaked_share : float or Tensor
        Share of test nodes with a twin in training; one value a split.
    """

    num_groups: int
    num_nodes: int
    num_surplus: int
    leaked_share: float | Tensor


def find_duplicate_nodes(
    edge_index: Int[Tensor, "2 edges"],
    num_nodes: int,
    *,
    y: Int[Tensor, " nodes"] | None = None,
    x: Float[Tensor, "nodes features"] | None = None,
    direction: Direction = "out",
) -> Int[Tensor, " nodes"]:
    """Return the group of each node: equal neighbour sets, and equal labels and features if given.

    Parameters
    ----------
    edge_index : Tensor of shape (2, edges)
        Edges as listed, row 0 to row 1; repeats count once, a self-loop makes a node its own neighbour.
    num_nodes : int
        How many nodes there are.
    y : Tensor of shape (nodes,), optional
        Labels that must agree.
    x : Tensor of shape (nodes, features), optional
        Features that must agree bit for bit.
    direction : {"out", "in", "both"}, default="out"
        Whether to compare the nodes a node sends to, those it receives from, or both.

    Returns
    -------
    Tensor
        Shape (nodes,): ids from 0 in the order of first members. A node without neighbours
        in ``direction`` is alone.

    Raises
    ------
    ValueError
        If the arguments do not fit or ``direction`` is unknown.

    Examples
    --------
    Nodes 0 and 1 both send to 2 and 3:

    >>> import torch
    >>> from posterity.graphs import find_duplicate_nodes
    >>> find_duplicate_nodes(torch.tensor([[0, 0, 1, 1, 2], [2, 3, 3, 2, 3]]), 4)
    tensor([0, 0, 1, 2])
    """
    n = integer("num_nodes", num_nodes, 1)
    edge_index = check_edges(edge_index, n, source="num_nodes", read=True)
    one_of("direction", direction, ("out", "in", "both"))
    node = torch.arange(n, device=edge_index.device)
    # All that must agree becomes one set of codes a node: neighbours, label, features.
    sender, receiver = edge_index
    rows = {"out": [sender], "in": [receiver], "both": [sender, receiver]}[direction]
    codes = {"out": [receiver], "in": [sender], "both": [receiver, sender + n]}[direction]
    alone = torch.bincount(torch.cat(rows), minlength=n) == 0
    rows.append(node[alone])
    codes.append(2 * n + node[alone])
    if y is not None:
        y = check_index("y", y, (n,), source="the nodes", read=True)
        rows.append(node)
        codes.append(3 * n + torch.unique(y, return_inverse=True)[1])
    if x is not None and has_shape("x", floating("x", x), (n, None), "num_nodes").shape[1]:
        rows.append(node)
        bits = x.detach().contiguous().view(torch.uint8)
        codes.append(4 * n + torch.unique(bits, dim=0, return_inverse=True)[1].to(node.device))
    pairs = torch.unique(torch.cat(rows) * (5 * n) + torch.cat(codes))
    row = pairs // (5 * n)
    code = pairs - row * (5 * n)
    size = torch.bincount(row, minlength=n)
    start = size.cumsum(0) - size

    # Equal sets have equal sums of random weights; the rare false friends are told apart below.
    hashes = _random_weights(5 * n, row.device).index_select(0, code)
    a, b = size.new_zeros(n, 2).index_add_(0, row, hashes).T
    a, b = torch.unique(a, return_inverse=True)[1], torch.unique(b, return_inverse=True)[1]
    bucket = torch.unique(a * n + b, return_inverse=True)[1]
    first, left = node.clone(), node
    while len(left):
        lowest = node.new_full((n,), n).scatter_reduce(0, bucket[left], left, "amin")[bucket[left]]
        same = size[left] == size[lowest]
        a, b = left[same], lowest[same]
        place = torch.arange(int(size[a].sum()), device=a.device)
        owner = torch.arange(len(a), device=a.device).repeat_interleave(size[a])
        place = place - (size[a].cumsum(0) - size[a])[owner]
        differ = (
            code[start[a].index_select(0, owner) + place] != code[start[b].index_select(0, owner) + place]
        )
        same[same.clone()] = torch.bincount(owner[differ], minlength=len(a)) == 0
        first[left[same]] = lowest[same]
        left = left[~same]
    return torch.unique(first, return_inverse=True)[1]


def duplicate_leakage(
    groups: Int[Tensor, " nodes"], train_mask: Bool[Tensor, "*splits nodes"], test_mask: Bool[Tensor, "*splits nodes"]
) -> DuplicateReport:  # fmt: skip
    """Return what duplicates there are and the share of test nodes with a training twin.

    Parameters
    ----------
    groups : Tensor of shape (nodes,)
        Of `find_duplicate_nodes`.
    train_mask : Tensor of shape (nodes,) or (splits, nodes)
        The nodes whose labels are trained on.
    test_mask : Tensor of the same shape
        The nodes that are tested.

    Returns
    -------
    DuplicateReport
        Its ``leaked_share`` is a float for one split, else a tensor of shape (splits,).

    Raises
    ------
    ValueError
        If shapes do not fit, or masks overlap or are empty.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import duplicate_leakage
    >>> train, test = torch.tensor([True, False, True, False]), torch.tensor([False, True, False, True])
    >>> duplicate_leakage(torch.tensor([0, 0, 1, 2]), train, test)
    DuplicateReport(num_groups=1, num_nodes=2, num_surplus=1, leaked_share=0.5)
    """
    groups = check_index("groups", groups, (None,), read=True)
    splits = train_mask.shape[:-1] if train_mask.ndim == 2 else ()
    train, test = _check_masks({"train_mask": train_mask, "test_mask": test_mask}, (*splits, len(groups)))
    _, group, count = torch.unique(groups, return_inverse=True, return_counts=True)
    train, test = (mask if splits else mask[None] for mask in (train, test))
    seen = torch.zeros(len(train), len(count), dtype=torch.long, device=group.device)
    seen.index_add_(1, group, train.long())
    share = ((seen[:, group] > 0) & test).sum(1) / test.sum(1)
    twins = count[count > 1]
    return DuplicateReport(
        len(twins), int(twins.sum()), len(group) - len(count), share if splits else float(share)
    )


def remove_duplicate_nodes(
    edge_index: Int[Tensor, "2 edges"],
    num_nodes: int,
    *,
    y: Int[Tensor, " nodes"] | None = None,
    x: Float[Tensor, "nodes features"] | None = None,
    direction: Direction = "out",
) -> tuple[Int[Tensor, " kept"], Int[Tensor, "2 kept_edges"]]:
    """Return the nodes that stay when each group keeps its best connected, and their edges.

    Parameters
    ----------
    edge_index, num_nodes, y, x, direction
        As for `find_duplicate_nodes`.

    Returns
    -------
    kept : Tensor of shape (kept,)
        Of each group the node of largest degree, in and out, or the first of several; ascending.
    edge_index : Tensor of shape (2, kept_edges)
        The edges among them, which count the kept nodes from 0.

    Raises
    ------
    ValueError
        As for `find_duplicate_nodes`.

    Notes
    -----
    Where others are connected to a removed node, they lose a neighbour and may become equal
    in turn: then call it again. A node that only repeats another's neighbours is sent to by none.
    """
    groups = find_duplicate_nodes(edge_index, num_nodes, y=y, x=x, direction=direction)
    once = torch.unique(edge_index, dim=1)
    degree = torch.bincount(once.flatten(), minlength=num_nodes)
    top = degree.new_zeros(num_nodes).scatter_reduce(0, groups, degree, "amax")
    best = (degree == top[groups]).nonzero()[:, 0]
    kept = groups.new_full((num_nodes,), num_nodes).scatter_reduce(0, groups[best], best, "amin")
    kept = kept[kept < num_nodes].sort().values
    place = edge_index.new_full((num_nodes,), -1)
    place[kept] = torch.arange(len(kept), dtype=place.dtype, device=place.device)
    edges = place[edge_index]
    return kept, edges[:, (edges >= 0).all(0)]


def _random_weights(n: int, device: torch.device) -> Tensor:
    """Return two 64-bit numbers for each code; what is exact is decided elsewhere."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (n, 2), generator=generator).to(device)


def _check_masks(masks: dict[str, Tensor], shape: tuple[int, ...], where: str = "") -> list[Tensor]:
    taken: Tensor | None = None
    for name, mask in masks.items():
        has_shape(f"{name}{where}", mask, shape)
        if mask.dtype != torch.bool:
            raise ValueError(f"{name}{where} must be a mask of bool, got dtype {mask.dtype}")
        if not bool(mask.any(-1).all()):
            raise ValueError(f"{name}{where} must not be empty")
        if taken is not None and bool((taken & mask).any()):
            raise ValueError(f"{name}{where} must not overlap the other masks")
        taken = mask if taken is None else taken | mask
    return list(masks.values())
