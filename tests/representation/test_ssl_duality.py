import math
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from posterity.representation import (
    ContrastiveCriterion,
    NTXentLoss,
    VICRegLoss,
    balance,
    duality_terms,
)
from posterity.testing import check_embedding_loss


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=rng(seed))


def off_diagonal(gram):
    return (gram - gram.diagonal().diag()).square().sum()


# The identity.


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (1, 6), (6, 1), (1, 1)])
def test_both_criteria_are_off_diagonal_gram_matrices_and_differ_by_the_norms(shape):
    k = randn(*shape)
    terms = duality_terms(k)
    torch.testing.assert_close(terms.contrastive, off_diagonal(k @ k.T), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(terms.noncontrastive, off_diagonal(k.T @ k), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(terms.sample_norms, k.norm(dim=1).pow(4).sum())
    torch.testing.assert_close(terms.dimension_norms, k.norm(dim=0).pow(4).sum())
    torch.testing.assert_close(
        terms.noncontrastive + terms.dimension_norms,
        terms.contrastive + terms.sample_norms,
        rtol=1e-10,
        atol=0,
    )


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_gradients_are_those_of_the_plain_definition(shape):
    k = randn(*shape).requires_grad_()
    terms = duality_terms(k)
    plain = off_diagonal(k @ k.T), off_diagonal(k.T @ k)
    plain += k.square().sum(1).square().sum(), k.square().sum(0).square().sum()
    for ours, theirs in zip(terms, plain, strict=True):
        torch.testing.assert_close(*(torch.autograd.grad(x, k, retain_graph=True)[0] for x in (ours, theirs)))
    sides = plain[1] + plain[3], plain[0] + plain[2]
    torch.testing.assert_close(*(torch.autograd.grad(x, k, retain_graph=True)[0] for x in sides))


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_on_the_balanced_set_the_criteria_differ_by_a_constant_and_so_share_their_gradient(shape):
    n, d = shape
    k = balance(randn(*shape))
    torch.testing.assert_close(k.norm(dim=1), torch.ones(n, dtype=k.dtype), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        k.norm(dim=0), torch.full((d,), math.sqrt(n / d), dtype=k.dtype), rtol=2e-9, atol=0
    )
    terms = duality_terms(k)
    torch.testing.assert_close(terms.noncontrastive, terms.contrastive + n - n**2 / d, rtol=1e-7, atol=1e-7)
    k = k.requires_grad_()
    grads = [
        torch.autograd.grad(x, k, retain_graph=True)[0].flatten()
        for x in (off_diagonal(k @ k.T), off_diagonal(k.T @ k))
    ]
    normal = torch.cat(  # what the norms of rows and columns must keep: d/dk of each squared norm
        [
            torch.stack([torch.zeros_like(k).index_fill(0, torch.tensor(i), 1) * k for i in range(n)]),
            torch.stack([torch.zeros_like(k).index_fill(1, torch.tensor(j), 1) * k for j in range(d)]),
        ]
    ).flatten(1).detach()  # fmt: skip
    basis = torch.linalg.svd(normal.T, full_matrices=False)
    span = basis.U[:, 1e-9 * basis.S[0] < basis.S]
    tangent = [g - span @ (span.T @ g) for g in grads]
    torch.testing.assert_close(*tangent, rtol=1e-6, atol=1e-6)
    assert tangent[0].norm() > 1e-3 < (grads[0] - grads[1]).norm()


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_with_one_side_normalised_the_criteria_bound_each_other(shape):
    n, d = shape
    for seed in range(20):
        k = randn(*shape, seed=seed) * torch.rand(d, dtype=torch.float64, generator=rng(seed)).exp()
        rows = duality_terms(F.normalize(k, dim=1))
        assert rows.contrastive + n - n**2 - 1e-9 <= rows.noncontrastive
        assert rows.noncontrastive <= rows.contrastive + n - n**2 / d + 1e-9
        columns = duality_terms(F.normalize(k, dim=0))
        assert columns.noncontrastive + d - d**2 - 1e-9 <= columns.contrastive
        assert columns.contrastive <= columns.noncontrastive + d - d**2 / n + 1e-9


def test_balance_says_when_it_has_not_settled_and_is_differentiable(as_a_user):
    k = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])  # the second column must keep all of two rows
    with pytest.warns(UserWarning, match="still .* off after 5 rounds"):
        balance(k, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balance(randn(30, 8, dtype=torch.float32))
    k = randn(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: balance(k, 3, tol=10.0), k)
    with pytest.raises(ValueError, match="no row of zeros, got one at 1"):
        balance(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="no column of zeros, got one at 0"):
        balance(torch.tensor([[0.0, 2.0], [0.0, 1.0]]))


# NT-Xent.


def by_loops(z1, z2, t, similarity, decoupled):
    """The loss by loops over anchors and negatives."""
    z = np.concatenate([z1.numpy(), z2.numpy()])
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    change = {"cos": lambda s: s, "sq": lambda s: s * s, "abs": abs}[similarity]
    n, total = len(z1), 0.0
    for i in range(2 * n):
        other = (i + n) % (2 * n)
        positive = z[i] @ z[other] / t
        summed = 0.0 if decoupled else math.exp(positive)
        for j in range(2 * n):
            if j not in (i, other):
                summed += math.exp(change(z[i] @ z[j]) / t)
        total += math.log(summed) - positive
    return total / (2 * n)


@pytest.mark.parametrize("similarity", ["cos", "sq", "abs"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_nt_xent_is_the_double_loop(similarity, decoupled):
    z1, z2 = randn(5, 3), randn(5, 3, seed=1)
    ours = NTXentLoss(0.3, similarity=similarity, decoupled=decoupled)(z1, z2)
    assert float(ours) == pytest.approx(by_loops(z1, z2, 0.3, similarity, decoupled), rel=1e-12)


def test_nt_xent_is_cross_entropy_over_the_masked_matrix_and_bounds_the_decoupled_one():
    z1, z2 = randn(6, 4), randn(6, 4, seed=1)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / 0.2).masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
    target = torch.cat([torch.arange(6, 12), torch.arange(6)])
    torch.testing.assert_close(NTXentLoss(0.2)(z1, z2), F.cross_entropy(logits, target), rtol=1e-12, atol=0)
    for similarity in ("cos", "sq", "abs"):
        coupled, decoupled = (NTXentLoss(similarity=similarity, decoupled=way) for way in (False, True))
        assert decoupled(z1, z2) < coupled(z1, z2)


def test_nt_xent_has_its_limits():
    z1, z2 = randn(6, 4), randn(6, 4, seed=1)
    assert float(NTXentLoss(1e9)(z1, z2)) == pytest.approx(math.log(11), rel=1e-8)
    apart = torch.eye(6, dtype=torch.float64)
    for similarity in ("cos", "sq", "abs"):
        found = float(NTXentLoss(0.5, similarity=similarity)(apart, 3 * apart))
        assert found == pytest.approx(math.log(1 + 10 * math.exp(-2)), rel=1e-12)


def test_opposite_negatives_are_best_for_the_cosine_alone():
    opposite, across = (torch.tensor(z, dtype=torch.float64) for z in ([[1, 0], [-1, 0]], [[1, 0], [0, 1]]))
    for similarity, sign in (("cos", -1), ("sq", 1), ("abs", 1)):
        loss = NTXentLoss(similarity=similarity)
        assert sign * (loss(opposite, opposite) - loss(across, across)) > 0


# VICReg.


def textbook(z1, z2, sim=25.0, std=25.0, cov=1.0, gamma=1.0, eps=1e-4):
    value = sim * (z1 - z2).square().mean()
    for z in (z1, z2):
        c = torch.cov(z.T)
        value = value + std * F.relu(gamma - (c.diagonal() + eps).sqrt()).mean() / 2
        value = value + cov * off_diagonal(c) / len(c)
    return value


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_vicreg_is_its_textbook_on_either_side_of_the_gram_matrix(shape):
    z1, z2 = (0.7 * randn(*shape, seed=seed) for seed in (0, 1))
    torch.testing.assert_close(VICRegLoss()(z1, z2), textbook(z1, z2))
    torch.testing.assert_close(VICRegLoss(3, 2, 5, gamma=0.5)(z1, z2), textbook(z1, z2, 3, 2, 5, 0.5))


def test_exp_repels_dimensions_by_log_sum_exp():
    z = randn(8, 3)
    c, t = torch.cov(z.T), 0.4
    by_hand = sum(math.log(sum(math.exp(c[i, j] / t) for j in range(3) if j != i)) for i in range(3)) / 3
    loss = VICRegLoss(0, 0, 1, variant="exp", temperature=t)
    assert float(loss(z, z)) == pytest.approx(2 * by_hand)


def test_ctr_is_the_regulariser_of_the_transposed_views():
    z1, z2 = randn(6, 4), randn(6, 4, seed=1)
    ours = VICRegLoss(0, variant="ctr")(z1, z2)
    torch.testing.assert_close(ours, VICRegLoss(0)(z1.T, z2.T), rtol=1e-12, atol=0)
    assert not torch.isclose(ours, VICRegLoss(0)(z1, z2))


def test_a_rotation_changes_the_regulariser_but_not_the_alignment_and_white_views_have_none():
    z1, z2 = randn(9, 4), randn(9, 4, seed=1)
    q = torch.linalg.qr(randn(4, 4, seed=2)).Q
    torch.testing.assert_close(VICRegLoss(1, 0, 0)(z1 @ q, z2 @ q), VICRegLoss(1, 0, 0)(z1, z2))
    for term in (VICRegLoss(0, 1, 0, gamma=2), VICRegLoss(0, 0, 1)):
        assert not torch.isclose(term(z1 @ q, z2 @ q), term(z1, z2))
    white = torch.linalg.qr(z1 - z1.mean(0)).Q * math.sqrt(8)
    assert float(VICRegLoss()(white, white)) == pytest.approx(0, abs=1e-12)


# The criterion as a loss.


@pytest.mark.parametrize("normalize", ["none", "rows", "columns"])
@pytest.mark.parametrize("side", ["samples", "dimensions"])
def test_the_criterion_is_alignment_and_a_mean_over_pairs(side, normalize):
    views = [randn(6, 4), randn(6, 4, seed=1)]
    made = {
        "none": lambda z: z,
        "rows": lambda z: z / z.norm(dim=1, keepdim=True),
        "columns": lambda z: z / z.norm(dim=0) * math.sqrt(6 / 4),
    }
    u = [made[normalize](z) for z in views]
    expected = 2.0 * (u[0] - u[1]).square().sum(1).mean()
    for z in u:
        gram, pairs = (z @ z.T, 30) if side == "samples" else (z.T @ z, 12)
        expected = expected + 3.0 * off_diagonal(gram) / pairs / 2
    loss = ContrastiveCriterion(side, alignment_weight=2, criterion_weight=3, normalize=normalize)
    torch.testing.assert_close(loss(*views), expected)


def test_balanced_views_make_the_sides_one():
    z1, z2 = randn(8, 5), randn(8, 5, seed=1)
    sides = [
        ContrastiveCriterion(side, alignment_weight=0, normalize="both")(z1, z2)
        for side in ("samples", "dimensions")
    ]
    # means over 56 and 20 pairs of what differs by n - n^2 / d, up to what ten rounds leave
    assert float(sides[1] * 20) == pytest.approx(float(sides[0] * 56) + 8 - 64 / 5, abs=0.02)


LOSSES = [
    (NTXentLoss(), True),
    (NTXentLoss(similarity="sq"), True),
    (NTXentLoss(similarity="abs", decoupled=True), True),
    (VICRegLoss(), False),
    (VICRegLoss(variant="exp"), False),
    (VICRegLoss(variant="ctr"), False),
    (ContrastiveCriterion(), True),
    (ContrastiveCriterion("dimensions", normalize="both"), True),
    (ContrastiveCriterion("dimensions", normalize="columns"), False),
    (ContrastiveCriterion("samples", normalize="none"), False),
]


@pytest.mark.parametrize(("loss", "on_sphere"), LOSSES)
def test_they_are_losses_of_two_views(as_a_user, loss, on_sphere):
    compiles = loss is LOSSES[0][0] or loss is LOSSES[3][0]
    check_embedding_loss(loss, n=4, dim=3, on_sphere=on_sphere, compiles=compiles)
    check_embedding_loss(loss, n=3, dim=5, on_sphere=on_sphere, compiles=False)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NTXentLoss(0), "temperature"),
        (lambda: NTXentLoss(similarity="cube"), "similarity"),
        (lambda: NTXentLoss(-0.1), "temperature"),
        (lambda: VICRegLoss(-1), "sim_coeff"),
        (lambda: VICRegLoss(std_coeff=-1), "std_coeff"),
        (lambda: VICRegLoss(gamma=-1), "gamma"),
        (lambda: VICRegLoss(eps=0), "eps"),
        (lambda: ContrastiveCriterion(alignment_weight=-1), "alignment_weight"),
        (lambda: VICRegLoss(variant="ctr")(torch.randn(4, 1), torch.randn(4, 1)), "at least 2 columns"),
        (lambda: balance(torch.ones(2, 2), tol=-1.0), "tol"),
        (lambda: VICRegLoss(cov_coeff=-1), "cov_coeff"),
        (lambda: VICRegLoss(variant="log"), "variant"),
        (lambda: VICRegLoss(temperature=-0.1), "temperature"),
        (lambda: ContrastiveCriterion("both"), "side"),
        (lambda: ContrastiveCriterion(normalize="row"), "normalize"),
        (lambda: ContrastiveCriterion(criterion_weight=-1), "criterion_weight"),
        (lambda: VICRegLoss(variant="exp")(torch.randn(4, 1), torch.randn(4, 1)), "at least 2 columns"),
        (lambda: ContrastiveCriterion("dimensions")(torch.ones(4, 1), torch.ones(4, 1)), "at least 2 columns"),
        (lambda: duality_terms(torch.ones(3)), "k must have shape"),
        (lambda: duality_terms(torch.ones(3, 2, dtype=torch.int64)), "k must be a floating-point"),
        (lambda: duality_terms(torch.ones(0, 2)), "k must have a row"),
        (lambda: balance(torch.full((2, 2), torch.nan)), "k must be finite"),
        (lambda: balance(torch.ones(2, 2), 0), "max_iter"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(as_a_user, make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 20), (torch.float16, 0.3)])
@pytest.mark.parametrize("shape", [(64, 32), (32, 64)])
def test_in_narrow_types_sums_are_rounded_once(dtype, scale, shape):
    k = (scale * randn(*shape)).to(dtype)
    ours, exact = duality_terms(k), duality_terms(k.double())
    for low, high in zip(ours, exact, strict=True):
        assert low.dtype == dtype and low.isfinite()
        torch.testing.assert_close(low.double(), high, rtol=0.51 * torch.finfo(dtype).eps, atol=0)
    assert balance(k / scale).dtype == dtype


@pytest.mark.parametrize("loss", [ContrastiveCriterion(), ContrastiveCriterion("dimensions"), NTXentLoss()])
def test_rows_may_be_of_a_length_whose_square_overflows(loss):
    z1, z2 = (randn(8, 4, seed=k, dtype=torch.float32) for k in (1, 2))
    torch.testing.assert_close(loss(1e25 * z1, 1e25 * z2), loss(z1, z2))
