"""States and gradients of the layer in six settings; its local Jacobian's eigenvalues and step limit."""

import torch

from posterity.graphs import AntiSymmetricConv, euler_step_limit, local_jacobian_eigenvalues

AGAINST = "the authors' code (github.com/gravins/Anti-SymmetricDGN), and for the Jacobian of brute force"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    x, edge_index, edge_weight, probe = (
        torch.tensor(stored[name]) for name in ("x", "edge_index", "edge_weight", "probe")
    )
    for case, (gcn, steps, epsilon, gamma, relu, bias, weighted) in enumerate(stored["settings"]):
        conv = AntiSymmetricConv(
            x.shape[1], int(steps), epsilon=epsilon, gamma=gamma, bias=bool(bias),
            phi="gcn" if gcn else "sum", act="relu" if relu else "tanh",
        ).double()  # fmt: skip
        put(conv, stored, case)
        state = x.clone().requires_grad_()
        y = conv(state, edge_index, edge_weight if weighted else None)
        yield f"case {case}", y, stored["y"][case], 1e-9
        gradients = torch.autograd.grad((y * probe).sum(), [state, conv.W, conv.V])
        for of, gradient in zip("xWV", gradients, strict=True):
            yield f"case {case} gradient of {of}", gradient, stored[f"{of}_grad"][case], 1e-9
    for k, gamma in enumerate(stored["gamma"]):  # at small states, where tanh is not saturated
        conv = AntiSymmetricConv(x.shape[1], gamma=float(gamma)).double()
        put(conv, stored, 0)
        eigenvalues = local_jacobian_eigenvalues(conv, x / 4, edge_index).detach()
        for part in ("real", "imag"):
            ours = getattr(eigenvalues, part).sort().values
            yield f"eigenvalues at gamma {gamma:g}, {part}", ours, stored[f"eigenvalue_{part}"][k], 1e-9
        yield (
            f"step at gamma {gamma:g}",
            euler_step_limit(conv, x / 4, edge_index),
            stored["step_limit"][k],
            1e-6,
        )


def put(conv, stored, case):
    """Give the layer the weights of a case."""
    with torch.no_grad():
        for name, parameter in conv.named_parameters():
            parameter.copy_(torch.tensor(stored[name][case]))
