"""Race AgentNet with a version on tables of all nodes, on one large graph and on many small ones.

Run from the repository root: ``python -m benchmarks.graphs.agentnet``.
"""

import torch

from benchmarks.timing import race
from posterity.graphs import AgentNet
from posterity.graphs.segments import _aggregate


class Tabled(AgentNet):
    """The same network as the official design has it: all nodes embedded and convolved in each step."""

    def forward(self, x, edge_index, batch=None, *, generator=None):
        edge_index, graph, position = self._begin(x, edge_index, batch, None, None, generator, None)
        k, h, n = self.num_agents, self.hidden_channels, len(x)
        n_graphs = len(position) // k
        states, agents = self.encoder(x), self.agents.weight.repeat(n_graphs, 1)
        visited = torch.zeros(n, k)  # [N, K]: how fresh the memory of each agent is
        slot = torch.arange(len(position)) % k
        loops = torch.arange(n)
        senders, heads = torch.cat([edge_index[0], loops]), torch.cat([edge_index[1], loops])
        order = senders.argsort(stable=True)
        senders, heads = senders[order], heads[order]
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(senders, minlength=n).cumsum(0)])
        logits = x.new_zeros(n_graphs, self.head.out_features)
        of = torch.zeros(n, dtype=torch.int64) if graph is None else graph
        visited[position, slot] = 1
        for t in range(self.num_steps + 1):
            if t:
                count = ends[position + 1] - ends[position]
                mover = torch.arange(len(position)).repeat_interleave(count)
                place = torch.arange(len(mover)) - (count.cumsum(0) - count)[mover] + ends[position][mover]
                candidate, origin = heads[place], position[mover]
                key = self.key(torch.cat([states[candidate], states[origin]], 1))
                score = (self.query(agents)[mover] * key).sum(1) / h**0.5
                fresh = visited[candidate, slot[mover]]
                score = score + torch.where(
                    candidate == origin,
                    self.move_bias[1],
                    fresh * self.move_bias[2] + (1 - fresh) * self.move_bias[3],
                )
                noisy = score - torch.rand(score.shape, generator=generator).log().neg().log()
                best = noisy.new_full((len(position),), -torch.inf).scatter_reduce(
                    0, mover, noisy.detach(), "amax"
                )
                position = candidate[noisy.detach() == best[mover]]
                visited = visited * self.visited_decay
                visited[position, slot] = 1
            held = torch.zeros(n, 1)
            held[position] = 1
            heard = _aggregate(agents, position, n, None, "log")
            parts = torch.cat([states, heard, agents.view(n_graphs, k, h).mean(1)[of]], 1)
            states = states + held * self.write(parts, self.time(torch.zeros(h)))
            near = _aggregate(states[edge_index[0]], edge_index[1], n, None, "log")
            states = states + held * self.gather(torch.cat([states, near], 1))
            agents = agents + self.read(torch.cat([agents, states[position]], 1), self.time(torch.zeros(h)))
            votes = self.vote(agents).view(n_graphs, k, -1)
            logits = logits + self.head(torch.cat([votes.amax(1), votes.mean(1)], 1))
        return logits / (self.num_steps + 1)


def ring(n):
    node = torch.arange(n)
    return torch.cat([torch.stack([node, (node + hop) % n]) for hop in (1, 2, -1, -2)], 1)


def main() -> None:
    torch.set_num_threads(1)
    ours, theirs = (make(8, 64, 2, num_agents=16, num_steps=16).eval() for make in (AgentNet, Tabled))
    x, e = torch.randn(100_000, 8), ring(100_000)
    csr = AgentNet.csr(e, 100_000)
    with torch.no_grad():
        race("100,000 nodes, 16 agents, 16 steps, against tables of all nodes",
             lambda: ours(x, e, csr=csr), lambda: theirs(x, e), target=20, rounds=1)  # fmt: skip
    ours, theirs = (make(8, 32, 2, num_agents=8, num_steps=8) for make in (AgentNet, Tabled))
    e = torch.cat([ring(16) + 16 * k for k in range(32)], 1)
    x, batch = torch.randn(512, 8), torch.arange(32).repeat_interleave(16)
    race("32 graphs of 16 nodes, 8 agents, 8 steps, forward and backward, against tables",
         lambda: ours(x, e, batch).sum().backward(), lambda: theirs(x, e, batch).sum().backward(), target=1,
             why="A table of 16 nodes is as small as what eight agents touch.")  # fmt: skip


if __name__ == "__main__":
    main()
