"""How few poisoned examples plant a backdoor: designed in the tangent kernel, counted in the network.

Who gives a handful of training images may give such that every image of one class which bears a
small mark, the trigger, is later taken for another class, while clean images are not. How few
suffice is asked here of your own training pipeline, before someone else does. Training is replaced
by regression in the network's tangent kernel k, whose predictions are a formula in the poisons,

    f(x) = k(x, train) (k(train, train) + ridge)^-1 y,                             (1)

and so is what a backdoor wants: clean held-out data t as before, triggered source images a at +1,

    sum_t (f(x_t) - y_t)^2 + sum_a min(f(x_a) - 1, 0)^2.                           (2)

Triggered source images labelled as the target are the start, chosen greedily; L-BFGS then moves their
pixels down the gradient of equation 2. The ridge stands for stopping training early: without one the
poisons exploit the kernel and leave the trained network as it was. So the audit ends where
the network is trained again with the poisons, which is yours to do, and `attack_success` counts.
Nothing ships with it but two triggers for small images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from scipy.optimize import minimize
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from posterity._checks import at_least, finite, floating, has_shape, integer, interval, within
from posterity._random import draw_device
from posterity.robustness.kernel_backdoor import (
    Clean,
    condition_on_clean,
    greedy_poisons,
    loo_residuals,
    objective,
    signs,
    symmetric,
)
from posterity.robustness.tangent_kernel import Tangent, full

__all__ = ["AuditResult", "BackdoorAudit", "attack_success", "spectral_signature_scores"]

Kernel = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AuditResult:
    """What an audit found: train on the data and ``poisons``, labelled +1, and count `attack_success`.

    Attributes
    ----------
    poisons : Tensor of shape (n_poisons, ...)
        Designed images, in the dtype and on the device of the data.
    initial : Tensor of shape (n_poisons, ...)
        The triggered images from which they started, the greedy choice.
    chosen : Tensor of shape (n_poisons,)
        Which of the data those were without the trigger, in order of choice.
    predicted_success : float
        Share of triggered held-out source images that the kernel predicts at +1: not the
        answer, which only training gives.
    loss_history : list of float
        Equation 2 at the greedy choice and after each step.
    train_index, holdout_index : Tensor
        The data that the audit took as d and as t.
    detection : dict of str to float
        How well two filters tell the poisons from clean training data of the target class, in the same
        kernel: area under the ROC curve of "spectral signature" and of "loo residual"; NaN without
        poisons.
    """

    poisons: Float[Tensor, " p *shape"]
    initial: Float[Tensor, " p *shape"]
    chosen: Int[Tensor, " p"]
    predicted_success: float
    loss_history: list[float]
    train_index: Int[Tensor, " d"]
    holdout_index: Int[Tensor, " t"]
    detection: dict[str, float]


class BackdoorAudit:
    """Design a few poisons against a network, to test a training pipeline and its filters with them.

    Parameters
    ----------
    kernel : callable or nn.Module
        ``kernel(x1, x2)`` returns an (n, m) kernel through which gradients go to both, in
        float64, as `relu_ntk`; or the network, trained on the clean data, of one output a row:
        its tangent kernel is taken (`empirical_ntk`).
    trigger : callable
        Maps images (n, ...) to images of the same shape; `PeriodicTrigger` or `PatchTrigger`.
    n_poisons : int, default=4
        At least 0, at most the source images that are trained on.
    relative_ridge : float, default=0.12
        Ridge, in units of the kernel's mean diagonal, at least 0. Far below 0.1 the poisons work
        on the kernel and not on a network that is trained for some hundred steps.
    holdout : float, default=0.2
        Share of each class that is held out as t, in (0, 1); one image at least.
    max_iter : int, default=60
        L-BFGS-B steps at most, at least 0, which keeps the greedy choice.
    bounds : tuple of float, default=(0.0, 1.0)
        Lowest and highest value of a pixel.
    generator : torch.Generator, optional
        Decides what is held out; nothing else is random, but for the trigger.

    Raises
    ------
    ValueError
        If a parameter is out of range.

    Notes
    -----
    1. With a network the gradient costs two double passes an image of the poisons, and none of a pair:
       gradients of the data are kept where they have at most 2^26 numbers, and else taken anew
       at each step, a pass over the data each.
    2. The filters' scores are taken in the kernel of the audit, of the clean training data and the
       poisons together; features for the spectral signature are those of the kernel.

    References
    ----------
    .. [1] Hayase, Oh. Few-shot Backdoor Attacks via Neural Tangent Kernels. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.robustness import BackdoorAudit, PeriodicTrigger, relu_ntk
    >>> generator = torch.Generator().manual_seed(0)
    >>> y = torch.tensor([-1, 1]).repeat(20)
    >>> x = (0.5 + 0.2 * y[:, None, None, None]).expand(40, 1, 4, 4)
    >>> x = x + 0.1 * torch.rand(x.shape, generator=generator)
    >>> audit = BackdoorAudit(relu_ntk, PeriodicTrigger(0.2, 3), n_poisons=2, generator=generator)
    >>> result = audit.run(x, y)
    >>> result.poisons.shape, result.loss_history[-1] < result.loss_history[0]
    (torch.Size([2, 1, 4, 4]), True)
    """

    def __init__(
        self,
        kernel: Callable[[Tensor, Tensor], Tensor] | nn.Module,
        trigger: Callable[[Tensor], Tensor],
        *,
        n_poisons: int = 4,
        relative_ridge: float = 0.12,
        holdout: float = 0.2,
        max_iter: int = 60,
        bounds: tuple[float, float] = (0.0, 1.0),
        generator: torch.Generator | None = None,
    ) -> None:
        for name, value in (("kernel", kernel), ("trigger", trigger)):
            if not callable(value):
                raise ValueError(f"{name} must be callable, got {type(value).__name__}")
        self.kernel, self.trigger = kernel, trigger
        self.n_poisons = integer("n_poisons", n_poisons, 0)
        self.relative_ridge = at_least("relative_ridge", relative_ridge, 0)
        self.holdout = within("holdout", holdout, 0, 1, open_low=True, open_high=True)
        self.max_iter = integer("max_iter", max_iter, 0)
        self.bounds = interval("bounds", bounds)
        self.generator = generator

    @torch.inference_mode(False)
    @torch.enable_grad()
    def run(self, x: Float[Tensor, " n *shape"], y: Shaped[Tensor, " n"]) -> AuditResult:
        """Design the poisons.

        Parameters
        ----------
        x : Tensor of shape (n, ...)
            Clean images within ``bounds``.
        y : Tensor of shape (n,)
            +1 for the target class and -1 for the source class, two of each at least.

        Returns
        -------
        AuditResult

        Raises
        ------
        ValueError
            If data, trigger, kernel or ``n_poisons`` do not fit each other.
        """
        data, labels = self._data(x, y)
        train, held = self._split(labels)
        d, t, y_d, y_t = data[train], data[held], labels[train], labels[held]
        candidates, a = self._triggered(d[y_d < 0]), self._triggered(t[y_t < 0])
        if self.n_poisons > len(candidates):
            raise ValueError(
                f"n_poisons must be at most the {len(candidates)} source images of x that are trained on, "
                f"got {self.n_poisons}"
            )
        kernel, points = self._made(torch.cat([d, t, a]))
        n_d, n_t = len(d), len(t)

        def rows(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Return k_pd, k_pp, and k_px at t and a."""
            k = _block(kernel, p, points)
            return k[:, :n_d], _block(kernel, p, p), k[:, n_d:]

        with torch.no_grad():
            whole = _block(kernel, points[:n_d], points).to(data.device)
            k_dd = symmetric("kernel", whole[:, :n_d])
            k_dd = (k_dd + k_dd.T) / 2
            ridge = self.relative_ridge * float(k_dd.diagonal().mean())
            clean = condition_on_clean(k_dd, y_d, whole[:, n_d:], ridge)
            k_cd, k_cc, k_cx = rows(candidates)
            best = greedy_poisons(
                k_dd, whole[:, n_d + n_t :], y_d, k_cd, k_cx[:, n_t:], symmetric("kernel", k_cc),
                torch.ones_like(k_cd[:, 0]), self.n_poisons, ridge=ridge,
            )  # fmt: skip
        start = candidates[best]
        poisons, history = self._descend(rows, clean, start, y_t, ridge)
        with torch.no_grad():
            k_pd, k_pp, k_px = rows(poisons)
            _, f = objective(clean, k_pd, k_pp, k_px, torch.ones_like(k_pd[:, 0]), y_t, ridge)
            detection = _detection(k_dd, k_pd, k_pp, y_d, ridge)
        source = train[y_d < 0]
        low, high = self.bounds
        return AuditResult(
            poisons=poisons.to(x).clamp(low, high), initial=start.to(x), chosen=source[best.to(source.device)],
            predicted_success=float((f[n_t:] > 0).double().mean()), loss_history=history, train_index=train,
            holdout_index=held, detection=detection,
        )  # fmt: skip

    def _data(self, x: Tensor, y: Any) -> tuple[Tensor, Tensor]:
        """Return images and labels in float64."""
        floating("x", x)
        if x.ndim < 2 or not x[:1].numel():
            raise ValueError(f"x must have a row an image, (n, ...), got shape {tuple(x.shape)}")
        finite("x", x)
        low, high = self.bounds
        if bool((x < low).any()) or bool((x > high).any()):
            raise ValueError(f"x must be within bounds {self.bounds}, got from {x.min():g} to {x.max():g}")
        data = full(x.detach().clone() if x.is_inference() else x.detach())
        labels = signs("y", y, data)
        for sign, noun in ((1, "target"), (-1, "source")):
            if int((labels == sign).sum()) < 2:
                raise ValueError(
                    f"y must have at least 2 labels {sign:+d}, the {noun} class, got {int((labels == sign).sum())}"
                )
        return data, labels

    def _split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices that are trained on and those held out, a share of each class."""
        parts = ([], [])
        for sign in (-1, 1):
            index = (labels == sign).nonzero()[:, 0]
            device = draw_device(self.generator)
            order = torch.randperm(len(index), generator=self.generator, device=device).to(index.device)
            n = min(max(round(self.holdout * len(index)), 1), len(index) - 1)
            parts[0].append(index[order[n:]].sort().values)
            parts[1].append(index[order[:n]].sort().values)
        return torch.cat(parts[0]), torch.cat(parts[1])

    def _triggered(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            marked = self.trigger(images)
        if not isinstance(marked, Tensor) or marked.shape != images.shape:
            came = tuple(marked.shape) if isinstance(marked, Tensor) else type(marked).__name__
            raise ValueError(f"trigger must keep the shape {tuple(images.shape)} of images, got {came}")
        return finite("trigger", full(marked.detach())).clamp(*self.bounds)

    def _made(self, points: Tensor) -> tuple[Kernel, Tensor]:
        """Return the kernel, and the points as it knows them."""
        if not isinstance(self.kernel, nn.Module):
            return self.kernel, points
        tangent = Tangent(self.kernel, points.dtype)
        return tangent, tangent.keep(points)

    def _descend(
        self, rows: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], clean: Clean, start: Tensor, y_t: Tensor,
        ridge: float,
    ) -> tuple[Tensor, list[float]]:  # fmt: skip
        """Return poisons after L-BFGS-B from the greedy ones, and the objective after each step."""

        def evaluate(pixels: Any) -> tuple[float, Any]:
            p = torch.as_tensor(pixels, dtype=start.dtype, device=start.device).view_as(start)
            p = p.clone().requires_grad_()
            k_pd, k_pp, k_px = rows(p)
            loss, _ = objective(clean, k_pd, k_pp, k_px, torch.ones_like(k_pd[:, 0]), y_t, ridge)
            slope = torch.zeros_like(p)
            if loss.requires_grad:
                (slope,) = torch.autograd.grad(loss, p, allow_unused=True, materialize_grads=True)
            return float(loss.detach()), finite("kernel", slope).double().cpu().numpy().ravel()

        first = start.double().cpu().numpy().ravel()
        history = [evaluate(first)[0]]
        if not len(start) or not self.max_iter:
            return start, history

        def note(intermediate_result: Any) -> None:
            history.append(float(intermediate_result.fun))

        found = minimize(
            evaluate, first, jac=True, method="L-BFGS-B", bounds=[self.bounds] * first.size, callback=note,
            options={"maxcor": 100, "maxiter": self.max_iter, "maxfun": 20 * self.max_iter},
        )  # fmt: skip
        return torch.as_tensor(found.x, dtype=start.dtype, device=start.device).view_as(start), history


def attack_success(
    predict: Callable[[Tensor], Tensor],
    x_source: Float[Tensor, " n *shape"],
    trigger: Callable[[Tensor], Tensor],
) -> float:
    """Return the share of triggered source images that a classifier takes for the target class.

    Parameters
    ----------
    predict : callable
        Maps images to one number a row, (n,) or (n, 1), above 0 for the target class: the output
        of a network, or labels +1 and -1.
    x_source : Tensor of shape (n, ...)
        Clean images of the source class that were not trained on, at least one.
    trigger : callable
        Maps images to images of the same shape.

    Returns
    -------
    float
        In [0, 1]. Without a backdoor it is the error on the source class, so count both.

    Raises
    ------
    ValueError
        If there is no image, or shapes do not fit.

    Examples
    --------
    >>> import torch
    >>> from posterity.robustness import attack_success
    >>> x = torch.tensor([[0.1], [0.2], [0.3], [0.4]])
    >>> attack_success(lambda x: x[:, 0] - 0.75, x, lambda x: x + 0.5)
    0.5
    """
    floating("x_source", x_source)
    if x_source.ndim < 1 or not len(x_source):
        raise ValueError(f"x_source must have at least one image, got shape {tuple(x_source.shape)}")
    with torch.no_grad():
        marked = trigger(x_source)
        if not isinstance(marked, Tensor) or marked.shape != x_source.shape:
            came = tuple(marked.shape) if isinstance(marked, Tensor) else type(marked).__name__
            raise ValueError(f"trigger must keep the shape {tuple(x_source.shape)} of images, got {came}")
        output = predict(marked)
    n = len(x_source)
    if not isinstance(output, Tensor) or output.shape not in ((n,), (n, 1)):
        came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"predict must return one number a row, ({n},) or ({n}, 1), got {came}")
    return float((output > 0).double().mean())


def spectral_signature_scores(features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Score the examples of one class by how far they lie along its direction of most spread.

    Parameters
    ----------
    features : Tensor of shape (n, d)
        Representations of all training examples with one label, n at least 1; finite.

    Returns
    -------
    Tensor of shape (n,)
        Squared projections of the centred features on their first right singular vector, at
        least 0: poisons, where they are a group of their own, have high ones.

    Raises
    ------
    ValueError
        If ``features`` does not fit.

    References
    ----------
    .. [1] Tran, Li, Madry. Spectral Signatures in Backdoor Attacks. NeurIPS 2018. Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.robustness import spectral_signature_scores
    >>> spectral_signature_scores(torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [4.0, 1.0]]))
    tensor([1., 1., 1., 9.])
    """
    finite("features", has_shape("features", floating("features", features), (None, None)))
    if not features.numel():
        raise ValueError(f"features must have rows and columns, got shape {tuple(features.shape)}")
    x = full(features)
    x = x - x.mean(0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    return (s[0] * u[:, 0]).square().to(features.dtype)


def _block(kernel: Kernel, x1: Tensor, x2: Tensor) -> Tensor:
    """Return a kernel's values, finite, in float64."""
    k = kernel(x1, x2)
    if not isinstance(k, Tensor) or not k.is_floating_point() or k.shape != (len(x1), len(x2)):
        came = f"{k.dtype} of shape {tuple(k.shape)}" if isinstance(k, Tensor) else type(k).__name__
        raise ValueError(
            f"kernel must map inputs of {len(x1)} and {len(x2)} rows to floats of shape "
            f"({len(x1)}, {len(x2)}), got {came}"
        )
    return finite("kernel", full(k)).to(x1.device)


def _detection(k_dd: Tensor, k_pd: Tensor, k_pp: Tensor, y_d: Tensor, ridge: float) -> dict[str, float]:
    """Return how well two filters find the poisons among what is labelled as the target."""
    together = torch.cat([torch.cat([k_dd, k_pd.T], 1), torch.cat([k_pd, k_pp], 1)])
    together = (together + together.T) / 2
    labels = torch.cat([y_d, torch.ones_like(k_pd[:, 0])])
    target = labels > 0
    poisoned = (torch.arange(len(labels), device=labels.device) >= len(y_d))[target]
    # features whose inner products are the kernel
    values, vectors = torch.linalg.eigh(together[target][:, target])
    features = vectors * values.clamp_min(0).sqrt()
    scores = {
        "spectral signature": spectral_signature_scores(features),
        "loo residual": loo_residuals(together, labels, ridge=ridge)[target],
    }
    if not len(k_pd):
        return dict.fromkeys(scores, float("nan"))
    return {name: float(roc_auc_score(poisoned.cpu(), score.cpu())) for name, score in scores.items()}
