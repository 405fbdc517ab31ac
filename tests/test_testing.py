"""The conformance checks refuse plausible toys, one subtle fault each."""

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F

from posterity.testing import (
    check_generative,
    check_graph_network,
    check_layer,
    check_loss,
    check_metric,
    check_neural_process,
)

pytestmark = pytest.mark.usefixtures("as_a_user")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- losses ---


@pytest.fixture
def batch():
    logits = torch.randn(8, 4, dtype=torch.float64, generator=generator()).requires_grad_()
    return logits, torch.randint(4, (8,), generator=generator())


class Good(nn.Module):
    reduction = "mean"

    def forward(self, logits, target):
        return self.reduce(F.cross_entropy(logits, target, reduction="none"))

    def reduce(self, each):
        return each if self.reduction == "none" else getattr(each, self.reduction)()


class Detached(Good):
    def forward(self, logits, target):
        return super().forward(logits.detach(), target) + 0 * logits.sum()


class NaiveLog(Good):
    def forward(self, logits, target):
        return self.reduce(
            -logits.exp().div(logits.exp().sum(1, keepdim=True)).gather(1, target[:, None])[:, 0].log()
        )


class SingleFloat(Good):
    def forward(self, logits, target):
        return super().forward(logits.float(), target)


class Noisy(Good):
    def forward(self, logits, target):
        return super().forward(logits + 1e-3 * torch.randn_like(logits), target)


class WrongMean(Good):
    def reduce(self, each):
        return each if self.reduction == "none" else each.sum() if self.reduction == "sum" else each.sum() / 4


class InPlace(Good):
    def forward(self, logits, target):
        with torch.no_grad():
            logits.sub_(logits.max())
        return super().forward(logits, target)


class Cancelling(Good):
    def forward(self, logits, target):
        far = logits + 8
        return self.reduce(far.square().mean(1) - far.mean(1).square())


class Upcasting(Good):
    def forward(self, logits, target):
        return super().forward(logits.float() if logits.element_size() == 2 else logits, target)


class Refusing(Good):
    def forward(self, logits, target):
        if logits.element_size() == 2:
            raise ValueError(f"logits must be float32 or float64, got {logits.dtype}")
        return super().forward(logits, target)


class Unbiased(nn.Module):
    def forward(self, logits, target):
        return F.cross_entropy(logits, target) + logits.std(0).sum()


def test_a_good_loss_passes(batch):
    check_loss(Good(), *batch)
    check_loss(Refusing(), *batch)


@pytest.mark.parametrize(
    ("toy", "said"),
    [
        (Detached, "Jacobian"), (NaiveLog, "finite with inputs scaled"), (SingleFloat, "."), (Noisy, "global generator"),
        (WrongMean, "is the mean of"), (InPlace, "changed its input"), (Unbiased, "batch of one is finite"),
        (Cancelling, "float16 the result is off"), (Upcasting, "in bfloat16 the result is in float32"),
    ],
)  # fmt: skip
def test_a_toy_loss_is_refused(toy, said, batch):
    with pytest.raises(AssertionError, match=said):
        check_loss(toy(), *batch)


# --- layers and graph networks ---


class Dead(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)
        self.scale = nn.Parameter(torch.ones(()))


class Hidden(nn.Linear):
    """Keeps a weight where no state_dict finds it."""

    def __init__(self):
        super().__init__(3, 3)
        self.secret = [torch.randn(3, generator=generator())]

    def forward(self, x):
        return super().forward(x) * self.secret[0].to(x)


class Dropping(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x))


class Kernelless(nn.Linear):
    def forward(self, x):
        return torch.linalg.qr(super().forward(x))[0]


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x).float()


def test_a_good_layer_passes():
    check_layer(nn.Linear(3, 2), torch.randn(5, 3), shape=(5, 2))


@pytest.mark.parametrize(
    ("toy", "said"),
    [
        (Dead, "no gradient reaches scale"),
        (lambda: Dropping(3, 3), "."),
        (lambda: Halved(3, 3), "float64 in"),
        (lambda: Kernelless(3, 3), "in bfloat16 it ends in"),
    ],
)
def test_a_toy_layer_is_refused(toy, said):
    with pytest.raises(AssertionError, match=said):
        check_layer(toy(), torch.randn(5, 3))


def test_a_wrong_shape_is_refused():
    with pytest.raises(AssertionError, match="has shape"):
        check_layer(nn.Linear(3, 2), torch.randn(5, 3), shape=(5, 3))


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.near = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, edge_index):
        own, sent = self.own(x), self.near(x)[edge_index[0]]
        return own + torch.zeros_like(own).index_add(0, edge_index[1], sent)


class Positional(Sum):
    def forward(self, x, edge_index):
        return super().forward(x, edge_index) + torch.arange(len(x), device=x.device)[:, None] / 10


class Global(Sum):
    def forward(self, x, edge_index):
        return super().forward(x - x.mean(0), edge_index)


class Edgeless(Sum):
    def forward(self, x, edge_index):
        return self.own(x) + self.near(x)


class LastWins(Sum):
    """Overwrites where it should add."""

    def forward(self, x, edge_index):
        own = self.own(x)
        return own + torch.zeros_like(own).index_put((edge_index[1],), self.near(x)[edge_index[0]])


class MeanOfNothing(Sum):
    def forward(self, x, edge_index):
        own, sent = self.own(x), self.near(x)[edge_index[0]]
        total = torch.zeros_like(own).index_add(0, edge_index[1], sent)
        return own + total / torch.bincount(edge_index[1], minlength=len(x))[:, None].to(own)


@pytest.fixture
def graph():
    edges = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4], [4, 0], [0, 2], [1, 4]]).T
    return torch.randn(5, 3, generator=generator()), torch.cat([edges, edges.flip(0)], 1)


def test_a_good_graph_layer_passes(graph):
    check_graph_network(Sum(), *graph)


@pytest.mark.parametrize("toy", [Positional, Global, Edgeless, LastWins, MeanOfNothing])
def test_a_toy_graph_layer_is_refused(toy, graph):
    with pytest.raises(AssertionError):
        check_graph_network(toy(), *graph)


# --- metrics ---


def squared(x, y):
    return ((x - y) ** 2).mean()


class MeanOfMeans(torchmetrics.Metric):
    """Averages the batches' means, as if all batches had one size."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, x, y):
        self.total += squared(x, y)
        self.count += 1

    def compute(self):
        return self.total / self.count


PAIR = torch.tensor([0.0, 1.0, 2.0, 4.0, 7.0]), torch.tensor([1.0, 1.0, 0.0, 4.0, 3.0])
KNOWN = [((torch.zeros(3), torch.full((3,), 2.0)), 4.0)]


def test_a_good_metric_passes():
    check_metric(squared, *PAIR, known=KNOWN, streaming=torchmetrics.MeanSquaredError)


@pytest.mark.parametrize(
    ("metric", "options", "said"),
    [
        (squared, {"streaming": MeanOfMeans}, "in pieces of"),
        (lambda x, y: squared(x, y) / 2, {}, "known value"),
        (lambda x, y: squared(x, y) + 0.1 * (x[0] - y[0]) ** 2 * (len(x) > 3), {}, "order of rows"),
        (lambda x, y: squared(x, y) + 0 * torch.rand(()), {}, "global generator"),
    ],
)
def test_a_toy_metric_is_refused(metric, options, said):
    with pytest.raises(AssertionError, match=said):
        check_metric(metric, *PAIR, known=KNOWN, **options)


# --- generative processes: N(2, 1/4) by a shift and a scale ---


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([2.0, -1.0]))


class Process:
    def loss(self, net, x, generator=None):
        noise = torch.rand((), generator=generator, device=generator.device, dtype=x.dtype)
        return (x - net.mean).square().mean() + 0 * noise

    @torch.no_grad()
    def sample(self, net, n, generator=None):
        return net.mean + 0.5 * torch.randn(
            n, 2, generator=generator, device=generator and generator.device
        ).to(net.mean)


class Narrow(Process):
    def sample(self, net, n, generator=None):
        return net.mean + 0.8 * (super().sample(net, n, generator) - net.mean).detach()


class Careless(Process):
    def sample(self, net, n, generator=None):
        return super().sample(net, n)


class Evaluating(Process):
    def sample(self, net, n, generator=None):
        net.eval()
        return super().sample(net, n, generator)


def test_a_good_process_passes():
    target = 2 + 0.5 * torch.randn(100, 2, generator=generator())
    check_generative(
        Process(), Affine(), target, mean=torch.tensor([2.0, -1.0]), std=torch.tensor([0.5, 0.5])
    )


@pytest.mark.parametrize("toy", [Narrow, Careless, Evaluating])
def test_a_toy_process_is_refused(toy):
    target = 2 + 0.5 * torch.randn(100, 2, generator=generator())
    with pytest.raises(AssertionError):
        check_generative(
            toy(), Affine(), target, mean=torch.tensor([2.0, -1.0]), std=torch.tensor([0.5, 0.5]), atol=0.05
        )


# --- neural processes ---


class Pooling(nn.Module):
    """A neural process that passes: the mean of embedded points, decoded at each target."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(2, 6), nn.Linear(7, 2)

    def pool(self, points, mask):
        return (self.embed(points).tanh() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)

    def decode(self, pooled, x):
        mean, raw = self.head(torch.cat([pooled[:, None].expand(-1, x.shape[1], -1), x], -1)).chunk(2, -1)
        return torch.distributions.Normal(mean, raw.exp(), validate_args=False)

    def forward(self, x_context, y_context, x_target, *, context_mask=None):
        mask = torch.ones_like(x_context[..., 0]).bool() if context_mask is None else context_mask
        return self.decode(self.pool(torch.cat([x_context, y_context], -1), mask), x_target)

    def log_likelihood(
        self, x_context, y_context, x_target, y_target, *, context_mask=None, target_mask=None
    ):
        mask = torch.ones_like(x_target[..., 0]).bool() if target_mask is None else target_mask
        x_target, y_target = (part.masked_fill(~mask[..., None], 0) for part in (x_target, y_target))
        each = self(x_context, y_context, x_target, context_mask=context_mask).log_prob(y_target)
        return each.masked_fill(~mask[..., None], 0).sum((1, 2))

    def loss(self, x_context, y_context, x_target, y_target, *, context_mask=None, target_mask=None):
        value = self.log_likelihood(
            x_context, y_context, x_target, y_target, context_mask=context_mask, target_mask=target_mask
        )
        return -(value / (x_target.shape[1] if target_mask is None else target_mask.sum(1))).mean()


class PaddedMean(Pooling):
    def pool(self, points, mask):
        return (self.embed(points).tanh() * mask[..., None]).mean(1)


class NanWhenEmpty(Pooling):
    def pool(self, points, mask):
        return (self.embed(points).tanh() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class SeesOtherTargets(Pooling):
    def decode(self, pooled, x):
        return super().decode(pooled, x + 0.01 * x.cumsum(1))


class CountsPadding(Pooling):
    def loss(self, x_context, y_context, x_target, y_target, **masks):
        return (
            -self.log_likelihood(x_context, y_context, x_target, y_target, **masks).mean() / x_target.shape[1]
        )


class InOrder(Pooling):
    def pool(self, points, mask):
        return super().pool(points * torch.linspace(1, 1.1, points.shape[1]).to(points)[:, None], mask)


def test_a_good_neural_process_passes():
    check_neural_process(Pooling(), dim_x=1, dim_y=1)


@pytest.mark.parametrize("toy", [PaddedMean, NanWhenEmpty, SeesOtherTargets, CountsPadding, InOrder])
def test_a_toy_neural_process_is_refused(toy):
    with pytest.raises(AssertionError):
        check_neural_process(toy(), dim_x=1, dim_y=1)
