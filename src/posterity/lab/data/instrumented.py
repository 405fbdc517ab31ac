"""Instrumented: rows of covariates with a treatment, a binary instrument and an outcome.

A user's table names the three columns. Its true effects are not known; where they must be,
instrument, treatment and outcome are simulated on covariates, those of a table or drawn ones,
by smooth random functions, with a confounder that no learner sees.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import pandas as pd
from numpy import ndarray
from scipy.stats import norm

from posterity.lab.data import Kind, Source, dataset, load
from posterity.lab.data.frames import READING, read_frame
from posterity.lab.data.needs import require_rows
from posterity.lab.data.table import table_encoder

__all__ = ["Instrumented", "InstrumentedData", "load_instrumented", "simulate_effects"]

Instrumented = Annotated[str, Kind("instrumented", (".csv", ".tsv", ".data", ".parquet"))]
ROLES = ("treatment", "instrument", "outcome")
IHDP = 5  # columns before the covariates: treatment, outcome, that of the other arm, the means of both
COVARIATES = 6  # that effects are simulated on, and seen by learners there
FEATURES, BATCH = 2_000, 1_000  # cosines of a random function, and rows that are evaluated at a time
LEAST, OF_AN_ARM = 40, 20  # rows, and of an arm that is not empty
WEAK, F = 0.05, 10.0  # a smaller mean compliance, or F of the first stage, is refused


@dataclass(frozen=True)
class InstrumentedData:
    """Rows with a treatment, an instrument and an outcome.

    Attributes
    ----------
    X : DataFrame
        Covariates: numbers, and categories as text; missing values as NaN.
    treatment, instrument : ndarray of shape (n,)
        Codes 0 and 1.
    outcome : ndarray of shape (n,)
    effect : ndarray of shape (n,), optional
        The true effect of each row, where it is known.
    note : str
        What was read and what was done to it.
    """

    X: pd.DataFrame
    treatment: ndarray
    instrument: ndarray
    outcome: ndarray
    effect: ndarray | None = None
    note: str = ""


def load_instrumented(data: str, *, seed: int = 0) -> InstrumentedData:
    """Return the rows of a name or file.

    Parameters
    ----------
    data : str
        A registered name; or a CSV, TSV or Parquet file whose columns ``treatment``,
        ``instrument`` and ``outcome`` are these, or those named behind it:
        ``trial.csv?treatment=went&instrument=invited&outcome=score``. Other columns are
        covariates. A file without a header that is laid out as those of IHDP (treatment,
        outcome, that of the other arm, the means of both, covariates) gives its covariates,
        and all else is simulated on them.
    seed : int, default=0
        For what is drawn or simulated.

    Returns
    -------
    InstrumentedData

    Raises
    ------
    ValueError
        If file, column or row is not what it must be; the message names it.
    """
    return load(Instrumented, data, seed=seed, simulated_by=seed)


def read_instrumented(source: Source, *, simulated_by: int = 0) -> InstrumentedData:
    """Return the rows in a file, or effects simulated on the covariates of a file such as IHDP's."""
    (path,) = source.paths
    options = source.option({**READING, **dict.fromkeys(ROLES)})
    given = {role: options[role] for role in ROLES if role in options}
    frame, note = read_frame(path, wanted=[given.get(role, role) for role in ROLES], options=options)
    columns = list(frame.columns)
    if not given and columns == [str(k) for k in range(len(columns))]:
        if not _as_ihdp(frame):
            raise ValueError(
                f"{source.name}: without a header, say treatment=, instrument= and outcome= with numbers of columns, "
                f"from 0 to {len(columns) - 1}; it is not laid out as IHDP's files are"
            )
        note += (
            "; laid out as IHDP's files, instrument, treatment and outcome are simulated on its covariates"
        )
        return replace(simulate_effects(frame.iloc[:, IHDP:], simulated_by), note=note)
    named = {role: given.get(role, role) for role in ROLES}
    for role, name in named.items():
        if name not in columns:
            raise ValueError(
                f"{source.name}: no column {name!r}, say data.{role}= and one of {', '.join(columns)}"
            )
    if len(set(named.values())) < len(ROLES):
        raise ValueError(
            f"{source.name}: treatment, instrument and outcome must be three columns, got {named}"
        )
    whole = frame[list(named.values())].notna().all(axis=1)
    if not whole.any():
        raise ValueError(f"{source.name}: no row has a treatment, an instrument and an outcome")
    if dropped := int((~whole).sum()):
        note += f"; {dropped:,} rows without one of the three left out"
    frame = frame[whole].reset_index(drop=True)
    X = _covariates(frame.drop(columns=list(named.values())), source.name)
    codes = {role: _coded(frame[named[role]], role, source.name) for role in ROLES[:2]}
    for role, (_, labels) in codes.items():
        note += f"; {role} {named[role]!r}, 1 is {labels[-1]}"
    outcome = frame[named["outcome"]]
    if outcome.dtype.kind not in "iufb" or np.isinf(outcome.astype(float)).any():
        raise ValueError(f"{source.name}: outcome {named['outcome']!r} must hold finite numbers")
    note += f"; outcome {named['outcome']!r}; its true effects are not known"
    return InstrumentedData(
        X, codes["treatment"][0], codes["instrument"][0], outcome.to_numpy(float), note=note
    )


def require_instrumented(data: InstrumentedData) -> None:
    """Refuse rows from which no effect can be learned: no variation, few rows, a weak instrument."""
    a, z = data.treatment, data.instrument
    require_rows(len(a), "rows with treatment, instrument and outcome", LEAST)
    for role, value in (("treatment", a), ("instrument", z)):
        if np.ptp(value) == 0:
            raise ValueError(f"the {role} is always the same: it never changes")
    if np.ptp(data.outcome) == 0:
        raise ValueError(f"the outcome is always {data.outcome[0]:g}")
    if data.X.shape[1] == 0 or data.X.nunique().max() < 2:
        raise ValueError("no column beside treatment, instrument and outcome varies")
    counts = np.bincount(2 * z + a, minlength=4)
    for cell, count in enumerate(counts):
        if 0 < count < OF_AN_ARM:
            raise ValueError(
                f"the arm of instrument {cell // 2} and treatment {cell % 2} needs no row or at least {OF_AN_ARM}, "
                f"has {count}"
            )
    share = [a[z == arm].mean() for arm in (0, 1)]
    variance = sum(part * (1 - part) / (z == arm).sum() for arm, part in enumerate(share))
    compliance = share[1] - share[0]
    f = compliance**2 / max(variance, 1e-12)
    if abs(compliance) < WEAK or f < F:
        raise ValueError(
            f"the instrument is almost irrelevant: it moves the treatment of a share {compliance:.3f} of the rows, "
            f"F = {f:.1f}; at least {WEAK} and F = {F:g} are needed"
        )


def simulate_effects(X: pd.DataFrame, seed: int) -> InstrumentedData:
    """Return covariates with an instrument, treatment, outcome and effects simulated on them.

    Parameters
    ----------
    X : DataFrame of shape (n, d)
        Covariates, of which the first six are used once encoded and standardised.
    seed : int

    Returns
    -------
    InstrumentedData
        ``X`` has the columns used, as numbers of mean 0 and deviation 1. The instrument's
        propensity and compliance depend on them; a hidden confounder of deviation 0.2 moves
        the treatment, and four times itself the outcome. Functions are draws of Gaussian
        processes of length sqrt(d), with the square root so that neighbours stay neighbours
        in more columns: smooth ones for the effect and the shares, a rough one (Matérn 1/2)
        for the outcome without the nudge. After the paper's appendix (Frauen, Feuerriegel,
        ICLR 2023).
    """
    encoded = np.asarray(table_encoder().fit_transform(_covariates(X, "X")), dtype=float)
    encoded = encoded[:, encoded.std(0) > 0][:, :COVARIATES]
    encoded = (encoded - encoded.mean(0)) / encoded.std(0)
    return _simulated(encoded, np.random.default_rng(seed))


def _simulated(x: ndarray, rng: np.random.Generator) -> InstrumentedData:
    n, d = x.shape
    mu_y0 = _random_function(x, rng, rough=True)
    delta_y, f1, f0, g = (_random_function(x, rng) for _ in range(4))
    share = 0.3 * _sigmoid(f0), 0.7 + 0.3 * _sigmoid(f1)  # of the treated without and with the nudge
    delta_a, mu_y1 = share[1] - share[0], mu_y0 + delta_y
    effect = delta_y / delta_a
    z = rng.random(n) < 0.1 + 0.8 * _sigmoid(g)
    hidden = rng.normal(0, 0.2, n)
    above = norm.ppf(1 - np.where(z, share[1], share[0]), scale=np.hypot(0.2, 0.1))
    a = rng.normal(0, 0.1, n) + hidden > above
    untreated = (share[1] * mu_y0 - share[0] * mu_y1) / delta_a
    y = untreated + a * effect + 4 * hidden + rng.normal(0, 0.3, n)
    frame = pd.DataFrame(x, columns=[f"x{k}" for k in range(d)])
    return InstrumentedData(frame, a.astype(np.int64), z.astype(np.int64), y, effect)


def _random_function(x: ndarray, rng: np.random.Generator, *, rough: bool = False) -> ndarray:
    """Return a draw of a Gaussian process at rows: of a Gaussian kernel, or Matérn 1/2 if ``rough``.

    It is a sum of cosines whose frequencies follow the kernel's spectrum, a normal or a
    multivariate Cauchy law, so that n rows cost n and not n^3.
    """
    d = x.shape[1]
    frequency = rng.standard_normal((d, FEATURES)) / d**0.5
    if rough:
        frequency /= np.abs(rng.standard_normal(FEATURES))
    phase = rng.uniform(0, 2 * np.pi, FEATURES).astype(np.float32)
    weight = (rng.standard_normal(FEATURES) * (2 / FEATURES) ** 0.5).astype(np.float32)
    rows, frequency = x.astype(np.float32), frequency.astype(np.float32)
    parts = [np.cos(rows[k : k + BATCH] @ frequency + phase) @ weight for k in range(0, len(x), BATCH)]
    return np.concatenate(parts).astype(float)


def _sigmoid(x: ndarray) -> ndarray:
    return 1 / (1 + np.exp(-x))


def _as_ihdp(frame: pd.DataFrame) -> bool:
    """Return whether the first columns are a treatment, two outcomes and two means that fit it."""
    if frame.shape[1] <= IHDP or any(frame.iloc[:, k].dtype.kind not in "iuf" for k in range(IHDP)):
        return False
    treated, y, _, mean0, mean1 = frame.iloc[:, :IHDP].to_numpy(float).T
    if not set(np.unique(treated)) <= {0.0, 1.0}:
        return False
    own, other = np.where(treated == 1, mean1, mean0), np.where(treated == 1, mean0, mean1)
    return bool(np.mean((y - own) ** 2) < np.mean((y - other) ** 2))


def _coded(column: pd.Series, role: str, name: str) -> tuple[ndarray, list[Any]]:
    """Return 0 and 1 for the two values of a column, in their order."""
    labels, codes = np.unique(column.to_numpy(), return_inverse=True)
    if len(labels) > 2:
        shown = ", ".join(map(str, labels[:4])) + (", …" if len(labels) > 4 else "")
        raise ValueError(f"{name}: {role} {column.name!r} must have two values, got {len(labels)}: {shown}")
    return codes.astype(np.int64), labels.tolist()


def _covariates(X: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return columns of floats and of text; dates as days."""
    X = X.copy()
    for column in X:
        if X[column].dtype.kind == "M":
            X[column] = (X[column] - pd.Timestamp(0)) / pd.Timedelta(days=1)
        elif X[column].dtype.kind in "iufb":
            X[column] = X[column].astype(float)
            if np.isinf(X[column]).any():
                row = int(np.flatnonzero(np.isinf(X[column]))[0]) + 1
                raise ValueError(f"{name}: column {column!r} is infinite in row {row}")
    return X


def _gp(seed: int, n_rows: int) -> InstrumentedData:
    """Return the paper's synthetic design: one normal covariate, all else simulated on it."""
    rng = np.random.default_rng(seed)
    return _simulated(rng.standard_normal((n_rows, 1)), rng)


for _name, _rows in (("gp", 6_000), ("gp-large", 14_000)):
    dataset(Instrumented, _name)(lambda seed, n_rows=_rows: _gp(seed, n_rows))
