"""Race diffusion of fields with attention among all points, with a bare step, and with itself in chunks.

Run from the repository root: ``python -m benchmarks.generative.diffusion_fields``.
"""

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.generative import FieldDiffusion, FieldNet

DIM, LATENTS, BLOCKS = 64, 16, 2


class AmongAll(nn.Module):
    """A transformer in which all points attend to all: the naive network of a field."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Linear(3 + 1 + 1, DIM)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(DIM, 4, 4 * DIM, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(BLOCKS)
        )
        self.out = nn.Linear(DIM, 1)

    def forward(self, x: Tensor, t: Tensor, coords: Tensor) -> Tensor:
        h = self.pair(torch.cat([coords, x, t[:, None, None].expand(-1, x.shape[1], -1)], 2))
        for block in self.blocks:
            h = block(h)
        return self.out(h)


def waves(x: Tensor, n: int) -> Tensor:
    """Return the features that both embed: numbers, sines and cosines."""
    angles = (x[..., None] * (torch.pi / 2 * 2.0 ** torch.arange(n))).flatten(-2)
    return torch.cat([x, angles.sin(), angles.cos()], -1)


def small_net(coord_dim: int = 3) -> FieldNet:
    return FieldNet(coord_dim, 1, dim=DIM, n_latents=LATENTS, n_blocks=BLOCKS).eval()


def points(n: int, m: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, m, 1), F.normalize(torch.randn(1, m, 3), dim=2)


@torch.no_grad()
def calls() -> None:
    """Time a call at many points."""
    net, naive, t = small_net(), AmongAll().eval(), torch.full((1,), 0.5)
    x, coords = points(1, 16_384)

    def ours(m: int = 16_384) -> Tensor:
        return net(x[:, :m], t, coords=coords[:, :m], context=x[:, :512], context_coords=coords[:, :512])

    race(
        "a call at 16,384 points, against attention among all",
        ours,
        lambda: naive(x, t, coords),
        target=20,
        rounds=3,
    )
    race(
        "a call at 16,384 points, against one at 1,024 (linear is 1/16)",
        ours,
        lambda: ours(1_024),
        target=1 / 17,
        rounds=31,
    )
    if find_spec("transformers") is None:
        print("a call, against transformers: skipped, transformers is not installed")
        return
    from transformers import PerceiverConfig
    from transformers.models.perceiver.modeling_perceiver import (
        PerceiverBasicDecoder,
        PerceiverModel,
    )

    config = PerceiverConfig(
        num_latents=LATENTS, d_latents=DIM, d_model=DIM, num_blocks=1, num_self_attends_per_block=BLOCKS,
        num_self_attention_heads=4, num_cross_attention_heads=4, self_attention_widening_factor=4,
        cross_attention_widening_factor=4, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    decoder = PerceiverBasicDecoder(
        config, output_num_channels=1, num_channels=DIM, use_query_residual=True, num_heads=4, widening_factor=4,
        position_encoding_type="none", final_project=True,
    )  # fmt: skip
    peer, pair = PerceiverModel(config).eval(), nn.Linear(3 * 13 + 1 + 9, DIM)

    def theirs() -> Tensor:
        times = waves(t[:, None, None], 4).expand(-1, x.shape[1], -1)
        pairs = pair(torch.cat([waves(coords, 6), x, times], 2))
        latents = peer(pairs[:, :512]).last_hidden_state
        return decoder(pairs, latents).logits

    race(
        "a call at 16,384 points, against transformers' Perceiver",
        ours,
        theirs,
        target=1,
        rounds=31,
        why="Both spend their time in the same products; attention to 16 latents gains nothing by being fused.",
    )


def losses() -> None:
    """Time the loss with its backward pass beside the network's own."""
    net, process = small_net(), FieldDiffusion()
    parameters = list(net.parameters())
    for n, m in ((64, 64), (8, 1_024)):
        values, coords = points(n, m)
        t = torch.rand(n)
        half, there = values[:, : m // 2], coords.expand(n, -1, -1)

        def ours(values: Tensor = values, coords: Tensor = coords) -> None:
            for _ in range(5):
                torch.autograd.grad(process.loss(net, values, coords), parameters)

        def bare(
            values: Tensor = values, there: Tensor = there, half: Tensor = half, m: int = m, t: Tensor = t
        ) -> None:
            for _ in range(5):
                said = net(values, t, coords=there, context=half, context_coords=there[:, : m // 2])
                torch.autograd.grad(said.square().mean(), parameters)

        name = f"loss and gradient, {n} fields of {m:,} points, against the network's own"
        race(name, ours, bare, target=1 / 1.05, rounds=31)


def chunks() -> None:
    """Time sampling in chunks of queries."""
    net, process = small_net(), FieldDiffusion(n_steps=4)
    _, coords = points(1, 16_384)

    def sample(chunk: int | None) -> Tensor:
        return process.sample(net, coords, 1, 2, n_context=2_048, chunk_size=chunk)

    race(
        "sampling in 8 chunks, against at once",
        lambda: sample(2_048),
        lambda: sample(None),
        target=1 / 1.1,
        rounds=11,
    )


def main() -> None:
    torch.set_num_threads(1)
    calls()
    losses()
    chunks()


if __name__ == "__main__":
    main()
