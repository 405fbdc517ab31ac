import pytest
from torch import nn
from torch.nn import functional as F

from posterity._precision import widened
from posterity.representation._pairs import joint_views
from posterity.testing import check_embedding_loss


class Aligned(nn.Module):
    """Mean squared distance of unit rows, and of their mean from zero."""

    def __init__(self, least=2):
        super().__init__()
        self.least = least

    @widened
    def forward(self, z1, z2):
        z1, z2 = (F.normalize(z, dim=1) for z in joint_views(z1, z2, least=self.least))
        return (z1 - z2).square().sum(1).mean() + z1.mean(0).square().sum()


class OrderMatters(Aligned):
    def forward(self, z1, z2):
        return super().forward(z1, z2) + z1[:1].tanh().mean()


class DimensionMatters(Aligned):
    def forward(self, z1, z2):
        return super().forward(z1, z2) + z1[:, 0].tanh().mean()


class LengthMatters(Aligned):
    def forward(self, z1, z2):
        return super().forward(z1, z2) + 0.1 * z1.tanh().square().mean()


class AnyShape(Aligned):
    def forward(self, z1, z2):
        z1, z2 = z1[: len(z2)], z2[: len(z1)]
        return super().forward(z1, z2)


def test_a_loss_of_two_views_passes(as_a_user):
    check_embedding_loss(Aligned(), on_sphere=True, compiles=False)
    check_embedding_loss(Aligned(least=1), least=1, compiles=False)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (OrderMatters(), "order of the batch"),
        (DimensionMatters(), "order of dimensions"),
        (AnyShape(), "names z2"),
        (Aligned(least=1), "batch of one is not defined"),
    ],
)
def test_what_users_rely_on_is_asked(as_a_user, loss, said):
    with pytest.raises(AssertionError, match=said):
        check_embedding_loss(loss, compiles=False)


def test_lengths_are_asked_of_a_loss_on_the_sphere(as_a_user):
    with pytest.raises(AssertionError, match="length of a row"):
        check_embedding_loss(LengthMatters(), on_sphere=True, compiles=False)
