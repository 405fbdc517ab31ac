"""Self-ensemble protection (SEP): perturb data before release so that nobody trains well on them.

Checkpoints w_1, ..., w_M of one ordinary training run, evenly spaced and ending with the last, see the
data differently: their input gradients are nearly orthogonal, as those of different architectures are.
All of them together push each sample towards the look of the wrong class g(y) = (y + K // 2) mod K,

    x <- clip(x - a sign(mean_m d L_m(x, g(y)) / dx),   |x - x_0| <= epsilon,              (1)

where L_m is the cross-entropy of checkpoint m, or, stronger, the mean squared distance of its features
of x to the mean features of class g(y) on the clean data ("feature alignment"). With variance
reduction each step (1) is preceded by inner steps z from x, of one checkpoint m drawn at random,

    G <- G + g_m(z) - (g_m(x) - mean_j g_j(x)),    z <- clip(z - a sign G),   G = 0, z = x at first,   (2)

and x then moves along the last G. Who trains on the result with the right labels learns the
perturbations, which say g(y) where the image says y, and fails on clean images.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from posterity._checks import at_least, integer, interval, one_of
from posterity._random import draw_device
from posterity.robustness.checkpoint_gradients import (
    Ensemble,
    Read,
    as_they_predict,
    cross_entropy_sum,
    distance,
    in_range,
    last_linear_input,
    models_of,
    outputs,
    samples,
)

__all__ = ["SelfEnsembleProtector", "select_checkpoints"]


def select_checkpoints(n_total: int, n_select: int) -> list[int]:
    """Return which of the checkpoints of a run to use: evenly spaced, the last among them.

    Parameters
    ----------
    n_total : int
        Checkpoints of the run, in order; at least 1.
    n_select : int
        How many of them, from 1 to ``n_total``.

    Returns
    -------
    list of int
        floor((k + 1) n_total / n_select) - 1 for k = 0, 1, ...

    Raises
    ------
    ValueError
        If a number is out of range.

    Examples
    --------
    >>> from posterity.robustness import select_checkpoints
    >>> select_checkpoints(120, 5)
    [23, 47, 71, 95, 119]
    """
    n_total, n_select = integer("n_total", n_total, 1), integer("n_select", n_select, 1)
    if n_select > n_total:
        raise ValueError(f"n_select must be at most n_total={n_total}, got {n_select}")
    return [(k + 1) * n_total // n_select - 1 for k in range(n_select)]


class SelfEnsembleProtector:
    """Perturb data with the checkpoints of one training run on them, equations 1 and 2.

    Nothing is guaranteed: whoever trains in another way (adversarially, on images that were
    compressed, with some clean data) may undo the protection. `protection_report` and a training
    run of your own on the result, tested on clean data, say how well it holds.

    Parameters
    ----------
    checkpoints : sequence of nn.Module
        At least one; each maps (batch, ...) to logits (batch, n_classes), with what normalises
        inputs inside it. They may differ in architecture. They are read in eval mode, and left as they
        are.
    epsilon : float, default=2/255
        Largest change of a value, at least 0, in units of ``x``.
    step_size : float, default=1/255
        Change in a step, at least 0.
    n_steps : int, default=30
        At least 1.
    mode : {"ce", "fa", "vr"}, default="vr"
        Cross-entropy; feature alignment; or feature alignment with variance reduction.
    n_inner : int, default=15
        Inner steps for "vr", at least 1.
    features : callable, optional
        ``features(model, x) -> Tensor (batch, f)``; by default the input of the linear layer that
        the model calls last, flattened. Unused for "ce".
    n_classes : int, optional
        K, at least 2; by default the number of logits of the first checkpoint.
    target_shift : int, optional
        g(y) = (y + target_shift) mod K; by default K // 2. A multiple of K aims at the true class.
    bounds : tuple of float, default=(0.0, 1.0)
        Least and largest value that ``x`` and the result may have.
    batch_size : int, default=512
        Samples at once, at least 1; it does not change the result, other than by rounding.
    generator : torch.Generator, optional
        Draws the checkpoints of inner steps; torch's own where it is None.

    Raises
    ------
    ValueError
        If an argument is out of range; or, by ``protect``, if ``x`` and ``y`` do not fit, a class aimed
        at has no sample of which to take the mean, or a gradient is not finite.

    Notes
    -----
    1. A step costs one gradient a checkpoint, and for "vr" ``n_inner`` more.
    2. The inner draws are one checkpoint for all samples, as if all were one batch; the official
       code draws anew for each batch.
    3. The official code shifts labels by 5 modulo 10 also where there are 100 classes of ImageNet;
       here by half of the number of classes.
    4. Gradients are computed in the widest dtype of data and models, float32 at least and outside
       autocast. Narrow data are rounded at the end to values that keep to ``epsilon``, which in 16 bits
       near 1 may be no change at all.

    References
    ----------
    .. [1] Chen et al. Self-Ensemble Protection: Training Checkpoints Are Good Data Protectors.
       ICLR 2023. Section 3, Algorithm 1.

    Examples
    --------
    A linear model whose class 1 looks dark on the left and bright on the right:

    >>> import torch
    >>> from posterity.robustness import SelfEnsembleProtector
    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.eye(2))
    >>> protector = SelfEnsembleProtector([net], epsilon=0.1, step_size=0.1, n_steps=1, mode="ce")
    >>> protector.protect(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([0, 1]))
    tensor([[0.4000, 0.6000],
            [0.1000, 0.9000]])
    """

    def __init__(
        self,
        checkpoints: Sequence[nn.Module],
        *,
        epsilon: float = 2 / 255,
        step_size: float = 1 / 255,
        n_steps: int = 30,
        mode: Literal["ce", "fa", "vr"] = "vr",
        n_inner: int = 15,
        features: Read | None = None,
        n_classes: int | None = None,
        target_shift: int | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 512,
        generator: torch.Generator | None = None,
    ) -> None:
        self.checkpoints = models_of(checkpoints)
        self.epsilon, self.step_size = at_least("epsilon", epsilon, 0), at_least("step_size", step_size, 0)
        self.n_steps = integer("n_steps", n_steps, 1)
        self.mode = one_of("mode", mode, ("ce", "fa", "vr"))
        self.n_inner = integer("n_inner", n_inner, 1)
        if features is not None and not callable(features):
            raise ValueError(f"features must be a function of a model and x, got {features!r}")
        self.features = features
        self.n_classes = None if n_classes is None else integer("n_classes", n_classes, 2)
        self.target_shift = None if target_shift is None else integer("target_shift", target_shift)
        self.bounds = interval("bounds", bounds)
        self.batch_size = integer("batch_size", batch_size, 1)
        self.generator = generator

    @torch.inference_mode(False)  # grad mode too
    def protect(self, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"]) -> Float[Tensor, "n ..."]:
        """Return the samples as they may be released; ``x`` is left as it is.

        Parameters
        ----------
        x : Tensor of shape (n, ...)
            The clean data, inside ``bounds``. All of them: the means of classes are taken over them.
        y : Tensor of shape (n,), integer
            Labels from 0 to K - 1.

        Returns
        -------
        Tensor of shape (n, ...)
            Within ``epsilon`` of ``x`` and inside ``bounds``, of its dtype and on its device.
        """
        x, y = samples(x, y)
        low, high = self.bounds
        if not bool(((x >= low) & (x <= high)).all()):  # NaN is neither
            raise ValueError(f"x must be in bounds [{low:g}, {high:g}], got others or NaN")
        if not x.numel():
            return x.clone()
        with as_they_predict(self.checkpoints):
            read, loss = outputs, cross_entropy_sum
            if self.mode != "ce":
                read, loss = self.features or last_linear_input, distance
            ensemble = Ensemble(self.checkpoints, read, loss, x)
            logits = ensemble
            if self.mode != "ce" and self.n_classes is None:
                logits = Ensemble(self.checkpoints[:1], outputs, cross_entropy_sum, x)
            K = self.n_classes or logits.width(0, x)
            in_range(y, K)
            target = (y + (K // 2 if self.target_shift is None else self.target_shift)) % K
            if self.mode == "ce":
                for m in range(len(self.checkpoints)):
                    if (width := ensemble.width(m, x)) < K:
                        raise ValueError(
                            f"checkpoints must give {K} logits, n_classes, got {width} of checkpoint {m}"
                        )
            else:
                counts = y.bincount(minlength=K)
                if missing := [k for k in target.unique().tolist() if not counts[k]]:
                    raise ValueError(
                        f"y must have a sample of each class aimed at, to take the mean of; has none of {missing}"
                    )
                means = ensemble.class_means(x, y, K, self.batch_size)
            shape = (self.n_steps, self.n_inner if self.mode == "vr" else 0)
            drawn = torch.randint(
                len(self.checkpoints), shape, generator=self.generator, device=draw_device(self.generator)
            ).tolist()  # once, for all batches alike
            parts = []
            for rows in torch.arange(len(x), device=x.device).split(self.batch_size):
                goals = [target[rows]] * len(self.checkpoints)
                if self.mode != "ce":
                    goals = [mean[goal.to(mean.device)] for mean, goal in zip(means, goals, strict=True)]
                parts.append(self._moved(ensemble, x[rows], goals, drawn))
        return torch.cat(parts)

    def _moved(self, ensemble: Ensemble, x: Tensor, goals: list[Tensor], drawn: list[list[int]]) -> Tensor:
        """Return a batch moved towards its goals, one for each checkpoint."""
        start = x.to(ensemble.dtype)
        least, most = (
            (start - self.epsilon).clamp_min(self.bounds[0]),
            (start + self.epsilon).clamp_max(self.bounds[1]),
        )

        def step(z: Tensor, direction: Tensor) -> Tensor:
            return (z - self.step_size * direction.sign()).clamp(least, most)

        now = start
        for inner in drawn:
            if not inner:
                now = step(now, sum(ensemble.gradients(now, goals), torch.zeros_like(now)))
                continue
            each = list(ensemble.gradients(now, goals))
            mean = sum(each, torch.zeros_like(now)) / len(each)
            z, direction = now, torch.zeros_like(now)
            for m in inner:
                direction = direction + ensemble.gradient(m, z, goals[m]) - (each[m] - mean)
                z = step(z, direction)
            now = step(now, direction)
        if x.dtype == now.dtype:
            return now
        moved = now.to(x.dtype)  # rounding may leave the limits: then the neighbour on the side of x does not
        there = moved.to(now.dtype)
        return torch.where((there < least) | (there > most), moved.nextafter(x), moved)
