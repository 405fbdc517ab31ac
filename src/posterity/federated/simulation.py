"""Federated training in one program: clients train copies of a model, the server averages what they send.

In each round client i starts from the server's state w, trains on its own rows and sends its
state w_i; the server sends back

    w <- aggregate([w_1, .., w_m], weights),     by default the mean weighted by rows,      (1)

of parameters and of buffers. Clients see their own rows and the state, nothing else. There is no
network and no server here: it is a loop, whose clients may run on Ray's workers. What a client
draws comes from a generator of its own, seeded by round and client, so that the numbers are the
same wherever it runs.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._checks import at_least, integer, needs
from posterity._precision import wide
from posterity._random import draw_device, seeded

__all__ = ["aggregate", "federate", "local_sgd", "update_vectors"]

State = dict[str, Tensor]
Client = Sequence[Tensor]


def aggregate(updates: Sequence[State], weights: Sequence[float] | None = None) -> State:
    """Return the weighted mean of what clients sent, entry by entry.

    Parameters
    ----------
    updates : sequence of dict of str to Tensor
        States of one model, as ``state_dict`` gives them, or differences of them.
    weights : sequence of float, optional
        Of each, at least 0, not all 0; divided by their sum. By default all alike.

    Returns
    -------
    dict of str to Tensor
        New tensors of the same dtypes. Whole numbers, as counts of batches, are the largest sent.

    Raises
    ------
    ValueError
        If there is no update, if their keys or shapes differ, or for weights that are not as above.

    Examples
    --------
    >>> import torch
    >>> from posterity.federated.simulation import aggregate
    >>> sent = [{"w": torch.tensor([0.0, 4.0])}, {"w": torch.tensor([3.0, 1.0])}]
    >>> aggregate(sent, weights=[2, 1])["w"]
    tensor([1., 3.])
    """
    shares = check_updates(updates, weights)
    return {name: _mean([update[name] for update in updates], shares) for name in updates[0]}


def check_updates(
    updates: Sequence[State], weights: Sequence[float] | None, called: str = "updates"
) -> list[float]:
    """Return the share of each update, or say what does not fit."""
    if len(updates) == 0:
        raise ValueError(f"{called} must hold at least one client's, got none")
    first = {name: value.shape for name, value in updates[0].items()}
    for k, update in enumerate(updates):
        for name in first.keys() ^ update.keys():
            raise ValueError(f"{called} must have the same keys, {name!r} is not in all ({k} and 0 differ)")
        for name, value in update.items():
            if value.shape != first[name]:
                raise ValueError(
                    f"{called} must have the same shapes, {name!r} has {tuple(value.shape)} in {k} "
                    f"and {tuple(first[name])} in 0"
                )
    if weights is None:
        return [1 / len(updates)] * len(updates)
    if len(weights) != len(updates):
        raise ValueError(f"weights must be one for each of {len(updates)} {called}, got {len(weights)}")
    values = [float(at_least("weights", float(weight), 0.0)) for weight in weights]
    if sum(values) == 0:
        raise ValueError("weights must not all be 0")
    return [value / sum(values) for value in values]


def _mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    if not (values[0].is_floating_point() or values[0].is_complex()):
        return torch.stack([value.detach() for value in values]).amax(0)
    total = torch.zeros_like(wide(values[0].detach()))
    for value, share in zip(values, shares, strict=True):
        total += share * value.detach().to(total)
    return total.to(values[0].dtype)


def update_vectors(updates: Sequence[State], base: State | None = None) -> Tensor:
    """Return updates as rows of a matrix: their floating-point entries, one after the other.

    Parameters
    ----------
    updates : sequence of dict of str to Tensor
        States of one model.
    base : dict of str to Tensor, optional
        The state that is subtracted from each.

    Returns
    -------
    Tensor of shape (clients, numbers)
        In float32 at least.
    """
    check_updates(updates, None)
    names = [name for name, value in updates[0].items() if value.is_floating_point()]
    rows = [torch.cat([wide(update[name].detach()).reshape(-1) for name in names]) for update in updates]
    matrix = torch.stack(rows)
    return matrix if base is None else matrix - update_vectors([base])


def local_sgd(
    model: nn.Module,
    client: Client,
    generator: torch.Generator | None = None,
    *,
    lr: float = 0.1,
    epochs: int = 1,
    batch_size: int = 32,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> None:
    """Train a model on one client's rows by stochastic gradient descent, in place.

    Parameters
    ----------
    model : nn.Module
        Put into training mode.
    client : sequence of Tensor
        Inputs and targets, with equal first axes.
    generator : torch.Generator, optional
        For the order of rows.
    lr : float, default=0.1
        Positive.
    epochs, batch_size : int
        Passes over the rows, and rows a step; a last batch of a single row is left out where there
        are others, since batch statistics of one row do not exist.
    momentum, weight_decay : float, default=0.0
    loss_fn : callable
        ``loss_fn(outputs, targets) -> scalar``.
    """
    integer("epochs", epochs, 0)
    integer("batch_size", batch_size, 1)
    at_least("lr", lr, 0.0, strict=True)
    x, y = client
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"client must hold inputs and as many targets, got {len(x)} and {len(y)}")
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator, device=draw_device(generator)).to(x.device)
        for batch in order.split(batch_size):
            if len(batch) == 1 < min(len(x), batch_size):
                continue
            optimizer.zero_grad()
            loss_fn(model(x[batch]), y[batch]).backward()
            optimizer.step()


def federate(
    model: nn.Module,
    clients: Sequence[Client],
    *,
    rounds: int,
    train: Callable[[nn.Module, Client, torch.Generator], None] = local_sgd,
    aggregate: Callable[[Sequence[State], Sequence[float]], State] = aggregate,
    weights: Sequence[float] | None = None,
    per_round: int | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[int, nn.Module], None] | None = None,
    ray: bool = False,
) -> nn.Module:
    """Train a model over clients and return what the server then has, a new model.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    clients : sequence of sequences of Tensor
        The rows of each.
    rounds : int
    train : callable
        ``train(model, client, generator)`` trains in place; `local_sgd` with other settings by
        ``functools.partial``.
    aggregate : callable
        ``aggregate(states, weights) -> state``, a pure function.
    weights : sequence of float, optional
        Of the clients; by default how many rows each has.
    per_round : int, optional
        Clients that are drawn, without replacement, each round; by default all take part.
    generator : torch.Generator, optional
        On the CPU; seeds clients and draws who takes part.
    callback : callable, optional
        ``callback(round, model)`` with the server's model, in eval mode, after each round.
    ray : bool, default=False
        Whether clients train on Ray's workers, each with one core; a Ray that is running is used.
        The numbers are those of this process where it has one thread too.

    Returns
    -------
    nn.Module
        In eval mode.

    Raises
    ------
    ValueError
        If there is no client, or a number is out of range.
    """
    integer("rounds", rounds, 0)
    if len(clients) == 0:
        raise ValueError("clients must hold at least one, got none")
    count = len(clients) if per_round is None else integer("per_round", per_round, 1)
    if count > len(clients):
        raise ValueError(f"per_round must be at most the number of clients {len(clients)}, got {per_round}")
    weights = [float(len(client[0])) for client in clients] if weights is None else list(weights)
    if len(weights) != len(clients):
        raise ValueError(f"weights must be one for each of {len(clients)} clients, got {len(weights)}")
    each = _on_ray(clients, train) if ray else _here(clients, train)
    with torch.inference_mode(False), torch.enable_grad():
        server = copy.deepcopy(model)
        for now in range(rounds):
            seeds = torch.randint(2**62, (len(clients),), generator=generator).tolist()
            chosen = range(len(clients))
            if count < len(clients):
                chosen = torch.randperm(len(clients), generator=generator)[:count].tolist()
            states = each(server, [(k, seeds[k]) for k in chosen])
            server.load_state_dict(aggregate(states, [weights[k] for k in chosen]))
            if callback is not None:
                callback(now, server.eval())
    return server.eval()


def _trained(model: nn.Module, client: Client, train: Callable[..., None], seed: int) -> State:
    own = copy.deepcopy(model)
    with seeded(seed, next(own.parameters(), client[0]).device):  # for what draws by itself, as dropout
        train(own, client, torch.Generator().manual_seed(seed))
    return {name: value.detach() for name, value in own.state_dict().items()}


def _trained_alone(model: nn.Module, client: Client, train: Callable[..., None], seed: int) -> State:
    torch.set_num_threads(1)
    return _trained(model, client, train, seed)


def _here(clients: Sequence[Client], train: Callable[..., None]) -> Callable[..., list[State]]:
    return lambda server, chosen: [_trained(server, clients[k], train, seed) for k, seed in chosen]


def _on_ray(clients: Sequence[Client], train: Callable[..., None]) -> Callable[..., list[State]]:
    engine: Any = needs("ray", "scale")
    if not engine.is_initialized():
        engine.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    held, how = [engine.put(client) for client in clients], engine.put(train)

    task = engine.remote(_trained_alone).options(num_cpus=1)

    def each(server: nn.Module, chosen: Sequence[tuple[int, int]]) -> list[State]:
        shared = engine.put(server)
        return engine.get([task.remote(shared, held[k], how, seed) for k, seed in chosen])

    return each
