"""Partitions of rows over clients: at random, by shares of classes that differ, or by few classes each."""

import numpy as np
from numpy import ndarray

__all__ = ["class_partition", "dirichlet_partition", "even_partition"]


def even_partition(n: int, n_clients: int, seed: int) -> ndarray:
    """Return a client for each row: a random partition into equal parts, as nearly as n allows.

    Parameters
    ----------
    n : int
        How many rows.
    n_clients : int
        At most ``n``.
    seed : int

    Returns
    -------
    ndarray of shape (n,), int64
        Codes from 0.
    """
    _enough(n, n_clients)
    return np.random.default_rng(seed).permutation(np.arange(n) % n_clients)


def dirichlet_partition(y: ndarray, n_clients: int, seed: int, *, alpha: float = 0.5) -> ndarray:
    """Return a client for each row: every class is dealt out by shares of a Dirichlet law.

    Parameters
    ----------
    y : ndarray of shape (n,)
        Classes.
    n_clients : int
        At most n; a client that would get no row takes one of the largest client's.
    seed : int
    alpha : float, default=0.5
        Positive. Small: a class lies with few clients; large: clients are alike.

    Returns
    -------
    ndarray of shape (n,), int64
        Codes from 0.
    """
    y = np.asarray(y)
    _enough(len(y), n_clients)
    if not (np.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be greater than 0, got {alpha}")
    rng, client = np.random.default_rng(seed), np.empty(len(y), dtype=np.int64)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        # gammas of a tiny alpha may all be 0: then the class is one client's
        shares = rng.gamma(alpha, size=n_clients)
        shares = shares / shares.sum() if shares.sum() else np.eye(n_clients)[rng.integers(n_clients)]
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for k, part in enumerate(np.split(rows, cuts)):
            client[part] = k
    return _all_served(client, n_clients, rng)


def class_partition(y: ndarray, n_clients: int, seed: int, *, classes_per_client: int = 2) -> ndarray:
    """Return a client for each row: a client holds a few classes, each class in equal parts.

    Parameters
    ----------
    y : ndarray of shape (n,)
        Classes.
    n_clients : int
        So many that every class finds a client.
    seed : int
    classes_per_client : int, default=2
        At most as many as there are classes; where a class has fewer rows than clients, some of
        them go without.

    Returns
    -------
    ndarray of shape (n,), int64
        Codes from 0.
    """
    labels, codes = np.unique(np.asarray(y), return_inverse=True)
    _enough(len(codes), n_clients)
    if not 1 <= classes_per_client <= len(labels):
        raise ValueError(f"classes_per_client must be in [1, {len(labels)}], got {classes_per_client}")
    if n_clients * classes_per_client < len(labels):
        raise ValueError(
            f"n_clients must be at least {-(-len(labels) // classes_per_client)} for {classes_per_client} of "
            f"{len(labels)} classes each, got {n_clients}"
        )
    rng = np.random.default_rng(seed)
    # a client's classes follow each other in a random circle, so that each has equally many clients
    circle, first = rng.permutation(len(labels)), rng.permutation(n_clients) * classes_per_client
    held = circle[(first[:, None] + np.arange(classes_per_client)) % len(labels)]
    client = np.empty(len(codes), dtype=np.int64)
    for label in range(len(labels)):
        holders, rows = (
            np.flatnonzero((held == label).any(1)),
            rng.permutation(np.flatnonzero(codes == label)),
        )
        client[rows] = holders[np.arange(len(rows)) % len(holders)]
    return _all_served(client, n_clients, rng)


def _enough(n: int, n_clients: int) -> None:
    if not 1 <= n_clients <= n:
        raise ValueError(f"n_clients must be in [1, {n}] for {n} rows, got {n_clients}")


def _all_served(client: ndarray, n_clients: int, rng: np.random.Generator) -> ndarray:
    """Give each client without a row one of the client that has most."""
    for k in np.flatnonzero(np.bincount(client, minlength=n_clients) == 0):
        most = np.bincount(client, minlength=n_clients).argmax()
        client[rng.choice(np.flatnonzero(client == most))] = k
    return client
