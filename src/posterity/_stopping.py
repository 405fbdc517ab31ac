"""Early stopping: the weights that scored best, and when to give up on better ones."""

import math

from torch import Tensor, nn

__all__ = ["Best"]


class Best:
    """Holds the weights of a model at its lowest score, and how often since then none was lower."""

    def __init__(self, model: nn.Module, patience: float = math.inf) -> None:
        self.model, self.patience = model, patience
        self.score, self.idle = math.inf, 0
        self.state: dict[str, Tensor] = {}

    def stop(self, score: float) -> bool:
        """Take note of a score, the lower the better; return whether ``patience`` of them were no better than the best."""
        if score < self.score:
            self.score, self.idle = score, 0
            self.state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        else:
            self.idle += 1
        return self.idle >= self.patience

    def restore(self) -> None:
        """Give the model the weights of the best score; as it is where no score was a number."""
        if self.state:
            self.model.load_state_dict(self.state)
