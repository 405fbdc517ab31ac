"""Diffusion of fields where everything is known: Gaussian processes, their exact noise, linear recursions."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from posterity.generative import FieldDiffusion, FieldNet
from posterity.testing import check_generative
from posterity.testing._low_precision import check_low_precision


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*size, seed=0):
    return torch.randn(*size, dtype=torch.float64, generator=rng(seed))


def line(m):
    return torch.linspace(-1, 1, m, dtype=torch.float64)[None, :, None]


def kernel(m, variance=1.0):
    """The covariance of a Gaussian process at ``line(m)``, with a little noise of its own."""
    x = line(m)[0]
    return variance * (-2 * (x - x.T) ** 2).exp() + 0.1 * torch.eye(m, dtype=torch.float64)


def shares(n_steps, schedule):
    """abar_0 ... abar_T by the textbook's product."""
    if schedule == "linear":
        betas = np.linspace(1e-4, 0.02, n_steps) * 1000 / n_steps
    else:
        f = np.cos((np.arange(n_steps + 1) / n_steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = 1 - f[1:] / f[:-1]
    return np.concatenate([[1.0], np.cumprod(1 - np.minimum(betas, 0.999))])


class GaussianNoise(nn.Module):
    """E[eps | y] for fields of covariance K, all of whose points are the context."""

    def __init__(self, process, covariance):
        super().__init__()
        self.process, self.covariance = process, nn.Parameter(covariance.clone())

    def forward(self, x, t, *, coords, context, context_coords):
        wide = torch.promote_types(x.dtype, torch.float32)
        values, axes = torch.linalg.eigh(self.covariance.to(wide))
        abar = self.process.alpha_bar(t.to(wide))[:, None]
        seen = context[..., 0].to(wide) @ axes
        noise = (1 - abar).sqrt() * seen / (abar * values + 1 - abar)
        return (noise @ axes.T)[..., None].to(x.dtype)


def silent(x, t, *, coords, context, context_coords):
    return torch.zeros_like(x)


# --- schedules ---


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("n_steps", [1, 7, 100, 1000])
def test_shares_are_the_product_of_what_steps_keep(schedule, n_steps):
    process = FieldDiffusion(n_steps=n_steps, schedule=schedule)
    t = 1 - torch.arange(n_steps + 1, dtype=torch.float64) / n_steps
    expected = shares(n_steps, schedule)
    np.testing.assert_allclose(process.alpha_bar(t), expected, rtol=1e-9)
    assert float(process.alpha_bar(torch.ones(1))) == 1
    between = process.alpha_bar(t[:-1] - 0.25 / n_steps)
    np.testing.assert_allclose(
        between.log(), 0.75 * np.log(expected[:-1]) + 0.25 * np.log(expected[1:]), rtol=1e-9
    )


# --- loss ---


def oracle(process, values, coords, seen=None):
    """The noise, from the values that are known by where they are."""

    def net(x, t, *, coords, context, context_coords):
        if seen is not None:
            seen.append((x, t, coords, context, context_coords))
        at = (coords[:, :, None] == whole.expand(len(x), -1, -1)[:, None]).all(-1).long().argmax(2)
        clean = values.take_along_dim(at[..., None], 1)
        abar = process.alpha_bar(t)[:, None, None]
        return (x - abar.sqrt() * clean) / (1 - abar).sqrt()

    whole = coords
    return net


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own points"])
@pytest.mark.parametrize(("n_context", "n_query"), [(0.5, 1.0), (3, 0.4), (9, 9), (1.0, 1)])
def test_an_oracle_has_no_loss_and_sees_what_is_promised(schedule, own, n_context, n_query):
    process, values = FieldDiffusion(n_steps=50, schedule=schedule), normal(6, 9, 2)
    coords, seen = normal(6 if own else 1, 9, 3, seed=1), []
    net = oracle(process, values, coords, seen)
    options = {"n_context": n_context, "n_query": n_query, "generator": rng()}
    each = process.loss(net, values, coords, reduction="none", **options)
    assert each.shape == (6,) and float(each.max()) < 1e-18
    ((x, t, at, context, around),) = seen
    k, q = (share if isinstance(share, int) else round(9 * share) for share in (n_context, n_query))
    assert x.shape == (6, q, 2) and at.shape == (6, q, 3)
    assert context.shape == (6, k, 2) and around.shape == (6, k, 3)
    assert t.shape == (6,) and ((t >= 0) & (t < 1)).all()
    torch.testing.assert_close(t * 50, (t * 50).round(), rtol=0, atol=1e-9)
    assert (torch.cdist(at[0], at[0]).fill_diagonal_(1) > 0).all(), "no query twice"
    same = (at[:, :, None] == around[:, None]).all(-1)  # where a query is in the context
    for field, query, there in same.nonzero():
        assert torch.equal(x[field, query], context[field, there])
    if k == 9:
        assert same.any(2).all()


def test_fields_with_points_of_their_own_have_subsets_of_their_own():
    coords, seen = line(20).expand(8, -1, -1).contiguous(), []
    FieldDiffusion().loss(
        lambda x, t, **given: seen.append(given) or x, normal(8, 20, 1), coords, generator=rng()
    )
    assert len({tuple(each.tolist()) for each in seen[0]["context_coords"][..., 0]}) > 1


def test_a_network_of_no_noise_errs_by_the_variance_of_noise():
    values, coords = normal(200, 50, 2), line(50)
    losses = {}
    for reduction in ("mean", "sum", "none"):
        losses[reduction] = FieldDiffusion().loss(
            silent, values, coords, n_query=10, reduction=reduction, generator=rng()
        )
    assert abs(float(losses["mean"]) - 1) < 5 * math.sqrt(2 / 4000)
    torch.testing.assert_close(losses["sum"], losses["mean"] * 200 * 10 * 2)
    torch.testing.assert_close(losses["none"].mean(), losses["mean"])


def test_steps_are_drawn_evenly_and_given_times_are_kept():
    times = []
    net = lambda x, t, **_: times.append(t) or x  # noqa: E731
    process = FieldDiffusion(n_steps=4)
    process.loss(net, normal(4000, 1, 1), line(1), generator=rng())
    counts = torch.bincount((times[0] * 4).round().long(), minlength=4)
    assert len(counts) == 4 and (abs(counts - 1000) < 5 * math.sqrt(750)).all()
    given = torch.tensor([0.1, 0.97], dtype=torch.float64)
    process.loss(net, normal(2, 3, 1), line(3), t=given)
    assert torch.equal(times[1], given)


def test_the_exact_noise_of_a_gaussian_process_minimises_the_loss():
    process, covariance = FieldDiffusion(n_steps=20, schedule="cosine"), kernel(6)
    net = GaussianNoise(process, covariance)
    fields = (normal(4000, 6) @ torch.linalg.cholesky(covariance).T)[..., None]

    def loss():
        return process.loss(net, fields, line(6), n_context=1.0, generator=rng())

    least = float(loss().detach())
    # E || eps - E[eps | y] ||^2 / m is the mean over steps and axes of abar v / (abar v + 1 - abar)
    abar, values = shares(20, "cosine")[1:, None], np.linalg.eigvalsh(covariance.numpy())
    assert abs(least - (abar * values / (abar * values + 1 - abar)).mean()) < 0.02
    (slope,) = torch.autograd.grad(loss(), net.parameters())
    for direction in (
        0.1 * torch.eye(6).double(),
        -0.05 * torch.eye(6).double(),
        0.05 * torch.ones(6, 6).double(),
    ):
        net.covariance.data = covariance + direction
        more = float(loss().detach()) - least
        assert more > 0
        assert abs(float((slope * direction).sum())) < 0.2 * more + 2e-3


# --- samples ---


def variances(process, covariance, sampler, n_steps):
    """Exact variances on the axes of K: the recursion of a linear step, its factor and what it adds."""
    abar = shares(process.n_steps, process.schedule)
    values, axes = np.linalg.eigh(covariance.numpy())
    factor, v = np.ones_like(values), np.ones_like(values)
    stops = [round(process.n_steps * (1 - s / n_steps)) for s in range(n_steps + 1)]
    for k, after in zip(stops[:-1], stops[1:], strict=True):
        a, b = abar[k], abar[after]
        noise = np.sqrt(1 - a) / (a * values + 1 - a)
        clean = (1 - np.sqrt(1 - a) * noise) / np.sqrt(a)
        if sampler == "ddim":
            step, added = np.sqrt(b) * clean + np.sqrt(1 - b) * noise, 0.0
        else:
            beta = 1 - a / b
            step = np.sqrt(b) * beta / (1 - a) * clean + np.sqrt(a / b) * (1 - b) / (1 - a)
            added = (1 - b) / (1 - a) * beta
        factor, v = factor * step, step**2 * v + added
    return axes, factor, v


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_samples_of_a_gaussian_process_have_its_covariance(schedule):
    process, covariance = FieldDiffusion(n_steps=200, schedule=schedule), kernel(6, variance=2.0)
    made = process.sample(
        GaussianNoise(process, covariance), line(6), 1, 4000, n_context=1.0, generator=rng()
    )[..., 0]
    axes, _, v = variances(process, covariance, "ddpm", 200)
    predicted = torch.from_numpy(axes @ np.diag(v) @ axes.T)
    spread = ((predicted**2 + predicted.diag()[:, None] * predicted.diag()) / 4000).sqrt()
    assert ((made.T.cov() - predicted).abs() < 5 * spread).all(), "the recursion of its steps"
    assert ((made.T.cov() - covariance).abs() < 5 * spread).all(), "the process itself"
    assert (made.mean(0).abs() < 5 * (covariance.diag() / 4000).sqrt()).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_is_a_linear_map_whose_square_is_the_covariance(schedule):
    process, covariance = FieldDiffusion(n_steps=1000, schedule=schedule), kernel(5)
    net, x0 = GaussianNoise(process, covariance), torch.eye(5).double()[..., None]
    away = []
    for n_steps in (10, 30, 100, 300):
        made = process.sample(net, line(5), 1, x0=x0, n_context=5, n_steps=n_steps, sampler="ddim")[..., 0]
        axes, factor, _ = variances(process, covariance, "ddim", n_steps)
        torch.testing.assert_close(made, torch.from_numpy(axes @ np.diag(factor) @ axes.T), rtol=0, atol=1e-7)
        away.append(float((made @ made - covariance).abs().max()))
    assert all(fine < 0.5 * coarse for coarse, fine in zip(away[:-1], away[1:], strict=True))
    assert away[-1] < 0.02


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_untrained_network_gives_noise_of_the_variance_of_the_recursion(schedule):
    process, net = (
        FieldDiffusion(n_steps=20, schedule=schedule),
        FieldNet(1, 1, dim=8, n_latents=2, n_blocks=0),
    )
    made = process.sample(net, line(2000).float(), 1, 2, generator=rng()).double()
    abar, v = shares(20, schedule), 1.0
    for k in range(20, 0, -1):
        beta = 1 - abar[k] / abar[k - 1]
        v = v / (1 - beta) + (1 - abar[k - 1]) / (1 - abar[k]) * beta  # the mean is y / sqrt(alpha)
    assert abs(float(made.square().mean()) / v - 1) < 5 * math.sqrt(2 / 4000)
    assert abs(float(np.corrcoef(made[:, :, 0])[0, 1])) < 5 / math.sqrt(2000)


def test_clipped_data_stay_in_their_interval():
    process = FieldDiffusion(n_steps=10, schedule="cosine", clip=(-0.5, 0.25))
    for sampler in ("ddpm", "ddim"):
        made = process.sample(silent, line(50), 1, 3, sampler=sampler, generator=rng())
        assert made.min() == -0.5 and made.max() == 0.25  # the last step returns predicted data
    free = FieldDiffusion(n_steps=10).sample(silent, line(5), 1, x0=normal(2, 5, 1), generator=rng())
    loose = FieldDiffusion(n_steps=10, clip=(-1e9, 1e9))
    torch.testing.assert_close(loose.sample(silent, line(5), 1, x0=normal(2, 5, 1), generator=rng()), free)


def test_ddim_goes_on_with_the_noise_of_the_clipped_data():
    """Of data clipped to one value the path is known: it ends there, and noise is what is left."""
    process, states = FieldDiffusion(n_steps=4, clip=(2.0, 2.0 + 1e-12)), []
    process.sample(
        lambda x, t, **_: states.append(x) or 0 * x, line(3), 1, x0=normal(1, 3, 1), sampler="ddim"
    )
    abar = shares(4, "linear")
    noise = [(y - 2 * math.sqrt(a)) / math.sqrt(1 - a) for y, a in zip(states, abar[:0:-1], strict=True)]
    for each in noise[1:]:
        torch.testing.assert_close(each, noise[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_network_sees_one_context_through_all_steps(sampler):
    seen = []
    process, index = FieldDiffusion(n_steps=6), torch.tensor([4, 0, 7])

    def net(x, t, **given):
        seen.append((x, t, given))
        return torch.tanh(x)

    process.sample(net, line(9), 2, 3, context_index=index, sampler=sampler, generator=rng())
    for step, (x, t, given) in enumerate(seen):
        assert torch.equal(t, torch.full((3,), step / 6, dtype=x.dtype))
        assert torch.equal(given["context"], x[:, index])
        torch.testing.assert_close(given["context_coords"], line(9)[:, index].float().expand(3, -1, -1))
        assert given["coords"].shape == (3, 9, 1)
    seen.clear()
    process.sample(net, line(10), 1, 3, n_context=0.3, sampler=sampler, generator=rng())
    chosen = [given["context_coords"] for _, _, given in seen]
    assert chosen[0].shape == (3, 3, 1) and all(torch.equal(each, chosen[0]) for each in chosen)
    assert len(seen) == 6


def test_shared_and_repeated_coordinates_give_the_same_samples():
    net, process = lively(), FieldDiffusion(n_steps=4)
    once = process.sample(net, line(11).float(), 1, 3, generator=rng())
    each = process.sample(net, line(11).float().expand(3, -1, -1).contiguous(), 1, 3, generator=rng())
    torch.testing.assert_close(each, once, rtol=0, atol=1e-6)
    t, values = torch.tensor([0.2, 0.6]), normal(2, 11, 1).float()
    options = {"n_context": 1.0, "n_query": 1.0, "t": t}
    for coords in (line(11).float(), line(11).float().expand(2, -1, -1), line(11).float().repeat(2, 1, 1)):
        loss = process.loss(net, values, coords, generator=rng(), **options)
        torch.testing.assert_close(
            loss, process.loss(net, values, line(11).float(), generator=rng(), **options)
        )


def lively(coord_dim=1, value_dim=1, **options):
    """A small network whose last layer is not zero."""
    options = {"dim": 16, "n_latents": 5, "n_blocks": 1, "n_heads": 2} | options
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = FieldNet(coord_dim, value_dim, **options)
        nn.init.normal_(net.out.weight)
        nn.init.normal_(net.out.bias)
    return net.eval()


class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x, t, **given):
        self.calls += 1
        return self.net(x, t, **given)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_queries_in_chunks_are_the_queries_at_once(sampler):
    net, process = lively(), FieldDiffusion(n_steps=3, clip=(-2.0, 2.0))
    options = {"n": 2, "n_context": 5, "sampler": sampler}
    whole = process.sample(net, line(20).float(), 1, generator=rng(), **options)
    wrapped = Wrapped(net)
    reads = []
    hook = net.reader.register_forward_hook(lambda *_: reads.append(1))
    for asked in (net, wrapped):
        parts = process.sample(asked, line(20).float(), 1, chunk_size=7, generator=rng(), **options)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    hook.remove()
    assert len(reads) == 3 + wrapped.calls == 3 + 9, "a FieldNet reads its context once a step"
    net.register_forward_hook(lambda *_: reads.append(1))
    reads.clear()
    process.sample(net, line(20).float(), 1, chunk_size=7, generator=rng(), **options)
    assert len(reads) == 9, "hooks are called"


def test_conditions_reach_the_network_and_its_mode_is_kept():
    labels, got = torch.arange(3.0), []

    class Labelled(nn.Module):
        def forward(self, x, t, *, coords, context, context_coords, label):
            got.append((label, self.training))
            return x

    net, process = Labelled(), FieldDiffusion(n_steps=2)
    process.sample(net, line(4), 1, 3, cond={"label": labels}, chunk_size=2)
    process.loss(net.eval(), normal(3, 4, 1), line(4), cond={"label": labels})
    assert all(torch.equal(label, labels) for label, _ in got)
    assert [mode for _, mode in got] == [True] * 4 + [False]


@pytest.mark.parametrize("own", [False, True])
def test_one_generator_gives_the_same_bytes(own):
    net, process = lively(), FieldDiffusion(n_steps=3)
    coords = line(9).float().expand(4 if own else 1, -1, -1).contiguous()
    state = torch.random.get_rng_state()
    for draw in (
        lambda seed: process.sample(net, coords, 1, 4, generator=rng(seed)),
        lambda seed: process.sample(net, coords, 1, 4, sampler="ddim", n_steps=2, generator=rng(seed)),
        lambda seed: process.loss(net, normal(4, 9, 1).float(), coords, generator=rng(seed)).detach(),
    ):
        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.random.get_rng_state(), state)


# --- conformance, precision ---


class AtPoints:
    """A process bound to its points, as the conformance check of a kind calls it."""

    def __init__(self, process, coords):
        self.process, self.coords = process, coords

    def loss(self, net, values, **options):
        return self.process.loss(net, values, self.coords, n_context=1.0, **options)

    def sample(self, net, n, **options):
        return self.process.sample(net, self.coords, 1, n, n_context=1.0, **options)


def test_conforms_to_its_kind(as_a_user):
    process, covariance = FieldDiffusion(n_steps=50, clip=(-6.0, 6.0)), kernel(4).float()
    fields = torch.randn(100, 4, generator=rng()) @ torch.linalg.cholesky(covariance).T
    deviations = covariance.diag().sqrt()[:, None]
    check_generative(
        AtPoints(process, line(4)), GaussianNoise(process, covariance), fields[..., None],
        mean=torch.zeros(4, 1), std=deviations, n=2000,
    )  # fmt: skip


@pytest.mark.parametrize("n_context", [1.0, 0.5])
def test_a_narrow_loss_is_its_float32_twin_rounded(as_a_user, n_context):
    process, coords = FieldDiffusion(), line(12)
    check_low_precision(
        lambda net, values: process.loss(net, values, coords, n_context=n_context, generator=rng()),
        lively(), (normal(40, 12, 1),), slack=8,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_of_a_narrow_sampler_is_wide(dtype):
    """A thousand steps of a silent network multiply its start by prod 1/sqrt(alpha)."""
    process, start = FieldDiffusion(), torch.tensor([[[1.0], [0.25]]], dtype=dtype)
    made = process.sample(silent, line(2), 1, x0=start, sampler="ddim")
    grown = 1 / math.sqrt(shares(1000, "linear")[-1])
    assert made.dtype == dtype
    torch.testing.assert_close(made, (start.double() * grown).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


# --- bad input ---

V, C, P = torch.zeros(4, 9, 2), torch.zeros(1, 9, 3), FieldDiffusion(n_steps=10)


def loss(values=V, coords=C, net=silent, **options):
    return P.loss(net, values, coords, **options)


def sample(coords=C, n_values=2, n=4, net=silent, **options):
    return P.sample(net, coords, n_values, n, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FieldDiffusion(n_steps=0), "n_steps must be an integer of at least 1, got 0"),
        (lambda: FieldDiffusion(schedule="sigmoid"), "schedule must be one of 'linear', 'cosine', got"),
        (lambda: FieldDiffusion(clip=(1, 1)), r"clip must be two numbers, the lower first, got \(1, 1\)"),
        (lambda: FieldDiffusion(clip=(1, 0)), "clip must be two numbers, the lower first"),
        (lambda: FieldDiffusion(clip=3), "clip must be two numbers, the lower first, got 3"),
        (lambda: FieldDiffusion(clip=(0, None)), "clip must be a number in"),
        (lambda: FieldDiffusion(clip=(0, math.nan)), "clip must be in"),
        (lambda: P.alpha_bar(torch.tensor([1.5])), r"t must be in \[0, 1\]"),
        (lambda: P.alpha_bar(torch.ones(1, dtype=torch.long)), "t must be a floating-point tensor"),
        (lambda: loss(V[:, :8]), r"coords must have shape \(1, 8, any\) for 4 fields .* at 8 points, got \(1, 9, 3\)"),
        (lambda: loss(coords=C.expand(3, -1, -1)), r"coords must have shape \(4, 9, any\) .* got \(3, 9, 3\)"),
        (lambda: loss(coords=C[0]), r"coords must have shape \(4, 9, any\) .* got \(9, 3\)"),
        (lambda: loss(coords=C.long()), "coords must be a floating-point tensor, got dtype torch.int64"),
        (lambda: loss(coords=None), "coords must be a floating-point tensor, got NoneType"),
        (lambda: loss(coords=C * math.nan), "coords must be finite, got NaN or infinity"),
        (lambda: loss(coords=C[:, :, :0]), "coords must have numbers"),
        (lambda: loss(V / 0), "values must be finite, got NaN or infinity"),
        (lambda: loss(V.long()), "values must be .* got dtype torch.int64: scale to floats first"),
        (lambda: loss("fields"), "values must be a floating-point tensor, got str"),
        (lambda: loss(V[0]), r"values must have shape \(any, any, any\), got \(9, 2\)"),
        (lambda: loss(V[:0]), r"values must have fields, points and channels, got shape \(0, 9, 2\)"),
        (lambda: loss(n_context=0), "n_context must be an integer of at least 1, got 0"),
        (lambda: loss(n_context=10), "n_context must be at most the number of points, 9, got 10"),
        (lambda: loss(n_context=0.0), r"n_context must be in \(0, 1\], got 0.0"),
        (lambda: loss(n_query=1.5), r"n_query must be in \(0, 1\], got 1.5"),
        (lambda: loss(n_query=True), "n_query must be an integer of at least 1, got True"),
        (lambda: loss(n_query="all"), "n_query must be an integer of at least 1, got 'all'"),
        (lambda: loss(t=torch.zeros(3)), r"t must have shape \(4\) for 4 samples, got \(3,\)"),
        (lambda: loss(t=torch.zeros(4) - 1), r"t must be in \[0, 1\]"),
        (lambda: loss(reduction="max"), "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
        (lambda: loss(cond={"y": torch.zeros(3)}), r"cond\['y'\] must have first dimension 4, got \(3,\)"),
        (lambda: loss(cond={"coords": V}), "cond must not name what the network is given anyway, got coords"),
        (lambda: loss(net=lambda x, t, **_: x[..., :1]), r"net\(x, t\) must have shape \(4, 9, 2\) .* got \(4, 9, 1\)"),
        (lambda: loss(net=lambda x, t, **_: None), r"net\(x, t\) must be a floating-point tensor, got NoneType"),
        (lambda: sample(net=lambda x, t, **_: x[:, :1]), r"net\(x, t\) must have shape \(4, 9, 2\)"),
        (lambda: loss(net=lively(2, 2)), "net must be for coords of 3 and values of 2 numbers, got one for 2 and 2"),
        (lambda: sample(net=lively(3, 1)), "net must be for coords of 3 and values of 2 numbers, got one for 3 and 1"),
        (lambda: sample(n=None), "exactly one of n and x0 must be given, got neither"),
        (lambda: sample(x0=V), "exactly one of n and x0 must be given, got both"),
        (lambda: sample(n=0), "n must be an integer of at least 1, got 0"),
        (lambda: sample(n_values=0), "n_values must be an integer of at least 1, got 0"),
        (lambda: sample(n=None, x0=V[:, :8]), r"x0 must have shape \(any, 9, 2\) for coords and n_values"),
        (lambda: sample(n=None, x0=V.long()), "x0 must be a floating-point tensor"),
        (lambda: sample(coords=C.expand(3, -1, -1)), r"coords must have shape \(4, 9, any\)"),
        (lambda: sample(coords=C + math.inf), "coords must be finite, got NaN or infinity"),
        (lambda: sample(coords=C.int()), "coords must be a floating-point tensor"),
        (lambda: sample(coords=C[:, :0]), "coords must have points and numbers"),
        (lambda: sample(n_context=10), "n_context must be at most the number of points, 9, got 10"),
        (lambda: sample(context_index=torch.tensor([0, 9])), "context_index must name some of the points 0 to 8"),
        (lambda: sample(context_index=torch.tensor([-1])), "context_index must name some of the points 0 to 8"),
        (lambda: sample(context_index=torch.tensor([3, 3])), r"each once, got \[3, 3\]"),
        (lambda: sample(context_index=torch.zeros(0).long()), r"each once, got \[\]"),
        (lambda: sample(context_index=torch.ones(9).bool()), "context_index must be a vector of whole numbers"),
        (lambda: sample(context_index=[0, 1]), r"context_index must be a vector .* got \[0, 1\]"),
        (lambda: sample(n_steps=5), "n_steps must be 10, that of the process, for sampler 'ddpm', got 5"),
        (lambda: sample(n_steps=11, sampler="ddim"), "n_steps must be at most 10 for sampler 'ddim', got 11"),
        (lambda: sample(n_steps=0, sampler="ddim"), "n_steps must be an integer of at least 1, got 0"),
        (lambda: sample(sampler="heun"), "sampler must be one of 'ddpm', 'ddim', got 'heun'"),
        (lambda: sample(chunk_size=0), "chunk_size must be an integer of at least 1, got 0"),
        (lambda: sample(cond={"y": torch.zeros(3)}), r"cond\['y'\] must have first dimension 4, got \(3,\)"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
