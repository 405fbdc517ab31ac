"""Schedules of noise: how fast it comes, how much has come, how much is still to come.

With sigma_t^2 the variance a unit of time, beta_t = int_0^t sigma_s^2 ds and v_t = beta_1 - beta_t,

    exp           sigma^2 = a b exp(-a t)                beta = b (1 - exp(-a t))
    linear        sigma^2 = b (1 - t) + c                beta = b (2 - t) t / 2 + c t
    inverse-exp   sigma^2 = a b (1 - exp(-a (1 - t))) + c
                  beta = (a b + c) t - b (exp(-a (1 - t)) - exp(-a))
    constant      sigma^2 = b                            beta = b t.
"""

from typing import Any

import torch
from torch import Tensor

from posterity._checks import at_least, one_of, within

__all__: list[str] = []

SCHEDULES = ("exp", "linear", "inverse-exp", "constant")


class _Schedule:
    """One of them, its settings checked."""

    def __init__(self, name: Any, a: Any, b: Any, c: Any) -> None:
        self.name = one_of("schedule", "inverse-exp" if name == "inverse_exp" else name, SCHEDULES)
        self.a, self.b = within("a", a, 0, 50, open_low=True), within("b", b, 1e-8, 1e16)
        self.c = at_least("c", c, 0)

    def clock(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return sigma^2, the variance gone and that to come; no difference of near numbers in any."""
        a, b, c, rest = self.a, self.b, self.c, 1 - t
        if self.name == "exp":
            e = torch.exp(-a * t)
            return a * b * e, -b * torch.expm1(-a * t), -b * e * torch.expm1(-a * rest)
        if self.name == "linear":
            return b * rest + c, t * (b * (2 - t) / 2 + c), rest * (b * rest / 2 + c)
        if self.name == "constant":
            return b * torch.ones_like(t), b * t, b * rest
        fall = torch.expm1(-a * rest)
        gone = (a * b + c) * t - b * torch.exp(-a * torch.ones_like(t)) * torch.expm1(a * t)
        return c - a * b * fall, gone, ((a * b + c) * rest + b * fall).clamp_min(0)
