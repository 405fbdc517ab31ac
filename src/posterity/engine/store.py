"""The store: finished trials in one SQLite file, written whole or not at all.

A trial is keyed by claim, parameters, seed, device and the fingerprint of its code.
Several processes may use one store; killing any of them loses only trials in flight.
"""

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["Job", "Outcome", "Store", "home"]


def home() -> Path:
    """Return the folder of stored trials: ``POSTERITY_HOME``, or the user's data folder."""
    if given := os.environ.get("POSTERITY_HOME"):
        return Path(given)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "posterity"


@dataclass(frozen=True)
class Job:
    """One trial to run: everything that decides its numbers.

    Attributes
    ----------
    paper, claim : str
    call : str
        ``module:name`` of the function that runs it.
    params : dict
        As the function takes them, JSON values.
    seed : int
    code : str
        Fingerprint of the module.
    device : str
    time_limit : float
        Seconds.
    """

    paper: str
    claim: str
    call: str
    params: dict[str, Any]
    seed: int
    code: str
    device: str = "cpu"
    time_limit: float = 600.0

    @property
    def key(self) -> str:
        """Identity in the store; the time limit is no part of it."""
        facts = asdict(self)
        del facts["time_limit"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes
    ----------
    value : float or dict, optional
        What the claim returned.
    curves, records, pictures : dict
        What the trial tracked, recorded and pictured.
    seconds : float
    error : str
        Why there is no value; empty if there is.
    ended : str
        When it ended, UTC.
    """

    value: Any = None
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    records: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""
    ended: str = ""
    pictures: dict[str, list[str]] = field(default_factory=dict)


PATIENCE = 60  # seconds to wait for other processes
SCHEMA = """
CREATE TABLE IF NOT EXISTS trials (
    key TEXT PRIMARY KEY, paper TEXT NOT NULL, claim TEXT NOT NULL, job TEXT NOT NULL,
    outcome TEXT NOT NULL, ok INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_paper ON trials (paper, claim);
"""


class Store:
    """Finished trials.

    Parameters
    ----------
    path : Path, optional
        The SQLite file; by default ``trials.sqlite`` in `home`.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or home() / "trials.sqlite"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._prepare()
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"the store {self.path} cannot be used: {error}; set POSTERITY_HOME") from error

    def _prepare(self) -> None:
        """Make the tables. Who switches a new file to WAL has it alone, and SQLite lets nobody wait for that."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                with self._open() as connection:
                    connection.executescript("PRAGMA journal_mode=WAL;" + SCHEMA)
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(0.01)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=PATIENCE)
        try:
            with connection:  # one transaction
                yield connection
        finally:
            connection.close()

    def put(self, job: Job, outcome: Outcome) -> None:
        """Keep a finished trial; a failure never replaces a success."""
        ended = outcome.ended or datetime.now(UTC).isoformat(timespec="seconds")
        kept = json.dumps({**asdict(outcome), "ended": ended})
        row = (job.key, job.paper, job.claim, json.dumps(asdict(job)), kept, int(not outcome.error))
        with self._open() as connection:
            connection.execute(
                "INSERT INTO trials VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE "
                "SET outcome = excluded.outcome, ok = excluded.ok WHERE excluded.ok >= trials.ok",
                row,
            )

    def get(self, jobs: Iterable[Job]) -> dict[str, Outcome]:
        """Return the successful outcomes that are stored, by key."""
        found = {}
        with self._open() as connection:
            for job in jobs:
                row = connection.execute(
                    "SELECT outcome FROM trials WHERE key = ? AND ok = 1", (job.key,)
                ).fetchone()
                if row:
                    found[job.key] = Outcome(**json.loads(row[0]))
        return found

    def all(self, papers: Iterable[str] | None = None) -> list[tuple[Job, Outcome]]:
        """Return every stored trial, or those of some papers."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT paper, job, outcome FROM trials ORDER BY paper, claim"
            ).fetchall()
        wanted = None if papers is None else set(papers)
        return [
            (Job(**json.loads(job)), Outcome(**json.loads(outcome)))
            for paper, job, outcome in rows
            if wanted is None or paper in wanted
        ]

    def forget(self, jobs: Iterable[Job]) -> None:
        """Remove trials, so that they are run anew."""
        with self._open() as connection:
            connection.executemany("DELETE FROM trials WHERE key = ?", [(job.key,) for job in jobs])
