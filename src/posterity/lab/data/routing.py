"""Routing: places to visit with their distances, demands and depots, from the files of TSPLIB and CVRPLIB or a table."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy import ndarray

from posterity._checks import needs
from posterity.lab.data import Kind, Source, dataset, load
from posterity.lab.data.frames import READING, read_frame

__all__ = ["Routing", "RoutingData", "load_routing"]

Routing = Annotated[str, Kind("routing", (".vrp", ".tsp", ".atsp", ".csv"))]

COLUMNS = {  # of a table, in small letters; degrees give distances in km
    "x": ("x", "east", "easting"), "y": ("y", "north", "northing"),
    "longitude": ("longitude", "lon", "lng", "long"), "latitude": ("latitude", "lat"),
    "demand": ("demand", "weight", "quantity", "load"), "depot": ("depot", "is_depot"),
}  # fmt: skip
EARTH = 6371.0088  # mean radius, km
ROUNDED = ("EUC_2D", "EUC_3D", "MAN_2D", "MAX_2D")  # types whose distances TSPLIB rounds to whole numbers
UNIFORM = 80  # customers of the made set


@dataclass(frozen=True)
class RoutingData:
    """Places in the numbering of their file, from 0, depots among them.

    Attributes
    ----------
    distance : ndarray of shape (n, n), float64
        ``distance[i, j]`` from i to j, which need not be the way back's; the diagonal is 0.
    points : ndarray of shape (n, 2), float64, optional
        Coordinates; longitude and latitude in degrees where the file has those.
    demands : ndarray of shape (n,), float64, optional
    capacity : float, optional
        Of each vehicle, in the unit of the demands.
    depots : tuple of int
        Where vehicles start; empty where there is none, as in a travelling salesman's file.
    best : float, optional
        The best known total length, where a file beside it states one.
    n_vehicles : int, optional
        How many the best known plan has, or its name says.
    note : str
        What was read and what was done to it.
    """

    distance: ndarray
    points: ndarray | None = None
    demands: ndarray | None = None
    capacity: float | None = None
    depots: tuple[int, ...] = ()
    best: float | None = None
    n_vehicles: int | None = None
    note: str = ""

    @property
    def customers(self) -> ndarray:
        """The places that are no depots, of shape (customers,): a customer's number is its place in here."""
        return np.setdiff1d(np.arange(len(self.distance)), self.depots)


def load_routing(data: str, *, seed: int = 0) -> RoutingData:
    """Return the places of a name or file.

    Parameters
    ----------
    data : str
        A registered name; a ``.vrp``, ``.tsp`` or ``.atsp`` file of TSPLIB or CVRPLIB, whose best known plan
        may stand beside it as ``.sol``; or a CSV file with columns ``x`` and ``y``, or ``longitude`` and
        ``latitude``, and where there are such ``demand`` and ``depot`` (yes or no; without it the first row is
        the depot). Behind a table may stand ``?capacity=100`` and the options of `read_frame`; behind a file
        of TSPLIB ``?rounded=no``, which keeps the decimals of distances that the format rounds.
    seed : int, default=0
        For made places.

    Returns
    -------
    RoutingData

    Raises
    ------
    ValueError
        If the file is not what it must be; the message names it.
    """
    return load(Routing, data, seed=seed)


def require_routing(data: RoutingData) -> None:
    """Refuse places among which there is nothing to choose."""
    if len(data.customers) < 2:
        raise ValueError(f"at least 2 customers are needed, has {len(data.customers)}")


def read_routing(source: Source) -> RoutingData:
    """Return the places in a file, and the best known length beside it."""
    path, *others = source.paths
    if path.suffix == ".csv":
        return _table(path, source)
    solution = others[0] if others else path.with_suffix(".sol")
    rounded = source.option({"rounded": ("yes", "no")}).get("rounded", "yes") == "yes"
    facts = _read("instance", path)
    kind = str(facts.get("edge_weight_type", "")).strip()
    distance = np.array(facts["edge_weight"], dtype=float)
    np.fill_diagonal(distance, 0)  # files have 9999 and the like there, which no route uses
    done = [f"{path.name}: {len(distance):,} places, distances {kind or 'as given'}"]
    if kind in ROUNDED:
        distance = np.floor(distance + 0.5) if rounded else distance
        done.append("rounded to whole numbers, as TSPLIB has them" if rounded else "not rounded")
    demands, capacity, depots = _loads(facts, len(distance), path.name)
    points = facts.get("node_coord")
    best, n_vehicles = None, _named_vehicles(path.stem)
    if solution.is_file():
        plan = _read("solution", solution)
        best, n_vehicles = float(plan["cost"]) if "cost" in plan else None, len(plan["routes"]) or n_vehicles
        done.append(f"best known length {best:g} in {solution.name}" if best else "")
    return _checked(
        RoutingData(
            distance, None if points is None else np.asarray(points, dtype=float), demands, capacity, depots,
            best, n_vehicles, "; ".join(filter(None, done)),
        ),
        path.name,
    )  # fmt: skip


def _read(what: str, path: Path) -> dict[str, Any]:
    """Return what vrplib reads, its errors said in words."""
    vrplib = needs("vrplib", "combinatorial")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    parse = vrplib.parse.parse_vrplib if what == "instance" else vrplib.parse.parse_solution
    try:
        facts = parse(_one_row_a_line(text))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        found = dict(re.findall(r"(?m)^\s*(EDGE_WEIGHT_\w+)\s*:\s*(\S+)", text))
        if "unknown" in str(error) and found:
            raise ValueError(
                f"{path.name}: distances of type {' '.join(found.values())} are not read; write the matrix out, "
                "as EDGE_WEIGHT_TYPE EXPLICIT with EDGE_WEIGHT_FORMAT FULL_MATRIX"
            ) from error
        raise ValueError(
            f"{path.name} is no file of TSPLIB or CVRPLIB: {_odd_line(text) or error}"
        ) from error
    if what == "solution":
        return facts
    if np.ndim(facts.get("edge_weight")) != 2:
        raise ValueError(f"{path.name} has no distances: neither NODE_COORD_SECTION nor EDGE_WEIGHT_SECTION")
    if facts.get("dimension", len(facts["edge_weight"])) != len(facts["edge_weight"]):
        raise ValueError(
            f"{path.name}: DIMENSION is {facts['dimension']}, distances are of {len(facts['edge_weight'])} places"
        )
    return facts


def _one_row_a_line(text: str) -> str:
    """Return a file whose full matrix is broken elsewhere than at its rows with one row a line."""
    section = re.search(r"(?m)^\s*EDGE_WEIGHT_SECTION\s*$((?:\s+[-+]?[\d.]+(?:[eE][-+]?\d+)?)*)", text)
    size = re.search(r"(?m)^\s*DIMENSION\s*:\s*(\d+)", text)
    if not section or not size or "FULL_MATRIX" not in text:
        return text
    numbers, n = section[1].split(), int(size[1])
    if len(numbers) != n * n:
        return text
    rows = "\n".join(" ".join(numbers[k : k + n]) for k in range(0, n * n, n))
    return f"{text[: section.start(1)]}\n{rows}\n{text[section.end(1) :]}"


def _odd_line(text: str) -> str:
    """Return what is missing in a file, or its first coordinate line that is not a number and two coordinates."""
    if "EDGE_WEIGHT_TYPE" not in text:
        return "it states no EDGE_WEIGHT_TYPE"
    inside = False
    for k, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*[A-Z]", line):
            inside = line.strip().startswith("NODE_COORD_SECTION")
        elif inside and line.strip() and not re.fullmatch(r"\s*\d+(\s+[-+.\deE]+){2}\s*", line):
            return f"line {k} is {line.strip()!r}, must be a place's number and two coordinates"
    return ""


def _loads(facts: dict[str, Any], n: int, name: str) -> tuple[ndarray | None, float | None, tuple[int, ...]]:
    """Return demands, capacity and depots."""
    demands = facts.get("demand")
    if demands is not None:
        demands = np.asarray(demands, dtype=float)
        if demands.shape != (n,):
            raise ValueError(f"{name}: {n} places have {demands.size} demands")
    depots = tuple(int(k) for k in np.atleast_1d(facts.get("depot", ())))
    if any(not 0 <= k < n for k in depots):
        raise ValueError(f"{name}: a depot is numbered {max(depots) + 1}, there are {n} places")
    return demands, float(facts["capacity"]) if "capacity" in facts else None, depots


def _named_vehicles(stem: str) -> int | None:
    found = re.search(r"-k(\d+)$", stem)
    return int(found[1]) if found else None


def _checked(data: RoutingData, name: str) -> RoutingData:
    """Refuse what is no distance and no demand, with its place."""
    n = len(data.distance)
    if data.distance.shape != (n, n):
        raise ValueError(f"{name}: distances must be square, are {data.distance.shape}")
    bad = np.argwhere(~np.isfinite(data.distance) | (data.distance < 0))
    if len(bad):
        i, j = bad[0]
        raise ValueError(
            f"{name}: the distance from place {i + 1} to {j + 1} is {data.distance[i, j]:g}: "
            "must be finite and not negative"
        )
    if data.demands is not None:
        bad = np.flatnonzero(~np.isfinite(data.demands) | (data.demands < 0))
        if len(bad):
            raise ValueError(
                f"{name}: the demand of place {bad[0] + 1} is {data.demands[bad[0]]:g}: must be finite and not negative"
            )
    return data


def _table(path: Path, source: Source) -> RoutingData:
    options = dict(source.option({**READING, "capacity": None}))
    capacity = options.pop("capacity", None)
    if capacity is not None:
        try:
            capacity = float(capacity)
        except ValueError:
            raise ValueError(f"{path.name}: capacity must be a number, got {capacity!r}") from None
        if not 0 < capacity < np.inf:
            raise ValueError(f"{path.name}: capacity must be positive and finite, got {capacity:g}")
    frame, note = read_frame(path, options=options)
    found: dict[str, str] = {}
    for column in frame:
        word = re.sub(r"\W+.*", "", str(column).strip().lower())  # "x [km]" is x
        for role, words in COLUMNS.items():
            if word in words:
                found.setdefault(role, column)
    degrees = "x" not in found and "longitude" in found
    across, up = ("longitude", "latitude") if degrees else ("x", "y")
    if across not in found or up not in found:
        raise ValueError(
            f"{path.name}: columns x and y, or longitude and latitude, are needed; has {', '.join(map(str, frame))}"
        )
    kept = [found[role] for role in (across, up, "demand") if role in found]
    for column in kept:
        if frame[column].dtype.kind not in "iuf":
            raise ValueError(f"{path.name}: column {column!r} must be numbers")
    whole = frame[kept].notna().all(axis=1).to_numpy()
    if not whole.all():
        note += f"; {int((~whole).sum()):,} rows without a coordinate or demand left out"
        frame = frame[whole]
    points = frame[[found[across], found[up]]].to_numpy(dtype=float)
    if degrees and len(points) and (np.abs(points) > (180, 90)).any():
        raise ValueError(f"{path.name}: longitude must be within 180 degrees and latitude within 90")
    depots = _marked(frame[found["depot"]], path.name) if "depot" in found else (0,)
    demands = frame[found["demand"]].to_numpy(dtype=float) if "demand" in found else None
    note += "; distances in km on the globe" if degrees else "; straight distances"
    note += f"; {'depot is the first row' if 'depot' not in found else f'{len(depots)} depots'}"
    distance = _on_the_globe(points) if degrees else _straight(points)
    return _checked(RoutingData(distance, points, demands, capacity, depots, note=note), path.name)


def _marked(column: Any, name: str) -> tuple[int, ...]:
    """Return the rows that a column of yes and no marks."""
    words = column.astype(str).str.strip().str.lower()
    yes = words.isin(("1", "1.0", "yes", "y", "true", "ja", "oui", "x"))
    no = words.isin(("0", "0.0", "no", "n", "false", "nein", "non", "", "nan", "none"))
    if not (yes | no).all():
        raise ValueError(
            f"{name}: column {column.name!r} must be yes or no, has {words[~(yes | no)].iloc[0]!r}"
        )
    if not yes.any():
        raise ValueError(f"{name}: column {column.name!r} marks no depot")
    return tuple(int(k) for k in np.flatnonzero(yes))


def _straight(points: ndarray) -> ndarray:
    return np.linalg.norm(points[:, None] - points, axis=-1)


def _on_the_globe(points: ndarray) -> ndarray:
    """Return great-circle distances in km, by haversines."""
    lon, lat = np.radians(points).T
    half = np.sin((lat[:, None] - lat) / 2) ** 2
    half = half + np.cos(lat[:, None]) * np.cos(lat) * np.sin((lon[:, None] - lon) / 2) ** 2
    return 2 * EARTH * np.arcsin(np.sqrt(half.clip(0, 1)))


@dataset(Routing, "uniform")
def uniform(seed: int) -> RoutingData:
    """Return eighty customers in the unit square and a depot, place 0, drawn with them."""
    points = np.random.default_rng(seed).uniform(size=(UNIFORM + 1, 2))
    return RoutingData(_straight(points), points, depots=(0,))
