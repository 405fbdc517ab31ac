"""Estimators: scikit-learn's own suite, with a reason for each check that cannot hold."""

from collections.abc import Mapping
from typing import Any

__all__ = ["check_estimator"]


def check_estimator(estimator: Any, *, expected_failures: Mapping[str, str] | None = None) -> None:
    """Check a scikit-learn estimator with scikit-learn's own suite, and a little more.

    Parameters
    ----------
    estimator : estimator
        An instance, small enough to be fitted a hundred times.
    expected_failures : mapping of str to str, optional
        Name of a check that cannot hold, and why. One that passes after all is an error.
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
