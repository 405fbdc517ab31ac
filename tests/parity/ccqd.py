"""Both critic losses, the actors' loss and all gradients, on rows of weights of three representations and six decisions."""

import torch
from torch import nn
from torch.nn.utils import vector_to_parameters

from posterity.combinatorial import PolicyCritic
from posterity.combinatorial.policy_critic import Stacked, leaky_mlp
from posterity.combinatorial.shared_learning import Learner, Learning, Policy, Replay

AGAINST = (
    "the authors' code (github.com/lamda-bbo/CCQD: losses, critics and actor), in float64, without noise"
)
HOW = Learning(
    n_sampled=6, train_batch=9, decision_steps=0, representation_lr=1.0, decision_lr=1.0, greedy_lr=1.0, critic_lr=1.0,
    discount=0.9, tau=0.1, policy_delay=1, noise=0.0, noise_clip=0.5, shared=True,
)  # fmt: skip


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    stored = {name: torch.tensor(value) for name, value in stored.items()}
    representation = nn.Sequential(nn.Linear(3, 5), nn.Tanh()).double()
    decision = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    decision.append(nn.Tanh())
    critic = PolicyCritic(3, 2, 4, hidden=(6, 7), encoder=(5, 4)).double()
    twin = critic.twins[0]
    learner = Learner(
        Policy(Stacked(representation), Stacked(decision), decision[2]), Stacked(leaky_mlp(5, 6, 7, 1)),
        Stacked(twin["encoder"]), Stacked(twin["value"]), HOW, {name: stored[name] for name in "RGQP"},
        Replay(3, 2, 9, torch.device("cpu")), torch.Generator(),
    )  # fmt: skip
    learner.slow = {name: stored[f"{name}_slow"] for name in "RGQP"}
    column = {name: stored[name][:, None] for name in ("rewards", "dones", "truncations")}
    batch = (stored["obs"], stored["actions"], stored["next_obs"], *column.values())
    decisions, index, now = stored["D"].requires_grad_(), stored["index"], learner.weights

    greedy, policy = learner._critic_losses(batch, decisions.detach(), index)
    yield "loss of the critics", greedy, stored["critic_loss"], 1e-10
    yield "loss of the policy critics", policy, stored["policy_critic_loss"], 1e-10
    yield "gradient of the critics", torch.autograd.grad(greedy, now["Q"])[0], stored["critic_grad"], 1e-10
    gradient = torch.autograd.grad(policy, now["P"])[0]
    yield "gradient of the policy critics", gradient, stored["policy_critic_grad"], 1e-10
    actors = learner._actor_loss(stored["obs"], decisions, index)
    yield "loss of the actors", actors, stored["actor_loss"], 1e-10
    for name, rows, theirs in (("representations", now["R"], "R"), ("greedy decisions", now["G"], "G"), ("decisions", decisions, "D")):  # fmt: skip
        gradient = torch.autograd.grad(actors, rows, retain_graph=True)[0]
        yield f"gradient of the {name}", gradient, stored[f"{theirs}_grad"], 1e-10

    vector_to_parameters(stored["P"][0], critic.parameters())
    last = decisions[0, 24:].detach()  # after the first layer, of 4 x 5 weights and 4 biases
    head = torch.cat([last[:8].view(2, 4), last[8:, None]], 1)
    yield "value of a policy", critic(stored["obs"], stored["actions"], head), stored["value"], 1e-12
