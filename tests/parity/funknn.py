"""Values, gradients and Laplacians of both networks with both activations, on the three kernels."""

import math

import torch

from posterity.generative import FunkNN, image_gradient, image_laplacian

AGAINST = (
    "the authors' network and its differentiation by autograd (github.com/swing-research/FunkNN), "
    "without the shift of 1e-6 in its kernel, in float64"
)

SETTINGS = {
    "mlp_relu_cubic": ("mlp", "relu", "cubic"),
    "mlp_sin_cubic": ("mlp", "sin", "cubic"),
    "mlp_sin_cubic6": ("mlp", "sin", "cubic6"),
    "mlp_relu_bilinear": ("mlp", "relu", "bilinear"),
    "cnn_relu_cubic": ("cnn", "relu", "cubic"),
    "cnn_sin_cubic": ("cnn", "sin", "cubic"),
}


@torch.no_grad()
def filled(convs, layers, activation):
    """Give layers weights that are waves of an index: nothing has to be stored."""
    for number, layer in enumerate([*convs, *layers]):
        gain = 0.02 if activation == "sin" and layer in list(layers) else 1.3
        index = torch.arange(layer.weight.numel(), dtype=torch.float64)
        wave = (1.7 * (index + 1).sqrt() * (number + 2)).sin().view(layer.weight.shape)
        layer.weight.copy_(wave * gain / math.sqrt(layer.weight[0].numel()))
        layer.bias.copy_(0.1 * gain * (torch.arange(len(layer.bias), dtype=torch.float64) + number).cos())


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    image, coords = (torch.tensor(stored[name]) for name in ("image", "coords"))
    for name, (network, activation, kernel) in SETTINGS.items():
        net = FunkNN(2, network=network, activation=activation, kernel=kernel).double()
        filled(net.convs, net.layers, activation)
        with torch.no_grad():
            net.patch_scale.copy_(torch.tensor([1.1, 0.8], dtype=torch.float64))
        said = name.replace("_", ", ")
        with torch.no_grad():
            yield f"{said}, values", net(image, coords), stored[f"{name}_value"], 1e-9
        gradient = image_gradient(net, image, coords, create_graph=False)
        yield f"{said}, gradients", gradient, stored[f"{name}_gradient"], 1e-8
        if kernel != "bilinear":
            laplacian = image_laplacian(net, image, coords, create_graph=False)
            yield f"{said}, Laplacians", laplacian, stored[f"{name}_laplacian"], 1e-6
