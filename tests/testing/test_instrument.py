"""The conformance check of instruments refuses plausible toys, one subtle fault each."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from posterity._models import call, evaluating, state
from posterity.testing import check_instrument

pytestmark = pytest.mark.usefixtures("as_a_user")


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    net[3].bias.requires_grad_(False)
    return net


@pytest.fixture
def x():
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Spread:
    spread: torch.Tensor

    def plot(self, ax=None):
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.subplots()[1]
        ax.plot(self.spread)
        return ax


@dataclass
class Loose:
    spread: torch.Tensor


class OnCurrentAxes(Spread):
    def plot(self, ax=None):
        from matplotlib import pyplot

        pyplot.plot(self.spread)
        return pyplot.gca() if ax is None else ax


def spread(model, x, kind=Spread):
    with evaluating(model), torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        outputs = model(x.clone()).detach()
    return kind(outputs.double().std(0).cpu())


def in_train_mode(model, x):
    return Spread(model.train()(x).detach().double().std(0))


def leaves_eval_mode(model, x):
    model.eval()
    return Spread(model(x).detach().double().std(0))


def all_modes_alike(model, x):
    found = spread(model.eval(), x)
    model.train()
    return found


def leaves_a_hook(model, x):
    seen = []
    model[0].register_forward_hook(lambda _module, _given, out: seen.append(out))
    return spread(model, x)


def hook_after_failure(model, x):
    handle = model[0].register_forward_hook(lambda *_: None)
    found = spread(model, x)
    handle.remove()
    return found


def mode_after_failure(model, x):
    modes = [(module, module.training) for module in model.modules()]
    outputs = model.eval()(x)
    for module, training in modes:
        module.training = training
    return Spread(outputs.detach().double().std(0))


def clears_gradients(model, x):
    model.zero_grad()
    return spread(model, x)


def adds_gradients(model, x):
    with torch.enable_grad(), torch.inference_mode(False), evaluating(model):
        model(x.clone()).sum().backward()
    return spread(model, x)


def shifts_and_shifts_back(model, x):
    weight = model[0].weight
    found = spread(model, x)
    weight.data = weight.data * 3 / 3
    return found


def thaws(model, x):
    for p in model.parameters():
        p.requires_grad_()
    return spread(model, x)


def keeps_a_note(model, x):
    model.last_spread = spread(model, x)
    return model.last_spread


def draws(model, x):
    return spread(model, x + 0 * torch.randn(()))


def centres_in_place(model, x):
    found = spread(model, x)
    x -= x.mean(0)
    return found


def keeps_the_graph(model, x):
    with evaluating(model):
        return model(x.clone()).double().std(0)


def follows_autocast(model, x):
    with evaluating(model):
        return Spread(model(x).detach().double().std(0))


def single_only(model, x):
    with torch.autocast("cpu", enabled=False):
        model.float()
    return spread(model, x.float())


def functional(model, x):
    params, rest = state(model)
    with evaluating(model), torch.no_grad(), torch.autocast("cpu", enabled=False):
        return {"spread": call(model, params | rest, x).double().std(0), "names": "ab"}


def by_functional_call(model, x):
    with evaluating(model), torch.no_grad(), torch.autocast("cpu", enabled=False):
        return functional_call(model, {**state(model)[0], **state(model)[1]}, (x,)).double().std(0)


def shared(tied=False):
    torch.manual_seed(0)
    inner = nn.Linear(3, 3)
    net = nn.Sequential(inner, nn.ReLU(), nn.Linear(3, 3) if tied else inner, nn.BatchNorm1d(3))
    if tied:
        net[2].weight = inner.weight
    return net


def test_a_faithful_instrument_passes(model, x):
    check_instrument(spread, model, x)
    for net in (model, shared(), shared(tied=True)):
        check_instrument(functional, net, x)


def test_a_module_in_two_places_is_changed_by_functional_call_alone(x):
    with pytest.raises(AssertionError, match=r"0.weight is changed|other parts than before"):
        check_instrument(by_functional_call, shared(), x)


@pytest.mark.parametrize("tied", [False, True])
def test_a_call_with_other_tensors_is_the_model_that_has_them(tied, x):
    net = shared(tied).eval()
    params, rest = state(net)
    other = {name: 2 * p for name, p in params.items()}
    got = call(net, {**other, **rest}, x)
    stacked = vmap(lambda p: call(net, {**p, **rest}, x))(
        {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    )
    usual = net(x)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    torch.testing.assert_close(got, net(x))
    torch.testing.assert_close(stacked, torch.stack([usual, net(x)]))


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (in_train_mode, "depends on the mode|is changed"),
        (leaves_eval_mode, "the mode of the model is changed"),
        (all_modes_alike, r"the mode of \d is changed"),
        (leaves_a_hook, "_forward_hooks of 0 is changed"),
        (hook_after_failure, "after a failure .*_forward_hooks of 0 is changed"),
        (mode_after_failure, "after a failure .*the mode of the model is changed"),
        (clears_gradients, "the gradient of .* is changed"),
        (adds_gradients, "the gradient of .* is changed"),
        (shifts_and_shifts_back, "the identity of 0.weight is changed"),
        (thaws, "the identity of 3.bias is changed"),
        (keeps_a_note, "the attributes of the model is changed"),
        (draws, "torch's global generator"),
        (centres_in_place, "the inputs are changed"),
        (keeps_the_graph, "the result has no gradient"),
        (follows_autocast, "under autocast the result is another"),
        (single_only, "in float64 .* is changed"),
        (lambda model, x: spread(model, x, Loose), "the result is a frozen dataclass"),
        (lambda model, x: spread(model, x, OnCurrentAxes), "draws on the Axes given|draws on a figure"),
    ],
)
def test_a_fault_is_named(model, x, look, message):
    with pytest.raises(AssertionError, match=message):
        check_instrument(look, model, x)
