"""What a rule of aggregation needs to be a Flower strategy."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from posterity._checks import needs
from posterity.federated.simulation import State

__all__ = ["strategy"]


def strategy(combine: Callable[[Sequence[State], Sequence[float]], State], **fedavg: Any) -> Any:
    """Return Flower's FedAvg with ``combine(states, examples)`` in place of its mean.

    Parameters
    ----------
    combine : callable
        Takes the state that each client sent and how many examples it says it has.
    **fedavg
        Of ``flwr.serverapp.strategy.FedAvg``.

    Returns
    -------
    flwr.serverapp.strategy.FedAvg
    """
    base = needs("flwr.serverapp.strategy", "federated").FedAvg
    record = needs("flwr.app", "federated").ArrayRecord

    class Combined(base):
        def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
            replies = list(replies)
            arrays, metrics = super().aggregate_train(server_round, replies)  # checks, and averages metrics
            if arrays is None:
                return arrays, metrics
            contents = [reply.content for reply in replies if reply.has_content()]
            states = [content[self.arrayrecord_key].to_torch_state_dict() for content in contents]
            examples = [
                float(next(iter(content.metric_records.values()))[self.weighted_by_key])
                for content in contents
            ]
            return record(combine(states, examples)), metrics

    return Combined(**fedavg)
