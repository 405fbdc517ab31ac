"""Linear layers over the nodes of a graph that commute with every relabelling of them.

From matrices to vectors there are five such maps, from vectors to vectors two; a layer mixes
them with a coefficient for each pair of channels:

    y_o = sum_c sum_s coeffs[c, o, s] op_s(p_c) + bias_o.                                (1)
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from posterity._checks import floating, has_shape, integer
from posterity._precision import wide, widened

__all__ = ["Equivariant1to1", "Equivariant2to1", "ign_2to1"]


@widened
def ign_2to1(p: Float[Tensor, "batch channels n n"]) -> Float[Tensor, "batch channels 5 n"]:
    """Return the five linear maps from matrices to vectors that commute with relabelling.

    Parameters
    ----------
    p : Tensor of shape (batch, channels, n, n)
        Square matrices over the nodes.

    Returns
    -------
    Tensor
        Shape (batch, channels, 5, n): the diagonal, its mean on every node, the means of the
        rows, the means of the columns, the mean of all entries on every node.

    Raises
    ------
    ValueError
        If ``p`` is no batch of square matrices.

    Examples
    --------
    >>> import torch
    >>> from posterity.graphs import ign_2to1
    >>> ign_2to1(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))[0, 0]
    tensor([[1.0000, 4.0000],
            [2.5000, 2.5000],
            [1.5000, 3.5000],
            [2.0000, 3.0000],
            [2.5000, 2.5000]])
    """
    n = has_shape("p", floating("p", p), (None,) * 4).shape[-1]
    has_shape("p", p, (None, None, n, n))
    diag = p.diagonal(dim1=2, dim2=3)
    row = p.mean(3)
    trace, total = diag.mean(2, keepdim=True), row.mean(2, keepdim=True)
    return torch.stack([diag, trace.expand_as(diag), row, p.mean(2), total.expand_as(diag)], 2)


class Equivariant2to1(nn.Module):
    """Linear layer from matrices to vectors over the nodes: any mix of `ign_2to1`.

    Parameters
    ----------
    in_channels : int
        Matrices in.
    out_channels : int
        Vectors out.

    Attributes
    ----------
    coeffs : nn.Parameter
        Shape (in_channels, out_channels, 5).
    bias : nn.Parameter
        Shape (1, out_channels, 1).

    Raises
    ------
    ValueError
        If a parameter is out of range, or the input does not fit.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.coeffs, self.bias = _equivariant(in_channels, out_channels, 5)

    def forward(self, p: Float[Tensor, "batch n_in n n"]) -> Float[Tensor, "batch n_out n"]:
        """Return the vectors.

        Parameters
        ----------
        p : Tensor of shape (batch, in_channels, n, n)
            Square matrices over the nodes.

        Returns
        -------
        Tensor
            Shape (batch, out_channels, n).
        """
        has_shape("p", floating("p", p), (None, len(self.coeffs), None, None), "this layer")
        return self._mix(ign_2to1(p))

    def _mix(self, ops: Tensor) -> Tensor:
        """Return sum over channels and maps of coeffs * ops, plus bias."""
        weight = self.coeffs.movedim(1, 0).flatten(1)  # (out, in * 5)
        return _mix_channels(weight, ops.flatten(1, 2), self.bias)


class Equivariant1to1(nn.Module):
    """Linear layer from vectors to vectors over the nodes: of each node, and of their mean.

    Parameters
    ----------
    in_channels : int
        Vectors in.
    out_channels : int
        Vectors out.

    Attributes
    ----------
    coeffs : nn.Parameter
        Shape (in_channels, out_channels, 2): for the identity and for the mean.
    bias : nn.Parameter
        Shape (1, out_channels, 1).

    Raises
    ------
    ValueError
        If a parameter is out of range, or the input does not fit.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.coeffs, self.bias = _equivariant(in_channels, out_channels, 2)

    def forward(self, x: Float[Tensor, "batch n_in n"]) -> Float[Tensor, "batch n_out n"]:
        """Return the vectors.

        Parameters
        ----------
        x : Tensor of shape (batch, in_channels, n)
            Vectors over the nodes.

        Returns
        -------
        Tensor
            Shape (batch, out_channels, n).
        """
        has_shape("x", floating("x", x), (None, len(self.coeffs), None), "this layer")
        own, mean = self.coeffs.movedim(1, 0).unbind(2)  # (out, in)
        return _mix_channels(
            own, x, _mix_channels(mean, wide(x).mean(2, keepdim=True).to(x.dtype), self.bias)
        )


def _mix_channels(weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """Return weight @ x + bias on (b, in, n); a broadcast ``@`` would copy x to turn its axes."""
    return torch.baddbmm(bias, weight.expand(len(x), -1, -1), x)


def _equivariant(in_channels: int, out_channels: int, basis: int) -> tuple[nn.Parameter, nn.Parameter]:
    n_in, n_out = integer("in_channels", in_channels, 1), integer("out_channels", out_channels, 1)
    std = 2**0.5 / (n_in + n_out)
    return nn.Parameter(std * torch.randn(n_in, n_out, basis)), nn.Parameter(torch.zeros(1, n_out, 1))
