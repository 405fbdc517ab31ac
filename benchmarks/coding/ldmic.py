"""Two passes against one a place, attention in linear cost against the quadratic form, all views at once against a loop."""

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.coding import LDMIC, EfficientAttention


def quadratic(layer: EfficientAttention, target: Tensor, source: Tensor) -> Tensor:
    """Return the attention that one would take otherwise, of the same projections and heads."""
    q, k, v = (
        part.flatten(2).unflatten(1, (layer.n_heads, -1)).mT
        for part in (layer.queries(target), layer.keys(source), layer.values(source))
    )
    found = F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2)
    return layer.reprojection(found.unflatten(2, target.shape[2:]))


def main() -> None:
    torch.manual_seed(0)
    views = torch.rand(1, 2, 3, 128, 128)
    codecs = {}
    for context in ("checkerboard", "autoregressive"):
        codecs[context] = LDMIC(hidden=32, latent=48, downsample=16, context=context).eval().freeze()
    streams = {context: codec.compress(views) for context, codec in codecs.items()}
    race(
        "decoding latents of two views of 128 x 128, 8 x 8 places, checkerboard against autoregressive",
        lambda: codecs["checkerboard"].decode_latents(streams["checkerboard"]),
        lambda: codecs["autoregressive"].decode_latents(streams["autoregressive"]),
        target=20, rounds=5,
    )  # fmt: skip
    larger = torch.rand(1, 2, 3, 512, 512)
    streams = {context: codec.compress(larger) for context, codec in codecs.items()}
    race(
        "the same of 512 x 512, 32 x 32 places",
        lambda: codecs["checkerboard"].decode_latents(streams["checkerboard"]),
        lambda: codecs["autoregressive"].decode_latents(streams["autoregressive"]),
        target=20, rounds=1,
    )  # fmt: skip

    layer = EfficientAttention(64)
    target, source = torch.randn(2, 1, 64, 64, 64)
    with torch.no_grad():
        race(
            "attention over 4,096 positions, linear against scaled_dot_product_attention",
            lambda: layer(target, source),
            lambda: quadratic(layer, target, source),
            target=5,
        )  # fmt: skip

        codec, many = LDMIC(hidden=32, latent=48, joint=False).eval(), torch.rand(1, 8, 3, 32, 32)
        race(
            "eight views of 32 x 32 as one batch against a loop over them",
            lambda: codec(many),
            lambda: [codec(many[:, i : i + 1]) for i in range(8)],
            target=1.3,
        )  # fmt: skip


if __name__ == "__main__":
    main()
