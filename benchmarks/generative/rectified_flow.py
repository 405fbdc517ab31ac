"""Race rectified flow with a bare regression step, torchcfm, diffusers and torchdiffeq.

Run from the repository root: ``python -m benchmarks.generative.rectified_flow``.
"""

from importlib.util import find_spec

import torch
from torch.nn import functional as F

from benchmarks.timing import race
from posterity.generative import RectifiedFlow
from posterity.lab import training
from posterity.lab.data import load_points
from posterity.lab.nets import TimeMLP

BATCH, SHAPE = 256, 64


def training_steps() -> None:
    """Time a loss with its backward pass, on one batch of digits."""
    flow, net = RectifiedFlow(SHAPE), TimeMLP(SHAPE)
    x1 = torch.from_numpy(load_points("digits"))[:BATCH]
    parameters = list(net.parameters())

    def ours() -> None:
        for _ in range(20):
            torch.autograd.grad(flow.loss(net, x1), parameters)

    def bare() -> None:
        for _ in range(20):
            noise, t = torch.randn_like(x1), torch.rand(BATCH)
            torch.autograd.grad(F.mse_loss(net(noise, t), x1), parameters)

    race(
        "loss and gradient, against a bare regression from fresh noise", ours, bare, target=1 / 1.1, rounds=31,
        why="Points between noise and data are a few small operations, beside a network of as few.",
    )  # fmt: skip
    if find_spec("torchcfm") is None:
        print("loss and gradient, against torchcfm: skipped, torchcfm is not installed")
        return
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

    matcher = ConditionalFlowMatcher(sigma=0.0)

    def peer() -> None:
        for _ in range(20):
            t, x, slope = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
            torch.autograd.grad(F.mse_loss(net(x, t), slope), parameters)

    race("loss and gradient, against torchcfm", ours, peer, target=1 / 1.05, rounds=31)


def sampling() -> None:
    """Time samplers on a trained flow and on its reflow."""
    flow, net = RectifiedFlow(SHAPE), TimeMLP(SHAPE)
    points = torch.from_numpy(load_points("digits"))
    options = {"steps": 1_000, "batch_size": BATCH, "lr": 3e-3, "schedule": "cosine"}
    training.fit(net, flow.loss, (points,), **options)
    z0, z1 = flow.couple(net, 2_000, method="euler", n_steps=50)
    straight = TimeMLP(SHAPE)
    straight.load_state_dict(net.state_dict())
    training.fit(straight, flow.loss, (z1, z0), **options)
    x0 = torch.randn(1_000, SHAPE)

    race(
        f"one step of the 2-rectified flow, against RK45 ({flow.integrate(net, x0).n_evals} calls)",
        lambda: flow.sample(straight, x0=x0, n_steps=1),
        lambda: flow.sample(net, x0=x0, method="rk45"),
        target=30,
    )
    if find_spec("torchdiffeq") is None:
        print("RK45, against torchdiffeq: skipped, torchdiffeq is not installed")
    else:
        from torchdiffeq import odeint

        @torch.no_grad()
        def dopri5(dtype: torch.dtype) -> torch.Tensor:
            span = torch.tensor([0.0, 1.0], dtype=dtype)
            return odeint(
                lambda t, x: net(x.float(), t.float().expand(len(x))).to(dtype),
                x0.to(dtype),
                span,
                rtol=1e-5,
                atol=1e-5,
            )[-1]

        # Ours keeps its state in float64; a small network in float32 shows what that costs.
        for dtype in (torch.float64, torch.float32):
            race(
                f"RK45, against torchdiffeq with a state in {dtype}",
                lambda: flow.sample(net, x0=x0, method="rk45"),
                lambda dtype=dtype: dopri5(dtype),
                target=1,
                why="Steps are scipy's, on numpy's doubles; a small network leaves its conversions in sight.",
            )
    if find_spec("diffusers") is None:
        print("50 Euler steps, against diffusers: skipped, diffusers is not installed")
        return
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()

    @torch.no_grad()
    def diffusers() -> torch.Tensor:
        scheduler.set_timesteps(50)
        x = x0
        for sigma, step in zip(scheduler.sigmas, scheduler.timesteps, strict=False):  # from 1 to 0
            velocity = -net(x, (1 - sigma).expand(len(x)))
            x = scheduler.step(velocity, step, x).prev_sample
        return x

    race(
        "50 Euler steps, against diffusers", lambda: flow.sample(net, x0=x0, n_steps=50), diffusers, target=1,
        why="Both call the network fifty times, and little else.",
    )  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    training_steps()
    sampling()


if __name__ == "__main__":
    main()
