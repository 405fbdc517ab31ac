"""FaiREE against brute force, against draws, and against the frequency that it promises."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import integrate, stats
from scipy.special import betainc, betaln
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted, validate_data

from posterity.fairness import FaiREE, fair_thresholds, violation_probability
from posterity.testing import check_estimator

CONSTRAINTS = ("equal_opportunity", "predictive_equality", "equalized_odds", "demographic_parity")


def sample(seed=0, sizes=(45, 60, 50, 70)):
    """Return scores, classes and groups; sizes of the cells (y, group) 00, 01, 10, 11."""
    rng = np.random.default_rng(seed)
    y, groups = np.repeat([0, 0, 1, 1], sizes), np.repeat([0, 1, 0, 1], sizes)
    return rng.normal(1.5 * y + 0.5 * groups), y, groups


X_NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)  # exact up to degree 399


def exceeds(k0, n0, k1, n1, alpha):
    """P(U0 - U1 > alpha) as an integral of scipy's functions, U(0) = 0 and U(n + 1) = 1."""
    if k1 == n1 + 1 or k0 == 0:
        return 0.0
    if k0 == n0 + 1:
        return 1.0 if k1 == 0 else betainc(k1, n1 + 1 - k1, 1 - alpha)
    if k1 == 0:
        return 1 - betainc(k0, n0 + 1 - k0, alpha)
    x = (1 - alpha) * (X_NODES + 1) / 2
    density = np.exp(
        (k0 - 1) * np.log(x + alpha) + (n0 - k0) * np.log1p(-x - alpha) - betaln(k0, n0 + 1 - k0)
    )
    return float((1 - alpha) / 2 * (density * WEIGHTS) @ betainc(k1, n1 + 1 - k1, x))


def brute_force(scores, y, groups, alpha, delta, constraint):
    """Loop over all pairs; return ranks, error, probability and how many are allowed."""
    cells = {(c, a): np.sort(scores[(y == c) & (groups == a)]) for c in (0, 1) for a in (0, 1)}
    constrained = {"predictive_equality": [0], "demographic_parity": [0, 1]}.get(constraint, [1])
    pools = [sorted((t, c) for c in constrained for t in cells[c, a]) for a in (0, 1)]
    best, allowed = (math.inf,), 0
    for k0, (tau0, own0) in enumerate(pools[0], 1):
        for k1, (tau1, own1) in enumerate(pools[1], 1):
            n0, n1 = len(pools[0]), len(pools[1])
            risk = exceeds(k0, n0, k1, n1, alpha) + exceeds(k1, n1, k0, n0, alpha)
            if constraint == "equalized_odds" and risk <= delta:
                b = [int((cells[0, a] <= tau).sum()) for a, tau in ((0, tau0), (1, tau1))]
                m = [len(cells[0, a]) for a in (0, 1)]
                risk += exceeds(b[0] + 1, m[0], b[1], m[1], alpha)
                risk += exceeds(b[1] + 1, m[1], b[0], m[0], alpha)
            if risk > delta:
                continue
            allowed += 1
            error = 0.0
            for a, tau, own in ((0, tau0, own0), (1, tau1, own1)):
                for c in (0, 1):
                    n, k = len(cells[c, a]), int((cells[c, a] <= tau).sum())
                    quantile = (k if own == c else k + 0.5) / (n + 1)
                    error += n / len(y) * (quantile if c else 1 - quantile)
            if error < best[0] - 1e-11:
                best = error, k0, k1, risk, tau0, tau1
    return best, allowed


@pytest.mark.parametrize(
    ("n0", "n1", "alpha"), [(1, 1, 0.3), (4, 9, 0.05), (35, 35, 0.1), (60, 300, 0.1), (20, 90, 0.7)]
)
def test_the_probability_is_the_integral(n0, n1, alpha):
    ranks = [(1, 1), (n0, n1), (1, n1), ((n0 + 1) // 2, (n1 + 1) // 2), (n0, max(1, n1 - 2))]
    for k0, k1 in ranks:
        f0, f1 = stats.beta(k0, n0 + 1 - k0), stats.beta(k1, n1 + 1 - k1)
        kinks = [c for c in (alpha, 1 - alpha, f0.mean()) if 0 < c < 1]
        expected, _ = integrate.quad(
            lambda u, f0=f0, f1=f1: f0.pdf(u) * (f1.cdf(u - alpha) + f1.sf(u + alpha)),
            0, 1, points=kinks, epsabs=1e-11,
        )  # fmt: skip
        assert violation_probability(k0, n0, k1, n1, alpha) == pytest.approx(expected, abs=1e-9)


def test_the_nodes_are_enough_for_large_and_unequal_samples():
    """Gauss's rule with half as many nodes as the polynomial has degrees is exact: 1,000 nodes by hand."""
    n0, n1, alpha = 30, 1969, 0.1
    x, weight = np.polynomial.legendre.leggauss(1000)
    x, weight = (1 - alpha) * (x + 1) / 2, (1 - alpha) * weight / 2
    k0, k1 = np.array([1, 2, 15, 29, 30]), np.array([1, 3, 200, 985, 1700, 1968, 1969])
    f0 = stats.beta.pdf(x + alpha, k0[:, None], n0 + 1 - k0[:, None]) * weight
    g0 = stats.beta.pdf(x, k0[:, None], n0 + 1 - k0[:, None]) * weight
    f1 = stats.beta.cdf(x, k1[:, None], n1 + 1 - k1[:, None])
    g1 = stats.beta.sf(x + alpha, k1[:, None], n1 + 1 - k1[:, None])
    expected = f0 @ f1.T + g0 @ g1.T
    np.testing.assert_allclose(
        violation_probability(k0[:, None], n0, k1, n1, alpha), expected, rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("n", [1, 10, 35, 200])
def test_top_ranks_have_the_closed_integral(n):
    expected = 2 * integrate.quad(lambda u: n * u ** (n - 1) * (u - 0.1) ** n, 0.1, 1, epsabs=1e-13)[0]
    value = violation_probability(n, n, n, n, 0.1)
    assert value == pytest.approx(expected, abs=1e-10)
    assert value <= 2 * 0.9**n


def test_it_is_symmetric_in_the_groups_and_in_up_and_down():
    n0, n1 = 23, 41
    k0, k1 = np.arange(1, n0 + 1)[:, None], np.arange(1, n1 + 1)
    table = violation_probability(k0, n0, k1, n1, 0.1)
    np.testing.assert_allclose(table.T, violation_probability(k1[:, None], n1, k0.T[0], n0, 0.1), atol=1e-13)
    np.testing.assert_allclose(
        table, violation_probability(n0 + 1 - k0, n0, n1 + 1 - k1, n1, 0.1), atol=1e-12
    )


def test_it_is_the_frequency_of_beta_draws():
    rng = np.random.default_rng(0)
    draws = 1_000_000
    for k0, n0, k1, n1 in ((50, 62, 230, 274), (3, 62, 20, 274), (31, 62, 120, 274)):
        gap = rng.beta(k0, n0 + 1 - k0, draws) - rng.beta(k1, n1 + 1 - k1, draws)
        p = violation_probability(k0, n0, k1, n1, 0.1)
        assert abs((np.abs(gap) > 0.1).mean() - p) <= 4 * math.sqrt(p * (1 - p) / draws)


def test_it_falls_from_one_to_nothing_as_alpha_grows():
    values = [violation_probability(12, 40, 30, 70, alpha) for alpha in np.linspace(0, 1, 21)]
    assert values[0] == pytest.approx(1, abs=1e-10)
    assert (np.diff(values) <= 1e-12).all()
    assert values[-1] == violation_probability(12, 40, 30, 70, 3) == 0


def test_sizes_broadcast_with_ranks():
    n0, n1 = np.array([[5], [9]]), np.array([7, 3, 7])
    table = violation_probability(2, n0, 3, n1, 0.2)
    assert table.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        one = violation_probability(2, int(n0[i, 0]), 3, int(n1[j]), 0.2)
        assert isinstance(one, float)
        assert table[i, j] == pytest.approx(one, abs=1e-14)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize(("seed", "alpha", "delta"), [(0, 0.25, 0.1), (1, 0.3, 0.03)])
def test_it_is_the_best_of_all_pairs(constraint, seed, alpha, delta):
    sizes = (40, 50, 24, 31) if constraint != "demographic_parity" else (14, 12, 16, 15)
    data = sample(seed, sizes)
    (error, k0, k1, risk, *taus), allowed = brute_force(*data, alpha, delta, constraint)
    found = fair_thresholds(*data, alpha=alpha, delta=delta, constraint=constraint)
    assert found.ranks.tolist() == [k0, k1]
    assert found.thresholds.tolist() == taus
    assert found.error == pytest.approx(error, abs=1e-11)
    assert found.probability == pytest.approx(risk, abs=1e-9)
    assert found.n_candidates == allowed
    assert found.probability <= delta


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_blocks_and_the_band_change_nothing(constraint, monkeypatch):
    from posterity.fairness import group_thresholds

    data = sample(3, (80, 90, 70, 100))
    whole = fair_thresholds(*data, alpha=0.2, delta=0.6, constraint=constraint)
    monkeypatch.setattr(group_thresholds, "CHUNK", 900)
    parts = fair_thresholds(*data, alpha=0.2, delta=0.6, constraint=constraint)
    assert parts.ranks.tolist() == whole.ranks.tolist()
    assert parts.n_candidates == whole.n_candidates
    if constraint == "equal_opportunity":
        k0, k1 = np.arange(1, 71)[:, None], np.arange(1, 101)
        every = violation_probability(k0, 70, k1, 100, 0.2) <= 0.6
        assert whole.n_candidates == every.sum()


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_only_the_order_of_scores_matters(constraint):
    scores, y, groups = sample(5)
    plain = fair_thresholds(scores, y, groups, alpha=0.25, constraint=constraint)
    bent = fair_thresholds(np.exp(scores) ** 3, y, groups, alpha=0.25, constraint=constraint)
    assert bent.ranks.tolist() == plain.ranks.tolist()
    np.testing.assert_array_equal(bent.thresholds, np.exp(plain.thresholds) ** 3)
    order = np.random.default_rng(0).permutation(len(y))
    mixed = fair_thresholds(scores[order], y[order], groups[order], alpha=0.25, constraint=constraint)
    assert mixed.ranks.tolist() == plain.ranks.tolist()


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_names_of_groups_and_classes_do_not_matter(constraint):
    scores, y, groups = sample(6)
    plain = fair_thresholds(scores, y, groups, alpha=0.25, constraint=constraint)
    swapped = fair_thresholds(scores, y, 1 - groups, alpha=0.25, constraint=constraint)
    assert swapped.error == pytest.approx(plain.error, abs=1e-11)
    assert swapped.n_candidates == plain.n_candidates
    named = fair_thresholds(
        scores, np.array(["no", "yes"])[y], np.array(["b", "c"])[groups], alpha=0.25, constraint=constraint
    )
    assert named.ranks.tolist() == plain.ranks.tolist()
    assert named.groups.tolist() == ["b", "c"]


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_weaker_demand_never_costs_more(constraint):
    data = sample(7, (90, 90, 90, 90))
    for option, values in (("alpha", (0.15, 0.2, 0.3, 0.6)), ("delta", (0.05, 0.1, 0.3, 0.9))):
        base = {"alpha": 0.15, "delta": 0.2} if option == "alpha" else {"alpha": 0.2, "delta": 0.05}
        found = [fair_thresholds(*data, **base | {option: v}, constraint=constraint) for v in values]
        assert (np.diff([f.error for f in found]) <= 0).all()
        assert (np.diff([f.n_candidates for f in found]) >= 0).all()


@pytest.mark.parametrize("name", ["norm", "expon", "cauchy"])
def test_a_fixed_pair_breaks_its_word_as_often_as_it_says(name):
    """2,000 fresh samples of each distribution: one and the same number."""
    k0, n0, k1, n1, alpha = 25, 40, 80, 110, 0.1
    law, rng = getattr(stats, name), np.random.default_rng(1)
    quantile = [
        law.cdf(np.sort(law.rvs(size=(2000, n), random_state=rng), 1)[:, k - 1])
        for k, n in ((k0, n0), (k1, n1))
    ]
    share = (np.abs(quantile[0] - quantile[1]) > alpha).mean()
    p = violation_probability(k0, n0, k1, n1, alpha)
    assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / 2000)


def test_thirty_six_in_each_cell_are_enough_whatever_the_scores(as_a_user):
    for seed in range(5):
        found = fair_thresholds(*sample(seed, (20, 20, 36, 36)))
        assert found.probability <= 0.05
    with pytest.raises(
        ValueError, match=r"equal_opportunity within alpha=0.1 .* 20 and 24 positives, 36 in each"
    ):
        fair_thresholds(*sample(0, (35, 35, 20, 24)))
    with pytest.raises(ValueError, match=r"36 in each are enough for the positives alone"):
        fair_thresholds(*sample(0, (20, 20, 20, 20)), constraint="equalized_odds")


def test_ties_are_told():
    scores, y, groups = sample()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fair_thresholds(scores, y, groups, alpha=0.25)
    with pytest.warns(UserWarning, match=r"scores of group 0 are tied.*jitter"):
        fair_thresholds(scores.round(1), y, groups, alpha=0.25)


class Parity(FaiREE):
    """The group follows from a row's first number, since scikit-learn's checks name no groups.

    The method hands X to its scorer as it is, so the checks of X are here.
    """

    def fit(self, X, y):
        first = check_array(validate_data(self, X, y)[0])[:, 0]
        self.level_, self.spread_ = first.mean(), np.ptp(first) or 1.0
        codes = np.unique(np.asarray(y), return_inverse=True)[1]
        for self.scale_ in range(1, 1000):  # until each class of each group has two rows
            if np.bincount(2 * codes.ravel() + self._groups(X, None), minlength=4).min() >= 2:
                break
        return super().fit(X, y)

    def decision_function(self, X, *, sensitive_features=None):
        check_is_fitted(self, "result_")
        check_array(X)
        return super().decision_function(X, sensitive_features=sensitive_features)

    def _groups(self, X, sensitive_features):
        first = (check_array(X)[:, 0] - self.level_) / self.spread_  # in no unit
        return np.floor(self.scale_ * first).astype(np.int64) % 2


def table(seed=0, n=800):
    rng = np.random.default_rng(seed)
    y, groups = rng.integers(0, 2, (2, n))
    X = rng.normal(size=(n, 3)) + 1.5 * y[:, None] + 0.5 * groups[:, None]
    return X, y, groups


@pytest.mark.parametrize("scorer", [LogisticRegression(), RidgeClassifier()])
def test_predict_is_the_score_against_the_threshold_of_the_group(scorer):
    X, y, groups = table()
    words, names = np.array(["no", "yes"])[y], np.array(["m", "w"])[groups]
    model = FaiREE(scorer, random_state=0).fit(X, words, sensitive_features=names)
    if hasattr(scorer, "predict_proba"):
        scores = model.estimator_.predict_proba(X)[:, 1]
    else:
        scores = model.estimator_.decision_function(X)
    tau = np.array([model.thresholds_[name] for name in names])
    margin = model.decision_function(X, sensitive_features=names)
    np.testing.assert_array_equal(margin, scores - tau)
    np.testing.assert_array_equal(
        model.predict(X, sensitive_features=names), np.where(scores > tau, "yes", "no")
    )
    assert (margin == 0).sum() == 2, "the thresholds are scores of two calibration rows, not positive"
    assert model.groups_.tolist() == ["m", "w"]
    assert model.n_features_in_ == 3


def test_scorer_and_thresholds_see_different_rows():
    X, y, groups = table()
    seen = []

    class Spy(LogisticRegression):
        def fit(self, X, y):
            seen.append(X)
            return super().fit(X, y)

        def predict_proba(self, X):
            seen.append(X)
            return super().predict_proba(X)

    FaiREE(Spy(), calibration_size=0.4, random_state=0).fit(X, y, sensitive_features=groups)
    assert [len(part) for part in seen] == [480, 320]
    assert len(np.unique(np.concatenate(seen), axis=0)) == 800


def test_a_scorer_that_is_trained_already_calibrates_on_all_rows():
    X, y, groups = table()
    scorer = GaussianNB().fit(*table(1)[:2])
    model = FaiREE(scorer, prefit=True, alpha=0.15).fit(X, y, sensitive_features=groups)
    assert model.estimator_ is scorer
    same = fair_thresholds(scorer.predict_proba(X)[:, 1], y, groups, alpha=0.15)
    assert model.result_.ranks.tolist() == same.ranks.tolist()


def test_groups_come_from_a_column_unless_they_are_given():
    X, y, groups = table()
    X = np.column_stack([X, groups])
    frame = pd.DataFrame(X, columns=["a", "b", "c", "sex"])
    given = FaiREE(random_state=0).fit(X, y, sensitive_features=groups)
    expected = given.predict(X, sensitive_features=groups)
    for data, column in ((X, 3), (X, -1), (frame, "sex"), (frame, 3)):
        model = FaiREE(sensitive_column=column, random_state=0).fit(data, y)
        np.testing.assert_array_equal(model.predict(data), expected)
        other = model.decision_function(data, sensitive_features=1 - groups)
        assert not np.array_equal(other, model.decision_function(data)), "the keyword wins"


def test_true_gaps_on_fresh_data_are_as_promised():
    """Fifty calibration sets: more than ten breaks have probability 1e-4 even at twice delta."""
    fresh = sample(10_000, (1, 1, 20_000, 20_000))
    breaks = 0
    for seed in range(50):
        found = fair_thresholds(*sample(seed, (100, 100, 80, 120)))
        rates = [(fresh[0][(fresh[1] == 1) & (fresh[2] == a)] > found.thresholds[a]).mean() for a in (0, 1)]
        breaks += abs(rates[0] - rates[1]) > 0.1
    assert breaks <= 10


def test_conforms_to_its_kind(as_a_user):
    reason = "one of its classes has too few of the ten rows for two groups in either half"
    check_estimator(
        Parity(make_pipeline(StandardScaler(), LogisticRegression()), alpha=0.9, delta=0.9, random_state=0),
        expected_failures={"check_fit2d_1feature": reason},
        invariant=["shift X", "scale X"],
    )


SCORES, Y, GROUPS = sample()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((SCORES, Y, GROUPS), {"alpha": 0}, r"alpha must be in \(0, 1\), got 0"),
        ((SCORES, Y, GROUPS), {"alpha": 1.0}, r"alpha must be in \(0, 1\)"),
        ((SCORES, Y, GROUPS), {"delta": 1}, r"delta must be in \(0, 1\)"),
        ((SCORES, Y, GROUPS), {"delta": math.nan}, r"delta must be in \(0, 1\)"),
        (
            (SCORES, Y, GROUPS),
            {"constraint": "fair"},
            "constraint must be one of 'equal_opportunity'.*'fair'",
        ),
        ((SCORES[1:], Y, GROUPS), {}, "one length, got 224, 225 and 225"),
        ((np.where(Y == 1, np.nan, SCORES), Y, GROUPS), {}, "scores must be finite"),
        ((SCORES, Y * 0, GROUPS), {}, "y must have two classes, got 1 class: 0"),
        (
            (SCORES, Y + 2 * GROUPS, GROUPS),
            {},
            "Only binary.* y must have two classes, got 4 classes: 0, 1, 2, 3",
        ),
        ((SCORES, Y, GROUPS + 2 * Y), {}, "groups must have two groups, got 4 groups: 0, 1, 2, 3"),
        ((SCORES, Y, Y), {}, "no case of group 1 has y = 0"),
    ],
)
def test_the_thresholds_refuse_bad_input(as_a_user, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        fair_thresholds(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 1, 5, 0.1), "k0 must be in 1 to n, got rank 0 of n=5"),
        ((1, 5, 6, 5, 0.1), "k1 must be in 1 to n, got rank 6 of n=5"),
        ((1.5, 5, 1, 5, 0.1), "k0 must be integers, got dtype float64"),
        ((1, 5, 1, 5, -0.1), "alpha must be at least 0"),
    ],
)
def test_the_probability_refuses_bad_input(as_a_user, arguments, message):
    with pytest.raises(ValueError, match=message):
        violation_probability(*arguments)


def test_the_estimator_refuses_bad_input(as_a_user):
    X, y, groups = table()
    model = FaiREE(random_state=0)
    with pytest.raises(ValueError, match="sensitive_features must be given"):
        model.fit(X, y)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        model.fit(X, y, sensitive_features=groups[1:])
    with pytest.raises(ValueError, match="sensitive_features must have two groups, got 3 groups: 0, 1, 2"):
        model.fit(X, y, sensitive_features=np.arange(len(y)) % 3)
    with pytest.raises(ValueError, match=r"calibration_size must be in \(0, 1\)"):
        FaiREE(calibration_size=1.0).fit(X, y, sensitive_features=groups)
    with pytest.raises(ValueError, match="give each group two rows of each class to be split, got one"):
        model.fit(
            X, y, sensitive_features=np.where(np.arange(len(y)) == int(y.argmax()), 0, np.where(y, 1, groups))
        )
    with pytest.raises(NotFittedError):
        FaiREE(LogisticRegression(), prefit=True).fit(X, y, sensitive_features=groups)
    with pytest.raises(NotFittedError):
        FaiREE(prefit=True).fit(X, y, sensitive_features=groups)
    with pytest.raises(ValueError, match=r"estimator must know the classes"):
        FaiREE(GaussianNB().fit(X, y + 1), prefit=True).fit(X, y, sensitive_features=groups)
    with pytest.raises(NotFittedError):
        model.predict(X, sensitive_features=groups)
    model.fit(X, y, sensitive_features=groups)
    with pytest.raises(ValueError, match=r"sensitive_features must be among \[0, 1\], got \[2\]"):
        model.predict(X, sensitive_features=groups + 1)
    with pytest.raises(ValueError, match="sensitive_features must be given"):
        model.predict(X)


@pytest.mark.parametrize("gap", [np.nan, None, pd.NA], ids=str)
def test_a_missing_group_is_named_by_its_row(as_a_user, gap):
    rng = np.random.default_rng(0)
    y, a = rng.integers(0, 2, (2, 600))
    x = rng.normal(size=(600, 3)) + y[:, None]
    groups = pd.Series(np.where(a == 1, "u", "v"), dtype=object)
    groups[7] = gap
    with pytest.raises(ValueError, match="sensitive_features must not be missing, got none in row 7"):
        FaiREE(random_state=0).fit(x, y, sensitive_features=groups)
    with pytest.raises(ValueError, match="groups must not be missing, got no value in row 7"):
        fair_thresholds(x[:, 0], y, groups)
    model = FaiREE(random_state=0).fit(x, y, sensitive_features=a)
    with pytest.raises(ValueError, match="sensitive_features must not be missing, got none in row 7"):
        model.predict(x, sensitive_features=groups)
