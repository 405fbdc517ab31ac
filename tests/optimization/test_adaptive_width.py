"""Parametrisations against abcd-training by hand, Microsoft's mup, and how far layers move with width."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.claims.optimization.adaptive_width import feature_learning
from posterity.lab.data import load_images
from posterity.optimization import (
    CoordinateTable,
    Exponents,
    coordinate_check,
    exponents,
    param_groups,
    parametrize,
    width_info,
)
from posterity.testing import check_layer

ROLES = ("input", "hidden", "output")
TINY = 1e-30  # in place of eps = 0, where a dead unit is 0 / 0


def mlp(n, bias=True, n_in=8, n_out=3):
    return nn.Sequential(
        nn.Linear(n_in, n, bias=bias), nn.ReLU(), nn.Linear(n, n, bias=bias), nn.ReLU(), nn.Linear(n, n_out, bias=bias)
    )  # fmt: skip


def seeded(make, *args, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make(*args, **options)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = randn(20, 8), torch.arange(20) % 3


def train(model, groups, steps=4, optimizer=torch.optim.Adam):
    opt = optimizer(groups)
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(X.to(next(model.parameters()).dtype)), Y).backward()
        opt.step()
    return [p.detach() for p in model.parameters()]


# The table: training by (1) itself.


def by_hand(weights, table, n, lr, steps=4, optimizer=torch.optim.Adam, eps=TINY):
    """Train the matrices n^-a w by (1); return W after each of the steps."""
    e = [table[role] for role in ROLES]
    ws = [(W * n**k.a).clone().requires_grad_() for W, k in zip(weights, e, strict=True)]
    options = {} if optimizer is torch.optim.SGD else {"eps": eps}
    opt = optimizer([{"params": [w], "lr": lr * n**-k.c} for w, k in zip(ws, e, strict=True)], **options)
    for _ in range(steps):
        h = X
        for k, (w, each) in enumerate(zip(ws, e, strict=True)):
            h = (h if k == 0 else h.relu()) @ (n**-each.a * w).T
        opt.zero_grad()
        F.cross_entropy(h, Y).backward()
        for w, each in zip(ws, e, strict=True):
            w.grad *= n**each.d
        opt.step()
    return [(n**-k.a * w).detach() for w, k in zip(ws, e, strict=True)]


@pytest.mark.parametrize("parametrization", ["mu", "ntk", "standard"])
@pytest.mark.parametrize("family", ["adaptive", "sgd"])
@pytest.mark.parametrize("role", ROLES)
def test_a_shift_of_one_layer_trains_alike(parametrization, family, role):
    weights = [p.detach().double() for p in seeded(mlp, 16, bias=False).parameters()]
    table = exponents(parametrization, family)
    a, b, c, d = table[role]
    t, sgd = 0.75, family == "sgd"
    shifted = table | {role: Exponents(a + t, b - t, c - (2 * t if sgd else t), d + (0 if sgd else t))}
    optimizer = torch.optim.SGD if sgd else torch.optim.Adam
    for one, other in zip(
        by_hand(weights, table, 16, 0.01, optimizer=optimizer),
        by_hand(weights, shifted, 16, 0.01, optimizer=optimizer),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("parametrization", ["mu", "ntk"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_a_parametrized_model_trains_as_the_table_says(parametrization, optimizer):
    """At width m times base, (1) with n = m: eps, multipliers, rates and initial weights together."""
    family = "sgd" if optimizer is torch.optim.SGD else "adaptive"
    net, m = seeded(mlp, 48, bias=False).double(), 3
    plain = [p.detach().clone() for p in net.parameters()]
    parametrize(net, mlp(16, bias=False), parametrization=parametrization, family=family)
    table = exponents(parametrization, family)
    effective = [
        plain[0],
        plain[1],
        plain[2] * (m**-0.5 if parametrization == "mu" else 1),
    ]  # n^-(a+b), from n^-1/2
    torch.testing.assert_close(
        net(X), F.linear(F.linear(F.linear(X, effective[0]).relu(), effective[1]).relu(), effective[2])
    )
    lr, eps = (0.1, 0.0) if family == "sgd" else (0.01, 0.02)
    # an eps near the gradients' size, so that its scaling tells
    ours = train(net, param_groups(net, lr, eps=eps), optimizer=optimizer)
    theirs = by_hand(effective, table, m, lr, optimizer=optimizer, eps=eps)
    ours[2] = ours[2] / (m if parametrization == "mu" else 1)
    for k in range(3):
        torch.testing.assert_close(ours[k], theirs[k], rtol=1e-9, atol=1e-12)


def test_in_mu_every_layers_update_is_of_order_one_and_finite():
    """Sizes as powers of n by the rules of tensor programs: coherent sums over inputs give n."""
    for family in ("adaptive", "sgd"):
        e = exponents("mu", family)
        above = -(e["output"].a + e["output"].b)  # of dloss/dh of the last hidden layer
        for role, gradient, inputs in (("input", above, 0), ("hidden", above, 1), ("output", 0, 1)):
            a, b, c, d = e[role]
            size = d - a + gradient  # of n^d g, with features of order one
            assert family == "sgd" or size == 0, "Q sees numbers of order one"
            assert -a - c + (size if family == "sgd" else 0) + inputs == 0, (family, role)
        assert (e["input"].a + e["input"].b, e["hidden"].a + e["hidden"].b) == (0, 0.5), (
            "features of order one"
        )
    e = exponents("ntk")
    for role, gradient, inputs, moved in (
        ("input", -0.5, 0, -0.5),
        ("hidden", -0.5, 1, -0.5),
        ("output", 0, 1, 0),
    ):
        a, b, c, d = e[role]
        assert d - a + gradient == 0
        assert -a - c + inputs == moved  # hidden features by n^-1/2, values by 1


# Groups, multipliers and roles.


@pytest.mark.filterwarnings("ignore:base has the shapes")
@pytest.mark.parametrize("parametrization", ["mu", "ntk", "standard"])
def test_at_the_base_width_nothing_changes_bit_for_bit(parametrization):
    plain, net = seeded(mlp, 16), seeded(mlp, 16)
    parametrize(net, mlp(16), parametrization=parametrization)
    assert list(net.state_dict()) == list(plain.state_dict())
    a = train(plain, [{"params": list(plain.parameters()), "lr": 0.01, "weight_decay": 0.1}])
    b = train(net, param_groups(net, 0.01, weight_decay=0.1))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Words(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, 5, n))
        self.table, self.norm = nn.Embedding(7, n), nn.LayerNorm(n)
        self.mix, self.head = nn.Linear(n, 2 * n), nn.Linear(2 * n, 7)

    def forward(self, ids):
        return self.head(input=self.mix(self.norm(self.table(ids) + self.place)))


def convnet(n):
    return nn.Sequential(
        nn.Conv2d(3, n, 3), nn.BatchNorm2d(n), nn.Conv2d(n, n, 3, groups=n), nn.Conv2d(n, 2 * n, 1),
        nn.ConvTranspose2d(2 * n, n, 2), nn.Conv2d(n, 4, 1),
    )  # fmt: skip


def of(model, lr=1.0, eps=1.0, **options):
    """Return (lr, eps, weight decay) by parameter name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["eps"], group["weight_decay"])
        for group in param_groups(model, lr, eps=eps, **options)
        for p in group["params"]
    }


def test_roles_rates_eps_and_decay_at_four_times_the_width():
    mu = {"input": (1, 1 / 4, 1), "hidden": (1 / 4, 1 / 4, 4), "output": (1, 1 / 4, 1), "fixed": (1, 1, 1)}
    ntk = {
        "input": (1 / 2, 1 / 2, 2),
        "hidden": (1 / 8, 1 / 2, 8),
        "output": (1 / 4, 1, 4),
        "fixed": (1, 1, 1),
    }
    for make, roles in (
        (mlp, {"0.weight": "input", "0.bias": "input", "2.weight": "hidden", "2.bias": "input", "4.weight": "output",
               "4.bias": "fixed"}),
        (convnet, {"0.weight": "input", "0.bias": "input", "1.weight": "input", "1.bias": "input", "2.weight": "input",
                   "2.bias": "input", "3.weight": "hidden", "3.bias": "input", "4.weight": "hidden", "4.bias": "input",
                   "5.weight": "output", "5.bias": "fixed"}),
        (Words, {"place": "input", "table.weight": "input", "norm.weight": "input", "norm.bias": "input",
                 "mix.weight": "hidden", "mix.bias": "input", "head.weight": "output", "head.bias": "fixed"}),
    ):  # fmt: skip
        info = width_info(make(32), make(8))
        assert {name: role for name, (role, _) in info.items()} == roles
        assert {m for role, m in info.values()} == {4.0, 1.0}
        for parametrization, expected in (
            ("mu", mu),
            ("ntk", ntk),
            ("standard", dict.fromkeys(mu, (1, 1, 1))),
        ):
            net = parametrize(make(32), make(8), parametrization=parametrization)
            assert of(net, weight_decay=1.0) == {name: expected[role] for name, role in roles.items()}
            assert len(param_groups(net, 1.0)) <= 4
            assert {decay for *_, decay in of(net, weight_decay=1.0, scale_decay=False).values()} == {1.0}


@pytest.mark.parametrize("make", [mlp, convnet, Words])
def test_the_output_layers_input_and_the_initial_weights_are_scaled_and_nothing_else(make):
    plain, net = seeded(make, 32), seeded(make, 32)
    parametrize(net, make(8))
    head, factor = list(plain.named_modules())[-1][0], 2.0
    x = (
        torch.randint(7, (2, 5))
        if make is Words
        else randn(4, 8).float()
        if make is mlp
        else randn(2, 3, 6, 6).float()
    )
    h = {}
    net.get_submodule(head).register_forward_pre_hook(
        lambda m, a, k: h.update(x=(*a, *k.values())[0]), with_kwargs=True
    )
    net.get_submodule(head).register_forward_hook(lambda m, a, k, out: h.update(y=out), with_kwargs=True)
    net(x)
    reference = copy.deepcopy(plain.get_submodule(head))
    reference.weight.data *= factor
    reference.bias.data *= factor  # drawn by fan-in, it has to be as in the base
    torch.testing.assert_close(h["y"], reference(h["x"]))
    scaled = {
        name: (p / q).mean()
        for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True)
        if q.any()
    }
    narrow = {
        n
        for n in scaled
        if n.endswith("bias")
        and isinstance(plain.get_submodule(n[:-5]), nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    }
    narrow -= {"0.bias", "2.bias"} if make is convnet else {"0.bias"}  # their fan-in does not grow
    for name, ratio in scaled.items():
        want = factor if name in narrow or name == f"{head}.weight" else 1.0
        torch.testing.assert_close(ratio, torch.tensor(want), msg=f"{name}: {ratio} for {want}")
    net = seeded(make, 32)
    parametrize(net, make(8), rescale_init=False)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))


def test_spreads_of_transposed_layers_follow_the_table_though_torch_counts_their_outputs():
    def make(n):
        return nn.Sequential(
            nn.ConvTranspose1d(6, n, 1), nn.ConvTranspose1d(n, 2 * n, 1), nn.ConvTranspose1d(2 * n, 40, 1)
        )

    for parametrization, powers in (("mu", (0, -0.5, 0)), ("ntk", (0, -0.5, -0.5))):
        base, net = seeded(make, 64), seeded(make, 256)
        parametrize(net, base, parametrization=parametrization)
        for k, power in enumerate(powers):
            torch.testing.assert_close(
                net[k].weight.std() / base[k].weight.std(), torch.tensor(4.0**power), rtol=0.1, atol=0
            )


def test_inputs_and_outputs_may_grow_by_different_ratios():
    net = parametrize(nn.Linear(16, 64, bias=False), nn.Linear(8, 8, bias=False))
    assert of(net)["weight"] == (1 / 2, 1 / 8, 0)  # rate by what is summed, eps by what shrinks the gradient
    net = parametrize(nn.Linear(16, 64, bias=False), nn.Linear(8, 8, bias=False), family="sgd")
    (group,) = param_groups(net, 1.0)
    assert (group["lr"], "eps" in group) == (4.0, False)


def test_a_parametrized_model_copies_pickles_and_compiles_its_state_dict_as_before():
    net = parametrize(seeded(mlp, 32), mlp(8))
    x = X.float()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(x), net(x))
        assert of(other) == of(net)
    fresh = parametrize(mlp(32), mlp(8), rescale_init=False)
    fresh.load_state_dict(net.state_dict())
    torch.testing.assert_close(fresh(x), net(x))


def test_a_parametrized_model_is_a_layer(as_a_user):
    check_layer(parametrize(seeded(mlp, 32), mlp(8)), X.float(), shape=(20, 3))


def test_works_without_gradients_and_on_meta_bases():
    net, base = seeded(mlp, 32), mlp(8).to("meta")
    with torch.inference_mode():
        parametrize(net, base)
    torch.testing.assert_close(net(X.float()), parametrize(seeded(mlp, 32), mlp(8))(X.float()))


@pytest.mark.parametrize("optimizer", ["MuAdam", "MuAdamW", "MuSGD"])
def test_agrees_with_microsofts_mup(optimizer):
    """As theirs leaves eps alone, at a tiny one; biases, different ratios and decay included."""
    mup = pytest.importorskip("mup")

    def make(n, head):
        return nn.Sequential(
            nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 3 * n), nn.ReLU(), head(3 * n, 3)
        ).double()

    theirs, ours = seeded(make, 32, mup.MuReadout), seeded(make, 32, nn.Linear)
    mup.set_base_shapes(theirs, make(8, mup.MuReadout), delta=make(16, mup.MuReadout))
    sgd = optimizer == "MuSGD"
    parametrize(ours, make(8, nn.Linear), family="sgd" if sgd else "adaptive")
    torch.testing.assert_close(ours(X), theirs(X))
    options = {"lr": 0.01, "weight_decay": 0.1}
    a = train(theirs, list(theirs.parameters()),
              optimizer=functools.partial(getattr(mup, optimizer), **options | ({} if sgd else {"eps": TINY})))  # fmt: skip
    plain = {"MuAdam": torch.optim.Adam, "MuAdamW": torch.optim.AdamW, "MuSGD": torch.optim.SGD}[optimizer]
    b = train(ours, param_groups(ours, **options, eps=TINY), optimizer=plain)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


# The coordinate check.


def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x[:128] / 16).float(), torch.from_numpy(y[:128])


@pytest.mark.parametrize(
    ("parametrization", "low", "high"), [("mu", -0.15, 0.15), ("ntk", -0.65, -0.35), ("standard", 0.4, 1.1)]
)
def test_hidden_layers_move_with_width_as_theory_says(parametrization, low, high):
    adam = functools.partial(torch.optim.Adam, eps=1e-20)
    table = coordinate_check(
        lambda n: mlp(n, bias=False, n_in=64, n_out=10), [64, 256, 1024], digits(), F.cross_entropy,
        parametrization=parametrization, optimizer=adam, seeds=range(1),
    )  # fmt: skip
    assert table.names == ["0", "2", "4"]
    assert table.change.shape == (3, 3, 5, 1)
    assert low <= table.slopes["2"] <= high, table.slopes
    if parametrization != "standard":  # values move by O(1)
        assert abs(table.slopes["4"]) < 0.3, table.slopes


def test_the_change_is_the_mean_absolute_difference_of_outputs():
    steps, seed, width = 2, 3, 8
    batch = X.float(), Y
    table = coordinate_check(
        mlp, [4, width], batch, F.cross_entropy, lr=0.01, n_steps=steps, seeds=[seed], base_width=2
    )
    net = seeded(mlp, width, seed=seed)
    parametrize(net, mlp(2))
    first = [net[:k](batch[0]).detach() for k in (1, 3)]
    train(net, param_groups(net, 0.01), steps=steps)
    for layer, k in enumerate((1, 3)):
        moved = (net[:k](batch[0]).detach() - first[layer]).abs().mean()
        torch.testing.assert_close(float(moved), table.change[layer, 1, -1, 0], rtol=1e-5, atol=0)


def test_the_check_leaves_the_generators_of_all_devices_and_works_in_inference_mode(monkeypatch):
    before = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs were reseeded"))
    with torch.inference_mode():
        table = coordinate_check(
            mlp, [4, 8], (X.float(), Y.clone()), F.cross_entropy, optimizer=torch.optim.SGD
        )
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(table, CoordinateTable)
    assert (table.change > 0).all()


def test_a_layer_that_does_not_move_has_no_slope():
    def make(n):
        net = mlp(n)
        net[0].requires_grad_(False)
        return net

    slopes = coordinate_check(make, [4, 8], (X.float(), Y), F.cross_entropy, seeds=[0]).slopes
    assert slopes["0"] != slopes["0"]
    assert slopes["2"] == slopes["2"]


# Bad input.


class Tied(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.table, self.head = nn.Embedding(7, n), nn.Linear(n, 7, bias=False)
        self.head.weight = self.table.weight


class Bare(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.readout = nn.Parameter(torch.zeros(3, n))


def check(**changed):
    arguments = {"make_model": mlp, "widths": [4, 8], "batch": (X.float(), Y), "loss_fn": F.cross_entropy}
    return coordinate_check(**arguments | changed)


def test_a_loss_of_one_number_counts_with_dimensions_and_without():
    found = check(loss_fn=lambda f, y: F.cross_entropy(f, y).reshape(1))
    assert (found.change == check().change).all()


def twice():
    net = parametrize(mlp(8), mlp(4))
    parametrize(nn.Sequential(net), nn.Sequential(mlp(4)))


def grown():
    net = parametrize(mlp(8), mlp(4))
    net.append(nn.Linear(3, 3))
    return param_groups(net, 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exponents("mup"), "parametrization must be one of 'mu', 'ntk', 'standard', got 'mup'"),
        (lambda: exponents("mu", "adam"), "family must be one of"),
        (lambda: width_info(mlp(8), mlp(4, bias=False)), "base must have the parameters of model, got 0.bias"),
        (lambda: width_info(nn.Conv1d(2, 4, 1), nn.Conv2d(2, 4, 1)), r"same rank as model, got weight of shape \(4, 2, 1\)"),
        (lambda: width_info(nn.Bilinear(4, 4, 4), nn.Bilinear(2, 2, 2)), "at most two dimensions of a tensor, got weight"),
        (lambda: width_info(nn.Conv1d(2, 4, 3), nn.Conv1d(2, 2, 1)), "inputs and outputs only"),
        (lambda: width_info(nn.Embedding(9, 4), nn.Embedding(7, 4)), "as many embeddings"),
        (lambda: width_info(nn.Linear(4, 2), nn.Linear(0, 2, device="meta")), "empty width"),
        (lambda: width_info(mlp(8), None), "base must be an nn.Module, got NoneType"),
        (lambda: width_info(Tied(8), Tied(4)), r"roles, got table.weight \(input\) and head.weight \(output\)"),
        (lambda: parametrize(Tied(8), Tied(4)), r"roles, got table.weight \(input\) and head.weight \(output\)"),
        (lambda: parametrize(Bare(8), Bare(4)), "Linear or Conv modules only, got readout in Bare"),
        (lambda: parametrize(mlp(8), mlp(4), parametrization="mup"), "parametrization must be one of"),
        (lambda: parametrize(mlp(8), mlp(4), rescale_init=2), "rescale_init must be one of"),
        (twice, "model must not be parametrized twice"),
        (lambda: param_groups(mlp(8), 0.1), "call parametrize first"),
        (grown, "got also 5.weight"),
        (lambda: param_groups(parametrize(mlp(8), mlp(4)), 0.0), "lr must be greater than 0, got 0.0"),
        (lambda: param_groups(parametrize(mlp(8), mlp(4)), 0.1, eps=-1.0), "eps must be at least 0"),
        (lambda: param_groups(parametrize(mlp(8), mlp(4)), 0.1, weight_decay=-1.0), "weight_decay must be at least 0"),
        (lambda: check(widths=[4]), r"widths must be at least two, rising, got \[4\]"),
        (lambda: check(widths=[8, 4]), "widths must be at least two, rising"),
        (lambda: check(widths=[4.0, 8.0]), "widths must be an integer"),
        (lambda: check(lr=-1.0), "lr must be greater than 0"),
        (lambda: check(loss_fn=lambda f, y: f), "loss_fn must return a scalar"),
        (lambda: check(optimizer=lambda p, lr: p), "optimizer must make a torch optimizer"),
        (lambda: check(optimizer=torch.relu), "optimizer must make a torch optimizer"),
        (lambda: check(n_steps=0), "n_steps must be an integer of at least 1"),
        (lambda: check(seeds=[]), "seeds must be at least one"),
        (lambda: check(base_width=0), "base_width must be an integer of at least 1"),
        (lambda: check(batch=(X.float(),)), "batch must be a pair"),
        (lambda: check(batch=(X[:0].float(), Y[:0])), "batch must have at least one row"),
        (lambda: check(batch=(X.float() * torch.nan, Y)), "loss_fn must stay finite"),
        (lambda: check(make_model=lambda n: nn.Flatten()), "make_model must return a model with a Linear"),
        (lambda: check(make_model=Tied, base_width=2), "roles"),
        (lambda: check(make_model=lambda n: n), "make_model must return a model with a Linear"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_model_is_left_as_it_was(as_a_user):
    net = mlp(8)
    with pytest.raises(ValueError, match="base"):
        parametrize(net, mlp(4, bias=False))
    assert not net[4]._forward_pre_hooks
    parametrize(net, mlp(4))


def test_warns_of_a_base_as_wide_as_the_model():
    for call in (width_info, parametrize):
        with pytest.warns(UserWarning, match="base has the shapes of model"):
            call(mlp(8), mlp(8))


def test_learning_from_all_images_is_refused_before_any_trial(as_a_user):
    digits = load_images("digits")
    feature_learning.refuse({"n": len(digits.y) - 1}, digits)
    with pytest.raises(ValueError, match="n must leave 1 of the 1797 images"):
        feature_learning.refuse({"n": len(digits.y)}, digits)
