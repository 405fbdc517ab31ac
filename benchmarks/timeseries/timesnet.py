"""TimesNet's block, its convolutions merged, against one that runs each kernel of each period."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.timeseries import TimesBlock

TIME, D_MODEL, D_FF, N_KERNELS, TOP_K, BATCH = 96, 16, 32, 6, 5, 8


class Parallel(nn.Module):
    """The naive version: every kernel on every folded series, outputs averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (
            nn.ModuleList(nn.Conv2d(a, b, 2 * j + 1, padding=j) for j in range(N_KERNELS))
            for a, b in ((D_MODEL, D_FF), (D_FF, D_MODEL))
        )

    def forward(self, x: Tensor) -> Tensor:
        n, time, d = x.shape
        amplitudes = torch.fft.rfft(x, dim=1).abs()
        strength = amplitudes.mean((0, 2))
        strength[0] = 0
        top = strength.topk(TOP_K).indices
        parts = []
        for f in top.tolist():
            period = time // f
            cycles = math.ceil(time / period)
            image = torch.cat([x, x.new_zeros(n, cycles * period - time, d)], 1)
            image = image.reshape(n, cycles, period, d).permute(0, 3, 1, 2).contiguous()
            for kernels in (self.up, self.down):
                image = torch.stack([conv(image) for conv in kernels], -1).mean(-1)
                image = F.gelu(image) if kernels is self.up else image
            parts.append(image.permute(0, 2, 3, 1).reshape(n, -1, d)[:, :time])
        share = amplitudes.mean(2)[:, top].softmax(1)
        return x + (torch.stack(parts, -1) * share[:, None, None]).sum(-1)


def _waves(frequencies: tuple[int, ...]) -> Tensor:
    """Return series whose strongest frequencies are these, in this order."""
    t = 2 * math.pi * torch.arange(TIME) / TIME
    clean = sum((2.0 - 0.2 * k) * torch.sin(f * t) for k, f in enumerate(frequencies))
    noise = torch.randn(BATCH, TIME, D_MODEL, generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(clean)[None, :, None] + 0.1 * noise


def main() -> None:
    torch.manual_seed(0)
    ours, peer = TimesBlock(D_MODEL, D_FF, top_k=TOP_K, n_kernels=N_KERNELS), Parallel()
    peer.load_state_dict({name.replace(".kernels", ""): value for name, value in ours.state_dict().items()})

    for name, frequencies, target in (
        ("five periods, forward and backward", (4, 8, 2, 12, 6), 2.2),  # 24, 12, 48, 8, 16
        ("two of five periods equal, forward and backward", (4, 8, 2, 17, 18), 3.0),  # 24, 12, 48, 5, 5
    ):
        x = _waves(frequencies)
        torch.testing.assert_close(ours(x), peer(x), rtol=1e-3, atol=1e-4)
        race(
            name,
            lambda x=x: ours(x).square().mean().backward(),
            lambda x=x: peer(x).square().mean().backward(),
            target=target,
        )


if __name__ == "__main__":
    main()
