"""The loss at four weights, schedules, Hits@k, a step of the momentum encoder and the link decoder."""

import torch
from torch import nn

from posterity.graphs import TBGRL, LinkDecoder, cosine_schedule, hits_at_k, tbgrl_loss

AGAINST = "the authors' code (github.com/snap-research/non-contrastive-link-prediction)"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    t = {name: torch.tensor(value) for name, value in stored.items()}
    views = [t[name] for name in ("q1", "y2", "q2", "y1", "corrupted")]
    losses = [float(tbgrl_loss(*views, neg_lambda=float(weight))) for weight in t["neg_lambda"]]
    yield "loss", losses, stored["loss"], 1e-5
    rates = [cosine_schedule(step, 0.015, 10, 50) for step in range(51)]
    yield "learning rate", rates, stored["learning_rate"], 1e-9
    momentum = [1 - cosine_schedule(step, 1 - 0.91, 0, 50) for step in range(51)]
    yield "momentum", momentum, stored["momentum"], 1e-9
    hits = [hits_at_k(t["positive"], t["negative"], k) for k in (1, 3, 20, 50, 100)]
    yield "hits", hits, stored["hits"], 1e-6

    net = TBGRL(Encoder(), 6, predictor_hidden=7, neg_lambda=0.3)
    net.online_encoder.load_state_dict(part(t, "online/"))
    net.target_encoder.load_state_dict(part(t, "target/"))
    net.predictor.load_state_dict(part(t, "predictor/net."))
    no_edges = torch.zeros(2, 0, dtype=torch.long)
    loss = net.loss(*((x, no_edges) for x in t["views"])).detach()
    yield "loss of the module", loss, stored["module_loss"], 1e-5
    net.update_target(0.9)
    for name, value in net.target_encoder.state_dict().items():
        yield f"target {name} after a step", value, stored[f"updated/{name}"], 1e-6
    decoder = LinkDecoder(6, 9)
    decoder.load_state_dict(part(t, "decoder/"))
    yield "links", decoder(t["embedding"], t["links"]).detach(), stored["logits"], 1e-5


class Encoder(nn.Module):
    """Two layers that do not look at the edges."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 6)

    def reset_parameters(self):
        self.a.reset_parameters()
        self.b.reset_parameters()

    def forward(self, x, edge_index):
        return self.b(self.a(x).tanh())


def part(tensors, prefix):
    return {k.removeprefix(prefix): value for k, value in tensors.items() if k.startswith(prefix)}
