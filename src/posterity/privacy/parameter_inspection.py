"""Looking at a state that was received for the marks of an imprint, before any gradient is taken.

Rows that all measure one number against many thresholds are equal, so their matrix has rank one; and a
query that must ignore what it sees is a bias without a weight. Neither comes about by initialisation
or training:

    equal rows         share of rows, zeros aside, that are equal to another one    > 0.5
    singular ratio     second over first singular value, of more than 8 rows        < 1e-3
    query bias         largest entry over the norm of the query weight              > 1e3

A state that passes has not these marks. That is no proof: other tampering, or this with noise on
the rows, has others.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posterity.privacy.decepticons import _double

__all__ = ["ParameterReport", "inspect_parameters"]

EQUAL, RATIO, BIAS = 0.5, 1e-3, 1e3
FEW = 8  # rows of which rank one says nothing
QUERIES = ("q_proj", "query", "q_lin", "to_q", "wq", "w_q", "q")


@dataclass(frozen=True)
class ParameterReport:
    """What `inspect_parameters` finds.

    Attributes
    ----------
    suspicious : bool
        Whether there is any finding.
    findings : list of str
        Each names a tensor and what is wrong with it.
    scores : dict of str to dict of str to float
        For each tensor that was looked at, by name: ``equal rows``, ``singular ratio`` and
        ``rows that are zero`` of a weight, ``sorted`` (share of neighbours that stand in one order)
        of a bias, ``query bias`` of a query, ``constant columns`` of an embedding.
    """

    suspicious: bool
    findings: list[str]
    scores: dict[str, dict[str, float]]


@torch.no_grad()
def inspect_parameters(model: nn.Module) -> ParameterReport:
    """Check the parameters of a model for the marks of a state that is made to leak.

    Parameters
    ----------
    model : nn.Module
        Any; its ``nn.Linear``, ``nn.MultiheadAttention`` and ``nn.Embedding`` are looked at.

    Returns
    -------
    ParameterReport
        Whatever is not finite is a finding too.

    Raises
    ------
    ValueError
        If ``model`` is no module, or has none of these.

    Notes
    -----
    Rows of zeros are left out of what is compared: adapters and last layers often begin with
    zeros, which leak nothing. What makes no mark in training either (a sorted bias, columns of an
    embedding that are constant, an output layer of one row) is a score and no finding.

    References
    ----------
    .. [1] Fowl et al. Decepticons. ICLR 2023. arXiv 2201.12675.

    Examples
    --------
    >>> from posterity.privacy import AuditTransformer, corrupt_transformer, inspect_parameters
    >>> model = AuditTransformer(50, 8, d_ff=64, n_layers=1)
    >>> inspect_parameters(model).suspicious
    False
    >>> for finding in inspect_parameters(corrupt_transformer(model)[0]).findings:
    ...     print(finding)
    encoder.layers.0.self_attn.in_proj_weight, query: its bias is inf times the norm of its weight
    encoder.layers.0.linear1.weight: 100 % of its 64 rows are equal to another
    encoder.layers.0.linear1.weight: its second singular value is less than 0.001 of the first
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    scores: dict[str, dict[str, float]] = {}
    findings: list[str] = []
    for name, weight, bias, role in _looked_at(model):
        if not bool(weight.isfinite().all()) or (bias is not None and not bool(bias.isfinite().all())):
            scores[name] = {}
            findings.append(f"{name}: it has NaN or infinity")
            continue
        weight = _double(weight)
        if role == "embedding":
            scores[name] = {"constant columns": float((weight == weight[:1]).all(0).double().mean())}
            continue
        scores[name] = found = _of_weight(weight)
        rows = len(weight)
        if found["equal rows"] > EQUAL and rows > FEW:
            findings.append(
                f"{name}: {100 * found['equal rows']:.0f} % of its {rows} rows are equal to another"
            )
        if found["singular ratio"] < RATIO and rows > FEW:
            findings.append(f"{name}: its second singular value is less than {RATIO:g} of the first")
        if bias is not None:
            bias = _double(bias)
            up = float((bias.diff() > 0).double().mean()) if len(bias) > 1 else 0.0
            down = float((bias.diff() < 0).double().mean()) if len(bias) > 1 else 0.0
            found["sorted"] = max(up, down)
            if role == "query":
                found["query bias"] = _over(float(bias.abs().max()), float(weight.norm()))
                if found["query bias"] > BIAS:
                    findings.append(
                        f"{name}: its bias is {found['query bias']:.2g} times the norm of its weight"
                    )
    if not scores:
        raise ValueError("model must have an nn.Linear, nn.MultiheadAttention or nn.Embedding, has none")
    return ParameterReport(bool(findings), findings, scores)


def _looked_at(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor | None, str]]:
    """Yield name, weight, bias and role of what is looked at; attention in its three parts."""
    for path, module in model.named_modules():
        at = f"{path}." if path else ""
        if isinstance(module, nn.MultiheadAttention):
            bias = module.in_proj_bias
            biases = (None, None, None) if bias is None else bias.chunk(3)
            if module.in_proj_weight is not None:
                weights = module.in_proj_weight.chunk(3)
                names = [f"{at}in_proj_weight, {role}" for role in ("query", "key", "value")]
            else:
                weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
                names = [f"{at}{part}_proj_weight" for part in "qkv"]
            for name, weight, part, role in zip(
                names, weights, biases, ("query", "key", "value"), strict=True
            ):
                yield name, weight, part, role
        elif isinstance(module, nn.Linear):
            role = "query" if path.rpartition(".")[2].lower() in QUERIES else "linear"
            yield f"{at}weight", module.weight, module.bias, role
        elif isinstance(module, nn.Embedding):
            yield f"{at}weight", module.weight, None, "embedding"


def _of_weight(weight: Tensor) -> dict[str, float]:
    """Return the scores of a weight, by those of its rows that are not zero."""
    rows = weight[(weight != 0).any(1)]
    zero = 1 - len(rows) / max(len(weight), 1)
    if len(rows) < 2 or rows.shape[1] < 2:
        return {"equal rows": 0.0, "singular ratio": 1.0, "rows that are zero": zero}
    counts = torch.unique(rows, dim=0, return_counts=True)[1]
    rows = rows / rows.abs().max()
    small = rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T
    squares = torch.linalg.eigvalsh(small)
    return {
        "equal rows": int(counts[counts > 1].sum()) / len(rows),
        "singular ratio": float((squares[-2].clamp_min(0) / squares[-1]).sqrt()),
        "rows that are zero": zero,
    }


def _over(a: float, b: float) -> float:
    """Return a / b, where 0 / 0 is 0."""
    return 0.0 if a == 0 else a / b if b else math.inf
