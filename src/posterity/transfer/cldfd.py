"""Cross-level distillation: a student on unlabelled images of another kind learns its teacher's next level.

A teacher was trained on ordinary labelled images, the student sees unlabelled ones of the target. Beside the contrast
of two views, block l of the student is drawn to block l + 1 of the teacher, which has seen more of the image:

    loss = NT-Xent(z1, z2) + alpha sum over l < L of  mean (p_l(s_l) - t_{l+1})^2 ,                      (1)
    t = (1 - m) teacher + m old student,   m = coef * step / total_steps ,                              (2)

p_l a convolution to the teacher's size. What the teacher knows of the base is needed first, what the student has
learned of the target last: m leads from one to the other.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from posterity._branches import momentum_copy
from posterity._checks import at_least, floating, has_shape, integer, one_of, within
from posterity._precision import wide, widened
from posterity._processes import all_rows

__all__ = ["CrossLevelDistillation", "CrossLevelLearner", "nt_xent"]


class CrossLevelDistillation(nn.Module):
    """The second term of (1): feature maps of a student beside those of the next level.

    Parameters
    ----------
    student_channels : sequence of int
        Channels of the L block outputs, at least two.
    teacher_channels : sequence of int, optional
        Of the teacher's blocks, as many; by default the student's.
    stride : int or sequence of int, default=2
        Of each of the L - 1 projections: how much smaller a map of the next level is.

    Attributes
    ----------
    projections : nn.ModuleList
        L - 1 times a 3 x 3 convolution, batch normalisation, ReLU.

    Raises
    ------
    ValueError
        If the lists have other lengths than said, or a projected map has not the size of its target.

    References
    ----------
    .. [1] Zheng, Wang, Liu and Kanezaki. Cross-Level Distillation and Feature Denoising for Cross-Domain Few-Shot
       Classification. ICLR 2023. Section 3.2, equations 3 to 6.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import CrossLevelDistillation
    >>> distillation = CrossLevelDistillation([4, 8])
    >>> student = [torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)]
    >>> teacher = [torch.zeros(2, 4, 8, 8), torch.zeros(2, 8, 4, 4)]
    >>> projected = distillation.projections[0](student[0])  # as large as the teacher's second map
    >>> torch.allclose(distillation(student, teacher), (projected**2).mean())
    True
    """

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int] | None = None, *,
        stride: int | Sequence[int] = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        ours = _sizes("student_channels", student_channels)
        theirs = ours if teacher_channels is None else _sizes("teacher_channels", teacher_channels)
        if len(ours) < 2 or len(theirs) != len(ours):
            raise ValueError(
                f"student_channels and teacher_channels must be of as many blocks, at least 2, got {ours} and {theirs}"
            )
        strides = [stride] * (len(ours) - 1) if isinstance(stride, int) else list(stride)
        if len(strides) != len(ours) - 1:
            raise ValueError(
                f"stride must be one, or one for each of {len(ours) - 1} projections, got {stride}"
            )
        self.student_channels, self.teacher_channels = ours, theirs
        self.projections = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(n_in, n_out, 3, stride=integer("stride", by, 1), padding=1),
                nn.BatchNorm2d(n_out),
                nn.ReLU(),
            )
            for n_in, n_out, by in zip(ours, theirs[1:], strides, strict=False)
        )

    def forward(
        self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor],
        old_maps: Sequence[Tensor] | None = None, *, momentum: float = 0.0,
    ) -> Float[Tensor, ""]:  # fmt: skip
        """Return the sum over levels of the mean squared difference.

        Parameters
        ----------
        student_maps, teacher_maps : sequence of Tensor of shape (n, c_l, h_l, w_l)
            Outputs of the L blocks; the last one of the student and the first one of the teacher count nothing.
        old_maps : sequence of Tensor, optional
            Of the student as it was, of the shapes of the teacher's maps; needed where ``momentum`` is not 0.
        momentum : float, default=0.0
            m of (2), in [0, 1]: the share of the old student in the target.

        Returns
        -------
        Tensor
            Scalar; a gradient reaches the student and the projections.
        """
        within("momentum", momentum, 0, 1)
        student = _maps("student_maps", student_maps, self.student_channels)
        teacher = _maps("teacher_maps", teacher_maps, self.teacher_channels)
        if momentum and old_maps is None:
            raise ValueError(f"old_maps must be given where momentum is not 0, got momentum {momentum}")
        old = (
            _maps("old_maps", old_maps, self.teacher_channels)
            if momentum and old_maps is not None
            else teacher
        )
        total = wide(student[0]).new_zeros(())
        levels = zip(self.projections, student, teacher[1:], old[1:], strict=False)
        for level, (projection, ours, theirs, before) in enumerate(levels):
            got = projection(ours)
            if got.shape != theirs.shape or before.shape != theirs.shape:
                raise ValueError(
                    f"level {level}: the projected map is {tuple(got.shape)}, the teacher's next one "
                    f"{tuple(theirs.shape)}, the old student's {tuple(before.shape)}: see stride"
                )
            target = wide(theirs.detach())
            if momentum:
                target = torch.lerp(target, wide(before.detach()).to(target.dtype), momentum)
            with torch.autocast(got.device.type, enabled=False):
                total = total + F.mse_loss(wide(got), target.to(wide(got).dtype))
        return total.to(student[0].dtype)


class CrossLevelLearner(nn.Module):
    """The whole of (1) and (2) for your networks: a loss of two views of unlabelled images.

    Parameters
    ----------
    student, teacher : nn.Module
        ``net(x) -> (list of L maps, features (n, n_features))``. The student is trained in place. The teacher is
        copied and frozen, in eval mode.
    channels : sequence of int
        Of the L maps, alike in both.
    n_features : int
        At least 1.
    alpha : float, default=2.0
        Weight of distillation, at least 0.
    coef : float, default=1.0
        Of m in (2), in [0, 1].
    total_steps : int
        Steps of the training, at least 1.
    temperature : float, default=1.0
        Of the contrast, greater than 0.
    projection_dim : int, default=128
        Of the head that the contrast is taken behind.
    stride : int or sequence of int, default=2
        Of `CrossLevelDistillation`.
    old_view : {"same", "third"}, default="same"
        What the old student sees: the view of student and teacher, or the third, as the official code does it.

    Attributes
    ----------
    student, teacher, old_student : nn.Module
    head : nn.Sequential
        Linear, ReLU, Linear: for training only.
    distillation : CrossLevelDistillation
    momentum : float
        m of the next step.

    Raises
    ------
    ValueError
        If a size is out of range, views do not fit or hold a single image, or a network returns something else.

    Notes
    -----
    1. The official code lets the old student see a third view, so that the maps it averages are not of one image;
       by default all see the first.
    2. In the first step there is no old student yet; in the official code, in the first epoch.
    3. Train ``learner.parameters()``: what is frozen among them gets no gradient.

    References
    ----------
    .. [1] Zheng et al. ICLR 2023. Section 3.2.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from posterity.transfer import CrossLevelLearner
    >>> class Blocks(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, padding=1)
    ...     def forward(self, x):
    ...         first = self.one(x).relu()
    ...         second = self.two(first).relu()
    ...         return [first, second], second.mean((2, 3))
    >>> learner = CrossLevelLearner(Blocks(), Blocks(), [4, 8], n_features=8, total_steps=100)
    >>> optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    >>> x = torch.rand(16, 1, 8, 8)
    >>> learner(x, x.flip(3)).backward()
    >>> optimizer.step()
    >>> learner.after_step()
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, channels: Sequence[int], *, n_features: int, alpha: float = 2.0,
        coef: float = 1.0, total_steps: int, temperature: float = 1.0, projection_dim: int = 128,
        stride: int | Sequence[int] = 2, old_view: Literal["same", "third"] = "same",
    ) -> None:  # fmt: skip
        super().__init__()
        for name, net in (("student", student), ("teacher", teacher)):
            if not isinstance(net, nn.Module):
                raise ValueError(f"{name} must be an nn.Module, got {type(net).__name__}")
        self.n_features = integer("n_features", n_features, 1)
        self.alpha, self.coef = at_least("alpha", alpha, 0), within("coef", coef, 0, 1)
        self.total_steps = integer("total_steps", total_steps, 1)
        self.temperature = at_least("temperature", temperature, 0, strict=True)
        self.old_view = one_of("old_view", old_view, ("same", "third"))
        integer("projection_dim", projection_dim, 1)
        if len(_sizes("channels", channels)) < 2:
            raise ValueError(f"channels must be of at least 2 blocks, got {list(channels)}")
        self.distillation = CrossLevelDistillation(channels, stride=stride)
        self.head = nn.Sequential(
            nn.Linear(n_features, n_features), nn.ReLU(), nn.Linear(n_features, projection_dim)
        )
        like = next((p for p in student.parameters() if p.is_floating_point()), None)
        if like is not None:
            self.distillation.to(like.device, like.dtype)
            self.head.to(like.device, like.dtype)
        self.student = student
        self.teacher, self.old_student = momentum_copy(teacher).eval(), momentum_copy(student).eval()
        self.n_steps = 0

    @property
    def momentum(self) -> float:
        """The share of the old student in the next target."""
        return min(1.0, self.coef * max(self.n_steps - 1, 0) / self.total_steps)

    def forward(
        self,
        x1: Shaped[Tensor, "n ..."],
        x2: Shaped[Tensor, "n ..."],
        x3: Shaped[Tensor, "n ..."] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss of views of one batch of unlabelled images.

        Parameters
        ----------
        x1, x2 : Tensor of shape (n, ...)
            Two views, n at least 2; what is distilled is seen in the first.
        x3 : Tensor of shape (n, ...), optional
            For the old student, where ``old_view`` is "third".

        Returns
        -------
        Tensor
            Scalar.
        """
        if self.old_view == "third" and x3 is None:
            raise ValueError('x3 must be given where old_view is "third"')
        for name, x in (("x1", x1), ("x2", x2), ("x3", x3)):
            if x is not None and (not isinstance(x, Tensor) or x.ndim == 0 or len(x) != len(x1)):
                shapes = [tuple(getattr(each, "shape", ())) for each in (x1, x)]
                raise ValueError(
                    f"{name} must be a view of the batch of x1, got shapes {shapes[0]} and {shapes[1]}"
                )
        if len(x1) < 2:
            raise ValueError(f"x1 must hold at least 2 images to tell apart, got {len(x1)}")
        maps, features = self._parts("student", self.student, x1)
        _, others = self._parts("student", self.student, x2)
        loss = nt_xent(self.head(features), self.head(others), temperature=self.temperature)
        if not self.alpha:
            return loss
        with torch.no_grad():
            theirs, _ = self._parts("teacher", self.teacher, x1)
            old = None
            if self.momentum:
                old, _ = self._parts("student", self.old_student, x3 if self.old_view == "third" else x1)  # type: ignore[arg-type]
        distilled = self.distillation(maps, theirs, old, momentum=self.momentum)
        return loss + self.alpha * distilled.to(loss.dtype)

    @torch.no_grad()
    def after_step(self) -> None:
        """Copy the student into the old student, buffers too, and count the step: call after each optimiser step."""
        for kind in ("parameters", "buffers"):
            ours, theirs = (list(getattr(net, kind)()) for net in (self.old_student, self.student))
            if ours:
                torch._foreach_copy_(ours, theirs)  # pyright: ignore[reportPrivateImportUsage]
        self.n_steps += 1

    def train(self, mode: bool = True) -> "CrossLevelLearner":
        """Set the mode of what is trained; teacher and old student stay in eval mode."""
        super().train(mode)
        self.teacher.eval()
        self.old_student.eval()
        return self

    def get_extra_state(self) -> dict[str, int]:
        """Return the number of steps, for ``state_dict``."""
        return {"n_steps": self.n_steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Take the number of steps of a ``state_dict``."""
        self.n_steps = state["n_steps"]

    def _parts(self, name: str, net: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
        out = net(x)
        if not isinstance(out, tuple | list) or len(out) != 2 or not isinstance(out[0], tuple | list):
            raise ValueError(f"{name} must return a list of maps and features, got {type(out).__name__}")
        maps, features = out
        return list(maps), has_shape(f"features of {name}", floating(f"features of {name}", features),
                                     (len(x), self.n_features))  # fmt: skip


@widened
def nt_xent(
    z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"], *, temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Return SimCLR's loss: each of 2n vectors is to find its partner among the others.

    Parameters
    ----------
    z1, z2 : Tensor of shape (n, d)
        Row i of one beside row i of the other; n at least 1. Their lengths do not matter.
    temperature : float, default=1.0
        What cosines are divided by, greater than 0.

    Returns
    -------
    Tensor
        Scalar, 0 for n = 1. Where ``torch.distributed`` is initialised, that of the rows of all processes.

    Raises
    ------
    ValueError
        If the views differ in shape or hold nothing.

    References
    ----------
    .. [1] Chen et al. A Simple Framework for Contrastive Learning of Visual Representations. ICML 2020. Equation 1.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import nt_xent
    >>> z = torch.eye(2)
    >>> nt_xent(z, z)  # e^1 beside two times e^0
    tensor(0.5514)
    """
    for name, z in (("z1", z1), ("z2", z2)):
        floating(name, z)
        has_shape(name, z, (None, None))
    has_shape("z2", z2, tuple(z1.shape), "z1")
    at_least("temperature", temperature, 0, strict=True)
    z1, z2 = all_rows(z1, z2)
    if not z1.numel():
        raise ValueError(f"z1 must hold vectors, got shape {tuple(z1.shape)}")
    both = torch.cat([z1, z2])
    largest = both.detach().abs().amax(1, keepdim=True)  # without it squares of large numbers overflow
    both = F.normalize(both / torch.where(largest > 0, largest, 1), dim=1)
    scores = (both @ both.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(both), device=both.device).roll(len(z1))
    return F.cross_entropy(scores, partner)


def _sizes(name: str, sizes: Any) -> list[int]:
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise ValueError(f"{name} must be a sequence of integers, got {sizes!r}")
    return [integer(name, size, 1) for size in sizes]


def _maps(name: str, maps: Any, channels: Sequence[int]) -> list[Tensor]:
    """Return the maps of each block, (n, c, h, w) each."""
    if not isinstance(maps, tuple | list) or len(maps) != len(channels):
        got = len(maps) if isinstance(maps, tuple | list) else type(maps).__name__
        raise ValueError(f"{name} must be a list of {len(channels)} maps, got {got}")
    for level, (each, size) in enumerate(zip(maps, channels, strict=True)):
        has_shape(f"{name}[{level}]", floating(f"{name}[{level}]", each), (None, size, None, None))
    return list(maps)
