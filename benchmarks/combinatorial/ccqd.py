"""A generation of CCQD against the same steps policy by policy with modules, acting against a loop, ribs beside it."""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import vector_to_parameters

from benchmarks.timing import race
from posterity._checks import needs
from posterity.combinatorial import CCQD, PolicyCritic
from posterity.lab.environments import Gait

HOW = {
    "obs_dim": 10, "action_dim": 4, "n_representations": 4, "batch_size": 50, "critic_steps": 30, "decision_steps": 10,
    "n_sampled": 12, "train_batch": 64, "hidden": (64, 64), "encoder": (32, 32), "iso_sigma": 0.1, "seed": 0,
}  # fmt: skip


def parts() -> tuple[nn.Sequential, nn.Sequential]:
    return (
        nn.Sequential(nn.Linear(10, 64), nn.Tanh()),
        nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4), nn.Tanh()),
    )


def archive(dim: int) -> Any:
    fields = {"representation": ((), np.int32)}
    return needs("ribs.archives", "combinatorial").GridArchive(
        solution_dim=dim, dims=[20, 20], ranges=[(0, 1)] * 2, dtype=np.float32, extra_fields=fields, seed=0
    )


def generation(emitter: CCQD) -> None:
    solutions = emitter.ask()
    seen = Gait().rollout(lambda obs: emitter.act(solutions, obs), len(solutions))
    emitter.tell(seen.objective, seen.measures, seen.transitions)


class OneByOne:
    """The same steps of training with one module a policy and a critic, as one would first write them."""

    def __init__(self) -> None:
        self.policies = [nn.Sequential(*parts()) for _ in range(12)]
        self.greedy = [nn.Sequential(*parts()) for _ in range(4)]
        self.values = [
            [nn.Sequential(nn.Linear(14, 64), nn.LeakyReLU(), nn.Linear(64, 64), nn.LeakyReLU(), nn.Linear(64, 1))
             for _ in range(2)]
            for _ in range(4)
        ]  # fmt: skip
        self.critics = [PolicyCritic(10, 4, 64, hidden=(64, 64), encoder=(32, 32)) for _ in range(4)]
        of_critics = [p for pair in self.values for net in pair for p in net.parameters()]
        of_critics += [p for critic in self.critics for p in critic.parameters()]
        of_actors = [p for net in self.greedy for p in net.parameters()]
        self.optimizers = torch.optim.Adam(of_critics), torch.optim.Adam(of_actors)
        self.improved = [nn.Sequential(*parts()) for _ in range(21)]

    def head(self, policy: nn.Sequential) -> Tensor:
        last: Any = policy[1][2]  # type: ignore[index]
        return torch.cat([last.weight, last.bias[:, None]], 1)

    def both(self, i: int, obs: Tensor, action: Tensor) -> Tensor:
        return torch.cat([net(torch.cat([obs, action], 1)) for net in self.values[i]], 1)

    def step(self, actors: bool) -> None:
        obs, after, action, reward = (torch.randn(64, size) for size in (10, 10, 4, 1))
        loss = torch.zeros(())
        for i, policy in enumerate(self.greedy):
            with torch.no_grad():
                target = reward + 0.97 * self.both(i, after, policy(after)).amin(1, keepdim=True)
            loss = loss + F.mse_loss(self.both(i, obs, action), target.expand(-1, 2))
        for k, policy in enumerate(self.policies):
            critic, head = self.critics[k % 4], self.head(policy).detach()
            with torch.no_grad():
                target = reward + 0.97 * critic(after, policy(after), head).amin(1, keepdim=True)
            loss = loss + F.mse_loss(critic(obs, action, head), target.expand(-1, 2))
        self.optimizers[0].zero_grad()
        loss.backward()
        self.optimizers[0].step()
        if actors:
            loss = -sum(self.both(i, obs, policy(obs))[:, 0].mean() for i, policy in enumerate(self.greedy))
            for k, policy in enumerate(self.policies):
                features: Tensor = self.greedy[k % 4][0](obs)
                value = self.critics[k % 4](obs, policy[1](features), self.head(policy).detach())
                loss = loss - value[:, 0].mean()
            self.optimizers[1].zero_grad()
            loss.backward()
            self.optimizers[1].step()

    def __call__(self) -> None:
        for turn in range(30):
            self.step(actors=turn % 2 == 0)
        for k, policy in enumerate(self.improved):
            optimizer = torch.optim.Adam(policy[1].parameters())
            for _ in range(10):
                obs = torch.randn(64, 10)
                loss = -self.critics[k % 4](obs, policy(obs), self.head(policy))[:, 0].mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    representation, decision = parts()
    dim = sum(p.numel() for part in (representation, decision) for p in part.parameters())
    emitter = CCQD(archive(dim), representation, decision, **HOW)
    for _ in range(5):
        generation(emitter)
    race(
        "a generation of 50 episodes, against its steps policy by policy with modules",
        lambda: generation(emitter), OneByOne(), target=2, rounds=7,
    )  # fmt: skip
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        generation(emitter)
        seconds.append(time.perf_counter() - start)
    print(f"a generation: {np.median(seconds):.2f} s (target 0.4 s)")

    solutions = np.concatenate([emitter.ask() for _ in range(2)])
    obs, net = torch.randn(100, 10), nn.Sequential(*parts())

    def by_modules() -> None:
        with torch.no_grad():
            for row, seen in zip(solutions, obs, strict=True):
                vector_to_parameters(torch.from_numpy(row), net.parameters())
                net(seen)

    race("acting of 100 policies, against loading and calling one module", lambda: emitter.act(solutions, obs), by_modules,
         target=10, rounds=31)  # fmt: skip
    nets = [nn.Sequential(*parts()) for _ in range(100)]

    def by_own_modules() -> None:
        with torch.no_grad():
            for net, seen in zip(nets, obs, strict=True):
                net(seen)

    race("acting of 100 policies, against 100 modules kept loaded", lambda: emitter.act(solutions, obs), by_own_modules,
         target=10, rounds=31,
         why="Solutions come as an array, whose weights are laid out anew at each call.")  # fmt: skip

    plain = archive(dim)
    gaussian = needs("ribs.emitters", "combinatorial").GaussianEmitter(
        plain, sigma=0.1, x0=solutions[0], batch_size=50, seed=0
    )
    scheduler = needs("ribs.schedulers", "combinatorial").Scheduler(plain, [gaussian])

    def evolution() -> None:
        rows = scheduler.ask()
        seen = Gait().rollout(lambda obs: emitter.act(rows, obs), len(rows))
        scheduler.tell(seen.objective, seen.measures, representation=np.zeros(50))

    start = time.perf_counter()
    for _ in range(5):
        evolution()
    print(
        f"a generation of ribs' GaussianEmitter, which trains nothing: {(time.perf_counter() - start) / 5:.3f} s"
    )


if __name__ == "__main__":
    main()
