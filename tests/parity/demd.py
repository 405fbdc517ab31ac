"""Value, potentials, gradient and coupling in four cases, exact programs, and the soft-histogram regulariser."""

import torch

from posterity.transport import DEMDLoss, DEMDRegularizer, multimarginal_emd, soft_histogram

AGAINST = "the authors' code (github.com/ronakrm/demd), and of two exact linear programs"


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for case in range(4):
        value, potentials, indices, masses = (
            stored[f"{name}{case}"] for name in ("value", "potentials", "indices", "masses")
        )
        histograms = torch.tensor(stored[f"histograms{case}"], requires_grad=True)
        transport = multimarginal_emd(histograms)
        yield f"case {case} value", transport.value, value, 1e-9
        yield f"case {case} potentials", transport.potentials, potentials, 1e-9
        (gradient,) = torch.autograd.grad(DEMDLoss()(histograms), histograms)
        yield f"case {case} gradient", gradient, potentials, 1e-9
        moved = transport.masses > 1e-12  # both couplings are listed from the first bins to the last
        yield f"case {case} cells", transport.indices[moved], indices, 0
        yield f"case {case} masses", transport.masses[moved], masses, 1e-9
    histograms = torch.tensor(stored["lp_histograms"])
    yield "program of the range", multimarginal_emd(histograms).value, stored["lp_range"], 1e-8
    squares = multimarginal_emd(histograms, cost=sum_of_squares).value
    yield "program of the squares", squares, stored["lp_squares"], 1e-8
    scores, groups = torch.tensor(stored["scores"]), torch.tensor(stored["groups"])
    soft = torch.stack([soft_histogram(scores.sigmoid()[groups == k] - 1e-4, 10) for k in range(3)])
    yield "soft histograms", soft, stored["soft_histograms"], 1e-6
    yield "regulariser", DEMDRegularizer(n_bins=10)(scores, groups), stored["regularizer"], 1e-5


def sum_of_squares(cells):
    return (cells.double() - cells.double().mean(-1, keepdim=True)).square().sum(-1)
