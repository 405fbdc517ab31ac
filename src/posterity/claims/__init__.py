"""Claims: what a paper says, as a function of one seed, and the form it is judged in.

A claim is decided before it is run: its statement, its arms (baseline first, method
last), its metric and direction, its data. One call is one seed; the arms of a seed
share split, initial weights and budget, so that their differences are paired.

Three forms are enough:

- ``comparison``: the function returns ``{arm: value}``; the last arm should beat the first;
- ``bound``: it returns a value that must never pass the limit that theory gives;
- ``trend``: it returns an exponent or correlation that should lie in a range.

The decorators' arguments and the parameters' defaults are literals, so that a claim can
be shown without being imported; only ``check``, which is a function, is not.

A parameter that is a number says in its annotation what is allowed (`Count`, `Several`,
`Share`, `PartOfAll`, `Positive`, `NotNegative`, or ``Annotated[int, Between(2, 10)]``); what several must fulfil together, or the
data, ``check`` says. Both are asked before any trial.
"""

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

__all__ = [
    "Between",
    "Claim",
    "Count",
    "NotNegative",
    "PartOfAll",
    "Positive",
    "Several",
    "Share",
    "Trial",
    "bound",
    "comparison",
    "refuse",
    "trend",
]

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Between:
    """The numbers that a parameter may be: ends included, ``above`` excludes the lower one.

    Attributes
    ----------
    low, high : float, optional
        None is no end.
    above : bool
        Whether the number must be greater than ``low``.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False

    def refuse(self, name: str, value: float) -> None:
        """Raise ``ValueError`` for a number outside, NaN among them."""
        low, high = self.low, self.high
        inside = (low is None or (value > low if self.above else value >= low)) and (
            high is None or value <= high
        )
        if not inside or value != value:
            ends = [f"{'greater than' if self.above else 'at least'} {low:g}"] if low is not None else []
            ends += [f"at most {high:g}"] if high is not None else []
            raise ValueError(f"{name} must be {' and '.join(ends)}, got {value}")


Count = Annotated[int, Between(1)]
Share = Annotated[float, Between(0, 1)]
Positive = Annotated[float, Between(0, above=True)]
Several = Annotated[int, Between(2)]
NotNegative = Annotated[float, Between(0)]
PartOfAll = Annotated[float, Between(0, 1, above=True)]


@dataclass
class Trial:
    """One seed of one claim, as the function that runs it sees it.

    Attributes
    ----------
    seed : int
        Decides every random number of the trial.
    device : str
        Where to compute, as torch names it.
    curves : dict
        What ``track`` kept: ``{curve: [(x, y), ...]}``, drawn in the report.
    records : dict
        What ``record`` kept: figures to report beside the metric.
    pictures : dict
        What ``picture`` kept: ``{name: (PNG in base64, what is seen)}``.
    """

    seed: int
    device: str = "cpu"
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    records: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, tuple[str, str]] = field(default_factory=dict)

    def track(self, curve: str, x: float, y: float) -> None:
        """Add a point to a curve (a loss over steps, an error over sizes)."""
        self.curves.setdefault(curve, []).append((float(x), float(y)))

    def record(self, name: str, value: float) -> None:
        """Keep a figure that is reported but not judged."""
        self.records[name] = float(value)

    def picture(self, name: str, picture: tuple[str, str]) -> None:
        """Keep a picture of samples, as ``posterity.lab.contact_sheet`` makes it, by the arm's name."""
        self.pictures[name] = picture


@dataclass(frozen=True)
class Claim:
    """A claim: calling it with a `Trial` and its parameters runs one seed.

    Attributes
    ----------
    paper, name : str
        The paper's slug and the function's name.
    says, where : str
        The statement, and where the paper makes it.
    form : {"comparison", "bound", "trend"}
    metric : str
        What is measured, with its unit.
    better : {"lower", "higher"}
        The good direction; for a bound, on which side of the limit values must stay.
    arms : tuple of str
        For a comparison: baseline first, method last.
    limit : float
        For a bound.
    range : tuple of float
        For a trend: lowest and highest value that agree with the paper; None is no end.
    time_limit : float
        Seconds after which a trial at the defaults is given up.
    smallest : dict
        Parameters of the smallest setting that means anything: what tests run.
    figure : float, optional
        The paper's own value of the effect, value or trend, drawn as a line.
    timed : bool
        Whether the metric is made of seconds, which one seed does not repeat.
    reason : str
        Why it does not hold at the defaults, in a line, where it does not.
    seeds : int
        How many seeds decide by default: more where the effect is small beside its spread.
    check : callable, optional
        ``check(**parameters)`` raises ``ValueError`` for settings that cannot go together; a
        claim's ``data`` comes as its kind's loader gives it, so that it can be refused too,
        and what the user calls it as ``name``.
    """

    run: Callable[..., Any]
    paper: str
    says: str
    form: Literal["comparison", "bound", "trend"]
    metric: str
    better: Better
    arms: tuple[str, ...] = ()
    limit: float | None = None
    range: tuple[float | None, float | None] | None = None
    where: str = ""
    time_limit: float = 600.0
    smallest: dict[str, Any] = field(default_factory=dict)
    figure: float | None = None
    timed: bool = False
    reason: str = ""
    seeds: int = 5
    check: Callable[..., None] | None = None

    @property
    def name(self) -> str:
        """Name of the function that runs it."""
        return self.run.__name__

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Parameters that a user may set, in order."""
        every = list(inspect.signature(self.run).parameters.values())
        return {parameter.name: parameter for parameter in every[1:]}

    @property
    def defaults(self) -> dict[str, Any]:
        """Default value of each parameter."""
        return {name: parameter.default for name, parameter in self.parameters.items()}

    def refuse(self, settings: Mapping[str, Any], data: Any = None) -> None:
        """Raise ``ValueError`` for settings out of range, or that go together neither with each other
        nor with the data, which are what their loader gives.
        """
        for name, value in settings.items():
            refuse(f"{self.name}: {name}", value, self.parameters[name].annotation)
        given = {**self.defaults, **settings}
        if data is not None:
            given |= {"data": data, "name": given["data"]}
        if self.check is not None and (data is not None or "data" not in given):
            self.check(**given)

    def __call__(self, trial: Trial, **parameters: Any) -> Any:
        """Run one seed: ``{arm: value}`` for a comparison, else a number."""
        self.refuse(parameters)
        outcome = self.run(trial, **parameters)
        if self.form != "comparison":
            return float(outcome)
        if tuple(outcome) != self.arms:
            raise ValueError(f"{self.name} must return the arms {self.arms}, got {tuple(outcome)}")
        return {arm: float(value) for arm, value in outcome.items()}


def refuse(name: str, value: Any, annotation: Any) -> None:
    """Raise ``ValueError`` for a value, or an item of it, that its annotation does not allow.

    Parameters
    ----------
    name : str
        For the message.
    value : Any
    annotation : Any
        Of the parameter, such as `Count`.
    """
    inner = get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        for allowed in inner[1:]:
            if isinstance(allowed, Between):
                allowed.refuse(name, value)
    elif get_origin(annotation) in (tuple, list):
        for item in value:
            refuse(name, item, inner[0])
    elif get_origin(annotation) in (Union, types.UnionType) and value is not None:
        refuse(name, value, next(kind for kind in inner if kind is not type(None)))


def comparison(
    *, paper: str, says: str, arms: Iterable[str], metric: str, better: Better, **facts: Any
) -> Callable[[Callable[..., dict[str, float]]], Claim]:
    """Say that the last of ``arms`` beats the first on ``metric``, paired by seed.

    Parameters
    ----------
    paper, says : str
        See `Claim`.
    arms : iterable of str
        At least two names, baseline first, method last.
    metric : str
        See `Claim`.
    better : {"lower", "higher"}
        Which way the metric is good.
    **facts
        ``where``, ``time_limit``, ``smallest``, ``figure``, ``timed``, ``reason``, ``seeds``, ``check`` of `Claim`.

    Returns
    -------
    callable
        Makes a `Claim` of a function ``(trial, **parameters) -> {arm: value}``.
    """
    names = tuple(arms)
    if len(set(names)) != len(names) or len(names) < 2:
        raise ValueError(f"arms must be at least two different names, got {names}")
    return lambda run: Claim(run, paper, says, "comparison", metric, better, arms=names, **facts)


def bound(
    *, paper: str, says: str, metric: str, limit: float, better: Better = "lower", **facts: Any
) -> Callable[[Callable[..., float]], Claim]:
    """Say that a value stays below (``better="higher"``: above) ``limit`` on every seed.

    Parameters
    ----------
    paper, says, metric : str
        See `Claim`.
    limit : float
        Reaching it is allowed, passing it is not.
    better : {"lower", "higher"}, default="lower"
        On which side of the limit the value must stay.
    **facts
        ``where``, ``time_limit``, ``smallest``, ``figure``, ``timed``, ``reason``, ``seeds``, ``check`` of `Claim`.

    Returns
    -------
    callable
        Makes a `Claim` of a function ``(trial, **parameters) -> value``.
    """
    return lambda run: Claim(run, paper, says, "bound", metric, better, limit=float(limit), **facts)


def trend(
    *, paper: str, says: str, metric: str, low: float | None = None, high: float | None = None, **facts: Any
) -> Callable[[Callable[..., float]], Claim]:
    """Say that a fitted exponent, ratio or correlation lies between ``low`` and ``high``.

    Parameters
    ----------
    paper, says, metric : str
        See `Claim`.
    low, high : float
        The values that agree with the paper, ends included; None, for one of them, is no end.
    **facts
        ``where``, ``time_limit``, ``smallest``, ``figure``, ``timed``, ``reason``, ``seeds``, ``check`` of `Claim`.

    Returns
    -------
    callable
        Makes a `Claim` of a function ``(trial, **parameters) -> value``.
    """
    if low is None and high is None:
        raise ValueError("low or high must be given, got neither")
    if low is not None and high is not None and low > high:
        raise ValueError(f"low must be at most high, got {low} and {high}")
    return lambda run: Claim(run, paper, says, "trend", metric, "higher", range=(low, high), **facts)
