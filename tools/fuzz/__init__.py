"""Call every public name with drawn arguments, and find what ends wrongly.

`python -m tools.fuzz [minutes] [names or slugs]`: names are found from the records, arguments drawn
from signatures (`drawing`), and each fault printed as its plainest example (`judging` says what a
fault is). Under each name hypothesis goes on until its share of the time is spent.
"""

import inspect
import signal
import time
import types
import warnings
from contextlib import contextmanager
from importlib import import_module

import torch
import torch._dynamo  # optimisers import it at their first use, and an alarm within that leaves it broken
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from posterity.papers import papers
from tools.fuzz.drawing import Drawing, Undrawable, is_result
from tools.fuzz.judging import misfit, place, rightly, shown

__all__ = ["Fuzzed", "public_names"]

FIRST = ("fit", "initialize", "update")  # methods that come before the others


class Fault(Exception):
    """What a call ended in and where; the message has the call."""

    def __init__(self, kind, text):
        super().__init__(text)
        self.kind = kind


class Refused(Exception):
    """A call ended in an error as it should."""


def public_names():
    """Return every public class and function as (slug, domain, name), but what is only returned or fulfilled."""
    every = [
        (paper.slug, paper.domain, name, getattr(import_module(f"posterity.{paper.domain}"), name))
        for paper in papers().values()
        if paper.implemented
        for name in paper.exports
    ]
    return [
        each for *each, value in every
        if callable(value) and not is_result(value) and not getattr(value, "_is_protocol", False)
    ]  # fmt: skip


class Fuzzed:
    """A public name under test: its faults, by kind, how many calls came out right, how many took too long."""

    def __init__(self, domain, name, patience=20):
        home = import_module(f"posterity.{domain}")
        self.value = getattr(home, name)
        self.others = [getattr(home, other) for other in dir(home) if not other.startswith("_")]
        self.patience = patience  # seconds of one call
        self.faults, self.right, self.long = {}, 0, 0

    def search(self, *, rounds, examples=10, until=float("inf")):
        """Draw so many examples a round; a fault that is known is passed over, so that others are found."""
        quiet = settings(
            max_examples=examples, database=None, deadline=None, print_blob=False, report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
        )  # fmt: skip
        turn = 0
        while turn < rounds and (turn == 0 or time.monotonic() < until):
            try:
                seed(turn)(quiet(given(st.data())(self._example)))()
                turn += 1
            except Fault as fault:
                self.faults[fault.kind] = str(fault)

    def _example(self, data):
        torch.manual_seed(0)
        try:
            self._calls(Drawing(data, self.others))
        except (Refused, Undrawable):
            return
        except Fault as fault:
            if fault.kind not in self.faults:
                raise

    def _calls(self, drawing):
        """Make one call of a function, or an object and one of its methods after those that come first."""
        value = self.value
        if not inspect.isclass(value):
            self._call(drawing, value, value, [value])
            return
        made = drawing.cast(self._call(drawing, value, value.__init__, [value]))
        methods = {
            name: function
            for name, function in inspect.getmembers(value, inspect.isfunction)
            if (not name.startswith("_") or name == "__call__")
            and function.__module__.startswith("posterity")
        }
        hints = {
            name: parameter.annotation
            for function in methods.values()
            for name, parameter in inspect.signature(function).parameters.items()
            if hasattr(parameter.annotation, "dim_str")
        }
        before = [name for name in FIRST if name in methods]
        last = [name for name in methods if name not in before] or before
        for name in [*before, *([drawing.pick(last)] if last else [])]:
            target = made if name in ("forward", "__call__") else getattr(made, name)
            self._call(drawing, target, methods[name], [value, methods[name]], hints)

    def _call(self, drawing, target, signature, documented, hints=None):
        """Return what a call gives; raise `Refused`, or `Fault` with the call."""
        drawing.sizes = {}
        try:
            arguments = drawing.arguments(signature, hints)
        except ValueError as error:  # of what makes an argument: that is its own example
            raise Refused from error
        given_ = ", ".join(f"{name}={shown(value)}" for name, value in arguments.items())
        text = f"{_title(target)}({given_})"
        try:
            with _within(self.patience), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = target(**arguments)
                result = list(result) if isinstance(result, types.GeneratorType) else result
        except TimeoutError as error:
            self.long += 1
            raise Refused from error
        except Exception as error:
            if rightly(error, documented):
                raise Refused from error
            kind, where = type(error).__name__, place(error)
            said = " ".join(str(error).split())[:200]
            raise Fault((kind, where), f"{text}\n    {kind} at {where}: {said}") from error
        if target is not self.value or not inspect.isclass(target):
            wrong = misfit(result, inspect.signature(signature).return_annotation, dict(drawing.sizes))
            if wrong:
                raise Fault(("result", _title(signature)), f"{text}\n    {wrong}")
            self.right += 1
        return result


def _title(target):
    owner = getattr(
        target, "__self__", None if inspect.isroutine(target) or inspect.isclass(target) else target
    )
    if owner is None:
        return target.__name__
    made = type(owner).__name__ if " object at " in repr(owner) else shown(owner)
    return made if owner is target else f"{made}.{target.__name__}"


@contextmanager
def _within(seconds):
    """Raise `TimeoutError` where what is done takes longer."""

    def ring(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
