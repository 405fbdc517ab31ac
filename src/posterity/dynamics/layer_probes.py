"""What each layer of a network knows: of true labels, and of the noisy ones that it was trained on.

A layer is probed by nearest neighbours (`knn_probe`), with nothing trained on top. Where memorising is benign, the
probe with true labels stays as good through the encoder as it is for the inputs, and falls only in the last layers,
where samples gather by their noisy labels. Where it is malign, it falls from the first layers on.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from posterity._checks import integer, one_of
from posterity._models import call, evaluating, state
from posterity._precision import wide
from posterity.dynamics._plots import axes
from posterity.dynamics.benign_memorization import FiniteViews, _augmented, _augments, _labelled
from posterity.dynamics.neighbor_probes import Metric, _predict, _share, _unit

__all__ = ["MemorizationProfile", "layer_probe", "memorization_profile"]


@dataclass(frozen=True)
class MemorizationProfile:
    """What each layer knows of true and of noisy labels: tensors on the CPU, in float64.

    Attributes
    ----------
    layers : tuple of str
        From the input on.
    signal : Tensor of shape (L,)
        Share of test samples whose neighbours among the training samples have their true label.
    noise : Tensor of shape (L,)
        Share of training samples whose neighbours among the others, and among views of the others, have their noisy
        label: how far the layer has gathered samples by it.
    invariance : Tensor of shape (L,)
        Mean cosine of two views of a sample less that of two samples; NaN without augmentation.
    input_signal : float
        The signal of the inputs themselves.
    """

    layers: tuple[str, ...]
    signal: Float[Tensor, " L"]
    noise: Float[Tensor, " L"]
    invariance: Float[Tensor, " L"]
    input_signal: float

    def split(self) -> str:
        """Return the last layer, from the input on, before the noise exceeds the signal.

        Returns
        -------
        str
            The layer's name; "input" if the noise exceeds the signal at the first.
        """
        over = (self.noise > self.signal).tolist()
        first = over.index(True) if True in over else len(over)
        return self.layers[first - 1] if first else "input"

    def plot(self, ax: Any = None) -> Any:
        """Draw signal, noise and invariance over the layers, and the signal of the inputs.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            By default of a new figure.

        Returns
        -------
        matplotlib.axes.Axes
        """
        ax, at = axes(ax), range(len(self.layers))
        curves = (("true labels", self.signal), ("noisy labels", self.noise), ("invariance", self.invariance))
        for name, values in curves:
            ax.plot(at, values, "o--" if name == "invariance" else "o-", label=name)
        ax.axhline(self.input_signal, color="0.5", linestyle=":", label="true labels, inputs")
        ax.set_xticks(at, self.layers)
        ax.set(xlabel="layer", ylabel="accuracy of nearest neighbours")
        ax.legend()
        return ax


def layer_probe(
    model: nn.Module,
    layers: Sequence[str],
    x: Shaped[Tensor, " n *shape"],
    y: Int[Tensor, " n"],
    x_test: Shaped[Tensor, " m *shape"],
    y_test: Int[Tensor, " m"],
    *,
    k: int = 20,
    metric: Metric = "cosine",
    batch_size: int = 1024,
) -> dict[str, float]:
    """Return the accuracy of nearest neighbours by the features of each layer.

    Report beside it that of the inputs, ``knn_probe(x.flatten(1), ...)``, and that of the untrained model: on easy
    data both are high.

    Parameters
    ----------
    model : nn.Module
        Looked at in eval mode; not changed.
    layers : sequence of str
        Names of submodules, as in ``model.named_modules()``; "" is the model itself. Of an output with channels,
        height and width the mean over the last two is taken, any other is flattened, and of a tuple its first tensor
        counts; of a module that is called several times, the last call.
    x : Tensor of shape (n, *shape)
        Training samples, as ``model(x)`` takes them, without augmentation.
    y : Tensor of shape (n,)
        Their true labels.
    x_test, y_test : Tensor of shape (m, *shape) and (m,)
        Samples to test on.
    k : int, default=20
        Neighbours, 1 .. n; 10 suits a few hundred samples.
    metric : {"cosine", "euclidean"}, default="cosine"
        As `knn_predict` takes it.
    batch_size : int, default=1024
        Rows that go through the model at once, at least 1. The features of all layers are kept, ``n + m`` rows.

    Returns
    -------
    dict of str to float
        In the order of ``layers``.

    Raises
    ------
    ValueError
        If data or settings are not as said, a layer is unknown, not reached, or has features that are not finite.

    Warns
    -----
    UserWarning
        If a layer has rows of zeros under "cosine".

    References
    ----------
    .. [1] Anagnostidis, Bachmann, Noci, Hofmann. The Curious Case of Benign Memorization. ICLR 2023. Abstract.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import layer_probe
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    >>> _ = net[0].load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
    >>> x, y = torch.tensor([[1.0, 0.1], [0.1, 1.0]]), torch.tensor([0, 1])
    >>> layer_probe(net, ["0", "1"], x, y, torch.tensor([[3.0, 0.2]]), torch.tensor([0]), k=1)
    {'0': 1.0, '1': 1.0}
    """
    integer("batch_size", batch_size, 1)
    names = _names(model, layers)
    y, y_test = _labelled("x", x, "y", y, 1), _labelled("x_test", x_test, "y_test", y_test, 1)
    _neighbours(k, len(y), metric)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        train, test = (_features(model, names, part, batch_size) for part in (x, x_test))
        return {
            name: float(_share(_predict(train[name], y, test[name], k, metric, 4096, name), y_test))
            for name in names
        }


def memorization_profile(
    model: nn.Module,
    layers: Sequence[str],
    x: Shaped[Tensor, " n *shape"],
    y_true: Int[Tensor, " n"],
    y_noisy: Int[Tensor, " n"],
    x_test: Shaped[Tensor, " m *shape"],
    y_test: Int[Tensor, " m"],
    *,
    k: int = 20,
    metric: Metric = "cosine",
    augment: Callable[..., Tensor] | FiniteViews | None = None,
    n_views: int = 4,
    generator: torch.Generator | None = None,
) -> MemorizationProfile:
    """Return what each layer of a model that was trained on noisy labels knows of them, and of the true ones.

    Parameters
    ----------
    model : nn.Module
        Looked at in eval mode; not changed.
    layers : sequence of str
        As `layer_probe` takes them, at least one, from the input on.
    x : Tensor of shape (n, *shape)
        The training samples, without augmentation; at least 2.
    y_true, y_noisy : Tensor of shape (n,)
        Their labels, and those that the model was trained on.
    x_test, y_test : Tensor of shape (m, *shape) and (m,)
        Samples to test on, with true labels.
    k : int, default=20
        Neighbours, 1 .. n - 1; 10 suits a few hundred samples.
    metric : {"cosine", "euclidean"}, default="cosine"
        As `knn_predict` takes it.
    augment : callable or FiniteViews, optional
        What the model was trained with, as `memorize` takes it. Then the neighbours by noisy label are sought
        among views too.
    n_views : int, default=4
        Views of each sample that are drawn, at least 1. The features of all layers are kept,
        ``(n_views + 1) * n + m`` rows.
    generator : torch.Generator, optional
        Passed to ``augment``; by default torch's global one. Without ``augment`` nothing is drawn.

    Returns
    -------
    MemorizationProfile
        With the layer at which memorising begins, and a plot.

    Raises
    ------
    ValueError
        As `layer_probe`, and if ``augment`` returns another shape.

    Warns
    -----
    UserWarning
        If a layer has rows of zeros under "cosine".

    Notes
    -----
    1. Views of the sample itself are no neighbours of it: they are near it at every layer, the input among them,
       and would give it its label where nothing is memorised.
    2. The sample as it is counts as one of its views, for the neighbours of others and for the invariance.

    References
    ----------
    .. [1] Anagnostidis, Bachmann, Noci, Hofmann. The Curious Case of Benign Memorization. ICLR 2023. Abstract.

    Examples
    --------
    >>> import torch
    >>> from posterity.dynamics import memorization_profile
    >>> net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(2, 2))
    >>> x, y = torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.1, 1.0], [0.2, 1.0]]), torch.tensor([0, 0, 1, 1])
    >>> noisy = torch.tensor([0, 1, 0, 1])
    >>> found = memorization_profile(net, ["0"], x, y, noisy, x[::2] * 2, y[::2], k=1)
    >>> found.signal, found.noise, found.split()
    (tensor([1.], dtype=torch.float64), tensor([0.], dtype=torch.float64), '0')
    """
    integer("n_views", n_views, 1)
    names = _names(model, layers)
    if not names:
        raise ValueError("layers must have at least one name, got none")
    y_true, y_noisy = _labelled("x", x, "y_true", y_true), _labelled("x", x, "y_noisy", y_noisy)
    y_test = _labelled("x_test", x_test, "y_test", y_test, 1)
    _neighbours(k, len(x) - 1, metric)
    _augments(augment, x)
    rows: dict[str, list[float]] = {"signal": [], "noise": [], "invariance": []}
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        train, test = (_features(model, names, part, 1024) for part in (x, x_test))
        views = []
        for _ in range(n_views if augment is not None else 0):
            views.append(
                _features(model, names, x, 1024, lambda rows: _augmented(augment, x, rows, generator))
            )
        for name in names:
            clean = train[name]
            every = torch.cat([clean, *(view[name] for view in views)])
            own = torch.arange(len(x), device=clean.device)
            found = _predict(clean, y_true, test[name], k, metric, 4096, name)
            rows["signal"].append(float(_share(found, y_test)))
            ids = (own.repeat(len(views) + 1), own)
            found = _predict(every, y_noisy.repeat(len(views) + 1), clean, k, metric, 4096, name, ids)
            rows["noise"].append(float(_share(found, y_noisy)))
            rows["invariance"].append(_invariance(every.view(len(views) + 1, *clean.shape)))
        inputs = [_rows(part if part.is_floating_point() else part.double()) for part in (x, x_test)]
        raw = _share(_predict(inputs[0], y_true, inputs[1], k, metric, 4096, "x"), y_test)
    curves = {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}
    return MemorizationProfile(tuple(names), **curves, input_signal=float(raw))


def _neighbours(k: int, most: int, metric: str) -> None:
    one_of("metric", metric, ("cosine", "euclidean"))
    if integer("k", k, 1) > most:
        raise ValueError(f"k must be at most {most} for these samples, got {k}")


def _names(model: nn.Module, layers: Any) -> list[str]:
    """Return names of submodules, each once."""
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise ValueError(f"layers must be a sequence of names, got {layers!r}")
    known = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for name in layers:
        if name not in known:
            near = get_close_matches(str(name), known, n=3, cutoff=0.3) or known[1:4]
            raise ValueError(
                f"layers must be names of submodules of model, got {name!r}; close to it: {', '.join(map(repr, near))}"
            )
    return list(dict.fromkeys(layers))


def _features(
    model: nn.Module, names: Sequence[str], x: Tensor, batch_size: int,
    view: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the features of some layers, in float32 at least, from one pass of samples or of views of them."""
    latest: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, tuple | list):
                output = next((part for part in output if isinstance(part, Tensor)), None)
            # a copy: the next layer may work in place
            latest[name] = output.detach().clone() if isinstance(output, Tensor) else output

        return hook

    params, rest = state(model)  # of buffers copies: what a module writes to them does not reach the model
    with evaluating(model), ExitStack() as hooks:
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_hook(keep(name)).remove)
        for rows in torch.arange(len(x), device=x.device).split(batch_size):
            latest.clear()
            call(model, {**params, **rest}, x[rows] if view is None else view(rows))
            for name in names:
                parts[name].append(_flat(name, latest.get(name), len(rows)))
    found = {name: torch.cat(part) for name, part in parts.items()}
    for name, features in found.items():
        if not bool(features.isfinite().all()):
            raise ValueError(f"layers must have finite features, {name!r} has NaN or infinity")
    return found


def _flat(name: str, output: Any, n: int) -> Tensor:
    """Return a layer's output as a row of float32 or float64 for each sample."""
    if not isinstance(output, Tensor) or output.shape[:1] != (n,) or not output.is_floating_point():
        what = "nothing" if output is None else getattr(output, "shape", type(output).__name__)
        raise ValueError(
            f"layers must give floating-point tensors of a row for each of {n} samples, {name!r} gives {what}"
        )
    output = wide(output)
    return output.mean((2, 3)) if output.ndim == 4 else _rows(output)


def _rows(x: Tensor) -> Tensor:
    """Return one row for each sample."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


def _invariance(views: Tensor) -> float:
    """Return the mean cosine of two views of a sample less that of two samples, from (views, n, d)."""
    m, n, _ = views.shape
    if m < 2:
        return float("nan")
    unit = _unit(views.double())
    own = unit.sum(0)  # of squares of sums, all inner products are the parts
    within = (own.square().sum() - unit.square().sum()) / (n * m * (m - 1))
    between = (own.sum(0).square().sum() - own.square().sum()) / (n * (n - 1) * m * m)
    return float(within - between)
