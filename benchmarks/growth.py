"""Draw how the cost of methods grows with the size of a problem, over two orders of magnitude.

    python -m benchmarks.growth            # all figures, to docs/growth-*.svg
    python -m benchmarks.growth transport  # one

Each point is the median of a few calls, forward and backward where a method has a gradient;
a curve ends where the next call would take longer than some ten seconds. Beside each name
is the slope of log seconds against log size over its larger sizes: 1 is linear. Figures of
memory show the most bytes of tensors alive at once in a call, what it returns among them.
"""

import argparse
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.representation import growth as representation
from posterity import dynamics, graphs, transport
from posterity.lab.memory import peak_bytes
from posterity.site.figures import alone, curves

LONGEST = 10.0  # seconds of a call
Work = Callable[[], object]


def random_graph(n: int, degree: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features (n, 32) and edges in both directions, ``degree`` a node on average."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(n, (2, n * degree // 2), generator=generator)
    half = half[:, half[0] != half[1]]
    x = torch.randn(n, 32, generator=generator, requires_grad=True)
    return x, torch.cat([half, half.flip(0)], 1).unique(dim=1)


def layer(make: Callable[[], torch.nn.Module]) -> Callable[..., Work]:
    """Return what makes a call of a graph layer, forward and backward, from a graph's size."""

    def prepare(n: int, degree: int = 8) -> Work:
        torch.manual_seed(0)
        x, edges = random_graph(n, degree)
        net = make()
        return lambda: net(x, edges).sum().backward()

    return prepare


def of_edges(measure: Callable[[torch.Tensor, int], object]) -> Callable[..., Work]:
    """Return what makes a call of a function of edges and the number of nodes."""

    def prepare(n: int, degree: int = 8) -> Work:
        _, edges = random_graph(n, degree)
        return lambda: measure(edges, n)

    return prepare


def grid(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a square grid, on which a factorisation stays sparse."""
    side = round(n**0.5)
    place = torch.arange(side * side).view(side, side)
    pairs = [(place[:, :-1], place[:, 1:]), (place[:-1], place[1:])]
    half = torch.cat([torch.stack([a.flatten(), b.flatten()]) for a, b in pairs], 1)
    return torch.randn(side * side, 32, requires_grad=True), torch.cat([half, half.flip(0)], 1)


def resolvent(n: int) -> Work:
    x, edges = grid(n)
    conv = graphs.ResolventConv(32, 32, 2)
    return lambda: conv(x, edges).sum().backward()


def sign_net(n: int, degree: int = 8) -> Work:
    _, edges = random_graph(n, degree)
    values, vectors = torch.rand(8), torch.randn(n, 8)
    net = graphs.SignNet(8, 16, 16)
    return lambda: net(vectors, values, edges).sum().backward()


def agents(n: int, degree: int = 8) -> Work:
    x, edges = random_graph(n, degree)
    net = graphs.AgentNet(32, 32, 2, num_agents=16, num_steps=16)
    csr = net.csr(edges, n)
    return lambda: net(x, edges, csr=csr).sum().backward()


def bayes(n: int) -> Work:
    csbm = graphs.CSBM(n, n_features=32)
    x, edges = random_graph(n)
    y = torch.arange(n) % 2
    candidates = graphs.attack_candidates(x.detach(), y, edges, 0)
    return lambda: graphs.bayes_robustness(csbm, x.detach(), edges, y, 0, candidates)


LAYERS = {
    "ADGN": layer(lambda: graphs.AntiSymmetricConv(32, 4)),
    "ACMP": layer(lambda: graphs.ACMPConv(32, time=1.0, method="rk4", step_size=0.5)),
    "HeterophilyGNN": layer(lambda: graphs.HeterophilyGNN(32, 32, 4, dropout=0.0)),
    "PolynomialFilter": layer(lambda: graphs.PolynomialFilter(10)),
    "GCNEncoder": layer(lambda: graphs.GCNEncoder(32, 32, 32)),
    "SignNet": sign_net,
}
WALKS_AND_FILTERS = {
    "AgentNet": agents,
    "ResolventConv on a grid": resolvent,
    "laplacian_eigs": of_edges(lambda edges, n: graphs.laplacian_eigs(edges, n, 8)),
    "resistance_distance": of_edges(graphs.resistance_distance),
    "shortest_path_distance": of_edges(graphs.shortest_path_distance),
    "bayes_robustness": bayes,
}
MEASURES = {
    "edge_homophily": of_edges(lambda edges, n: graphs.edge_homophily(edges, torch.arange(n) % 5)),
    "find_duplicate_nodes": of_edges(graphs.find_duplicate_nodes),
    "biconnectivity": of_edges(graphs.biconnectivity),
}


def marginals(d: int, n: int) -> Work:
    p = torch.rand(d, n, generator=torch.Generator().manual_seed(0)).softmax(-1).requires_grad_()
    loss = transport.DEMDLoss()
    return lambda: loss(p).backward()


def clouds(n: int) -> Work:
    x, y = (torch.randn(n, 3, generator=torch.Generator().manual_seed(k)).requires_grad_() for k in (0, 1))
    loss = transport.QuasiSlicedWasserstein(100)
    return lambda: loss(x, y).backward()


def plan(n: int) -> Work:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.ones(n) / n, torch.ones(n) / n
    cost = torch.rand(n, n, generator=generator)
    return lambda: transport.sparse_transport(a, b, cost, k=4, max_iter=50)


def perceptron(width: int, depth: int = 3, outputs: int = 10) -> torch.nn.Sequential:
    torch.manual_seed(0)
    sizes = [32, *(width,) * (depth - 1), outputs]
    parts = [torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    return torch.nn.Sequential(*(each for part in parts for each in (part, torch.nn.ReLU())))[:-1]


def images(channels: int) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Unflatten(1, (2, 4, 4)), torch.nn.Conv2d(2, channels, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(16 * channels, 10),
    )  # fmt: skip


def width_of(parameters: int, of: Callable[[int], torch.nn.Module]) -> int:
    """Return the width at which a network has about so many parameters."""
    widths = range(2, 2_000)
    at = bisect_left(widths, parameters, key=lambda w: sum(p.numel() for p in of(w).parameters()))
    return widths[min(at, len(widths) - 1)]


def looks(net: torch.nn.Module, n: int) -> dict[str, Work]:
    """Return looks at a network with n samples."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 32, generator=generator), torch.randint(10, (n,), generator=generator)
    return {
        "empirical_ntk": lambda: dynamics.empirical_ntk(net, x),
        "reduced_landscape, 20 steps": lambda: dynamics.reduced_landscape(net, x, y, x, y, alphas=(0.5, 1.0, 2.0), n_steps=20),
        "layer_probe": lambda: dynamics.layer_probe(net, ["0", "2"], x, y, x, y, k=3),
        "quasi_homogeneity_error": lambda: dynamics.quasi_homogeneity_error(net, x, dynamics.layer_rates(net)),
        "train_ensemble, 20 steps": lambda: dynamics.train_ensemble(
            lambda seed: net, x, x[:, :10], x, n_models=4, lr=1e-3, n_steps=20
        ),
    }  # fmt: skip


def on_the_sphere(n: int) -> torch.Tensor:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def predictions(n: int) -> Work:
    probs, y = dynamics.neural_collapse_ensemble(n, 10, generator=torch.Generator().manual_seed(0))
    return lambda: dynamics.bias_variance(probs, y)


def sentences(n: int) -> Work:
    x = torch.randint(150, (n, 9), generator=torch.Generator().manual_seed(0))
    return lambda: dynamics.equipartition_kernel(x, x[:100], n_words=150, n_concepts=5)


LOOKS = (
    "empirical_ntk",
    "reduced_landscape, 20 steps",
    "layer_probe",
    "quasi_homogeneity_error",
    "train_ensemble, 20 steps",
)
BY_JACOBIAN = "empirical_ntk, convolutions"
SAMPLES: dict[str, Callable[[int], Work]] = {
    **{name: (lambda n, name=name: looks(perceptron(64), n)[name]) for name in LOOKS},
    BY_JACOBIAN: lambda n: looks(images(8), n)["empirical_ntk"],
    "SobolevLoss": lambda n: lambda: dynamics.SobolevLoss(on_the_sphere(n), 1.0, max_degree=4),
    "bias_variance, 20 members": predictions,
    "equipartition_kernel, 100 columns": sentences,
}
PARAMETERS: dict[str, Callable[[int], Work]] = {
    **{name: (lambda p, name=name: looks(perceptron(width_of(p, perceptron)), 64)[name]) for name in LOOKS},
    BY_JACOBIAN: lambda p: looks(images(width_of(p, images)), 64)["empirical_ntk"],
}
NODES = (1_000, 3_000, 10_000, 30_000, 100_000)
FIGURES: dict[str, tuple[str, dict[str, Callable[[int], Work]], tuple[int, ...]]] = {
    "layers": ("seconds against nodes, 8 edges a node", LAYERS, NODES),
    "walks": ("seconds against nodes, 8 edges a node", WALKS_AND_FILTERS, NODES),
    "measures": ("seconds against nodes, 8 edges a node", MEASURES, NODES),
    "edges": (
        "seconds against edges, 2,000 nodes",
        {name: (lambda size, make=make: make(2_000, size // 2_000)) for name, make in LAYERS.items()},
        (8_000, 24_000, 80_000, 240_000, 800_000),
    ),
    "transport": (
        "seconds against points, bins or histograms",
        {
            "DEMD, histograms": lambda n: marginals(n, 10),
            "DEMD, bins": lambda n: marginals(10, n),
            "sliced, points": clouds,
            "sparse plan, points": plan,
        },
        (100, 300, 1_000, 3_000, 10_000),
    ),
    "samples": ("seconds against samples", SAMPLES, (30, 100, 300, 1_000, 3_000)),
    "parameters": (
        "seconds against parameters, 64 samples",
        PARAMETERS,
        (3_000, 10_000, 30_000, 100_000, 300_000),
    ),
    "samples-memory": ("MiB against samples", SAMPLES, (30, 100, 300, 1_000, 3_000)),
    "parameters-memory": (
        "MiB against parameters, 64 samples",
        PARAMETERS,
        (3_000, 10_000, 30_000, 100_000, 300_000),
    ),
    **representation.FIGURES,
}


def measure(work: Work) -> float:
    """Return the median of up to five calls, in seconds; one that is long is called once."""
    seconds = []
    while len(seconds) < 5 and sum(seconds) < LONGEST:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:] or seconds)  # the first call warms up


def memory(work: Work) -> float:
    """Return the most MiB of tensors alive at once in a call."""
    return peak_bytes(work) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=", ".join(FIGURES))
    torch.set_num_threads(1)
    for figure in parser.parse_args().figures or FIGURES:
        path = Path(__file__).parent.parent / "docs" / f"growth-{figure}.svg"
        path.write_text(
            alone(draw(*FIGURES[figure], memory if figure.endswith("memory") else measure)), encoding="utf-8"
        )


def draw(
    title: str,
    makers: dict[str, Callable[[int], Work]],
    sizes: tuple[int, ...],
    cost: Callable[[Work], float],
) -> str:
    """Print and return the curves of some methods."""
    print(title)
    drawn = {}
    for name, make in makers.items():
        points: list[tuple[int, float]] = []
        for size in sizes:
            points.append((size, cost(make(size))))
            if cost is measure and points[-1][1] * (sizes[1] / sizes[0]) ** 2 > LONGEST:
                break
        upper = np.log(points[len(points) // 2 - 1 :])
        slope = np.polyfit(upper[:, 0], upper[:, 1], 1)[0]
        print(
            f"{name:36} slope {slope:5.2f}  " + "  ".join(f"{n:,}: {value:.3g}" for n, value in points),
            flush=True,
        )
        drawn[f"{name} ({slope:.2f})"] = [points]
    return curves(title, drawn)


if __name__ == "__main__":
    main()
