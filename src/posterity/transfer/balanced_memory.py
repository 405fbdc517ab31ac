"""A memory of a stream that keeps its classes as even as what has come allows.

Until it is full every sample is kept. Then each newcomer takes the place of a random member of the class that has
the most, the newcomer counted among its own: it always enters, and counts soon differ by one at most.
"""

from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from posterity._checks import integer
from posterity._random import draw_device

__all__ = ["BalancedMemory"]


class BalancedMemory:
    """Samples of the past, by class in even numbers.

    Parameters
    ----------
    size : int
        How many are kept, at least 1.
    generator : torch.Generator, optional
        Draws what is replaced and what is sampled; torch's own where it is None.

    Attributes
    ----------
    x : list of Tensor
        The samples; copies.
    labels : list of int
        Their classes.

    Raises
    ------
    ValueError
        If ``size`` is out of range.

    References
    ----------
    .. [1] Koh et al. Online Continual Learning on Class Incremental Blurry Task Configuration with Anytime
       Inference. ICLR 2022; its memory without importance, as in "Online Boundary-Free Continual Learning by
       Scheduled Data Prior", ICLR 2023.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import BalancedMemory
    >>> memory = BalancedMemory(3)
    >>> for label in (0, 0, 0, 0, 1, 2, 1):
    ...     memory.add(torch.zeros(3), label)
    ...
    >>> sorted(memory.labels)
    [0, 1, 2]
    """

    def __init__(self, size: int, *, generator: torch.Generator | None = None) -> None:
        self.size, self.generator = integer("size", size, 1), generator
        self.x: list[Tensor] = []
        self.labels: list[int] = []
        self._places: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, x: Shaped[Tensor, "..."], y: int) -> None:
        """Take a sample in.

        Parameters
        ----------
        x : Tensor
            One sample, of the shape of all others.
        y : int
            Its class.
        """
        y = integer("y", y)
        if not isinstance(x, Tensor):
            raise ValueError(f"x must be a tensor, got {type(x).__name__}")
        if self.x and x.shape != self.x[0].shape:
            raise ValueError(
                f"x must have the shape {tuple(self.x[0].shape)} of those before, got {tuple(x.shape)}"
            )
        x = x.detach().clone()
        if len(self) < self.size:
            place = len(self)
            self.x.append(x)
            self.labels.append(y)
        else:
            place = self._leaves(y)
            self.x[place], self.labels[place] = x, y
        self._places.setdefault(y, []).append(place)

    def sample(self, n: int) -> tuple[Shaped[Tensor, "m ..."], Int[Tensor, " m"]]:
        """Return samples and their classes, each at most once.

        Parameters
        ----------
        n : int
            How many, at least 1; as many as there are, at most.

        Returns
        -------
        tuple of Tensor
            Of shapes (m, ...) and (m,), m the smaller of ``n`` and the length.
        """
        n = integer("n", n, 1)
        if not self.x:
            raise ValueError(f"n samples cannot be had of an empty memory, got n {n}")
        rows = torch.randperm(len(self), generator=self.generator, device=draw_device(self.generator))[
            :n
        ].tolist()
        x = torch.stack([self.x[row] for row in rows])
        return x, torch.tensor([self.labels[row] for row in rows], device=x.device)

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept, and in which order it would be drawn.

        Returns
        -------
        dict
        """
        x = torch.stack(self.x) if self.x else None
        return {
            "x": x,
            "labels": list(self.labels),
            "places": [[y, list(at)] for y, at in self._places.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep what another memory kept.

        Parameters
        ----------
        state : dict
            What `state_dict` returned.
        """
        if not isinstance(state, dict) or set(state) != {"x", "labels", "places"}:
            raise ValueError("state must be what state_dict of a BalancedMemory returned")
        if len(state["labels"]) > self.size:
            raise ValueError(f"state must hold at most size {self.size} samples, has {len(state['labels'])}")
        self.x = [] if state["x"] is None else [x.clone() for x in state["x"]]
        self.labels = list(state["labels"])
        self._places = {y: list(at) for y, at in state["places"]}

    def _leaves(self, y: int) -> int:
        """Return the place that becomes free for a newcomer."""
        counts = {label: len(places) for label, places in self._places.items()}
        counts[y] = counts.get(y, 0) + 1
        most = max(counts.values())
        # a newcomer alone in its class has nobody to replace: all classes are then of one, and another goes
        largest = [label for label, count in counts.items() if count == most and label in self._places]
        places = self._places[largest[self._draw(len(largest))]]
        gone = places.pop(self._draw(len(places)))
        if not places:
            del self._places[self.labels[gone]]
        return gone

    def _draw(self, n: int) -> int:
        """Return a whole number below n."""
        if n == 1:
            return 0
        return int(torch.randint(n, (), generator=self.generator, device=draw_device(self.generator)))
