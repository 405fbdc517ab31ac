"""A quarter of the experts against the dense layer, all experts and a mask, and one expert after the other."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.compression import SMoEDropout

D, HIDDEN, E, TOKENS = 256, 2048, 16, 4096


def masked(layer: SMoEDropout, x: Tensor) -> Tensor:
    """Return what the layer does, by all experts for all tokens and scores that are 0 for most."""
    assert layer.b1 is not None and layer.b2 is not None
    logits = layer.router(x)
    top, chosen = logits.topk(layer.k, 1)
    scores = torch.zeros_like(logits).scatter(1, chosen, top.softmax(1))
    hidden = layer.activation(torch.einsum("nd,edh->enh", x, layer.w1) + layer.b1[:, None])
    out = torch.einsum("enh,eho->eno", hidden, layer.w2) + layer.b2[:, None]
    return torch.einsum("ne,eno->no", scores, out)


def one_by_one(layer: SMoEDropout, x: Tensor) -> Tensor:
    """Return the same as the sparse blocks of common libraries do: find each expert's tokens, add its part."""
    assert layer.b1 is not None and layer.b2 is not None
    top, chosen = layer.router(x).topk(layer.k, 1)
    scores, out = top.softmax(1), torch.zeros_like(x)
    for e in range(layer.n_experts):
        token, place = (chosen == e).nonzero(as_tuple=True)
        hidden = layer.activation(x[token] @ layer.w1[e] + layer.b1[e])
        out.index_add_(0, token, (hidden @ layer.w2[e] + layer.b2[e]) * scores[token, place, None])
    return out


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, D, requires_grad=True)
    linear1, linear2 = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)
    dense = nn.Sequential(linear1, nn.GELU(), linear2)
    layer = SMoEDropout.from_dense(linear1, linear2, E, E // 4, activation=F.gelu)
    torch.testing.assert_close(layer(x), masked(layer, x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer(x), one_by_one(layer, x), rtol=1e-3, atol=1e-4)

    def train(call):
        return lambda: call(x).sum().backward()

    @torch.no_grad()
    def infer(call):
        return call(x)

    quarter = "a quarter of 16 experts"
    race(
        f"training, {quarter}, against the dense layer", train(layer), train(dense), target=1 / 0.45, rounds=7
    )
    race(f"training, {quarter}, against all experts and a mask", train(layer), train(lambda x: masked(layer, x)), target=2, rounds=5)  # fmt: skip
    race(f"training, {quarter}, against one expert after the other", train(layer), train(lambda x: one_by_one(layer, x)), target=1, rounds=7)  # fmt: skip
    race(f"inference, {quarter}, against the dense layer", lambda: infer(layer), lambda: infer(dense), target=1 / 0.4)  # fmt: skip
    layer.k = E
    race("training, all experts, against the dense layer", train(layer), train(dense), target=0.8, rounds=7)


if __name__ == "__main__":
    main()
