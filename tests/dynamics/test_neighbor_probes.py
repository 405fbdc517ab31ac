"""Probes by nearest neighbours against a double loop, scikit-learn, and features made by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from posterity.dynamics import (
    FiniteViews,
    MemorizationProfile,
    knn_predict,
    knn_probe,
    layer_probe,
    memorization_profile,
    memorize,
    neighbor_probes,
    randomize_labels,
)
from posterity.testing import check_instrument


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=rng(seed)).to(dtype)


def whole(*shape, seed=0):
    """Return whole numbers, of which many are equally far from each other."""
    return torch.randint(-2, 3, shape, generator=rng(seed)).float()


def labels(n, k=4, seed=9):
    return torch.randint(k, (n,), generator=rng(seed))


def by_hand(features, y, test, ks, metric):
    """Return labels for each k by a double loop: distances in float64, to nine digits, then the index."""
    found = []
    for q in test.double().tolist():
        near = []
        for at, r in enumerate(features.double().tolist()):
            size = math.hypot(*q) * math.hypot(*r)
            dot = sum(a * b for a, b in zip(q, r, strict=True))
            far = math.dist(q, r) if metric == "euclidean" else 1 - (dot / size if size else 0.0)
            near.append((round(far, 9), at))
        votes = [int(y[at]) for _, at in sorted(near)]
        some = [votes[:k] for k in ks]
        found.append([max(v, key=lambda label, v=v: (v.count(label), -v.index(label))) for v in some])
    return torch.tensor(found).T


# --- neighbours ---


@pytest.mark.filterwarnings("ignore:features has")
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [normal, whole])
def test_labels_are_those_of_a_double_loop_ties_among_them(metric, dtype, make):
    features, test, y = make(40, 3).to(dtype), make(15, 3, seed=1).to(dtype), labels(40)
    ks = (1, 7, 40)
    for k, expected in zip(ks, by_hand(features, y, test, ks, metric), strict=True):
        for chunk in (4096, 7):
            assert torch.equal(knn_predict(features, y, test, k=k, metric=metric, chunk_size=chunk), expected)
    assert y.bincount().topk(2).values.diff() < 0 and (expected == y.bincount().argmax()).all()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_samples_agree_with_scikit_learn_where_products_of_float32_choose_candidates(metric, offset):
    features, test, y = normal(700, 24) + offset, normal(200, 24, seed=1) + offset, labels(700)
    peer = KNeighborsClassifier(1, metric=metric, algorithm="brute").fit(features.double(), y)
    for chunk in (4096, 130):
        got = knn_predict(features, y, test, k=1, metric=metric, chunk_size=chunk)
        assert np.array_equal(got.numpy(), peer.predict(test.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_of_many_equal_samples_the_first_are_the_neighbours(metric, dtype):
    """More copies than there are candidates: those beyond would be chosen by the order of a sort."""
    features = normal(3, 5, dtype=dtype).repeat(100, 1)
    y = torch.arange(300)
    test = features[:3] * (7 if metric == "cosine" else 1)
    for k in (1, 5):
        assert knn_predict(features, y, test, k=k, metric=metric).tolist() == [0, 1, 2]
    assert knn_predict(features, (y < 9).long(), test, k=3, metric=metric).tolist() == [1, 1, 1]
    assert knn_predict(features, (y < 9).long(), test, k=7, metric=metric).tolist() == [0, 0, 0]


def test_candidates_of_coarse_products_are_settled_in_float64():
    """Features that float32 products cannot tell apart, all within a hair of one direction."""
    features = 1 + 1e-5 * normal(400, 8, dtype=torch.float64)
    features, test = features.float(), (1 + 1e-5 * normal(50, 8, seed=1, dtype=torch.float64)).float()
    y = torch.arange(400)
    for metric in ("cosine", "euclidean"):
        expected = knn_predict(features.double(), y, test.double(), k=1, metric=metric)
        assert torch.equal(expected, by_hand_far(features, y, test, metric))
        assert torch.equal(knn_predict(features, y, test, k=1, metric=metric), expected)


def by_hand_far(features, y, test, metric):
    """Return the label of the nearest, from differences of unit rows, which do not cancel."""
    r, q = features.double(), test.double()
    if metric == "cosine":
        r, q = nn.functional.normalize(r), nn.functional.normalize(q)
    return y[(q[:, None] - r).square().sum(2).argmin(1)]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_rotations_and_scales_change_nothing(metric):
    features, test, y = normal(80, 6), normal(50, 6, seed=1), labels(80)
    expected = knn_predict(features, y, test, k=5, metric=metric)
    turn = torch.linalg.qr(normal(6, 6, seed=2))[0]
    assert torch.equal(knn_predict(features @ turn, y, test @ turn, k=5, metric=metric), expected)
    for scale in (1e-30, 1e30):
        assert torch.equal(knn_predict(features * scale, y, test * scale, k=5, metric=metric), expected)
    if metric == "cosine":
        sizes = torch.logspace(-12, 12, 80)[:, None]
        assert torch.equal(knn_predict(features * sizes, y, test * 3, k=5), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_features_and_autocast_count_as_the_numbers_that_they_are(dtype):
    features, test, y = normal(90, 6, dtype=dtype), normal(50, 6, seed=1, dtype=dtype), labels(90)
    expected = knn_predict(features.double(), y, test.double(), k=5)
    assert torch.equal(knn_predict(features, y, test, k=5), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(knn_predict(features.float(), y, test.float(), k=5), expected)


def test_products_of_low_precision_are_seen_to_be_so(monkeypatch):
    """As a GPU makes them if it is allowed to: candidates are then doubted, and the result is the same."""
    features, test, y = normal(500, 16), normal(100, 16, seed=1), torch.arange(500)
    expected = knn_predict(features, y, test, k=1)
    space = neighbor_probes._Space
    make = space.__init__

    def coarse(self, *args):
        make(self, *args)
        self.refs.quick = self.refs.quick.bfloat16().float()

    monkeypatch.setattr(space, "__init__", coarse)
    assert torch.equal(knn_predict(features, y, test, k=1), expected)


def test_the_cosine_with_a_row_of_zeros_is_zero():
    features = torch.tensor([[-1.0, 0.1], [0.0, 0.0], [1.0, 0.0]])
    y = torch.tensor([0, 1, 2])
    with pytest.warns(UserWarning, match="features has 1 rows of zeros"):
        assert knn_predict(features, y, torch.tensor([[1.0, -1.0], [-1.0, -11.0]]), k=1).tolist() == [2, 1]
    with pytest.warns(UserWarning, match="2 rows of zeros"):  # all are as near: the first
        assert knn_predict(features, y, torch.zeros(1, 2), k=1).tolist() == [0]


def test_labels_keep_their_dtype_and_no_test_sample_is_none():
    y = torch.tensor([-5, 10**12, 3])
    assert knn_predict(torch.eye(3), y, 2 * torch.eye(3), k=1).tolist() == y.tolist()
    empty = knn_predict(torch.eye(3), y.int(), torch.empty(0, 3), k=1)
    assert empty.shape == (0,) and empty.dtype == torch.int32


# --- accuracy ---


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("make", [normal, whole])
@pytest.mark.filterwarnings("ignore:features has")
def test_leaving_one_out_is_a_call_without_each_sample(metric, make):
    features, y = make(30, 3), labels(30, 3)
    for k in (1, 6, 29):
        right = 0
        for i in range(30):
            kept = torch.arange(30) != i
            found = knn_predict(features[kept], y[kept], features[i : i + 1], k=k, metric=metric)
            right += int(found[0] == y[i])
        for chunk in (4096, 9):
            assert float(knn_probe(features, y, k=k, metric=metric, chunk_size=chunk)) == right / 30


def test_accuracy_is_the_share_of_labels_found_and_one_for_duplicates():
    features, y = normal(40, 5), labels(40)
    test, y_test = normal(30, 5, seed=1), labels(30, seed=2)
    share = (knn_predict(features, y, test, k=3) == y_test).double().mean()
    probe = knn_probe(features, y, test, y_test, k=3)
    assert probe == share and probe.dtype == torch.float64 and probe.shape == ()
    assert knn_probe(features.repeat(2, 1), y.repeat(2), k=1) == 1
    assert knn_probe(features, y, features, y, k=1) == 1


# --- layers ---


class Net(nn.Module):
    """Layers whose outputs have channels and pixels, a sequence, a tuple; it counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.inputs, self.conv, self.norm = nn.Identity(), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
        self.rnn = nn.GRU(2, 4, batch_first=True)
        self.unused, self.head = nn.Identity(), nn.Linear(4, 3)

    def forward(self, x):
        self.calls += 1
        self.norm(self.conv(x))
        sequence, _ = self.rnn(self.inputs(x.flatten(2).mT))
        return self.head(sequence[:, -1])


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def pictures(n=40, seed=0):
    return normal(n, 2, 4, 4, seed=seed), labels(n, 3, seed=seed)


def test_each_layer_is_probed_by_its_features():
    model, (x, y), (x_test, y_test) = net(), pictures(), pictures(30, seed=1)
    got = layer_probe(model, ["head", "norm", "rnn", "conv"], x, y, x_test, y_test, k=3, batch_size=7)
    model.eval()
    with torch.no_grad():

        def conv(x):
            return model.conv(x).mean((2, 3))

        def rnn(x):
            return model.rnn(x.flatten(2).mT)[0].flatten(1)

        of = {
            "head": model,
            "norm": lambda x: model.norm(model.conv(x)).mean((2, 3)),
            "rnn": rnn,
            "conv": conv,
        }
        for name, features in of.items():
            assert got[name] == float(knn_probe(features(x), y, features(x_test), y_test, k=3))
    assert list(got) == ["head", "norm", "rnn", "conv"]


def test_an_identity_on_the_inputs_is_a_probe_of_the_inputs():
    model = nn.Sequential(nn.Identity(), nn.Linear(5, 2))
    x, y, x_test, y_test = normal(40, 5), labels(40), normal(30, 5, seed=1), labels(30, seed=2)
    for metric in ("cosine", "euclidean"):
        got = layer_probe(model, ["0"], x, y, x_test, y_test, k=5, metric=metric)
        assert got == {"0": float(knn_probe(x, y, x_test, y_test, k=5, metric=metric))}


def test_features_are_those_before_the_next_layer_works_in_place():
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Linear(2, 2))
    x, y, x_test, y_test = normal(40, 2), labels(40), normal(30, 2, seed=1), labels(30, seed=2)
    kept = x.clone()
    for got in (
        layer_probe(model, ["0"], x, y, x_test, y_test, k=1)["0"],
        float(memorization_profile(model, ["0"], x, y, y, x_test, y_test, k=1).signal),
    ):
        assert got == float(knn_probe(x, y, x_test, y_test, k=1))
    assert torch.equal(x, kept)


def test_integers_go_into_a_model_that_takes_them():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randint(6, (20, 3), generator=rng()), labels(20)
    assert set(layer_probe(model, ["0", ""], x, y, x, y, k=1)) == {"0", ""}
    assert memorization_profile(model, ["0"], x, y, y, x, y, k=1).input_signal >= 0.5


def test_probing_leaves_a_model_as_it_was(as_a_user):
    x, y = normal(9, 3), labels(9)
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    names = ["0", "3"]
    check_instrument(
        lambda model, x: layer_probe(model, names, x, y, x[::2], y[::2], k=3), model, x, chooses=True
    )

    def profile(model, x):
        return memorization_profile(
            model, names, x, y, y.flip(0), x[::2], y[::2], k=3, augment=jitter, n_views=2, generator=rng()
        )

    check_instrument(profile, model, x, chooses=True)


def test_what_a_module_writes_to_its_buffers_does_not_reach_the_model():
    model, (x, y) = net(), pictures(12)
    layer_probe(model, ["head"], x, y, x, y, k=1)
    memorization_profile(model, ["head"], x, y, y, x, y, k=1, augment=jitter)
    assert model.calls == 0 and model.norm.num_batches_tracked == 0 and model.training


# --- profile ---


def jitter(x, generator=None):
    return x + 0.1 * torch.randn(x.shape, generator=generator).to(x)


@pytest.mark.parametrize("bank", [False, True])
def test_a_profile_is_what_its_parts_are_by_hand(bank):
    x, y, noisy = normal(24, 5), labels(24, 3), labels(24, 3, seed=4)
    x_test, y_test = normal(20, 5, seed=1), labels(20, 3, seed=2)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    augment = FiniteViews(x, jitter, 2, generator=rng(3)) if bank else jitter
    got = memorization_profile(
        model, ["1", "2"], x, y, noisy, x_test, y_test, k=3, augment=augment, n_views=3, generator=rng()
    )
    draws = rng()
    index = torch.arange(24)
    views = [x, *(augment(index if bank else x, generator=draws) for _ in range(3))]
    for at, layers in enumerate((model[:2], model)):
        with torch.no_grad():
            features, test = [layers(view) for view in views], layers(x_test)
        assert got.signal[at] == knn_probe(features[0], y, test, y_test, k=3)
        right = 0
        for i in range(24):
            others = index != i
            pool = torch.cat([view[others] for view in features])
            right += int(
                knn_predict(pool, noisy[others].repeat(4), features[0][i : i + 1], k=3)[0] == noisy[i]
            )
        assert got.noise[at] == right / 24
        unit = nn.functional.normalize(torch.stack(features, 1).double(), dim=2)
        cosines = torch.einsum("iad,jbd->ijab", unit, unit)
        same = torch.eye(24, dtype=torch.bool)
        within = cosines[same][:, ~torch.eye(4, dtype=torch.bool)].mean()
        assert float(got.invariance[at]) == pytest.approx(float(within - cosines[~same].mean()), abs=1e-6)
    assert got.input_signal == float(knn_probe(x, y, x_test, y_test, k=3))
    assert got.layers == ("1", "2")


def test_without_augmentation_the_noise_is_of_other_samples_and_nothing_is_drawn():
    x, y = normal(30, 4), labels(30)
    model = nn.Sequential(nn.Identity())
    state = torch.get_rng_state()
    got = memorization_profile(model, ["0"], x, y, y.flip(0), x, y, k=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert got.noise[0] == knn_probe(x, y.flip(0), k=3)
    assert math.isnan(got.invariance[0])


def test_views_of_the_sample_itself_do_not_tell_its_label():
    """Far apart, and labelled at random: only a sample's own views could have its label, more often than chance has it."""
    x, noisy = 10 * normal(300, 8), labels(300)
    model = nn.Sequential(nn.Identity())
    got = memorization_profile(model, ["0"], x, noisy, noisy, x, noisy, k=3, augment=jitter, generator=rng())
    assert float(got.noise) == pytest.approx(0.25, abs=0.1)
    assert float(got.invariance) > 0.9


def test_a_memorised_network_splits_where_samples_gather_by_noisy_labels():
    y = torch.arange(120) % 3
    x = 3 * torch.eye(6)[y] + normal(120, 6)
    noisy = randomize_labels(y[:60], n_classes=3, generator=rng())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 3),
        )
    assert memorize(model, x[:60], noisy, augment=None, n_steps=600, stop_at=1.0, generator=rng()).memorized
    got = memorization_profile(model, ["1", "3", "5", "6"], x[:60], y[:60], noisy, x[60:], y[60:], k=5)
    assert got.signal[0] > got.noise[0] and got.noise[-1] > max(got.signal[-1], 0.9)
    assert got.split() in ("1", "3", "5")


@pytest.mark.parametrize(
    ("noise", "layer"), [([0.1, 0.2, 0.9], "b"), ([0.1, 0.9, 0.2], "a"), ([0.5, 0.5, 0.5], "c"), ([0.6, 0.1, 0.9], "input")]
)  # fmt: skip
def test_the_split_is_the_last_layer_before_the_noise_exceeds_the_signal(noise, layer):
    half = torch.full((3,), 0.5)
    assert MemorizationProfile(("a", "b", "c"), half, torch.tensor(noise), half, 0.5).split() == layer


# --- bad input ---


F, Y = normal(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
LINEAR = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def probe(model=LINEAR, layers=("0",), x=F, y=Y, x_test=F, y_test=Y, k=2, **options):
    return layer_probe(model, layers, x, y, x_test, y_test, k=k, **options)


def profile(layers=("0",), x=F, k=2, **options):
    return memorization_profile(LINEAR, layers, x, Y, Y, F, Y, k=k, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: knn_predict(F, Y, F, k=7), "k must be at most the number of samples, 6, got 7"),
        (lambda: knn_predict(F, Y, F, k=0), "k must be an integer of at least 1"),
        (lambda: knn_predict(F, Y, F[:, 1:], k=1), r"features_test must have shape \(any, 3\) for features, got \(6, 2\)"),
        (lambda: knn_predict(F, Y[1:], F, k=1), r"y must have shape \(6\)"),
        (lambda: knn_predict(F, Y.float(), F, k=1), "y must hold class indices"),
        (lambda: knn_predict(F.int(), Y, F, k=1), "features must be a floating-point tensor"),
        (lambda: knn_predict(F[0], Y, F, k=1), "features must have shape"),
        (lambda: knn_predict(F, Y, F / 0, k=1), "features_test must be finite"),
        (lambda: knn_predict(F * torch.nan, Y, F, k=1), "features must be finite"),
        (lambda: knn_predict(F, Y, F, k=1, metric="dot"), "metric must be one of 'cosine', 'euclidean'"),
        (lambda: knn_predict(F, Y, F, k=1, chunk_size=0), "chunk_size must be an integer of at least 1"),
        (lambda: knn_probe(F, Y, F), "features_test and y_test must be given together, got no y_test"),
        (lambda: knn_probe(F, Y, y_test=Y), "given together, got no features_test"),
        (lambda: knn_probe(F, Y, F[:0], Y[:0], k=1), "features_test must have at least one row"),
        (lambda: knn_probe(F, Y, F, Y[1:], k=1), r"y_test must have shape \(6\)"),
        (lambda: knn_probe(F, Y, k=6), "k must be at most the number of other samples, 5, got 6"),
        (lambda: probe(layers=["O"]), "layers must be names of submodules of model, got 'O'; close to it: '0'"),
        (lambda: probe(layers="0"), "layers must be a sequence of names, got '0'"),
        (lambda: probe(k=7), "k must be at most 6 for these samples, got 7"),
        (lambda: probe(y=Y[1:]), r"y must have shape \(6\)"),
        (lambda: probe(y_test=Y.float()), "y_test must hold class indices"),
        (lambda: probe(x_test=F[:0], y_test=Y[:0]), "x_test must have at least 1 samples"),
        (lambda: probe(x=F / 0), "x must be finite"),
        (lambda: probe(batch_size=0), "batch_size must be an integer of at least 1"),
        (lambda: probe(nn.Sequential(nn.ReLU(), nn.Linear(3, 3).requires_grad_(False)), x=F * 1e38 * 9), "x must be finite"),
        (lambda: probe(Broken(), ["layer"]), "layers must have finite features, 'layer' has NaN"),
        (lambda: probe(net(), ["unused"], *pictures(6), *pictures(6)), "layers must give .* 'unused' gives nothing"),
        (lambda: probe(nn.Sequential(nn.Flatten(0)), ["0"]), r"a row for each of 6 samples, '0' gives torch.Size\(\[18\]\)"),
        (lambda: profile([]), "layers must have at least one name"),
        (lambda: profile(k=6), "k must be at most 5 for these samples"),
        (lambda: profile(n_views=0), "n_views must be an integer of at least 1"),
        (lambda: profile(augment=lambda x, generator: x[:, 1:]), r"augment must return .* \(6, 3\), got \(6, 2\)"),
        (lambda: profile(augment=FiniteViews(F[1:], jitter, 1)), "augment must have views of x"),
        (lambda: profile(augment=1), "augment must be a function of a batch"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ReLU()

    def forward(self, x):
        return self.layer(x / 0)
