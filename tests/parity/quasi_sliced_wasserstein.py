"""Point sets, distances over them at equal and unequal sizes, and how near many directions come to all."""

import torch

from posterity.transport import QuasiSlicedWasserstein, sliced_wasserstein, sphere_points

AGAINST = (
    "the authors' code (github.com/khainb/Quasi-SW), of POT 0.9.7 "
    "and, by finitely many directions, of the mean over all"
)


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    x, y, z = (torch.tensor(stored[name]) for name in "xyz")
    for method, allowed in {"spiral": 1e-9, "equal-area": 1e-6, "gaussian": 1e-5}.items():
        for n in (10, 64):
            points = sphere_points(n, method, dtype=torch.float64)
            yield f"{n} {method} points", points, stored[f"{method}{n}"], allowed
    directions = torch.tensor(stored["spiral64"])
    for name, other in {"equal": y, "unequal": z}.items():
        ours = [sliced_wasserstein(x, other, directions, p=p) for p in (1, 2)]
        yield f"distances, {name} sizes", ours, stored[f"{name}_sizes"], 1e-8

    limit = float(stored["limit"])
    sizes = {"spiral": 500, "equal-area": 4096, "gaussian": 4096, "distance": 64, "coulomb": 64}
    for method, n in sizes.items():
        yield f"limit by {n} {method} points", QuasiSlicedWasserstein(n, method=method)(x, y), limit, 1e-3
    apart, close = (
        torch.pdist(sphere_points(64, name, dtype=torch.float64)) for name in ("distance", "coulomb")
    )
    far, near = float(stored["start_distance"]), float(stored["start_coulomb"])  # of the spiral, the start
    yield "distances at least the spiral's", min(float(apart.mean()), far), far, 1e-6
    yield "inverse distances at most the spiral's", max(float((1 / close).mean()), near), near, 1e-6
    generator = torch.Generator().manual_seed(0)
    for method, how in {"spiral": "rotate", "equal-area": "scramble", "gaussian": "scramble"}.items():
        options = {"randomize": how, "generator": generator, "dtype": torch.float64}
        squares = torch.stack(
            [sliced_wasserstein(x, y, sphere_points(256, method, **options)) ** 2 for _ in range(50)]
        )
        error = float(squares.std()) / 50**0.5
        yield f"mean of squares by random {method} points", squares.mean(), limit**2, 5 * error + 1e-6
