"""What collapsing strong edges refuses; what it does is tested with the networks that it is for."""

import pytest
import torch

from posterity.graphs import collapse_bound, collapse_strong_edges

X, PAIR = torch.ones(3, 4), torch.tensor([[0, 1], [1, 0]])
ONE_WAY = torch.tensor([[0, 1, 1], [1, 0, 2]])
HALF = torch.tensor([True, False])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: collapse_strong_edges(PAIR, 0, None, 1.0), "num_nodes must be an integer of at least 1"),
        (lambda: collapse_strong_edges(PAIR, 2, None, torch.ones(3) > 0), r"strong must have shape \(2\) for edge_index, got \(3,\)"),
        (lambda: collapse_strong_edges(PAIR, 2, None, HALF), "strong must be symmetric, got 0 -> 1 without 1 -> 0"),
        (lambda: collapse_strong_edges(PAIR, 2, torch.tensor([1.0, 9.0]), 5.0), "strong must be symmetric, got 1 -> 0 without 0 -> 1"),
        (lambda: collapse_strong_edges(PAIR, 2, None, torch.ones(2)), "strong must be a mask or a number, got dtype torch.float32"),
        (lambda: collapse_strong_edges(PAIR, 2, None, 0.0), "strong must be greater than 0"),
        (lambda: collapse_strong_edges(PAIR, 2, None, 1.0).lift(X), r"f must have shape \(1, 4\) for the coarse graph"),
        (lambda: collapse_strong_edges(PAIR, 2, None, 1.0).project(X), r"f must have shape \(2, 4\) for the fine graph"),
        (lambda: collapse_bound(PAIR, 2, torch.tensor([1.0, 2.0]), 0.5), "edge_weight must be symmetric, got (1|2) for . -> ., (1|2) back"),
        (lambda: collapse_bound(ONE_WAY, 3, None, torch.tensor([True, True, False])), "edge_weight must be symmetric, got 1 for 1 -> 2, 0 back"),
        (lambda: collapse_bound(PAIR, 2, None, 1.0, shift=0), "shift must be greater than 0"),
        (lambda: collapse_strong_edges(PAIR, 2, None, 1.0).project(X[:2].long()), "f must be a floating-point tensor"),
        (lambda: collapse_strong_edges(PAIR.float(), 2, None, 1.0), "edge_index must hold integers"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
