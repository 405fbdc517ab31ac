"""The algebra against fresh fits, triggers, the audit, low precision, and bad input."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.gaussian_process.kernels import RBF
from sklearn.kernel_ridge import KernelRidge
from torch import nn

from posterity.robustness import (
    BackdoorAudit,
    PatchTrigger,
    PeriodicTrigger,
    added_poison_predictions,
    attack_success,
    backdoor_loss,
    empirical_ntk,
    greedy_poisons,
    loo_residuals,
    relu_ntk,
    spectral_signature_scores,
)
from posterity.testing._low_precision import check_low_precision

SIZES = {"d": 12, "p": 5, "t": 4, "a": 3}


def points(seed=0, **sizes):
    """Points of each letter, labels, and an RBF kernel of names such as k_pd."""
    rng = np.random.default_rng(seed)
    sizes = {**SIZES, **sizes}
    x = {letter: rng.normal(size=(n, 3)) for letter, n in sizes.items()}
    y = {letter: torch.tensor(np.where(rng.random(n) < 0.5, -1.0, 1.0)) for letter, n in sizes.items()}
    y["p"] = torch.ones(sizes["p"]).double()

    def k(pair):
        first, second = x[pair[0]], x[pair[1]]
        if not len(first) or not len(second):
            return torch.zeros(len(first), len(second)).double()
        return torch.tensor(RBF(1.5)(first, second))

    return x, y, k


def by_ridge_regression(x, y, letters, rows, at, ridge):
    """Predictions of scikit-learn's kernel ridge regression on some rows, at the points of a letter."""
    x_train = np.concatenate([x[letter][index] for letter, index in zip(letters, rows, strict=True)])
    y_train = np.concatenate([y[letter][index] for letter, index in zip(letters, rows, strict=True)])
    model = KernelRidge(alpha=ridge, kernel="rbf", gamma=1 / (2 * 1.5**2)).fit(x_train, y_train)
    return torch.tensor(model.predict(x[at]))


def loss_arguments(k, y, **changed):
    given = {f"k_{pair}": k(pair) for pair in ("dd", "pd", "pp", "dt", "pt", "da", "pa")}
    return {**given, **{f"y_{letter}": y[letter] for letter in "dpt"}, **changed}


def greedy_arguments(k, y, **changed):
    given = {f"k_{pair}": k(pair) for pair in ("dd", "da", "pd", "pa", "pp")}
    return {**given, "y_d": y["d"], "y_p": y["p"], "n_poisons": 2, **changed}


# --- regression with poisons ---


@pytest.mark.parametrize("ridge", [0.05, 1.0])
def test_each_added_poison_is_a_fresh_fit_with_its_row_appended(ridge):
    x, y, k = points()
    f, new = added_poison_predictions(
        k("dd"), k("da"), y["d"], k("pd"), k("pa"), k("pp").diagonal(), y["p"], ridge=ridge
    )
    alone = by_ridge_regression(x, y, "d", [slice(None)], "a", ridge)
    torch.testing.assert_close(f, alone, rtol=0, atol=1e-9)
    for j in range(SIZES["p"]):
        fresh = by_ridge_regression(x, y, "dp", [slice(None), [j]], "a", ridge)
        torch.testing.assert_close(new[j], fresh, rtol=0, atol=1e-9)


def test_a_poison_that_repeats_a_training_point_has_no_prediction_without_a_ridge_and_is_not_chosen():
    x, y, k = points()
    x["p"][2] = x["d"][0]
    _, new = added_poison_predictions(k("dd"), k("da"), y["d"], k("pd"), k("pa"), k("pp").diagonal(), y["p"])
    assert new.isnan().all(1).tolist() == [False, False, True, False, False]
    assert 2 not in greedy_poisons(**greedy_arguments(k, y, n_poisons=4)).tolist()
    with pytest.raises(ValueError, match="n_poisons must be at most 4 here, got 5"):
        greedy_poisons(**greedy_arguments(k, y, n_poisons=5))
    assert len(greedy_poisons(**greedy_arguments(k, y, n_poisons=5), ridge=0.1)) == 5


@pytest.mark.parametrize("ridge", [0.05, 1.0])
def test_the_loss_is_made_of_the_predictions_of_a_fresh_fit(ridge):
    x, y, k = points(1)
    loss, f_t, f_a = backdoor_loss(**loss_arguments(k, y), ridge=ridge)
    every = [slice(None)] * 2
    torch.testing.assert_close(f_t, by_ridge_regression(x, y, "dp", every, "t", ridge), rtol=0, atol=1e-9)
    torch.testing.assert_close(f_a, by_ridge_regression(x, y, "dp", every, "a", ridge), rtol=0, atol=1e-9)
    assert (f_a < 1).any()
    by_hand = sum((float(f) - float(z)) ** 2 for f, z in zip(f_t, y["t"], strict=True))
    by_hand += sum(min(float(f) - 1, 0) ** 2 for f in f_a)
    assert float(loss) == pytest.approx(by_hand, abs=1e-9)


def test_triggered_images_above_one_cost_nothing_and_have_no_gradient():
    one, none = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    far = (3 * one).requires_grad_()
    loss, _, f_a = backdoor_loss(one, none, one, one, none, none, far, -one[0], one[0], -one[0])
    assert (float(f_a.detach()), float(loss.detach())) == (3, 0)
    (slope,) = torch.autograd.grad(loss, far)
    assert slope == 0


def test_gradients_of_the_loss_are_those_of_finite_differences():
    _, y, k = points(2, d=5, p=2, t=2, a=2)
    names = ("dd", "pd", "pp", "dt", "pt", "da", "pa")

    def loss(*kernels):
        mirrored = [(v + v.T) / 2 if n in ("dd", "pp") else v for n, v in zip(names, kernels, strict=True)]
        return backdoor_loss(*mirrored, y["d"], y["p"], y["t"], ridge=0.3)

    assert torch.autograd.gradcheck(loss, tuple(k(name).requires_grad_() for name in names))


def test_without_poisons_predictions_are_those_of_the_clean_data():
    x, y, k = points(3, p=0)
    _, f_t, f_a = backdoor_loss(**loss_arguments(k, y), ridge=0.1)
    for f, letter in ((f_t, "t"), (f_a, "a")):
        alone = by_ridge_regression(x, y, "d", [slice(None)], letter, 0.1)
        torch.testing.assert_close(f, alone, rtol=0, atol=1e-9)


def attack_part(x, y, rows, ridge):
    f = by_ridge_regression(x, y, "dp", [slice(None), rows], "a", ridge)
    return float((f - 1).clamp_max(0).square().sum())


@pytest.mark.parametrize("seed", range(4))
def test_greedy_takes_at_each_step_what_an_exhaustive_search_takes(seed):
    x, y, k = points(seed, p=7, a=4)
    order = greedy_poisons(**greedy_arguments(k, y, n_poisons=4), ridge=0.2).tolist()
    for step in range(4):
        rest = [j for j in range(7) if j not in order[:step]]
        costs = [attack_part(x, y, [*order[:step], j], 0.2) for j in rest]
        assert order[step] == rest[int(np.argmin(costs))]


def test_loo_residuals_are_those_of_fits_that_leave_each_out():
    x, y, k = points(4)
    got = loo_residuals(k("dd"), y["d"], ridge=0.3)
    for i in range(SIZES["d"]):
        rest = [j for j in range(SIZES["d"]) if j != i]
        left_out = by_ridge_regression(x, y, "d", [rest], "d", 0.3)[i]
        assert float(got[i]) == pytest.approx(float(y["d"][i] - left_out), abs=1e-9)


def test_spectral_signatures_are_squared_coordinates_on_the_first_principal_axis():
    features = np.random.default_rng(0).normal(size=(20, 6)) * np.arange(1, 7)
    coordinate = PCA(1).fit_transform(features)[:, 0]
    got = spectral_signature_scores(torch.tensor(features))
    torch.testing.assert_close(got, torch.tensor(coordinate**2))
    assert (spectral_signature_scores(torch.ones(3, 2)) == 0).all()


# --- triggers and the count of success ---


def test_the_periodic_trigger_is_a_sine_along_one_axis():
    x = torch.full((2, 3, 5, 8), 0.5).double()
    wave = 0.2 * np.sin(np.linspace(0, 4 * np.pi, 8))
    got = PeriodicTrigger(0.2, 4)(x)
    torch.testing.assert_close(got, 0.5 + torch.tensor(wave).expand(2, 3, 5, 8))
    turned = PeriodicTrigger(0.2, 4, dim=-2)(x.mT)
    torch.testing.assert_close(turned, got.mT)
    assert PeriodicTrigger(0.9, 4)(x).aminmax() == (0, 1)


def test_the_patch_trigger_is_a_checkerboard_inside_the_image_at_many_places():
    x = torch.full((60, 2, 5, 4), 0.5)
    change = PatchTrigger(0.25, 2, generator=torch.Generator().manual_seed(0))(x) - 0.5
    places = set()
    for image in change:
        assert torch.equal(image[0], image[1])
        rows, columns = (image[0] != 0).nonzero().unbind(1)
        top, left = int(rows.min()), int(columns.min())
        places.add((top, left))
        board = image[0, top : top + 2, left : left + 2]
        assert torch.equal(board, torch.tensor([[0.25, -0.25], [-0.25, 0.25]]))
        assert int((image[0] != 0).sum()) == 4
    assert places == set(itertools.product(range(4), range(3)))


def test_success_is_the_share_of_triggered_images_above_zero():
    x = torch.linspace(0, 1, 11)[:, None]
    for predict in (lambda x: x[:, 0] - 0.75, lambda x: (x - 0.75).sign(), nn.Identity()):
        want = 11 if isinstance(predict, nn.Identity) else 6
        assert attack_success(predict, x, lambda x: x + 0.3) == pytest.approx(want / 11)


# --- the audit ---


def images(n=24, seed=0, dtype=torch.float32):
    """Two classes of images, one brighter above and one below."""
    y = torch.tensor([-1.0, 1.0]).repeat(n // 2)
    x = 0.5 + 0.15 * y[:, None, None, None] * torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None]
    noise = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) - 0.5
    return (x + 0.4 * noise).clamp(0, 1).to(dtype), y


def audit(kernel=relu_ntk, trigger=None, **options):
    trigger = trigger or PeriodicTrigger(0.3, 3)
    return BackdoorAudit(
        kernel, trigger, generator=torch.Generator().manual_seed(0), **{"n_poisons": 2, **options}
    )


def net(*layers, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(*[make() for make in layers]).double()


def flat(n_in=16, seed=0):
    return net(nn.Flatten, lambda: nn.Linear(n_in, 12), nn.Tanh, lambda: nn.Linear(12, 1), seed=seed)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("kernel", [relu_ntk, flat()], ids=["relu_ntk", "network"])
def test_poisons_stay_within_bounds_and_no_step_makes_the_objective_worse(kernel):
    x, y = images()
    result = audit(kernel, max_iter=12).run(x, y)
    assert result.poisons.aminmax().min >= 0 and result.poisons.aminmax().max <= 1
    assert len(result.loss_history) > 2
    assert all(after <= before for before, after in itertools.pairwise(result.loss_history))
    assert result.loss_history[-1] < result.loss_history[0]
    torch.testing.assert_close(result.initial, PeriodicTrigger(0.3, 3)(x[result.chosen]))
    assert (y[result.chosen] == -1).all() and set(result.chosen.tolist()) <= set(result.train_index.tolist())
    assert result.poisons.dtype == x.dtype


@pytest.mark.parametrize("kernel", [relu_ntk, flat()], ids=["relu_ntk", "network"])
def test_what_it_reports_is_what_regression_on_data_and_poisons_predicts(kernel):
    x, y = images(dtype=torch.float64)
    result = audit(kernel, max_iter=4).run(x, y)
    k = kernel if kernel is relu_ntk else lambda a, b: empirical_ntk(kernel, a, b)
    d, t = result.train_index, result.holdout_index
    assert sorted(torch.cat([d, t]).tolist()) == list(range(24))
    assert [int((y[t] == sign).sum()) for sign in (-1, 1)] == [2, 2]  # a fifth of twelve
    x_all = torch.cat([x[d], result.poisons])
    labels = torch.cat([y[d], torch.ones(2)]).double()
    ridge = 0.12 * k(x[d], x[d]).diagonal().mean()
    beta = torch.linalg.solve(k(x_all, x_all) + ridge * torch.eye(len(x_all)), labels)
    a = PeriodicTrigger(0.3, 3)(x[t][y[t] < 0])
    f_t, f_a = k(x[t], x_all) @ beta, k(a, x_all) @ beta
    loss = (f_t - y[t]).square().sum() + (f_a - 1).clamp_max(0).square().sum()
    assert result.loss_history[-1] == pytest.approx(float(loss), abs=1e-8)
    assert result.predicted_success == float((f_a > 0).double().mean())
    residual = loo_residuals(k(x_all, x_all), labels, ridge=float(ridge))
    clean, poison = residual[: len(d)][y[d] > 0], residual[len(d) :]
    won = (poison[:, None] > clean).double().mean()
    assert result.detection["loo residual"] == pytest.approx(float(won))


def test_the_spectral_signature_is_that_of_the_kernels_own_features():
    x, y = images(dtype=torch.float64)

    def linear(a, b):
        return a.flatten(1) @ b.flatten(1).T

    result = audit(linear).run(x, y)
    target = x[result.train_index][y[result.train_index] > 0]
    score = spectral_signature_scores(torch.cat([target, result.poisons]).flatten(1))
    won = (score[len(target) :, None] > score[: len(target)]).double().mean()
    assert result.detection["spectral signature"] == pytest.approx(float(won))


def test_without_poisons_the_audit_reports_the_clean_kernel():
    x, y = images(dtype=torch.float64)
    result = audit(n_poisons=0).run(x, y)
    assert result.poisons.shape == (0, 1, 4, 4) and len(result.loss_history) == 1
    assert all(math.isnan(value) for value in result.detection.values())
    still = audit(max_iter=0).run(x, y)
    assert torch.equal(still.poisons, still.initial) and len(still.loss_history) == 1


def test_an_audit_repeats_and_works_without_gradients_and_in_inference_mode():
    x, y = images()
    plain = audit(flat(), max_iter=3).run(x, y)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            same = audit(flat(), max_iter=3).run(x + 0, y + 0)
        torch.testing.assert_close(same.poisons, plain.poisons, rtol=1e-4, atol=1e-4)
        assert same.loss_history[-1] == pytest.approx(plain.loss_history[-1], rel=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(empirical_ntk(flat(), x + 0, x), empirical_ntk(flat(), x, x))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_an_audit_of_narrow_images_is_that_of_the_same_numbers(narrow):
    x, y = images(dtype=narrow)
    low, full = (audit(max_iter=4).run(each, y) for each in (x, x.float()))
    assert low.poisons.dtype == narrow and float(low.poisons.float().max()) <= 1
    assert low.loss_history == pytest.approx(full.loss_history)
    assert torch.equal(low.poisons, full.poisons.to(narrow))


def test_functions_are_right_in_low_precision(as_a_user):
    _, y, k = points(5)
    given = {name: v.requires_grad_() if v.ndim == 2 else v for name, v in loss_arguments(k, y).items()}
    check_low_precision(lambda *each: backdoor_loss(*each, ridge=0.5), None, list(given.values()), slack=8)
    single = [k("dd"), k("da"), y["d"], k("pd"), k("pa"), k("pp").diagonal(), y["p"]]
    check_low_precision(
        lambda *each: added_poison_predictions(*each, ridge=0.5), None, single, slack=8, gradient=False
    )
    check_low_precision(
        lambda *each: greedy_poisons(*each, 2, ridge=0.5), None,
        [k("dd"), k("da"), y["d"], k("pd"), k("pa"), k("pp"), y["p"]], slack=8, chooses=True, gradient=False,
    )  # fmt: skip
    check_low_precision(
        lambda *each: loo_residuals(*each, ridge=0.5), None, [k("dd"), y["d"]], slack=8, gradient=False
    )
    check_low_precision(spectral_signature_scores, None, [draw(9, 4)], slack=8, gradient=False)
    x = [draw(4, 16).requires_grad_(), draw(3, 16, seed=1)]
    check_low_precision(relu_ntk, None, x, slack=8)
    check_low_precision(lambda *each: empirical_ntk(flat().float(), *each), None, x, slack=8)
    pixels = images(4)[0]
    for trigger in (PeriodicTrigger(0.2, 3), lambda x: PatchTrigger(0.3)(x)):
        check_low_precision(trigger, None, [pixels], slack=8, gradient=False)


# --- bad input ---

ONE = torch.ones(1).double()
X, Y = images()


def lopsided(k):
    return k + torch.triu(torch.ones_like(k), 1)


def bad(function, arguments, **changed):
    def call():
        _, y, k = points()
        return function(**arguments(k, y, **changed))

    return call


BAD_LOSS = [
    ({"y_d": torch.zeros(12)}, r"y_d must hold labels \+1 and -1, got 0"),
    ({"y_d": torch.ones(12).bool()}, r"y_d must hold labels \+1 and -1, got torch.bool"),
    ({"y_t": torch.ones(3)}, r"y_t must have shape \(4\)"),
    (
        {"k_dd": lopsided(torch.eye(12))},
        "k_dd must be symmetric, got entries that differ from their mirror by 1",
    ),
    ({"k_pp": lopsided(torch.eye(5))}, "k_pp must be symmetric"),
    ({"k_dd": -torch.eye(12)}, "k_dd with its ridge must be positive definite.*raise ridge"),
    ({"k_pp": -torch.eye(5)}, "k_pp with its ridge must be positive definite.*raise ridge"),
    ({"k_pd": torch.zeros(5, 11)}, r"k_pd must have 12 for d as k_dd has, got shape \(5, 11\)"),
    ({"k_pa": torch.zeros(4, 3)}, r"k_pa must have 5 for p as k_pd has, got shape \(4, 3\)"),
    ({"k_da": torch.full((12, 3), torch.nan)}, "k_da must be finite"),
    ({"k_dt": torch.zeros(12, 4).long()}, "k_dt must be a floating-point tensor"),
    ({"ridge": -1.0}, "ridge must be at least 0"),
]
BAD_GREEDY = [
    ({"n_poisons": -1}, "n_poisons must be an integer of at least 0"),
    ({"n_poisons": 6}, "n_poisons must be at most the 5 candidates of k_pp, got 6"),
]


@pytest.mark.parametrize(
    ("call", "message"),
    [(bad(backdoor_loss, loss_arguments, **changed), said) for changed, said in BAD_LOSS]
    + [(bad(greedy_poisons, greedy_arguments, **changed), said) for changed, said in BAD_GREEDY]
    + [
        (lambda: loo_residuals(torch.eye(2), torch.tensor([1, 2])), r"y_d must hold labels \+1 and -1, got 2"),
        (lambda: loo_residuals(torch.zeros(0, 0), torch.zeros(0)), "k_dd must have at least one row"),
        (lambda: added_poison_predictions(ONE[None], ONE[None], ONE, ONE[None], ONE[None], torch.ones(2), ONE),
         r"k_pp_diag must have shape \(1\) for k_pd"),
        (lambda: spectral_signature_scores(torch.zeros(0, 3)), "features must have rows"),
        (lambda: spectral_signature_scores(torch.full((2, 2), math.inf)), "features must be finite"),
        (lambda: empirical_ntk(nn.Linear(2, 3), torch.ones(2, 2), torch.ones(2, 2)), r"model must have one output.*got \(1, 3\)"),
        (lambda: empirical_ntk(nn.Flatten(), torch.ones(2, 1), torch.ones(2, 1)), "model must have a parameter that requires"),
        (lambda: empirical_ntk(nn.Linear(2, 1), torch.ones(2, 2), torch.ones(2, 3)), r"x2 must have shape \(any, 2\) for x1"),
        (lambda: empirical_ntk(nn.Linear(2, 1), torch.ones(2, 2), torch.ones(2, 2), chunk_size=0), "chunk_size must be"),
        (lambda: empirical_ntk(nn.Linear(2, 1), torch.ones(2, 2).long(), torch.ones(2, 2)), "x1 must be a floating-point"),
        (lambda: relu_ntk(torch.ones(2), torch.ones(2)), "x1 must have a row an input"),
        (lambda: relu_ntk(torch.ones(2, 2), torch.full((2, 2), torch.nan)), "x2 must be finite"),
        (lambda: relu_ntk(torch.ones(2, 2), torch.ones(2, 2), depth=-1), "depth must be an integer of at least 0"),
        (lambda: relu_ntk(torch.ones(2, 0), torch.ones(2, 0)), "x1 must have numbers in its rows"),
        (lambda: PeriodicTrigger(0.0), "strength must be greater than 0"),
        (lambda: PeriodicTrigger(frequency=0.0), "frequency must be greater than 0"),
        (lambda: PeriodicTrigger(dim=1), "dim must be one of -1, -2"),
        (lambda: PeriodicTrigger()(torch.full((1, 1, 2, 2), 1.5)), r"images must be in \[0, 1\], got values from 1.5"),
        (lambda: PeriodicTrigger()(torch.ones(1, 2, 2)), "images must have shape"),
        (lambda: PatchTrigger(1.5), r"amplitude must be in \(0, 1\]"),
        (lambda: PatchTrigger(size=3)(torch.ones(1, 1, 2, 4)), "images must be at least 3 x 3 for size"),
        (lambda: attack_success(nn.Identity(), torch.ones(0, 2), nn.Identity()), "x_source must have at least one image"),
        (lambda: attack_success(nn.Identity(), torch.ones(3, 2), nn.Identity()), r"predict must return one number a row.*\(3, 2\)"),
        (lambda: attack_success(nn.Identity(), torch.ones(3, 1), lambda x: x[1:]), "trigger must keep the shape"),
        (lambda: audit("kernel"), "kernel must be callable, got str"),
        (lambda: audit(trigger=3), "trigger must be callable, got int"),
        (lambda: audit(n_poisons=-1), "n_poisons must be an integer of at least 0"),
        (lambda: audit(relative_ridge=-0.1), "relative_ridge must be at least 0"),
        (lambda: audit(holdout=1.0), r"holdout must be in \(0, 1\)"),
        (lambda: audit(max_iter=-1), "max_iter must be"),
        (lambda: audit(bounds=(1.0, 0.0)), "bounds must be two finite numbers .* low < high"),
        (lambda: audit(bounds=(0.0,)), "bounds must be two numbers"),
        (lambda: audit(n_poisons=11).run(X, Y), "n_poisons must be at most the 10 source images.*got 11"),
        (lambda: audit().run(X, torch.zeros_like(Y)), r"y must hold labels \+1 and -1, got 0"),
        (lambda: audit().run(X, Y.abs()), r"y must have at least 2 labels -1, the source class, got 0"),
        (lambda: audit().run(X, -Y.abs()), r"y must have at least 2 labels \+1, the target class, got 0"),
        (lambda: audit().run(X + 1, Y), r"x must be within bounds \(0.0, 1.0\), got from 1"),
        (lambda: audit().run(X, Y[:5]), r"y must have shape \(24\)"),
        (lambda: audit(trigger=lambda x: x[..., :2]).run(X, Y), r"trigger must keep the shape \(10, 1, 4, 4\)"),
        (lambda: audit(trigger=lambda x: x / 0).run(X, Y), "trigger must be finite"),
        (lambda: audit(lambda a, b: a.flatten(1)).run(X, Y), "kernel must map inputs of 20 and 26 rows"),
        (lambda: audit(lambda a, b: lopsided(relu_ntk(a, b))).run(X, Y), "kernel must be symmetric"),
        (lambda: audit(lambda a, b: -relu_ntk(a, b)).run(X, Y), "ridge"),
    ],
)  # fmt: skip
def test_refuses_bad_input_by_name(as_a_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
