"""LBANP: a training step against einsum attention, a prediction against a transformer, query cost."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.timing import race
from posterity.claims.uncertainty.lbanp import TNPD
from posterity.uncertainty import LBANP, lbanp


class Einsum(lbanp._Attention):
    """The same attention with its weights written out, (batch, heads, queries, keys)."""

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2).flatten(0, 1).contiguous()
            for part in (self.query(x), *self.key_value(source).chunk(2, dim=-1))
        )
        scores = torch.einsum("bid,bjd->bij", q, k) * q.shape[-1] ** -0.5
        if mask is not None:
            hidden = ~mask[:, None].expand(-1, self.n_heads, -1).flatten(0, 1)[:, None]
            scores = scores.masked_fill(hidden, -torch.finfo(scores.dtype).max)
        mixed = torch.einsum("bij,bjd->bid", scores.softmax(-1), v)
        return self.out(mixed.unflatten(0, (-1, self.n_heads)).transpose(1, 2).flatten(2))


def written_out(model: LBANP) -> LBANP:
    """Return the model with every attention replaced by `Einsum`, of the same weights."""
    twin = LBANP(1, 1, n_latents=model.n_latents)
    twin.load_state_dict(model.state_dict())
    for module in list(twin.modules()):
        if type(module) is lbanp._Attention:
            module.__class__ = Einsum
    return twin


def main() -> None:
    """Run the races and print the curve."""
    torch.manual_seed(0)
    for n_latents, n, m in ((8, 30, 20), (128, 30, 20), (128, 500, 500)):
        _steps(n_latents, n, m)
    model, rival = LBANP(1, 1).eval(), TNPD(1, 1, n_layers=6).eval()
    x, y, x_new = torch.randn(1, 1000, 1), torch.randn(1, 1000, 1), torch.randn(1, 1000, 1)
    with torch.no_grad():
        race("prediction, 1,000 + 1,000 points, against TNP-D", lambda: model(x, y, x_new),
             lambda: rival(x, y, x_new), target=10, rounds=5)  # fmt: skip
        print("context points, milliseconds to encode, to answer 2,000 queries")
        queries = torch.randn(1, 2000, 1)
        for n in (100, 400, 1600, 6400, 25_600, 102_400):
            x, y = torch.randn(1, n, 1), torch.randn(1, n, 1)
            encode = _milliseconds(model.encode, x, y)
            decode = _milliseconds(model.decode, model.encode(x, y), queries)
            print(f"{n:9,d} {encode:9.2f} {decode:9.2f}")


def _steps(n_latents: int, n: int, m: int) -> None:
    ours = LBANP(1, 1, n_latents=n_latents)
    peer = written_out(ours)
    batch = [torch.randn(16, size, 1) for size in (n, n, m, m)]
    real = torch.arange(n).expand(16, n) < n - 3

    def step(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        model.loss(*batch, context_mask=real).backward()  # type: ignore[operator]

    name = f"training step, {n_latents} latents, {n} + {m} points, against einsum attention"
    race(name, lambda: step(ours), lambda: step(peer), target=1.3, rounds=9)


def _milliseconds(work: Callable[..., object], *args: object) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work(*args)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


if __name__ == "__main__":
    main()
