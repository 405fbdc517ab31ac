"""Consensus fair clustering against brute force, its invariances, and data on which it must hold."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from sklearn import set_config
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from posterity.fairness import (
    ConsensusFairClustering,
    FairSpectralClustering,
    cluster_balance,
    coassociation_matrix,
    consensus_contrastive_loss,
    fair_assignment_loss,
    soft_assignment,
    structure_preservation_loss,
)
from posterity.testing import check_estimator, check_loss
from posterity.testing._low_precision import check_low_precision

GROUPS = torch.tensor([0, 1, 2, 0, 0, 1, 1, 2, 2, 0, 0, 2])


def draw(n=12, k=3, seed=0):
    """Return shares of clusters, one-hot labels and a co-association, in float64."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(n, k, dtype=torch.float64, generator=rng).softmax(1)
    reference = torch.eye(k, dtype=torch.float64)[torch.randint(k, (n,), generator=rng)]
    half = torch.rand(n, n, dtype=torch.float64, generator=rng)
    together = ((half + half.T) / 2).fill_diagonal_(1)
    return q, reference, together


# --- losses ---


def test_soft_assignment_is_students_kernel_also_where_squares_overflow():
    rng = torch.Generator().manual_seed(0)
    z, centers = torch.randn(7, 4, generator=rng), torch.randn(3, 4, generator=rng)
    for unit in (1.0, 30.0):
        kernel = 1 / (1 + torch.cdist(unit * z, unit * centers).square())
        torch.testing.assert_close(
            soft_assignment(unit * z, unit * centers), kernel / kernel.sum(1, keepdim=True)
        )
    far = soft_assignment(1e30 * z, 1e30 * centers)
    inverse = torch.cdist(z, centers).square().reciprocal()
    torch.testing.assert_close(far, inverse / inverse.sum(1, keepdim=True))
    assert torch.equal(soft_assignment(1e30 * z, 1e30 * z).argmax(1), torch.arange(7))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_consensus_loss_is_the_sum_over_pairs(order):
    z, _, together = draw(6)
    weight = np.linalg.matrix_power(together.numpy(), order)
    rows = z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True)
    total = 0.0
    for i in range(6):
        e = [np.exp(2.5 * (rows[i] @ rows[j] if i != j else 0.0)) for j in range(6)]
        total -= np.log(sum(e[j] * weight[i, j] for j in range(6)) / sum(e) + 1e-8) / 6
    got = consensus_contrastive_loss(z, together, temperature=2.5, order=order)
    assert float(got) == pytest.approx(total, abs=1e-12)


def test_with_a_weight_of_ones_the_consensus_loss_is_a_constant():
    z = draw()[0]
    ones = torch.ones(12, 12, dtype=torch.float64)
    assert float(consensus_contrastive_loss(z, ones, order=1)) == pytest.approx(-np.log1p(1e-8), abs=1e-15)


def test_lengths_of_latent_rows_do_not_matter_to_the_consensus_loss():
    z, _, together = draw()
    value = consensus_contrastive_loss(z, together)
    lengths = torch.linspace(1e-3, 1e3, 12, dtype=torch.float64)[:, None]
    torch.testing.assert_close(consensus_contrastive_loss(lengths * z, together), value)
    for unit in (1e-30, 1e30):
        far = consensus_contrastive_loss(unit * z.float(), together.float())
        torch.testing.assert_close(far, value.float())


def test_the_fair_loss_is_the_divergence_from_each_groups_target():
    q = draw()[0]
    total = 0.0
    for g in range(3):
        part = q[g == GROUPS].numpy()
        target = part**2 / part.sum(0)
        total += rel_entr(target / target.sum(1, keepdims=True), part).sum() / 3
    assert float(fair_assignment_loss(q, GROUPS)) == pytest.approx(total, abs=1e-12)
    assert total > 0


def test_the_fair_loss_is_zero_where_shares_are_their_own_target():
    q = torch.full((12, 3), 1 / 3, dtype=torch.float64)
    assert abs(float(fair_assignment_loss(q, GROUPS))) < 1e-15
    hard = torch.eye(3, dtype=torch.float64)[torch.arange(12) % 3]
    assert float(fair_assignment_loss(hard, GROUPS)) == 0


def test_no_gradient_goes_through_the_target():
    q = draw()[0].requires_grad_()
    (gradient,) = torch.autograd.grad(fair_assignment_loss(q, GROUPS), q)
    for g in range(3):
        part = q[g == GROUPS].detach()
        target = part.square() / part.sum(0)
        target = target / target.sum(1, keepdim=True)
        torch.testing.assert_close(gradient[g == GROUPS], -target / part / 3)


def test_the_structure_loss_is_that_of_the_large_matrices():
    q, reference, _ = draw()
    total = 0.0
    for g in range(3):
        a, b = q[g == GROUPS], reference[g == GROUPS]
        total += float((a @ a.T - b @ b.T).square().sum()) / 3
    assert float(structure_preservation_loss(q, reference, GROUPS)) == pytest.approx(total, abs=1e-9)


def test_the_structure_loss_is_zero_at_the_reference_whatever_clusters_are_called_in_each_group():
    q, reference, _ = draw()
    assert float(structure_preservation_loss(reference, reference, GROUPS)) == 0
    value = structure_preservation_loss(q, reference, GROUPS)
    for seed in range(3):
        rng, renamed, other = torch.Generator().manual_seed(seed), q.clone(), reference.clone()
        for g in range(3):  # each group's names are shuffled on their own
            renamed[g == GROUPS] = renamed[g == GROUPS][:, torch.randperm(3, generator=rng)]
            other[g == GROUPS] = other[g == GROUPS][:, torch.randperm(3, generator=rng)]
        torch.testing.assert_close(structure_preservation_loss(renamed, other, GROUPS), value)
        assert float(structure_preservation_loss(other, reference, GROUPS)) == 0


def test_single_precision_does_not_cancel_in_a_large_structure_loss():
    reference = torch.eye(2)[torch.arange(40_000) % 2]
    q = reference * 0.9998 + 0.0001
    groups = torch.zeros(40_000, dtype=torch.long)
    got = structure_preservation_loss(q, reference, groups)
    # every pair misses by about 2e-4, of the same and of different labels alike
    a = q[:2].double() @ q[:2].double().T - torch.eye(2, dtype=torch.float64)
    expected = float(a.square().sum()) * 20_000**2
    assert float(got) == pytest.approx(expected, rel=1e-4)


class OfLogits(nn.Module):
    """A loss of shares as one of logits, which may be any numbers."""

    def __init__(self, loss, *fixed):
        super().__init__()
        self.loss = loss
        for k, tensor in enumerate(fixed):
            self.register_buffer(f"fixed{k}", tensor)

    def forward(self, logits, groups):
        fixed = [buffer[: len(logits)] for buffer in self.buffers()]
        dtype = logits.dtype
        logits = logits.float() if dtype in (torch.bfloat16, torch.float16) else logits
        return self.loss(logits.softmax(1), *fixed, groups).to(dtype)


class Contrast(nn.Module):
    def __init__(self, together):
        super().__init__()
        self.register_buffer("together", together)

    def forward(self, z):
        return consensus_contrastive_loss(z, self.together[: len(z), : len(z)])


def test_losses_conform_to_their_kind(as_a_user):
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, reference, together = draw(6)
    groups = GROUPS[:6]
    structure = OfLogits(structure_preservation_loss, reference)
    check_loss(structure, logits.clone().requires_grad_(), groups, compiles=False)
    check_loss(Contrast(together), logits.clone().requires_grad_())
    check_low_precision(soft_assignment, None, (logits, logits[:2]), slack=4, gradient=False)
    # the target is a constant for the gradient, so finite differences cannot agree
    check_low_precision(
        lambda part, *xs: part(*xs),
        OfLogits(fair_assignment_loss),
        (logits.requires_grad_(), groups),
        slack=4,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shares_of_low_precision_are_taken_as_they_are(dtype):
    q, reference, _ = draw(300, 40)
    q, groups = q.to(dtype), torch.arange(300) % 2
    for loss in (lambda q: fair_assignment_loss(q, groups),
                 lambda q: structure_preservation_loss(q, reference.to(q.dtype), groups)):  # fmt: skip
        assert loss(q).dtype == dtype
        torch.testing.assert_close(loss(q), loss(q.float()).to(dtype))


# --- co-association ---


def test_coassociation_is_symmetric_in_0_to_1_and_the_share_of_runs():
    X = np.random.default_rng(0).normal(size=(30, 4))
    A = coassociation_matrix(X, 3, n_runs=8, random_state=0)
    np.testing.assert_array_equal(A, A.T)
    np.testing.assert_array_equal(np.diag(A), 1)
    assert A.min() >= 0
    assert A.max() <= 1
    np.testing.assert_allclose(8 * A, np.round(8 * A), atol=1e-12)
    assert len(np.unique(A)) > 3, "runs see different samples and features"
    # one run that sees everything is k-means; triangles of one run close
    one = coassociation_matrix(X, 3, n_runs=1, sample_fraction=1.0, feature_fraction=1.0, random_state=0)
    assert set(np.unique(one)) == {0.0, 1.0}
    np.testing.assert_array_equal(one @ one > 0, one > 0)
    assert np.linalg.matrix_rank(one) == 3


def test_clusters_that_lie_apart_are_together_in_every_run():
    classes = np.arange(24) % 3
    X = 100.0 * np.eye(3)[classes] + np.random.default_rng(0).normal(size=(24, 3))
    A = coassociation_matrix(X, 3, feature_fraction=1.0, n_runs=20, random_state=0)
    together = classes[:, None] == classes
    assert A[together].min() > 0.9, "but for a run whose half misses a class"
    assert A[~together].max() < 0.3


# --- estimators ---


def grouped(n=80, shift=3.0, seed=0):
    """Three classes that two groups share, the second group moved along an axis of its own."""
    rng = np.random.default_rng(seed)
    classes, groups = np.arange(n) % 3, np.arange(n) // 3 % 2
    X = rng.normal(np.concatenate([8 * np.eye(3)[classes], np.zeros((n, 1))], 1), 0.5)
    X[:, 3] += shift * groups
    return X, classes, groups


SMALL = {"beta": 5.0, "hidden": 16, "epochs": 30, "n_runs": 5}


def test_groups_that_lie_apart_are_mixed_where_k_means_keeps_them_apart():
    X, classes, groups = grouped(shift=40.0)
    plain = KMeans(3, n_init=10, random_state=0).fit_predict(X)
    assert cluster_balance(plain, groups) == 0
    model = ConsensusFairClustering(3, **{**SMALL, "epochs": 50}, random_state=0).fit(
        X, sensitive_features=groups
    )
    assert cluster_balance(model.labels_, groups) == model.balance_ > 0.8
    assert normalized_mutual_info_score(model.labels_, classes) > 0.9, "and the classes are found"
    np.testing.assert_array_equal(model.predict(X), model.labels_)


def test_the_kept_loss_is_that_of_the_paper():
    X, _, groups = grouped(40)
    options = {**SMALL, "alpha": 3.0, "epochs": 10}
    model = ConsensusFairClustering(3, **options, random_state=0).fit(X, sensitive_features=groups)
    x = torch.from_numpy((X - X.mean(0)) / (X - X.mean(0)).std()).float()
    with torch.no_grad():
        z = model.net_(x)
    q = soft_assignment(z, torch.from_numpy(model.cluster_centers_))
    np.testing.assert_array_equal(q.argmax(1), model.labels_)
    own = np.empty(40, dtype=int)
    for g in (0, 1):
        own[groups == g] = KMeans(3, n_init=10, random_state=0).fit_predict(X[groups == g])
    A, g = torch.from_numpy(model.coassociation_).float(), torch.from_numpy(groups)
    expected = consensus_contrastive_loss(z, A) + 3.0 * fair_assignment_loss(q, g)
    expected += 5.0 * structure_preservation_loss(q, torch.eye(3)[own], g)
    assert model.loss_ == pytest.approx(float(expected), rel=1e-4)


def test_the_best_start_by_balance_is_kept_and_no_more_are_made_than_needed(monkeypatch):
    X, _, groups = grouped(40)
    made = []
    whole = ConsensusFairClustering._train

    def spy(self, *arguments):
        made.append(whole(self, *arguments))
        return made[-1]

    monkeypatch.setattr(ConsensusFairClustering, "_train", spy)
    fair = ConsensusFairClustering(3, **SMALL, n_init=4, random_state=0).fit(X, sensitive_features=groups)
    assert fair.balance_ >= 0.5
    assert len(made) < 4
    made.clear()
    short = {**SMALL, "epochs": 1, "n_init": 6, "random_state": 0}
    model = ConsensusFairClustering(3, **short).fit(X, sensitive_features=groups)
    x = torch.from_numpy((X - X.mean(0)) / (X - X.mean(0)).std()).float()
    ranks = []
    for net, centers, loss in made:
        labels = soft_assignment(net(x), centers).argmax(1).numpy()
        ranks.append((len(np.unique(labels)), cluster_balance(labels, groups), -loss))
    assert (len(np.unique(model.labels_)), model.balance_, -model.loss_) == max(ranks)
    assert len(made) == 6 or ranks[-1][1] >= 0.5


def test_a_fit_on_the_cpu_leaves_torchs_own_state_on_every_device(monkeypatch):
    X, _, groups = grouped(40)
    before = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs were reseeded"))
    ConsensusFairClustering(3, **{**SMALL, "epochs": 1}, n_init=1).fit(X, sensitive_features=groups)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_coassociation_and_a_reference_may_be_given_and_the_training_is_then_the_same():
    X, _, groups = grouped(40)
    options = {**SMALL, "epochs": 10, "n_init": 1, "random_state": 0}
    first = ConsensusFairClustering(3, **options).fit(X, sensitive_features=groups)
    again = ConsensusFairClustering(3, **options, coassociation=first.coassociation_)
    again.fit(X, sensitive_features=groups)
    assert again.loss_ == first.loss_
    named = ConsensusFairClustering(3, **options, reference=np.array(["u", "v", "w"])[np.arange(40) // 14])
    assert named.fit(X, sensitive_features=groups).loss_ != first.loss_
    other = np.where(groups, "b", "a")
    np.testing.assert_array_equal(
        again.fit_predict(X, sensitive_features=other), first.labels_, "names of groups do not matter"
    )


def test_groups_are_routed_through_a_pipeline():
    X, _, groups = grouped(40)
    set_config(enable_metadata_routing=True)
    try:
        model = FairSpectralClustering(3, random_state=0).set_fit_request(sensitive_features=True)
        piped = make_pipeline(StandardScaler(), model).fit(X, sensitive_features=groups)
    finally:
        set_config(enable_metadata_routing=False)
    plain = FairSpectralClustering(3, random_state=0)
    np.testing.assert_array_equal(
        piped[-1].labels_, plain.fit_predict(StandardScaler().fit_transform(X), sensitive_features=groups)
    )


@pytest.mark.parametrize("n_groups", [2, 3])
def test_fair_spectral_embedding_solves_the_constrained_problem(n_groups):
    """Against a penalty: eigenvectors of L + C F F' for a large C."""
    rng = np.random.default_rng(n_groups)
    X, groups = rng.normal(size=(30, 3)), np.arange(30) % n_groups
    model = FairSpectralClustering(3, n_neighbors=4, random_state=0).fit(X, sensitive_features=groups)
    H = model.embedding_
    distance = np.linalg.norm(X[:, None] - X, axis=2) + np.diag(np.full(30, np.inf))
    joined = distance <= np.sort(distance, 1)[:, [3]]
    joined = (joined | joined.T).astype(float)
    L = np.diag(joined.sum(1)) - joined
    F = np.eye(n_groups)[groups] - np.bincount(groups) / 30
    np.testing.assert_allclose(F.T @ H, 0, atol=1e-10)
    np.testing.assert_allclose(H.T @ H, np.eye(3), atol=1e-10)
    values, vectors = np.linalg.eigh(L + 1e7 * F @ F.T)
    assert np.trace(H.T @ L @ H) == pytest.approx(values[:3].sum(), abs=1e-4)
    assert values[3] > values[2] + 1e-3
    np.testing.assert_allclose(H @ H.T, vectors[:, :3] @ vectors[:, :3].T, atol=1e-4)


class InTurns:
    """Rows are of two groups in turns, since scikit-learn's checks name no groups; one cluster is two."""

    def fit(self, X, y=None):
        asked, self.n_clusters = self.n_clusters, max(2, self.n_clusters)
        try:
            groups = np.arange(len(X)) % 2 if hasattr(X, "__len__") else [0, 1]
            return super().fit(X, y, sensitive_features=groups)
        finally:
            self.n_clusters = asked


class ConsensusInTurns(InTurns, ConsensusFairClustering):
    pass


class SpectralInTurns(InTurns, FairSpectralClustering):
    pass


def test_conforms_to_its_kind(as_a_user):
    model = ConsensusInTurns(2, beta=1.0, hidden=8, dropout=0.0, lr=0.1, epochs=6, n_runs=1, random_state=0)
    check_estimator(model, invariant=["shift X", "scale X"])


def test_the_peer_passes_scikit_learns_checks(as_a_user):
    from sklearn.utils import estimator_checks  # alone: ours asks for `predict`, which it does not have

    peer = SpectralInTurns(2, n_neighbors=2, random_state=0)
    results = estimator_checks.check_estimator(peer, on_fail=None, on_skip=None)
    assert [r["check_name"] for r in results if r["status"] == "failed"] == []


# --- bad input ---


Q, R, A = (part.float() for part in draw())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_assignment(Q.long(), Q), "z must be a floating-point tensor"),
        (lambda: soft_assignment(Q, Q[:, :2]), r"centers must have shape \(any, 3\) for z"),
        (lambda: soft_assignment(Q, Q[:0]), "centers must have at least one row"),
        (lambda: consensus_contrastive_loss(Q, A[:5]), r"coassociation must have shape \(12, 12\) for z, got \(5, 12\)"),
        (lambda: consensus_contrastive_loss(Q, A + 1), r"coassociation must be in \[0, 1\], got values from 1"),
        (lambda: consensus_contrastive_loss(Q, A * torch.nan), r"coassociation must be in \[0, 1\]"),
        (lambda: consensus_contrastive_loss(Q, A, temperature=0.0), "temperature must be greater than 0"),
        (lambda: consensus_contrastive_loss(Q, A, order=0), "order must be an integer of at least 1"),
        (lambda: consensus_contrastive_loss(Q[:0], A[:0, :0]), "z must have at least one row and one column"),
        (lambda: fair_assignment_loss(2 * Q, GROUPS), r"q must have rows .* sum to 1, got .* in row 0"),
        (lambda: fair_assignment_loss(Q, GROUPS[1:]), r"groups must have shape \(12\) for q"),
        (lambda: fair_assignment_loss(Q, GROUPS.float()), "groups must be a tensor of integers or bool, got torch.float32"),
        (lambda: fair_assignment_loss(Q[:0], GROUPS[:0]), "q must have at least one row"),
        (lambda: structure_preservation_loss(Q, R[1:], GROUPS), "reference must have the 12 rows of q, got 11"),
        (lambda: structure_preservation_loss(Q, R - 1, GROUPS), "reference must have rows"),
        (lambda: coassociation_matrix(np.zeros((4, 2)), 5), "n_clusters must be at most the number of samples, 4"),
        (lambda: coassociation_matrix(np.zeros((4, 2)), 2, n_runs=0), "n_runs must be an integer of at least 1"),
        (lambda: coassociation_matrix(np.zeros((4, 2)), 2, sample_fraction=0.0), r"sample_fraction must be in \(0, 1\]"),
        (lambda: coassociation_matrix(np.zeros((4, 2)), 2, feature_fraction=1.5), r"feature_fraction must be in \(0, 1\]"),
        (lambda: coassociation_matrix(np.full((4, 2), np.nan), 2), "X contains NaN"),
    ],
)  # fmt: skip
def test_functions_refuse_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


X, _, S = grouped(12)


@pytest.mark.parametrize(
    ("options", "groups", "message"),
    [
        ({}, None, "sensitive_features must be given"),
        ({}, S[1:], "sensitive_features must have a value for each of the 12 samples, got 11"),
        ({}, 0 * S, "sensitive_features must have at least two groups, got only 0"),
        ({}, [None, *S[1:]], "sensitive_features must not be missing, got no value in row 0"),
        (
            {},
            np.arange(12) < 2,
            r"sensitive_features must give each group n_clusters=3 samples .* group of 2",
        ),
        ({"n_clusters": 1}, S, "n_clusters must be an integer of at least 2, got 1"),
        ({"n_clusters": 13}, S, "n_clusters must be at most the number of samples, 12, got 13"),
        ({"alpha": -1.0}, S, "alpha must be at least 0"),
        ({"dropout": 1.0}, S, r"dropout must be in \[0, 1\)"),
        ({"lr": 0.0}, S, "lr must be greater than 0"),
        ({"epochs": 0}, S, "epochs must be an integer of at least 1"),
        ({"n_init": 0}, S, "n_init must be an integer of at least 1"),
        ({"reference": "groups"}, S, "reference must be 'per-group' or an array"),
        ({"reference": S[1:]}, S, "reference must have a label for each of the 12 samples, got 11"),
        ({"coassociation": np.eye(11)}, S, r"coassociation must be numbers of shape \(12, 12\)"),
        ({"coassociation": -np.eye(12)}, S, r"coassociation must be in \[0, 1\], got values from -1 to"),
        ({"coassociation": np.full((12, 12), np.nan)}, S, r"coassociation must be in \[0, 1\]"),
    ],
)
def test_the_estimator_refuses_bad_input(as_a_user, options, groups, message):
    model = ConsensusFairClustering(**{"n_clusters": 3, "epochs": 1, "n_runs": 1, "n_init": 1, **options})
    with pytest.raises(ValueError, match=message):
        model.fit(X, sensitive_features=groups)


@pytest.mark.parametrize(
    ("options", "groups", "message"),
    [
        ({}, None, "sensitive_features must be given"),
        ({"n_clusters": 1}, S, "n_clusters must be an integer of at least 2"),
        ({"n_clusters": 12}, S, "n_clusters must be at most 11 for 12 samples, got 12"),
        ({"n_neighbors": 12}, S, "n_neighbors must be less than the number of samples, 12"),
    ],
)
def test_the_peer_refuses_bad_input(as_a_user, options, groups, message):
    with pytest.raises(ValueError, match=message):
        FairSpectralClustering(**{"n_clusters": 3, **options}).fit(X, sensitive_features=groups)


def test_a_loss_that_is_not_finite_is_said(as_a_user):
    with pytest.raises(ValueError, match=r"the loss is nan after 9 epochs: lower lr="):
        ConsensusFairClustering(2, lr=1e30, epochs=9, n_runs=1).fit(X, sensitive_features=S)
