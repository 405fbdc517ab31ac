from functools import partial

import pytest
import torch
from torch.optim import SGD, Adagrad, AdamW, Optimizer

from posterity.testing import check_optimizer


class Toy(Optimizer):
    """Gradient descent with momentum as it is often written; each fault is one line of it."""

    def __init__(self, params, lr=0.01, momentum=0.8, fault="", maximize=False):
        super().__init__(params, {"lr": lr, "momentum": momentum, "maximize": maximize})
        self.fault, self.first, self.own = fault, lr, {}

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad() if self.fault != "closure without gradients" else torch.no_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    self.move(p, group)
        if self.fault == "draws":
            torch.rand(())
        return None if self.fault == "no loss" else loss

    def move(self, p, group):
        if p.grad is None:
            if self.fault == "decays what has no gradient":
                p.mul_(0.9)
            return
        if p.grad.is_sparse:
            if self.fault == "silent about sparse":
                return
            raise ValueError("gradients must be dense, got a sparse one")
        g = -p.grad if group["maximize"] and self.fault != "never maximises" else p.grad
        state = self.own.setdefault(p, {}) if self.fault == "state of its own" else self.state[p]
        last = state.get("buffer", torch.zeros_like(p))
        if self.fault == "float32 inside":
            last, g = last.float(), g.float()
        state["buffer"] = last * group["momentum"] + g
        lr = self.first if self.fault == "one lr for all" else group["lr"]
        if self.fault == "wrong way":
            lr = -lr
        if self.fault == "too small":
            lr = lr * 1e-3
        if self.fault == "complex as real" and p.is_complex():
            p.sub_(lr * state["buffer"].real)
        else:
            p.sub_((lr * state["buffer"]).to(p.dtype))


@pytest.mark.parametrize("make", [
    partial(SGD, lr=0.01, momentum=0.9), partial(Adagrad, lr=0.5, eps=1e-6), Toy,
], ids=["SGD", "Adagrad", "own"])  # fmt: skip
def test_ordinary_optimisers_pass(make):
    check_optimizer(make, steps=800)


@pytest.mark.parametrize(("fault", "words"), [
    ("closure without gradients", "closure is called with gradients enabled"), ("no loss", "returns the closure's loss"),
    ("decays what has no gradient", "without gradient is left alone"), ("silent about sparse", "sparse ones"),
    ("never maximises", "to maximise"), ("state of its own", "round trip"), ("float32 inside", "in torch.float32"),
    ("one lr for all", "converges|own lr|lr 0"), ("wrong way", "converges"), ("too small", "converges"), ("complex as real", "complex ones"),
    ("draws", "drew from torch's global generator"),
])  # fmt: skip
def test_an_optimiser_with_one_fault_is_refused_for_it(fault, words):
    with pytest.raises(AssertionError, match=words):
        check_optimizer(partial(Toy, fault=fault), steps=300, tol=0.05)


def test_adam_in_float16_is_refused_since_its_eps_is_zero_there():
    # one entry starts at its optimum: 0 / (0 + 0)
    with pytest.raises(AssertionError, match=r"in torch.float16 three steps are off"):
        check_optimizer(partial(AdamW, lr=0.05), steps=300, tol=0.1)
