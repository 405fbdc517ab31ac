"""Scheduled data prior (SDP): learning from a drifting stream, one sample at a time, without tasks.

Each arriving sample enters a memory balanced over classes (`BalancedMemory`), and steps are made on batches of the
memory alone, of which sample n costs

    (1 - C) CE_n + beta C ||f_n - f'_n||^2 ,                                                                (1)

f the features, f' those of a teacher, an average of past weights in which those of a chosen age weigh most
(`ScheduledTeacher`); beta lets both terms pull equally hard (`prior_loss`). C, in [0, 1), is how well the teacher
already knew the classes as they arrived,

    C = K / (K + 1) clip(mean over classes of the teacher's probability of the label - 1 / K, 0, 1) ,       (2)

K classes seen: at first the network learns from labels alone, later it is held to what the teacher is good at, and
the learning rate falls with 1 - C.
"""

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.optim import Optimizer

from posterity._checks import at_least, class_indices, finite, floating, integer
from posterity._models import evaluating
from posterity._precision import NARROW, wide
from posterity._random import seed_from, seeded
from posterity.transfer.balanced_memory import BalancedMemory
from posterity.transfer.feature_prior import prior_loss
from posterity.transfer.scheduled_teacher import ScheduledTeacher

__all__ = ["ScheduledDataPrior"]

AT_ONCE = 1024  # rows asked about together
CUT = 0.5  # share of batches that CutMix mixes


class ScheduledDataPrior:
    """A classifier that learns from a stream, sample by sample, and may be asked at any time.

    Parameters
    ----------
    body : nn.Module
        ``body(x) -> features (n, n_features)``, in float32 or float64; trained in place.
    n_features : int
        At least 1.
    memory_size : int, default=500
        Samples kept, at least 1.
    batch_size : int, default=16
        Samples of the memory a step, at least 1; all of it where it has fewer.
    updates_per_sample : float, default=1.0
        Steps for each arriving sample, greater than 0; 0.25 is a step every fourth.
    lr : float, default=3e-4
        Rate of the default optimizer, Adam, greater than 0.
    optimizer : callable, optional
        ``optimizer(groups) -> torch.optim.Optimizer``, in the place of Adam, with its own rates; as
        ``functools.partial(torch.optim.SGD, lr=0.1)``.
    prior_mean, prior_var : float, default=10_000.0, 0.75
        Age of the teacher's weights in updates and its relative variance, as `ScheduledTeacher` takes them; for short
        streams a mean of about a fifth of all updates.
    window : int, default=100
        Of how many last arrivals of a class the teacher's probability counts in (2), at least 1.
    adaptive_lr : bool, default=True
        Whether rates are multiplied by 1 - C.
    cutmix : float, default=0.0
        Where greater than 0, half of all batches are mixed by CutMix with a share from Beta(cutmix, cutmix); images
        (n, channels, height, width) only.
    augment : callable, optional
        ``augment(x) -> x`` for the batches of the memory.
    device : str or torch.device, default="cpu"
        Where body and memory are.
    generator : torch.Generator, optional
        Draws replacements, batches, CutMix, new rows of the head, and seeds what body and ``augment`` draw themselves;
        by default a new one, seeded by torch's own.

    Attributes
    ----------
    classes_ : list of int
        Labels in the order in which they first came.
    head : nn.Linear or None
        From features to the classes seen; None before the first.
    teacher : ScheduledTeacher
        Of the body.
    memory : BalancedMemory
        Its labels are places in ``classes_``.
    prior_weight : float
        C of (2).
    n_seen : int
        Samples that have come.
    optimizer : Optimizer
        The body's parameters first, then those of the head.

    Raises
    ------
    ValueError
        If an argument is out of range or does not fit; if body or samples do not fit what came before; if something
        is asked before anything was seen; or if the network stops being finite.

    Notes
    -----
    1. A batch of a single row, as the first sample makes it, passes layers of batch normalisation as in eval mode.
    2. Weights and running statistics are the caller's module's; modes and flags are left as they were.

    References
    ----------
    .. [1] Koh et al. Online Boundary-Free Continual Learning by Scheduled Data Prior. ICLR 2023. The method as
       a whole; `methods/sdp.py` of the official code.

    Examples
    --------
    >>> import torch
    >>> from posterity.transfer import ScheduledDataPrior
    >>> body = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU())
    >>> learner = ScheduledDataPrior(body, 8, lr=0.01, generator=torch.Generator().manual_seed(0))
    >>> for _ in range(50):
    ...     learner.observe(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([7, 3]))
    ...
    >>> learner.predict(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    tensor([7, 3])
    """

    def __init__(
        self,
        body: nn.Module,
        n_features: int,
        *,
        memory_size: int = 500,
        batch_size: int = 16,
        updates_per_sample: float = 1.0,
        lr: float = 3e-4,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        prior_mean: float = 10_000.0,
        prior_var: float = 0.75,
        window: int = 100,
        adaptive_lr: bool = True,
        cutmix: float = 0.0,
        augment: Callable[[Tensor], Tensor] | None = None,
        device: str | torch.device = "cpu",
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(body, nn.Module):
            raise ValueError(f"body must be a torch module, got {type(body).__name__}")
        self.n_features = integer("n_features", n_features, 1)
        memory_size, self.batch_size = (
            integer("memory_size", memory_size, 1),
            integer("batch_size", batch_size, 1),
        )
        self.updates_per_sample = at_least("updates_per_sample", updates_per_sample, 0, strict=True)
        at_least("lr", lr, 0, strict=True)
        self.window, self.adaptive_lr = integer("window", window, 1), bool(adaptive_lr)
        self.cutmix = at_least("cutmix", cutmix, 0)
        for name, function in (("optimizer", optimizer), ("augment", augment)):
            if function is not None and not callable(function):
                raise ValueError(f"{name} must be callable, got {type(function).__name__}")
        if narrow := sorted({str(p.dtype) for p in body.parameters() if p.dtype in NARROW}):
            raise ValueError(
                f"body must be in float32 or float64, got {', '.join(narrow)}: use autocast inside it"
            )
        self.augment, self.device = augment, torch.device(device)
        try:
            self.teacher = ScheduledTeacher(body, mean=prior_mean, var=prior_var).to(self.device)
        except ValueError as error:  # under the names that they have here
            raise ValueError(str(error).replace("mean", "prior_mean").replace("var ", "prior_var ")) from None
        self.body = body.to(self.device)
        self._modules, self._teachers = list(self.body.modules()), list(self.teacher.module.modules())
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self.generator = generator
        self.memory = BalancedMemory(memory_size, generator=generator)
        self.head: nn.Linear | None = None
        self.classes_: list[int] = []
        self.prior_weight, self.n_seen = 0.0, 0
        groups = [{"params": [p for p in self.body.parameters() if p.requires_grad]}]
        fused = self.device.type in ("cpu", "cuda")  # one kernel a step: small networks spend theirs on calls
        self.optimizer = (
            torch.optim.Adam(groups, lr=lr, fused=fused) if optimizer is None else optimizer(groups)
        )
        if not isinstance(self.optimizer, Optimizer):
            raise ValueError(f"optimizer must return a torch optimizer, got {type(self.optimizer).__name__}")
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._known: list[deque[float]] = []  # of each class, the teacher's probabilities as it arrived
        self._due = 0.0  # steps, of which only whole ones are made
        self._shape: tuple[int, ...] | None = None
        self._dtype = next((p.dtype for p in body.parameters() if p.is_floating_point()), torch.float32)

    @torch.inference_mode(False)  # grad mode too
    def observe(self, x: Float[Tensor, " n *shape"], y: Shaped[Tensor, " n"], task: Any = None) -> None:
        """Learn from samples, once, in their order; many at once are as one after another.

        Parameters
        ----------
        x : Tensor of shape (n, *shape)
            Finite; n = 1 is the online case.
        y : Tensor of shape (n,)
            Labels, any whole numbers.
        task : Any
            Ignored, for learners that are told.
        """
        x = self._samples(x)
        if isinstance(y, Tensor) and y.is_floating_point():
            if not bool((y == y.round()).all()):  # nor is NaN
                raise ValueError(f"y must hold whole numbers, got dtype {y.dtype} with fractions or NaN")
            y = y.long()
        labels = class_indices("y", y, len(x)).tolist()
        if self._shape is None:  # of the whole batch nothing is learned where the body does not fit
            with torch.no_grad(), evaluating(self.teacher):
                self._features(self.teacher, x[:1])
            self._shape = tuple(x.shape[1:])
        modes = [module.training for module in self._modules]
        try:
            for row, label in zip(x, labels, strict=True):
                self._take(row, label)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            for module, training in zip(self._modules, modes, strict=True):
                module.training = training

    @torch.no_grad()
    def logits(self, x: Float[Tensor, " n *shape"]) -> Float[Tensor, "n classes"]:
        """Return scores of the classes seen, columns as ``classes_``.

        Parameters
        ----------
        x : Tensor of shape (n, *shape)

        Returns
        -------
        Tensor of shape (n, len(classes_))
            Of the dtype and on the device of ``x``.
        """
        return self._asked(x).to(x)

    @torch.no_grad()
    def predict(self, x: Float[Tensor, " n *shape"]) -> Int[Tensor, " n"]:
        """Return the most probable labels.

        Parameters
        ----------
        x : Tensor of shape (n, *shape)

        Returns
        -------
        Tensor of shape (n,)
            Labels as they came, int64, on the device of ``x``.
        """
        best = self._asked(x).argmax(1).to(x.device)
        return torch.tensor(self.classes_, device=x.device)[best]

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that changes, with which another learner of the same arguments goes on to the bit.

        Returns
        -------
        dict
            Tensors, numbers and lists: it can be saved by ``torch.save``.
        """
        return copy.deepcopy(
            {
                "body": self.body.state_dict(),
                "head": None if self.head is None else self.head.state_dict(),
                "teacher": self.teacher.state_dict(),
                "memory": self.memory.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "classes": self.classes_,
                "known": [list(each) for each in self._known],
                "prior_weight": self.prior_weight,
                "n_seen": self.n_seen,
                "due": self._due,
                "shape": self._shape,
            }
        )

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Parameters
        ----------
        state : dict
            What `state_dict` of a learner with the same arguments returned.
        """
        if not isinstance(state, dict) or set(state) != set(self.state_dict()):
            raise ValueError("state must be what state_dict of a ScheduledDataPrior returned")
        state = copy.deepcopy(state)
        head = state["head"]
        if head is not None and tuple(head["weight"].shape) != (len(state["classes"]), self.n_features):
            raise ValueError(
                f"state must have {self.n_features} features, its head is {tuple(head['weight'].shape)}"
            )
        if head is not None:
            self._set_head(head["weight"], head["bias"])
        elif self.head is not None:
            raise ValueError("state must not be of before the first sample where this learner has seen some")
        self.memory.load_state_dict(state["memory"])
        self.body.load_state_dict(state["body"])
        self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.classes_ = list(state["classes"])
        self._known = [deque(each, maxlen=self.window) for each in state["known"]]
        self.prior_weight, self.n_seen, self._due = state["prior_weight"], state["n_seen"], state["due"]
        self._shape = None if state["shape"] is None else tuple(state["shape"])

    def _samples(self, x: Any) -> Tensor:
        """Return samples that fit, on the device and in the dtype of the body."""
        floating("x", x)
        if not x.ndim or not x.numel():
            raise ValueError(f"x must have at least one row that is not empty, got shape {tuple(x.shape)}")
        if self._shape is not None and tuple(x.shape[1:]) != self._shape:
            raise ValueError(f"x must have rows of shape {self._shape} as before, got {tuple(x.shape[1:])}")
        if self.cutmix and x.ndim != 4:
            raise ValueError(
                f"x must be images (n, channels, height, width) for cutmix, got shape {tuple(x.shape)}"
            )
        finite("x", x)
        x = x.clone() if x.is_inference() else x.detach()
        return x.to(self.device, self._dtype)

    def _take(self, x: Tensor, label: int) -> None:
        """Learn from one sample."""
        if label not in self.classes_:
            self._add_class(label)
        y = self.classes_.index(label)
        self.n_seen += 1
        self.memory.add(x, y)
        with torch.no_grad():
            _set_modes(self._teachers, False)
            p = float(self._scores(self._features(self.teacher, x[None])).softmax(1)[0, y])
        if not math.isfinite(p):
            raise ValueError(
                f"lr must be lower, or x smaller: after {self.n_seen} samples the network is not finite"
            )
        self._known[y].append(p)
        k = len(self.classes_)
        mean = sum(sum(each) / len(each) for each in self._known) / k
        self.prior_weight = min(max(mean - 1 / k, 0.0), 1.0) * k / (k + 1)
        if self.adaptive_lr:
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * (1 - self.prior_weight)
        self._due += self.updates_per_sample
        while self._due >= 1:
            self._due -= 1
            self._step()

    def _step(self) -> None:
        """Make a step on a batch of the memory, and let the teacher follow."""
        x, y = self.memory.sample(self.batch_size)
        y_mix, lam = None, 1.0
        with seeded(seed_from(self.generator), self.device):  # for what is drawn without a generator
            if self.augment is not None:
                x = self.augment(x)
                if len(x) != len(y):
                    raise ValueError(f"augment must keep the {len(y)} rows, gave {len(x)}")
            if self.cutmix and float(torch.rand(())) < CUT:
                x, y_mix, lam = _mixed(x, y, self.cutmix)
            _set_modes(self._modules, True, len(y))
            f = self._features(self.body, x)
            target = f.detach()
            if self.prior_weight:
                _set_modes(self._teachers, True, len(y))
                with torch.no_grad():
                    target = self._features(self.teacher, x)
        assert self.head is not None
        loss = prior_loss(f, target, self.head, y, weight=self.prior_weight, y_mix=y_mix, lam=lam)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.teacher.update(self.body)

    def _add_class(self, label: int) -> None:
        """Give the head a row as torch begins a Linear."""
        bound = 1 / math.sqrt(self.n_features)
        row = torch.empty(1, self.n_features + 1, dtype=self._dtype, device=self.generator.device)
        row = row.uniform_(-bound, bound, generator=self.generator).to(self.device)
        weight, bias = row[:, :-1], row[:, -1]
        if self.head is not None:
            weight = torch.cat([self.head.weight.detach(), weight])
            bias = torch.cat([self.head.bias.detach(), bias])
        self._set_head(weight, bias)
        self.classes_.append(label)
        self._known.append(deque(maxlen=self.window))

    def _set_head(self, weight: Tensor, bias: Tensor) -> None:
        """Take new parameters into the head and the optimizer, which forgets what it knew of the old."""
        weight, bias = (nn.Parameter(p.detach().clone().to(self.device)) for p in (weight, bias))
        head = self.head
        if head is None:
            head = self.head = nn.utils.skip_init(
                nn.Linear, self.n_features, len(bias), device=self.device, dtype=weight.dtype
            )
            self.optimizer.add_param_group({"params": [weight, bias]})
            self._rates.append(self.optimizer.param_groups[-1]["lr"])
        else:
            for old in head.parameters():
                self.optimizer.state.pop(old, None)
            self.optimizer.param_groups[-1]["params"] = [weight, bias]
        head.weight, head.bias, head.out_features = weight, bias, len(bias)

    def _features(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return what the body, or its teacher, gives, if it is of the right shape."""
        f = module(x)
        if not isinstance(f, Tensor) or not f.is_floating_point() or f.shape != (len(x), self.n_features):
            got = tuple(f.shape) if isinstance(f, Tensor) else type(f).__name__
            raise ValueError(
                f"body must return (n, {self.n_features}), n_features wide, got {got} for {tuple(x.shape)}"
            )
        return wide(f)

    def _scores(self, f: Tensor) -> Tensor:
        assert self.head is not None
        with torch.autocast(f.device.type, enabled=False):
            return self.head(f.to(self.head.weight.dtype))

    def _asked(self, x: Any) -> Tensor:
        """Return logits in the dtype of the body."""
        if self.head is None:
            raise ValueError("x cannot be classified before a sample was observed")
        with evaluating(self.body):
            return torch.cat(
                [self._scores(self._features(self.body, part)) for part in self._samples(x).split(AT_ONCE)]
            )


def _set_modes(modules: Iterable[nn.Module], training: bool, n: int = 2) -> None:
    """Put modules into train mode or out of it, normalisation out of it where there is a single row."""
    for each in modules:
        each.training = training and (n > 1 or not isinstance(each, nn.modules.batchnorm._BatchNorm))


def _mixed(x: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor, float]:
    """Return images with a box of others (CutMix), the classes of these, and the share of pixels that stayed."""
    concentration = torch.tensor([alpha, alpha], dtype=torch.float64)
    share = float(torch.distributions.Dirichlet(concentration).sample()[0])
    order = torch.randperm(len(y)).to(x.device)
    ends = []
    for size in x.shape[2:]:
        half, middle = int(size * math.sqrt(1 - share)) // 2, int(torch.randint(size, ()))
        ends.append((max(middle - half, 0), min(middle + half, size)))
    (top, bottom), (left, right) = ends
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x[order, :, top:bottom, left:right]
    return mixed, y[order], 1 - (bottom - top) * (right - left) / (x.shape[2] * x.shape[3])
