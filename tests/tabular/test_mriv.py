"""MRIV against exact expectations, the Wald estimator and AIPW; its network against one layer at a time."""

import itertools
import pickle

import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from sklearn.base import BaseEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn
from torch.nn import functional as F

from posterity.tabular import MRIV, MRIVNet, NuisanceNet, mr_pseudo_outcome
from posterity.testing import check_estimator, check_layer

QUICK = {"max_epochs": 3, "batch_size": 256, "random_state": 0}


# the pseudo-outcome, on a population of which every expectation is a finite sum

TAU, PI = np.array([1.5, -2.0, 0.25]), np.array([0.3, 0.5, 0.8])


@pytest.fixture(scope="module")
def population():
    """Return rows x, z, u, a, y, their weights, and the true nuisances of each cell by summing over rows."""
    rows = []
    for x, z, u, a in itertools.product(range(3), *[range(2)] * 3):
        taken = 0.1 + 0.05 * x + 0.4 * z + 0.3 * u  # the hidden u moves treatment and outcome
        weight = (PI[x] if z else 1 - PI[x]) * (0.6 if u else 0.4) * (taken if a else 1 - taken)
        rows.append((x, z, u, a, 1.0 + x + TAU[x] * a + 4.0 * u, weight))
    x, z, _, a, y, weight = np.array(rows).T
    x = x.astype(int)

    def mean(value, arm):
        here = weight * (z == arm)
        return (np.bincount(x, here * value) / np.bincount(x, here))[x]

    truth = {"propensity": PI[x], "mu_y0": mean(y, 0), "mu_a0": mean(a, 0), "tau": TAU[x],
             "delta_a": mean(a, 1) - mean(a, 0)}  # fmt: skip
    return {"x": x, "y": y, "a": a, "z": z, "weight": weight}, truth, (mean(y, 1), mean(a, 1))


def cell_means(rows, nuisances):
    pseudo = mr_pseudo_outcome(rows["y"], rows["a"], rows["z"], **nuisances)
    return np.bincount(rows["x"], rows["weight"] * pseudo) / np.bincount(rows["x"], rows["weight"])


ENOUGH = ({"propensity", "delta_a"}, {"propensity", "tau"}, {"mu_y0", "mu_a0", "tau"})


def test_it_is_unbiased_where_one_of_three_groups_is_right_and_only_there(population):
    """All 32 subsets of nuisances that are right, the others wrong."""
    rows, truth, _ = population
    wrong = {"propensity": 0.43, "mu_y0": 0.7, "mu_a0": 0.37, "delta_a": 0.55, "tau": 0.9}
    for size in range(6):
        for right in map(set, itertools.combinations(truth, size)):
            said = {name: truth[name] if name in right else np.full(24, wrong[name]) for name in truth}
            bias = np.abs(cell_means(rows, said) - TAU).max()
            assert (bias < 1e-12) == any(group <= right for group in ENOUGH), right
            assert bias < 1e-12 or bias > 1e-3


def test_the_labels_of_the_instrument_do_not_matter(population):
    rows, truth, (mu_y1, mu_a1) = population
    tau = np.array([0.0, 3.0, -1.0])[rows["x"]]
    swapped = {**rows, "z": 1 - rows["z"]}
    other = {
        "propensity": 1 - truth["propensity"],
        "mu_y0": mu_y1,
        "mu_a0": mu_a1,
        "delta_a": -truth["delta_a"],
    }
    np.testing.assert_allclose(cell_means(swapped, {**other, "tau": tau}), TAU, atol=1e-12)
    np.testing.assert_allclose(cell_means(rows, {**truth, "tau": tau}), TAU, atol=1e-12)


def draw(n=200, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.integers(0, 2, n)
    return {
        "y": rng.normal(size=n), "a": (rng.random(n) < 0.2 + 0.6 * z).astype(int), "z": z,
        "propensity": rng.uniform(0.2, 0.8, n), "mu_y0": rng.normal(size=n), "mu_a0": rng.uniform(0, 0.4, n),
        "delta_a": rng.uniform(0.3, 0.6, n), "tau": rng.normal(size=n),
    }  # fmt: skip


def test_with_perfect_compliance_it_is_augmented_inverse_propensity_weighting():
    given = draw()
    rng = np.random.default_rng(1)
    mu1, z, y, pi, mu0 = rng.normal(size=200), given["z"], given["y"], given["propensity"], given["mu_y0"]
    given |= {"a": z, "mu_a0": np.zeros(200), "delta_a": np.ones(200), "tau": mu1 - mu0}
    aipw = mu1 - mu0 + z * (y - mu1) / pi - (1 - z) * (y - mu0) / (1 - pi)
    np.testing.assert_allclose(mr_pseudo_outcome(**given), aipw, atol=1e-12)


def test_arrays_and_tensors_agree_and_gradients_flow():
    given = draw(6)
    floats = ["y", "propensity", "mu_y0", "mu_a0", "delta_a", "tau"]
    tensors = {name: torch.tensor(value) for name, value in given.items()}
    torch.testing.assert_close(mr_pseudo_outcome(**tensors), torch.tensor(mr_pseudo_outcome(**given)))
    leaves = [tensors[name].requires_grad_() for name in floats]

    def value(*leaves):
        return mr_pseudo_outcome(**{**tensors, **dict(zip(floats, leaves, strict=True))})

    assert torch.autograd.gradcheck(value, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_tensors_and_autocast_are_computed_wide(dtype):
    given = {name: torch.tensor(value) for name, value in draw(300).items()}
    given = {name: each.to(dtype) if each.is_floating_point() else each for name, each in given.items()}
    exact = mr_pseudo_outcome(**{name: each.double() for name, each in given.items()})
    with torch.autocast("cpu", enabled=dtype is torch.float32):
        got = mr_pseudo_outcome(**given)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps * 4, atol=1e-3)
    whole = {
        name: torch.ones(3, dtype=torch.int64) for name in ("y", "a", "z", "mu_y0", "mu_a0", "delta_a", "tau")
    }
    assert mr_pseudo_outcome(**whole, propensity=torch.full((3,), 0.5)).tolist() == [1, 1, 1]


# the network


def plain(net, x):
    """Return the seven outputs, a layer and a network at a time."""

    def run(stack, k, x):
        for layer in range(3):
            weight, bias = getattr(stack, f"weight{layer}")[k], getattr(stack, f"bias{layer}")[k, 0]
            x = F.linear(x.relu() if layer else x, weight.T, bias)
        return x

    inner = [run(net.representations, k, x) for k in range(2)]
    return [run(net.heads, k, inner[k > 2])[:, 0] for k in range(7)]


@pytest.fixture
def batch():
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((12, 3), (12,)))
    a, z = (torch.rand(2, 12, generator=rng) < 0.5).long()
    return x, y, a, z


def network(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NuisanceNet(3, **options).double()


def test_the_batched_network_is_nine_networks_a_layer_at_a_time(batch):
    net, (x, y, a, z) = network(), batch
    pi, a1, a0, y1, y0, b1, b0 = plain(net, x)
    said = net(x)
    for name, logit in {"pi": pi, "mu_a1": a1, "mu_a0": a0, "mu_a1_tau": b1, "mu_a0_tau": b0}.items():
        torch.testing.assert_close(getattr(said, name), logit.sigmoid())
    torch.testing.assert_close((said.mu_y1, said.mu_y0), (y1, y0))
    outcome = torch.where(z == 1, said.mu_y1, said.mu_y0)
    first, second = (
        torch.where(z == 1, said.mu_a1, said.mu_a0),
        torch.where(z == 1, said.mu_a1_tau, said.mu_a0_tau),
    )
    loss = F.mse_loss(outcome, y) + sum(
        F.binary_cross_entropy(chance, each.double())
        for chance, each in ((said.pi, z), (first, a), (second, a))
    )
    torch.testing.assert_close(net.loss(x, y, a, z), loss)
    parameters = list(net.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(net.loss(x, y, a, z), parameters),
        torch.autograd.grad(loss, parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_the_two_groups_of_heads_share_no_weight(batch):
    net, x = network(), batch[0]
    said = net(x)
    of_instrument = torch.autograd.grad(
        said.pi.sum() + said.mu_a1.sum() + said.mu_a0.sum(), net.representations.weight0, retain_graph=True
    )[0]
    of_outcome = torch.autograd.grad(sum(each.sum() for each in said[3:]), net.representations.weight0)[0]
    assert (of_instrument[0] != 0).any() and (of_instrument[1] == 0).all()
    assert (of_outcome[1] != 0).any() and (of_outcome[0] == 0).all()


class Stacked(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return torch.stack(self.net(x))


def test_the_network_conforms_to_its_kind(as_a_user, batch):
    check_layer(Stacked(network().float()), batch[0].float(), shape=(7, 12))


def test_the_loss_is_wide_drops_units_in_training_only_and_takes_bool(batch):
    x, y, a, z = batch
    net = network(dropout=0.5)
    assert net.loss(x, y, a, z) != net.loss(x, y, a, z)
    net.eval()
    torch.testing.assert_close(net.loss(x, y, a.bool(), z.bool()), net.loss(x, y, a.float(), z.float()))
    narrow = net.bfloat16()
    wide = NuisanceNet(3).double().eval()
    wide.load_state_dict(narrow.state_dict())
    got = narrow.loss(x.bfloat16(), 100 * y, a, z)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(
        got.double(), wide.loss(x.bfloat16().double(), 100 * y, a, z), rtol=0.02, atol=0
    )


# the estimators


def table(n=400, seed=0, effect=lambda x: 2.0 * x[:, 0]):
    rng = np.random.default_rng(seed)
    X, hidden = rng.normal(size=(n, 2)), rng.normal(size=n)
    z = rng.integers(0, 2, n)
    a = (1.5 * z - 0.75 + hidden > 0).astype(int)
    return X, effect(X) * a + 0.7 * hidden + X[:, 1], a, z


X, Y, A, Z = table()
LINEAR = {"outcome": LinearRegression(), "treatment_model": LogisticRegression(),
          "instrument_model": LogisticRegression(), "final": LinearRegression()}  # fmt: skip


@pytest.mark.parametrize("initial", ["wald", "2sls"])
def test_saturated_models_give_the_wald_estimate_of_each_cell(initial):
    rng = np.random.default_rng(0)
    cell, z = rng.integers(0, 4, 3_000), rng.integers(0, 2, 3_000)
    a = (rng.random(3_000) < 0.2 + 0.1 * cell + 0.3 * z).astype(int)
    y = rng.normal(size=3_000) + cell * a
    trees = {"outcome": DecisionTreeRegressor(), "treatment_model": DecisionTreeClassifier(),
             "instrument_model": DecisionTreeClassifier(), "final": DecisionTreeRegressor()}  # fmt: skip
    model = MRIV(initial, **trees, n_folds=1, clip_propensity=0.0, min_compliance=1e-6, random_state=0)
    model.fit(cell[:, None], y, treatment=a, instrument=z)
    means = pd.DataFrame({"y": y, "a": a}).groupby([cell, z]).mean().unstack()
    wald = (means["y"][1] - means["y"][0]) / (means["a"][1] - means["a"][0])
    np.testing.assert_allclose(model.predict(np.arange(4)[:, None]), wald, atol=1e-10)
    assert model.n_clipped_ == 0


def test_two_stage_least_squares_is_the_textbook_formula():
    plug_in = MRIV(**LINEAR, n_folds=1).fit(X, Y, A, Z).plug_in(X)
    instruments, regressors = (np.column_stack([np.ones(400), X, each]) for each in (Z, A))
    expected = np.linalg.solve(instruments.T @ regressors, instruments.T @ Y)[-1]
    np.testing.assert_allclose(plug_in, expected)


class Seen(BaseEstimator):
    """A first estimate that keeps the rows it was fitted on."""

    def fit(self, X, y, treatment, instrument):
        self.rows_ = {tuple(row) for row in X}
        return self

    def predict(self, X):
        assert not self.rows_ & {tuple(row) for row in X} or not self.__class__.strict
        return np.zeros(len(X))


class Spy(LogisticRegression):
    def fit(self, X, y):
        self.rows_ = {tuple(row) for row in X}
        return super().fit(X, y)

    def predict_proba(self, X):
        Spy.asked.append((self.rows_, {tuple(row) for row in X}))
        return super().predict_proba(X)


def test_no_row_meets_a_model_that_saw_it_nor_the_two_groups_the_same_rows():
    Seen.strict, Spy.asked = True, []
    model = MRIV(Seen(), **{**LINEAR, "treatment_model": Spy(), "instrument_model": Spy()}, random_state=0)
    model.fit(X, Y, A, Z)
    assert len(Spy.asked) == 3 * 4  # each fold: mu_0A, and propensity, mu_0A, mu_1A of the other
    assert not any(saw & met for saw, met in Spy.asked)
    of_outcome = [asked[0] for asked in Spy.asked[::4]]
    for k, learned in enumerate(of_outcome):
        assert learned <= model.nuisance_[(k + 1) % 3]["initial"].rows_
        assert all(not saw & learned for saw, _ in Spy.asked[4 * k + 1 : 4 * k + 4])
    assert sum(len(fold["initial"].rows_) for fold in model.nuisance_) == 400
    Seen.strict = False
    np.testing.assert_array_equal(model.plug_in(X), 0)


@pytest.mark.parametrize("make", [
    lambda: MRIV(random_state=0), lambda: MRIV("wald", **LINEAR, random_state=0),
    lambda: MRIVNet(lr=2e-2, batch_size=256, max_epochs=20, random_state=0), lambda: MRIVNet(lr=2e-2, batch_size=256, max_epochs=20, n_folds=3, random_state=0),
])  # fmt: skip
def test_confounded_effects_of_each_row_are_found(make):
    """One effect for all is off by 2 on average."""
    X, y, a, z = table(1_500)
    model = make().fit(X, y, treatment=a, instrument=z)
    error = np.sqrt(np.mean((model.predict(X) - 2 * X[:, 0]) ** 2))
    assert error < 1
    assert np.corrcoef(model.pseudo_outcome_, X[:, 0])[0, 1] > 0.1
    assert model.propensity_ == pytest.approx(0.5, abs=0.35)
    assert model.compliance_.mean() == pytest.approx(a[z == 1].mean() - a[z == 0].mean(), abs=0.1)
    assert len(model.final_) == model.n_folds


@pytest.mark.parametrize(
    "model",
    [MRIV(**LINEAR, random_state=0), MRIV("wald", **LINEAR, random_state=0, n_folds=1), MRIVNet(**QUICK)],
)
def test_effects_are_in_units_of_the_outcome_and_the_kind_of_table_does_not_matter(model):
    plain = model.fit(X, Y, A, Z).predict(X)
    again = model.fit(pd.DataFrame(X, columns=["u", "v"]), Y, A.astype(bool), pd.Series(Z)).predict(
        pd.DataFrame(X, columns=["u", "v"])
    )
    np.testing.assert_array_equal(again, plain)  # and the same random_state gives the same
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(model)).predict(pd.DataFrame(X, columns=["u", "v"])), plain
    )
    moved = model.fit(X, 8 * Y + 1024, A, Z).predict(X)
    np.testing.assert_allclose(moved, 8 * plain, rtol=1e-4, atol=1e-4)
    model.fit(X, 1e12 * Y, A, Z)
    np.testing.assert_allclose(model.predict(X), 1e12 * plain, rtol=1e-3, atol=1e9)
    constant = model.fit(X, np.full(400, 0.1), A, Z).predict(X)
    assert np.isfinite(constant).all()


def test_clipping_keeps_signs_and_is_counted():
    """The nudge pushes half of the people away from the treatment."""
    rng = np.random.default_rng(0)
    x, z = rng.integers(0, 2, 2_000), rng.integers(0, 2, 2_000)
    z = np.where(rng.random(2_000) < 0.02, 0, z)
    a = (rng.random(2_000) < np.where(x == 1, 0.1 + 0.8 * z, 0.5 - 0.1 * z)).astype(int)
    trees = {
        "outcome": DecisionTreeRegressor(),
        "treatment_model": DecisionTreeClassifier(),
        "instrument_model": DecisionTreeClassifier(),
    }
    model = MRIV(**trees, n_folds=1, min_compliance=0.3).fit(x[:, None], rng.normal(size=2_000), a, z)
    assert np.unique(model.compliance_[x == 0]).tolist() == [-0.3]
    assert (model.compliance_[x == 1] > 0.6).all()
    assert model.n_clipped_ == (x == 0).sum()
    model.set_params(clip_propensity=0.5).fit(x[:, None], rng.normal(size=2_000), a, z)
    assert (model.propensity_ == 0.5).all() and model.n_clipped_ == 2_000


@pytest.mark.parametrize("model", [MRIV(n_folds=3, **LINEAR), MRIVNet(**QUICK)])
def test_compliance_may_be_one_sided_or_perfect(model):
    sided = A * Z
    assert np.isfinite(model.fit(X, Y, sided, Z).predict(X)).all()
    assert np.isfinite(model.fit(X, Y, Z, Z).predict(X)).all()
    if isinstance(model, MRIV):
        np.testing.assert_array_equal(model.compliance_, 1)


def test_treatment_and_instrument_are_routed_through_a_pipeline():
    with sklearn.config_context(enable_metadata_routing=True):
        piped = make_pipeline(StandardScaler(), MRIV(**LINEAR, random_state=0))
        got = piped.fit(X, Y, treatment=A, instrument=Z).predict(X)
    scaled = StandardScaler().fit_transform(X)
    expected = MRIV(**LINEAR, random_state=0).fit(scaled, Y, A, Z).predict(scaled)
    np.testing.assert_array_equal(got, expected)


def test_fitting_leaves_the_global_generators_alone():
    before, drawn = torch.get_rng_state(), np.random.get_state()[1].copy()
    MRIVNet(**QUICK, second_stage_dropout=0.3).fit(X, Y, A, Z)
    MRIV(**LINEAR, random_state=0).fit(X, Y, A, Z)
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], drawn)


class Derived(BaseEstimator):
    """The estimator as scikit-learn's suite can call it: treatment and instrument are made of the rows.

    The suite passes no further argument to ``fit``. They go by the number of the row, so that each arm
    has two rows of ten.
    """

    def __init__(self, kind="net", random_state=0):
        self.kind = kind
        self.random_state = random_state

    def fit(self, X, y=None):
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=10)
        if y is None:
            y = X[:, 0]
        number = np.arange(len(X))
        z, a = number % 2, np.isin(number % 10, [1, 2, 5, 8, 9]).astype(int)
        made = {
            "net": MRIVNet(max_epochs=1, batch_size=256, head_size=4, random_state=self.random_state),
            "models": MRIV(**LINEAR, n_folds=1, random_state=self.random_state),
        }[self.kind]
        self.model_ = made.set_params(min_compliance=0.01).fit(X, y, treatment=a, instrument=z)
        return self

    def predict(self, X):
        check_is_fitted(self)
        return self.model_.predict(validate_data(self, X, reset=False, dtype=np.float64))


@pytest.mark.parametrize("kind", ["net", "models"])
def test_estimators_conform_to_their_kind(as_a_user, kind):
    check_estimator(Derived(kind))


HALF = {name: np.asarray(value, dtype=float) for name, value in draw(4).items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.zeros(3)}, r"a must have shape \(3\) for y, got \(4,\)"),
        ({"tau": np.zeros((4, 1))}, r"tau must have shape \(4\) for y, got \(4, 1\)"),
        ({"y": np.zeros((4, 1))}, r"y must have shape \(any\), got \(4, 1\)"),
        ({"z": np.full(4, 2)}, "z must be 0 or 1, got values from 2 to 2"),
        ({"a": np.full(4, 0.5)}, "a must be 0 or 1"),
        ({"propensity": np.array([0.5, 0.5, 0.5, 1.0])}, r"propensity must be in \(0, 1\), got values from 0.5 to 1"),
        ({"delta_a": np.array([0.5, 0.0, 0.5, 0.5])}, "delta_a must not be 0, row 1 is"),
        ({"mu_y0": np.array([0, np.nan, 0, 0])}, "mu_y0 must be finite"),
        ({"tau": np.array(list("abcd"))}, "tau must hold numbers"),
        ({"y": torch.zeros(4)}, r"all tensors|must be tensors, or all arrays, got tensors only for \['y'\]"),
    ],
)  # fmt: skip
def test_a_pseudo_outcome_of_bad_input_is_refused_by_name(as_a_user, change, message):
    with pytest.raises(ValueError, match=message):
        mr_pseudo_outcome(**{**HALF, **change})


BOTH = (MRIV(**LINEAR), MRIVNet(**QUICK))
RARE = np.where(np.arange(400) == np.flatnonzero((Z == 1) & (A == 1))[0], 0, np.maximum(A, Z))


@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"treatment": None}, "treatment must be given, an array of 400 values of 0 and 1, got None"),
        ({"instrument": None}, "instrument must be given"),
        ({"treatment": A[:5]}, r"treatment must have shape \(400,\) for X, got \(5,\)"),
        ({"instrument": Z + 1}, "instrument must be 0 or 1, got 2 in row"),
        ({"instrument": Z * 0.5}, "instrument must be 0 or 1, got 0.5 in row"),
        ({"treatment": np.where(A == 1, np.nan, 0)}, "treatment must be 0 or 1, got nan in row"),
        ({"treatment": np.where(A == 1, "yes", "no")}, "treatment must be 0 or 1, got dtype"),
        ({"instrument": np.ones(400)}, "instrument must take both values, got only 1: it never changes"),
        ({"treatment": np.zeros(400)}, "treatment must take both values, got only 0: it never changes"),
        ({"treatment": RARE}, "instrument 1 with treatment 0 must have no row, or 2 rows a fold, got 1 for n_folds="),
        ({"treatment": np.arange(400) % 2, "instrument": np.arange(400) // 2 % 2}, "instrument must move .*a mean compliance of"),
        ({"X": np.where(X > 2, np.nan, X)}, "X contains NaN"),
        ({"y": np.where(Y > 2, np.inf, Y)}, "y contains infinity"),
        ({"n_folds": 2}, "n_folds must be one of 1, 3, got 2"),
        ({"clip_propensity": 0.6}, r"clip_propensity must be in \[0, 0.5\], got 0.6"),
        ({"min_compliance": 0.0}, r"min_compliance must be in \(0, 1\], got 0.0"),
    ],
)  # fmt: skip
def test_estimators_refuse_bad_input_by_name(as_a_user, model, change, message):
    given = {"X": X, "y": Y, "treatment": A, "instrument": Z}
    data = {name: change.get(name, value) for name, value in given.items()}
    options = {name: value for name, value in change.items() if name not in given}
    with pytest.raises(ValueError, match=message):
        sklearn.clone(model).set_params(**options).fit(**data)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MRIV("ols").fit(X, Y, A, Z), "initial must be one of '2sls', 'wald', got 'ols'"),
        (lambda: MRIV(3).fit(X, Y, A, Z), "initial must have the method fit, got 3"),
        (lambda: MRIV(treatment_model=LinearSVC()).fit(X, Y, A, Z), "treatment_model must have the method predict_proba"),
        (lambda: MRIV(instrument_model=LinearRegression()).fit(X, Y, A, Z), "instrument_model must have the method predict_proba"),
        (lambda: MRIVNet(lr=0.0).fit(X, Y, A, Z), "lr must be greater than 0"),
        (lambda: MRIVNet(max_epochs=0).fit(X, Y, A, Z), "max_epochs must be an integer of at least 1"),
        (lambda: MRIVNet(dropout=1.0).fit(X, Y, A, Z), r"dropout must be in \[0, 1\)"),
        (lambda: MRIVNet(**{**QUICK, "lr": 1e30}).fit(X, Y, A, Z), "lr must be small enough"),
        (lambda: MRIV(**LINEAR).fit(X, Y, A, Z).predict(X[:, :1]), "X has 1 features"),
        (lambda: MRIV(**LINEAR).fit(pd.DataFrame(X, columns=["u", "v"]), Y, A, Z).predict(pd.DataFrame(X, columns=["u", "w"])), "feature names"),
        (lambda: NuisanceNet(0), "in_features must be an integer of at least 1"),
        (lambda: NuisanceNet(3)(torch.zeros(4, 2)), r"x must have shape \(any, 3\), got \(4, 2\)"),
        (lambda: NuisanceNet(3)(torch.zeros(4, 3).long()), "x must be a floating-point"),
        (lambda: NuisanceNet(1).loss(torch.zeros(2, 1), torch.zeros(3), torch.zeros(2), torch.zeros(2)), r"y must have shape \(2\) for x"),
        (lambda: NuisanceNet(1).loss(torch.zeros(2, 1), torch.zeros(2), torch.full((2,), 2), torch.zeros(2)), r"a must be 0 or 1, got \[2\]"),
        (lambda: NuisanceNet(1).loss(torch.zeros(0, 1), *[torch.zeros(0)] * 3), "x must have at least one row"),
    ],
)  # fmt: skip
def test_refuses_bad_parameters_and_shapes_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
