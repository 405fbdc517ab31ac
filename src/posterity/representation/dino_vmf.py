"""DINO-vMF: self-distillation whose prototypes may differ in precision, since each logit has its law's normaliser.

DINO's softmax over prototypes w_k is the posterior of a mixture of von Mises-Fisher laws with mean directions
w_k / |w_k| and precisions kappa_k = |w_k| / t, but only where all norms are equal. The logits of the mixture are

    y.w_k / t + log C_p(|w_k| / t)                                                                 (1)

for unit embeddings y: the constant falls as a prototype's norm grows, so that none wins by its length alone. As it
differs from prototype to prototype, the teacher is centred in probabilities: the centre is a moving average of the
logarithm of each prototype's mean probability, and what is used much is used less.
"""

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._branches import follow, momentum_copy
from posterity._checks import at_least, floating, has_shape, integer, one_of, within
from posterity._models import evaluating
from posterity._precision import wide
from posterity._processes import all_rows
from posterity.representation.vmf import vmf_log_normalizer

__all__ = ["DINOHead", "DINOvMFLoss", "SelfDistillation"]


class DINOHead(nn.Module):
    """Multilayer perceptron to unit embeddings, and logits of prototypes, the temperature applied.

    Parameters
    ----------
    in_dim : int
        Features of the backbone.
    n_prototypes : int, default=4096
        K; DINO has 65,536.
    hidden_dim, bottleneck_dim : int, default=2048, 256
        Units between layers, and the width p of embeddings, at least 2.
    n_layers : int, default=3
        Linear layers, with GELU between them.
    prototypes : {"vmf", "unnormalized", "normalized"}, default="vmf"
        Free norms with the constant of (1); free norms without it, which is unstable in large models; or norms
        fixed at 1, as DINO has them for large models.

    Attributes
    ----------
    direction : Parameter of shape (K, p)
        Prototypes up to their norm.
    magnitude : Parameter of shape (K,)
        Their norms, which start at 1; a buffer for "normalized".

    Raises
    ------
    ValueError
        If a parameter is out of range, or features or a temperature do not fit.

    References
    ----------
    .. [1] Govindarajan, Siden, Roll, Lindsten. DINO as a von Mises-Fisher mixture model. ICLR 2023. Section 3.
    .. [2] Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin. Emerging Properties in Self-Supervised Vision
       Transformers. ICCV 2021.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import DINOHead
    >>> head = DINOHead(16, 32, hidden_dim=24, bottleneck_dim=8)
    >>> head(torch.randn(5, 16), temperature=0.1).shape
    torch.Size([5, 32])
    """

    magnitude: Tensor

    def __init__(
        self, in_dim: int, n_prototypes: int = 4096, *, hidden_dim: int = 2048, bottleneck_dim: int = 256,
        n_layers: int = 3, prototypes: Literal["vmf", "unnormalized", "normalized"] = "vmf",
    ) -> None:  # fmt: skip
        super().__init__()
        integer("in_dim", in_dim, 1)
        integer("n_prototypes", n_prototypes, 1)
        integer("hidden_dim", hidden_dim, 1)
        integer("bottleneck_dim", bottleneck_dim, 2)
        integer("n_layers", n_layers, 1)
        self.prototypes = one_of("prototypes", prototypes, ("vmf", "unnormalized", "normalized"))
        sizes = [in_dim, *[hidden_dim] * (n_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for n_in, n_out in zip(sizes, sizes[1:], strict=False):
            layer = nn.Linear(n_in, n_out)
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.direction = nn.Parameter(F.normalize(torch.randn(n_prototypes, bottleneck_dim), dim=1))
        if prototypes == "normalized":
            self.register_buffer("magnitude", torch.ones(n_prototypes))
        else:
            self.magnitude = nn.Parameter(torch.ones(n_prototypes))

    def forward(self, x: Float[Tensor, "n in_dim"], temperature: float) -> Float[Tensor, "n k"]:
        """Return logits.

        Parameters
        ----------
        x : Tensor of shape (n, in_dim)
            Features.
        temperature : float
            t, positive.

        Returns
        -------
        Tensor of shape (n, K)
            In float32 at least, as `vmf_logits`.
        """
        at_least("temperature", temperature, 0, strict=True)
        y = wide(self.embed(x))
        with torch.autocast(x.device.type, enabled=False):
            y = F.normalize(y, dim=1)  # to the digits of the wider type
            direction, magnitude = (wide(v).to(y.dtype) for v in (self.direction, self.magnitude))
            # the K x p weights are read and written once, and their norms, which are known, not taken again
            scale = magnitude / (temperature * direction.norm(dim=1).clamp_min(1e-12))
            constant = None
            if self.prototypes == "vmf":
                constant = vmf_log_normalizer(magnitude.abs() / temperature, y.shape[1])
            return F.linear(y, direction * scale[:, None], constant)

    def embed(self, x: Float[Tensor, "n in_dim"]) -> Float[Tensor, "n p"]:
        """Return embeddings of norm 1.

        Parameters
        ----------
        x : Tensor of shape (n, in_dim)

        Returns
        -------
        Tensor of shape (n, p)
        """
        has_shape("x", floating("x", x), (None, self.mlp[0].in_features))  # type: ignore[list-item]
        out = self.mlp(x)
        return F.normalize(wide(out), dim=1).to(out.dtype)

    def precision(self, temperature: float = 0.1) -> Float[Tensor, " k"]:
        """Return the precision of each prototype, its norm over the temperature.

        Parameters
        ----------
        temperature : float, default=0.1
            Positive.

        Returns
        -------
        Tensor of shape (K,)
            Without a gradient.
        """
        at_least("temperature", temperature, 0, strict=True)
        return self.magnitude.detach().abs() / temperature


class DINOvMFLoss(nn.Module):
    """Cross-entropy between the teacher's assignment of one view and the student's of another.

    Parameters
    ----------
    n_prototypes : int
        K.
    center_momentum : float, default=0.9
        What stays of the centre in a step, in [0, 1].
    centering : {"probability", "logit", "none"}, default="probability"
        Whether the centre averages log mean probabilities, as in this paper, or logits, as in DINO.

    Attributes
    ----------
    center : Tensor of shape (K,)
        Starts at 0; float32 at least.

    Raises
    ------
    ValueError
        If a parameter is out of range, or views do not fit.

    Notes
    -----
    The average is of the logarithm of the mean, over all global views of a step; where ``torch.distributed`` is
    initialised, over those of all processes. Rows meet in nothing else: the loss of a process is that of its own
    rows, and the mean over processes of equal batches, as their averaged gradient, is that of all rows.

    References
    ----------
    .. [1] Govindarajan, Siden, Roll, Lindsten. DINO as a von Mises-Fisher mixture model. ICLR 2023. Section 3.2.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import DINOvMFLoss
    >>> student = [torch.randn(6, 32, requires_grad=True) for _ in range(4)]  # two global views and two local ones
    >>> DINOvMFLoss(32)(student, [torch.randn(6, 32) for _ in range(2)]).backward()
    """

    center: Tensor

    def __init__(
        self, n_prototypes: int, *, center_momentum: float = 0.9,
        centering: Literal["probability", "logit", "none"] = "probability",
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_prototypes = integer("n_prototypes", n_prototypes, 1)
        self.center_momentum = within("center_momentum", center_momentum, 0, 1)
        self.centering = one_of("centering", centering, ("probability", "logit", "none"))
        self.register_buffer("center", torch.zeros(n_prototypes))

    def _apply(self, fn, recurse: bool = True) -> "DINOvMFLoss":
        super()._apply(fn, recurse)
        self.center = wide(self.center)
        return self

    @torch.no_grad()
    def teacher_probs(self, logits: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return the teacher's assignment, centred.

        Parameters
        ----------
        logits : Tensor of shape (n, K)

        Returns
        -------
        Tensor of shape (n, K)
            Rows sum to 1; no gradient.
        """
        self._check("logits", logits)
        logits = wide(logits)
        return (logits if self.centering == "none" else logits - self.center.to(logits.dtype)).softmax(1)

    @torch.no_grad()
    def update_center(self, logits: Float[Tensor, "n k"]) -> None:
        """Move the centre towards what a batch of teacher logits, not centred, says.

        Parameters
        ----------
        logits : Tensor of shape (n, K)
            Of all global views.
        """
        self._check("logits", logits)
        self._move([logits])

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], *, update: bool = True
    ) -> Float[Tensor, ""]:
        """Return the mean cross-entropy over pairs of different views, and move the centre.

        Parameters
        ----------
        student : sequence of Tensor of shape (n, K)
            Logits of each view, the global ones first.
        teacher : sequence of Tensor of shape (n, K)
            Logits of the global views; no gradient enters them.
        update : bool, default=True
            Whether the centre moves afterwards.

        Returns
        -------
        Tensor of shape ()
        """
        if not teacher or len(teacher) > len(student):
            raise ValueError(
                f"teacher must have at most as many views as student, {len(student)}, got {len(teacher)}"
            )
        if len(student) < 2:
            raise ValueError("student must have at least two views: one alone has no pair")
        n = len(student[0]) if isinstance(student[0], Tensor) and student[0].ndim else None
        for name, views in (("student", student), ("teacher", teacher)):
            for k, logits in enumerate(views):
                self._check(f"{name}[{k}]", logits, n)
        with torch.autocast(student[0].device.type, enabled=False):
            probs = [self.teacher_probs(logits) for logits in teacher]
            aims = [
                reduce(torch.add, probs[:j] + probs[j + 1 :]) for j in range(len(probs)) if len(probs) > 1
            ]
            if len(student) > len(probs):
                aims += [reduce(torch.add, probs)] * (len(student) - len(probs))
            # one cross-entropy a view, which is linear in what it aims at: one (n, K) log-softmax to keep
            values = [
                F.cross_entropy(wide(view), aim.to(wide(view).dtype))
                for view, aim in zip(student[len(student) - len(aims) :], aims, strict=True)
            ]
            if update:
                self._move(teacher)
            pairs = len(teacher) * (len(student) - 1)
            return (torch.stack(values).sum() / pairs).to(student[0].dtype)

    @torch.no_grad()
    def _move(self, views: Sequence[Tensor]) -> None:
        """Move the centre towards what teacher logits say, of all views and processes alike."""
        if self.centering == "none":
            return
        sums = []
        for logits in map(wide, views):
            if self.centering == "probability":  # log of a mean, never of 0
                sums.append(logits.log_softmax(1).logsumexp(0))
            else:
                sums.append(logits.sum(0))
        n = sum(map(len, views))
        rows, counts = all_rows(torch.stack(sums), sums[0].new_full((1,), n, dtype=torch.int64))
        total = counts.sum().to(rows.dtype)
        now = rows.logsumexp(0) - total.log() if self.centering == "probability" else rows.sum(0) / total
        self.center.mul_(self.center_momentum).add_((1 - self.center_momentum) * now.to(self.center.dtype))

    def _check(self, name: str, logits: Tensor, n: int | None = None) -> None:
        has_shape(name, floating(name, logits), (n, self.n_prototypes))
        if len(logits) == 0:
            raise ValueError(f"{name} must have at least one row, got none")


class SelfDistillation(nn.Module):
    """Student and teacher: a backbone and a head that learn from a moving average of themselves.

    Parameters
    ----------
    backbone : nn.Module
        Of images to features (n, d), any.
    head : DINOHead
        Of those features.
    student_temperature, teacher_temperature : float, default=0.1, 0.04
        Positive; the smaller the teacher's, the sharper what the student learns from.
    teacher_warmup : tuple of float and int, default=(0.04, 0)
        Temperature that the teacher starts at, and steps until it has its own, along a line.
    momentum : float, default=0.996
        What stays of the teacher in the first step; rises to 1 as a cosine.
    total_steps : int
        Steps of training.
    center_momentum, centering
        As for `DINOvMFLoss`.
    freeze_prototypes_steps : int, default=0
        Steps in which prototypes do not learn; DINO has one epoch.

    Attributes
    ----------
    teacher_backbone, teacher_head : nn.Module
        Copies that no gradient reaches.
    criterion : DINOvMFLoss

    Raises
    ------
    ValueError
        If an argument is out of range.

    Notes
    -----
    A step is ``loss(global_views, local_views).backward()``, the optimiser's step, ``update_teacher(step)``. The
    teacher runs in training mode; its buffers, as BatchNorm has, are the student's. For iBOT use `vmf_logits` and
    `DINOvMFLoss` on the logits of masked patches in the same way.

    References
    ----------
    .. [1] Govindarajan, Siden, Roll, Lindsten. DINO as a von Mises-Fisher mixture model. ICLR 2023. Section 3.

    Examples
    --------
    >>> import torch
    >>> from posterity.representation import DINOHead, SelfDistillation
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16))
    >>> model = SelfDistillation(net, DINOHead(16, 32, hidden_dim=24, bottleneck_dim=8), total_steps=100)
    >>> optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-3)
    >>> model.loss([torch.rand(8, 1, 8, 8) for _ in range(2)]).backward()
    >>> optimizer.step()
    >>> model.update_teacher(0)
    """

    steps_done: Tensor

    def __init__(
        self, backbone: nn.Module, head: DINOHead, *, student_temperature: float = 0.1,
        teacher_temperature: float = 0.04, teacher_warmup: tuple[float, int] = (0.04, 0), momentum: float = 0.996,
        total_steps: int, center_momentum: float = 0.9,
        centering: Literal["probability", "logit", "none"] = "probability", freeze_prototypes_steps: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.student_temperature = at_least("student_temperature", student_temperature, 0, strict=True)
        self.teacher_temperature = at_least("teacher_temperature", teacher_temperature, 0, strict=True)
        if not isinstance(teacher_warmup, (tuple, list)) or len(teacher_warmup) != 2:
            raise ValueError(f"teacher_warmup must be a temperature and steps, got {teacher_warmup!r}")
        start, steps = teacher_warmup
        self.teacher_warmup = (
            at_least("teacher_warmup[0]", start, 0, strict=True), integer("teacher_warmup[1]", steps, 0)
        )  # fmt: skip
        self.momentum = within("momentum", momentum, 0, 1)
        self.total_steps = integer("total_steps", total_steps, 1)
        self.freeze_prototypes_steps = integer("freeze_prototypes_steps", freeze_prototypes_steps, 0)
        if not isinstance(head, DINOHead):
            raise ValueError(f"head must be a DINOHead, got {type(head).__name__}")
        self.backbone, self.head = backbone, head
        self.teacher_backbone, self.teacher_head = momentum_copy(backbone), momentum_copy(head)
        self.criterion = DINOvMFLoss(
            len(head.direction), center_momentum=center_momentum, centering=centering
        )
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))

    def loss(
        self,
        global_views: Sequence[Tensor],
        local_views: Sequence[Tensor] = (),
        *,
        update: bool | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss of a step, and move the centre.

        Parameters
        ----------
        global_views, local_views : sequence of Tensor of shape (n, ...)
            Views of the same n samples: both branches see the global ones, the student alone the local ones.
        update : bool, optional
            Whether the centre moves; by default in training mode only.

        Returns
        -------
        Tensor of shape ()
        """
        if not global_views:
            raise ValueError("global_views must have at least one view, got none")
        if len(global_views) + len(local_views) < 2:
            raise ValueError("global_views and local_views must be two at least: one view has no pair")
        self._freeze()
        t, views = self.student_temperature, (*global_views, *local_views)
        student = [self.head(self.backbone(x), t) for x in views]
        with torch.no_grad():
            t = self._teacher_temperature()
            teacher = [self.teacher_head(self.teacher_backbone(x), t) for x in global_views]
        return self.criterion(student, teacher, update=self.training if update is None else update)

    @torch.no_grad()
    def update_teacher(self, step: int) -> None:
        """Move the teacher towards the student, after the optimiser's step.

        Parameters
        ----------
        step : int
            From 0; the momentum is 1 from ``total_steps`` on.
        """
        done = min(integer("step", step, 0) / self.total_steps, 1.0)
        momentum = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * done)) / 2
        for target, source in ((self.teacher_backbone, self.backbone), (self.teacher_head, self.head)):
            follow(target, source, momentum)
        self.steps_done.fill_(step + 1)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield what an optimiser should get: parameters of the student's backbone and head."""
        yield from self.backbone.parameters()
        yield from self.head.parameters()

    def assignments(
        self, x: Tensor, branch: Literal["student", "teacher"] = "teacher"
    ) -> Float[Tensor, "n k"]:
        """Return the probabilities of prototypes, in eval mode.

        Parameters
        ----------
        x : Tensor of shape (n, ...)
        branch : {"teacher", "student"}, default="teacher"
            The teacher's are centred, as in training.

        Returns
        -------
        Tensor of shape (n, K)
        """
        one_of("branch", branch, ("student", "teacher"))
        with evaluating(self), torch.no_grad():
            if branch == "student":
                return self.head(self.backbone(x), self.student_temperature).softmax(1)
            logits = self.teacher_head(self.teacher_backbone(x), self._teacher_temperature())
            return self.criterion.teacher_probs(logits)

    def usage(self, x: Tensor) -> float:
        """Return the effective number of prototypes that the teacher uses for samples, in [1, K].

        Parameters
        ----------
        x : Tensor of shape (n, ...)

        Returns
        -------
        float
            The exponential of the entropy of the mean assignment.
        """
        return float(torch.special.entr(self.assignments(x).double().mean(0)).sum().exp())

    def _teacher_temperature(self) -> float:
        start, steps = self.teacher_warmup
        share = min(int(self.steps_done) / steps, 1.0) if steps else 1.0
        return start + (self.teacher_temperature - start) * share

    def _freeze(self) -> None:
        if not self.freeze_prototypes_steps:  # what the user froze stays frozen
            return
        learn = int(self.steps_done) >= self.freeze_prototypes_steps
        self.head.direction.requires_grad_(learn)
        if isinstance(self.head.magnitude, nn.Parameter):
            self.head.magnitude.requires_grad_(learn)
