"""What clients of a federated round send: how far local training moves the weights, clipped to a norm.

Client k starts from the server's weights theta, takes steps of gradient descent on all of its rows
and sends

    u_k = (theta - theta_k) min(1, clip / |theta - theta_k|).                              (1)

All clients that hold equally many rows are computed at once.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from posterity._checks import at_least, floating, integer, scalar
from posterity._precision import wide

__all__ = ["client_updates"]

Rows = tuple[Shaped[Tensor, "..."], Shaped[Tensor, "..."]]
Loss = Callable[[Tensor, Tensor], Tensor]
AT_ONCE = 256  # clients


@torch.inference_mode(False)  # grad mode too
def client_updates(
    model: nn.Module,
    clients: Sequence[Rows],
    *,
    loss_fn: Loss = F.cross_entropy,
    lr: float = 1.0,
    local_steps: int = 1,
    clip: float = 1.0,
) -> Float[Tensor, "clients numbers"]:
    """Return what each client would send to the server in a round, equation 1.

    Parameters
    ----------
    model : nn.Module
        With the server's weights; left as it is. It is in eval mode: no dropout, and batch
        normalisation by its running statistics.
    clients : sequence of tuple of Tensor
        Inputs and targets of each, at least one row.
    loss_fn : callable, default=cross_entropy
        ``loss_fn(model(x), y) -> scalar``, the mean over a client's rows.
    lr : float, default=1.0
        Rate of the local steps, positive.
    local_steps : int, default=1
        At least 1, each on all rows of the client.
    clip : float, default=1.0
        Largest Euclidean norm of an update, positive.

    Returns
    -------
    Tensor of shape (clients, numbers)
        One row a client: the parameters that require a gradient, in the order of
        ``model.parameters()``; in float32 at least, and norms are at most ``clip`` but for rounding.

    Raises
    ------
    ValueError
        If a parameter is out of range, clients do not fit, or an update is not finite.

    References
    ----------
    .. [1] McMahan, Ramage, Talwar, Zhang. Learning Differentially Private Recurrent Language Models.
       ICLR 2018. Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.privacy import client_updates
    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> net.weight.data.fill_(0.0)
    tensor([[0.]])
    >>> clients = [(torch.ones(2, 1), torch.full((2, 1), y)) for y in (0.1, 30.0)]
    >>> client_updates(net, clients, loss_fn=torch.nn.functional.mse_loss)  # the second is clipped
    tensor([[-0.2000],
            [-1.0000]])
    """
    at_least("lr", lr, 0, strict=True)
    at_least("clip", clip, 0, strict=True)
    local_steps = integer("local_steps", local_steps, 1)
    twin = frozen(model)
    parameters = {name: p.detach() for name, p in twin.named_parameters() if p.requires_grad}
    first = next(iter(parameters.values()))
    if not len(clients):
        raise ValueError("clients must hold at least one, got none")

    def moved(x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of slopes of one client's steps; a difference of weights would cancel."""
        way: dict[str, Tensor] = {}
        for _ in range(local_steps):
            at = {name: p - lr * way[name] for name, p in parameters.items()} if way else parameters
            slope = grad(lambda p: sample_loss(lambda: functional_call(twin, p, (x,)), loss_fn, y))(at)
            way = {name: way[name] + each for name, each in slope.items()} if way else slope
        return torch.cat([part.reshape(-1) for part in way.values()])

    alike: dict[Any, list[int]] = {}
    for k, client in enumerate(clients):
        alike.setdefault(_form(k, client), []).append(k)
    with plain_kernels(twin):
        found = []
        for members in alike.values():
            x, y = (torch.stack([clients[k][part] for k in members]) for part in (0, 1))
            found.append(_sums(moved, like(x, first), like(y, first)))
    sent = found[0] if len(found) == 1 else torch.cat(found)[_inverse(list(alike.values()))]
    sizes = torch.linalg.vector_norm(sent, dim=1)
    if not bool(sizes.isfinite().all()):
        k = int((~sizes.isfinite()).nonzero()[0])
        raise ValueError(
            f"clients must have updates of finite norm, that of client {k} is not; lr={lr} may be too large"
        )
    return sent.mul_((clip / sizes).clamp(max=lr)[:, None])


def _sums(moved: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return the sums of slopes of clients, at once where the model allows it."""
    if len(x) > 1:
        try:
            return vmap(moved, chunk_size=AT_ONCE if len(x) > AT_ONCE else None)(x, y).detach()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):  # a model that cannot be vectorised, or rows that do not fit it
            pass
    return torch.stack([moved(*client).detach() for client in zip(x, y, strict=True)])


def _inverse(groups: list[list[int]]) -> list[int]:
    """Return where each client is when groups follow each other."""
    places = {k: place for place, k in enumerate(k for members in groups for k in members)}
    return [places[k] for k in range(len(places))]


def sample_loss(output: Callable[[], Any], loss_fn: Loss, y: Tensor) -> Tensor:
    """Return the loss of a model's output, a scalar, or say what does not fit."""
    try:
        out = output()
        value = loss_fn(wide(out) if isinstance(out, Tensor) else out, y)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, TypeError, AssertionError) as error:
        raise ValueError(f"model and loss_fn must take x and y as loss_fn(model(x), y): {error}") from error
    return floating("what loss_fn returns", scalar("loss_fn", value))


def frozen(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode, with weights and buffers of 32 bits at least."""
    twin = copy.deepcopy(model).eval()
    for part in (*twin.parameters(), *twin.buffers()):
        part.data = wide(part.data)
        part.grad = None
    if not any(p.requires_grad and p.numel() for p in twin.parameters()):
        raise ValueError("model must have a parameter that requires a gradient, has none")
    return twin


@contextlib.contextmanager
def plain_kernels(model: nn.Module) -> Iterator[None]:
    """Compute outside autocast, by kernels of attention and recurrence that have second derivatives."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(next(model.parameters()).device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "TF32 acceleration")  # of Intel GPUs, at each change of flags
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def like(x: Tensor, parameter: Tensor) -> Tensor:
    """Return inputs on the device of a parameter, and in its dtype where they are floating; no inference tensor."""
    x = x.clone() if x.is_inference() else x.detach()
    return x.to(parameter) if x.is_floating_point() else x.to(parameter.device)


def _form(k: int, client: Any) -> Any:
    """Return what the rows of a client must have in common with those of others to be stacked."""
    fits = isinstance(client, tuple | list) and len(client) == 2
    if not fits or not all(isinstance(part, Tensor) and part.ndim for part in client):
        raise ValueError(f"clients must be tensors (x, y) each, client {k} is not")
    (n, *_), (m, *_) = shapes = tuple(part.shape for part in client)
    if n != m or not n:
        raise ValueError(f"clients must have rows with a target each, client {k} has {n} and {m}")
    return shapes, client[0].dtype, client[1].dtype, client[0].device, client[1].device
