"""Hidden tokens: what a masked language model has to say again."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from posterity._checks import integer, within
from posterity._random import draw_device
from posterity.transfer.integration import token_batch

__all__ = ["mask_tokens"]

NOT_SCORED = -100  # a label, as torch's losses know it


def mask_tokens(
    input_ids: Int[Tensor, "n L"],
    *,
    mask_token_id: int,
    vocab_size: int,
    special_ids: Sequence[int] = (),
    probability: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "n L"], Int[Tensor, "n L"]]:
    """Hide tokens for masked language modelling: of those chosen 80 % by the mask, 10 % by any token, 10 % not at all.

    Parameters
    ----------
    input_ids : Tensor of shape (n, L)
        Integers in 0 .. vocab_size - 1.
    mask_token_id : int
        In 0 .. vocab_size - 1.
    vocab_size : int
        At least 1.
    special_ids : sequence of int, default=()
        Tokens that are never chosen: padding, beginnings, ends.
    probability : float, default=0.15
        With which each other token is chosen, in (0, 1).
    generator : torch.Generator, optional
        Torch's own if None.

    Returns
    -------
    inputs : Tensor of shape (n, L)
        With the chosen tokens hidden, replaced or left.
    labels : Tensor of shape (n, L)
        The tokens that were chosen, elsewhere -100: not scored.

    Raises
    ------
    ValueError
        If an argument is out of range, or all tokens are special.

    Notes
    -----
    1. Where chance chooses no token of the batch, one of each row is drawn.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import mask_tokens
    >>> ids = torch.tensor([[0, 5, 6, 7, 2]])
    >>> inputs, labels = mask_tokens(ids, mask_token_id=4, vocab_size=9, special_ids=(0, 2), probability=0.999)
    >>> labels.tolist()
    [[-100, 5, 6, 7, -100]]
    """
    vocab_size = integer("vocab_size", vocab_size, 1)
    ids = token_batch({"input_ids": input_ids})["input_ids"]
    in_vocabulary("input_ids", ids, vocab_size)
    if not 0 <= integer("mask_token_id", mask_token_id) < vocab_size:
        raise ValueError(f"mask_token_id must be in 0..{vocab_size - 1}, got {mask_token_id}")
    within("probability", probability, 0, 1, open_low=True, open_high=True)
    if isinstance(special_ids, str) or not isinstance(special_ids, Iterable):
        raise ValueError(f"special_ids must be integers, got {special_ids!r}")
    special = torch.tensor(
        [integer("special_ids", each) for each in special_ids], dtype=ids.dtype, device=ids.device
    )
    return hidden_tokens(ids, ~torch.isin(ids, special), mask_token_id, vocab_size, probability, generator)


def hidden_tokens(
    ids: Tensor, eligible: Tensor, mask_token_id: int, vocab_size: int, probability: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return inputs and labels, of which only eligible tokens are chosen."""
    if not bool(eligible.any()):
        raise ValueError("input_ids must have tokens that are neither special nor padding, got none")
    where = draw_device(generator, ids.device)
    rank, fate = torch.rand(2, *ids.shape, generator=generator, device=where).to(ids.device)
    chosen = eligible & (rank < probability)
    if not bool(chosen.any()):  # the least likely of each row, which is any with equal probability
        first = rank.masked_fill(~eligible, 2.0).argmin(1, keepdim=True)
        chosen = torch.zeros_like(eligible).scatter_(1, first, True) & eligible
    other = torch.randint(vocab_size, ids.shape, generator=generator, device=where).to(ids)
    inputs = torch.where(chosen & (fate < 0.8), torch.full_like(ids, mask_token_id), ids)
    inputs = torch.where(chosen & (fate >= 0.9), other, inputs)
    return inputs, ids.masked_fill(~chosen, NOT_SCORED)


def in_vocabulary(name: str, ids: Tensor, vocab_size: int) -> None:
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name} must be in 0..{vocab_size - 1}, got values from {low} to {high}")
