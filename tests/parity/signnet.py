"""The equivariant layers of BasisNet, and spectra and eigenspaces of a cycle and of an irregular graph."""

import torch

from posterity.graphs import Equivariant1to1, Equivariant2to1, eigenspaces, ign_2to1, laplacian_eigs

AGAINST = "the authors' code (github.com/cptq/SignNet-BasisNet), and for spectra of NumPy and a closed form"


@torch.no_grad()
def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    matrices = torch.tensor(stored["matrices"])
    yield "operations", ign_2to1(matrices), stored["operations"], 1e-5
    first, second = Equivariant2to1(2, 4), Equivariant1to1(4, 3)
    for layer, name in ((first, "2to1"), (second, "1to1")):
        layer.load_state_dict({part: torch.tensor(stored[f"{part}_{name}"]) for part in ("coeffs", "bias")})
    yield "layer from matrices", first(matrices), stored["output_2to1"], 1e-5
    yield "layer from vectors", second(first(matrices)), stored["output_1to1"], 1e-5
    for name, n in {"cycle": 8, "graph": 12}.items():
        eigenvalues = laplacian_eigs(torch.tensor(stored[name]), n)[0]
        yield f"spectrum of the {name}", eigenvalues, stored[f"{name}_eigenvalues"], 1e-5
        if name == "cycle":
            yield "eigenspaces of the cycle", eigenspaces(eigenvalues), stored["cycle_eigenspaces"], 0
