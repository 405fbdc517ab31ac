"""Estimators: scikit-learn's own suite, and what does not depend on origin, unit, dtype and torch's modes."""

import warnings
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from numpy import ndarray

__all__ = ["check_estimator"]

Invariance = Literal["shift X", "scale X", "shift y", "scale y"]
FAR, UNITS = 1e8, (1e-12, 1e12)


def check_estimator(
    estimator: Any,
    *,
    expected_failures: Mapping[str, str] | None = None,
    invariant: Collection[Invariance] = (),
) -> None:
    """Check a scikit-learn estimator with scikit-learn's own suite, and a little more.

    Every estimator answers for float16 as for float32 of the same numbers, or refuses it by
    name, and fits inside ``torch.no_grad`` and ``torch.inference_mode`` as it does outside.

    Parameters
    ----------
    estimator : estimator
        An instance, small enough to be fitted a hundred times, its ``random_state`` a number.
    expected_failures : mapping of str to str, optional
        Name of a check that cannot hold, and why. One that passes after all is an error.
    invariant : collection of {"shift X", "scale X", "shift y", "scale y"}, default=()
        What the mathematics promises: that the answer for X + 1e8 ("shift X"), or for X times
        1e-12 and 1e12 ("scale X"), is that for X; that predictions move and scale with y.
        Labels are compared exactly, predictions to 1e-3 of their spread. What is no
        classifier, regressor, clusterer or outlier detector answers in the units of X.
    """
    from sklearn.base import clone
    from sklearn.utils import estimator_checks

    reasons = dict(expected_failures or {})
    assert all(reasons.values()), "each expected failure has its reason"
    results = estimator_checks.check_estimator(
        clone(estimator), expected_failed_checks=reasons or None, on_fail=None, on_skip=None
    )
    failed = [r for r in results if r["status"] == "failed"]
    assert not failed, "; ".join(f"{r['check_name']}: {r['exception']!r}" for r in failed)
    unreal = {r["check_name"] for r in results if r["status"] == "passed"} & set(reasons)
    assert not unreal, f"expected to fail, but pass: {sorted(unreal)}"
    _check_units(estimator, invariant)


def _check_units(estimator: Any, invariant: Collection[Invariance]) -> None:
    """Check what ``invariant`` promises, float16 and torch's modes."""
    from sklearn.utils import get_tags

    kind = get_tags(estimator).estimator_type
    tags = get_tags(estimator)
    asked = "regressor" if kind is None and tags.target_tags.required else kind  # as a second view is
    X, y = _table(asked, gaps=asked is None and tags.input_tags.allow_nan)
    plain = _answer(estimator, X, y)
    cases = [(FAR, 1.0)] * ("shift X" in invariant) + [
        (0.0, unit) for unit in UNITS if "scale X" in invariant
    ]
    for shift, unit in cases:
        got = _answer(estimator, X * unit + shift, y)
        got = got if kind else (got - shift) / unit
        _alike(got, plain, f"the answer for X {_moved(shift, unit)} is that for X")
    cases = [(FAR, 1.0)] * ("shift y" in invariant) + [
        (0.0, unit) for unit in UNITS if "scale y" in invariant
    ]
    for shift, unit in cases:
        got = (_answer(estimator, X, y * unit + shift) - shift) / unit
        _alike(got, plain, f"predictions for y {_moved(shift, unit)} move with y")
    for mode in (torch.no_grad, torch.inference_mode):
        _alike(_answer(estimator, X, y, mode), plain, f"fit inside torch.{mode.__name__}() is as outside")
    half = X.astype(np.float16)
    try:
        narrow = _answer(estimator, half, y)
    except ValueError as error:
        if "float16" not in str(error):
            raise AssertionError(f"float16 is refused without its name: {error}") from error
    else:
        _alike(narrow, _answer(estimator, half.astype(np.float32), y), "float16 is as float32")


def _table(kind: str | None, *, gaps: bool) -> tuple[ndarray, Any]:
    """Return two groups of rows in turns, a feature that is constant, and their target.

    Numbers are multiples of 1/256, so that a shift rounds none of them.
    """
    draw = np.random.default_rng(0)
    group = np.arange(60) % 2
    X = np.column_stack([draw.normal(4 * group, 1), draw.normal(-4 * group, 1), np.full(60, 0.25)])
    X = np.round(256 * X) / 256
    if gaps:
        X[draw.random(X.shape) < 0.1] = np.nan
        return X, None
    y = np.round(256 * (X[:, 0] - X[:, 1])) / 256
    return X, {"classifier": group, "regressor": y}.get(kind or "")


def _answer(estimator: Any, X: ndarray, y: Any, mode: Any = nullcontext) -> ndarray:
    """Return labels, predictions or the data transformed, of an estimator fitted under a mode of torch."""
    from sklearn.base import clone

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = clone(estimator)
        with mode():
            model.fit(X, y)
        return np.asarray(model.predict(X) if hasattr(model, "predict") else model.transform(X))


def _alike(got: ndarray, plain: ndarray, what: str) -> None:
    assert got.shape == plain.shape, f"{what}, but its shape is {got.shape} and not {plain.shape}"
    if plain.dtype.kind != "f":
        wrong = int((got != plain).sum())
        assert wrong == 0, f"{what}, but {wrong} of {plain.size} labels differ"
        return
    spread = np.ptp(plain.astype(np.float64), axis=0).max()
    off = float(np.abs(got.astype(np.float64) - plain).max() / spread)
    assert off <= 1e-3, f"{what}, but it is off by {off:.2g} of their spread"


def _moved(shift: float, unit: float) -> str:
    return f"+ {shift:.0e}" if shift else f"* {unit:.0e}"
