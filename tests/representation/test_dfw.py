import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from posterity.representation import DFWRegressor, dfw, dfw_step, subspace_distance
from posterity.testing import check_estimator


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=rng(seed))


def basis(r, d, seed=0):
    return torch.linalg.qr(randn(d, r, seed=seed)).Q.T


def problem(tasks=4, n=40, dx=6, dy=3, r=2, noise=0.0, seed=0, skew=0.5):
    """Tasks of unlike covariance that share a representation."""
    phi = basis(r, dx, seed)
    heads = randn(tasks, dy, r, seed=seed + 1)
    mixing = torch.stack([torch.linalg.qr(randn(dx, dx, seed=seed + 9 + t)).Q for t in range(tasks)])
    scales = (skew * randn(tasks, 1, dx, seed=seed + 2)).exp()
    x = randn(tasks, n, dx, seed=seed + 3) * scales @ mixing
    y = x @ phi.T @ heads.mT + noise * randn(tasks, n, dy, seed=seed + 4)
    return x, y, phi


def by_loops(phi, x, y, lr, split, debias, whiten):
    """A round, task by task, by numpy's least squares."""
    phi, x, y = phi.numpy(), x.numpy(), y.numpy()
    total = np.zeros_like(phi)
    for a, b in zip(x, y, strict=True):
        k = int(split * len(a))
        a1, b1, a2, b2 = (a[:k], b[:k], a[k:], b[k:]) if debias else (a, b, a, b)
        head = np.linalg.lstsq(a1 @ phi.T, b1, rcond=None)[0].T
        if whiten:
            operator = np.linalg.lstsq(a2, b2, rcond=None)[0].T
            step = head.T @ (head @ phi - operator)
        else:
            step = head.T @ (head @ phi @ a2.T - b2.T) @ a2 / len(a2)
        total += (phi - lr * step) / len(x)
    q, r = np.linalg.qr(total.T)
    return torch.from_numpy((q * np.sign(np.diag(r))).T)


# The distance.


def test_the_distance_is_the_sine_of_the_largest_principal_angle():
    for seed in range(5):
        a, b = randn(2, 6, seed=seed), randn(2, 6, seed=seed + 50)
        angle = subspace_angles(a.numpy().T, b.numpy().T).max()
        assert float(subspace_distance(a, b)) == pytest.approx(math.sin(angle), abs=1e-12)
        torch.testing.assert_close(subspace_distance(a, b), subspace_distance(b, a))
    assert float(subspace_distance(a, torch.stack([a[0] + a[1], 3 * a[1]]))) < 1e-12
    eye = torch.eye(4)
    assert float(subspace_distance(eye[:2], eye[1:3])) == 1
    assert float(subspace_distance(eye[:1], eye[:3])) == 0 and float(subspace_distance(eye[:3], eye[:1])) == 1


# A round.


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("whiten", [True, False])
def test_a_round_is_that_of_plain_loops(debias, whiten):
    x, y, _ = problem(noise=0.3)
    phi = basis(2, 6, 77)
    found = dfw_step(phi, x, y, lr=0.1, split=0.4, debias=debias, whiten=whiten)
    torch.testing.assert_close(
        found.phi, by_loops(phi, x, y, 0.1, 0.4, debias, whiten), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(found.phi @ found.phi.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)
    turned = dfw_step(-phi, x, y, lr=0.1, split=0.4, debias=debias, whiten=whiten)
    torch.testing.assert_close(turned.phi, -found.phi)
    k = 16 if debias else 40
    heads = [np.linalg.lstsq((a @ phi.T).numpy(), b.numpy(), rcond=None)[0].T for a, b in zip(x[:, :k], y[:, :k], strict=True)]  # fmt: skip
    torch.testing.assert_close(found.weights, torch.from_numpy(np.stack(heads)))


@pytest.mark.parametrize("whiten", [True, False])
def test_the_truth_is_a_fixed_point_without_noise(whiten):
    x, y, phi = problem()
    assert float(subspace_distance(dfw_step(phi, x, y, lr=0.1, whiten=whiten).phi, phi)) < 1e-12


def test_a_ridge_is_added_to_both_gram_matrices():
    x, y, _ = problem(noise=0.3)
    phi = basis(2, 6, 77)
    found = dfw_step(phi, x, y, lr=0.1, ridge=2.5)
    total = torch.zeros_like(phi)
    for a, b in zip(x, y, strict=True):
        z = a[:20] @ phi.T
        head = torch.linalg.solve(z.T @ z + 2.5 * torch.eye(2), z.T @ b[:20]).T
        gradient = head.T @ (head @ phi @ a[20:].T - b[20:].T) @ a[20:]
        total += phi - 0.1 * gradient @ torch.linalg.inv(a[20:].T @ a[20:] + 2.5 * torch.eye(6))
    assert float(subspace_distance(found.phi, total)) < 1e-10


def test_with_a_little_ridge_tasks_of_few_rows_leave_what_they_have_not_seen_to_others():
    x, y, phi = problem(tasks=30, n=10)  # five rows of six inputs
    assert float(subspace_distance(dfw_step(phi, x, y, lr=0.1, ridge=1e-9).phi, phi)) < 1e-6
    assert float(dfw(x, y, 2, ridge=1e-9, phi_true=phi, random_state=0).distances[-1]) < 1e-5


def test_a_round_does_not_depend_on_coordinates():
    x, y, _ = problem(noise=0.3)
    phi, A = basis(2, 6, 77), randn(6, 6, seed=5)
    moved = dfw_step(phi @ torch.linalg.inv(A), x @ A.T, y, lr=0.1).phi  # not orthonormal, as (1) allows
    back = dfw_step(phi, x, y, lr=0.1).phi
    assert float(subspace_distance(moved @ A, back)) < 1e-8


# The solver.


def test_without_noise_it_converges_linearly_from_anywhere():
    x, y, phi = problem()
    for partition in ("shuffle", "fixed", "blocks"):
        found = dfw(x, y, 2, partition=partition, phi_true=phi, random_state=0, max_iter=400)
        assert found.converged and float(found.distances[-1]) < 1e-5
        assert found.n_iter == len(found.distances) < 400
        own = torch.eye(2, dtype=torch.float64)
        torch.testing.assert_close(found.phi @ found.phi.T, own, rtol=0, atol=1e-10)
        middle = found.distances[5:30].log()
        assert float((middle[-1] - middle[0]) / 24) < -0.05
    start = dfw(x, y, 2, init="spectral", phi_true=phi, max_iter=1)
    assert float(start.distances[0]) < 1e-6
    heads = [
        np.linalg.lstsq((a @ found.phi.T).numpy(), b.numpy(), rcond=None)[0].T
        for a, b in zip(x, y, strict=True)
    ]
    torch.testing.assert_close(found.weights, torch.from_numpy(np.stack(heads)))


def test_rounds_are_steps_and_the_rate_is_one_over_their_curvature():
    x, y, _ = problem(noise=0.3)
    phi = basis(2, 6, 77)
    fixed = dfw(x, y, 2, init=phi, partition="fixed", lr=0.07, max_iter=3, tol=0)
    again = phi
    for _ in range(3):
        again = dfw_step(again, x, y, lr=0.07).phi
    torch.testing.assert_close(fixed.phi, again)
    heads = [
        np.linalg.lstsq((a @ again.T).numpy(), b.numpy(), rcond=None)[0].T for a, b in zip(x, y, strict=True)
    ]
    torch.testing.assert_close(fixed.weights, torch.from_numpy(np.stack(heads)))  # of all rows
    for whiten in (True, False):
        auto = dfw(x, y, 2, init=phi, partition="fixed", max_iter=1, whiten=whiten)
        heads = dfw_step(phi, x, y, lr=1.0, whiten=whiten).weights
        steep = float(torch.linalg.eigvalsh((heads.mT @ heads).mean(0))[-1])
        if not whiten:
            steep *= max(float(torch.linalg.eigvalsh(a[20:].T @ a[20:] / 20)[-1]) for a in x)
        torch.testing.assert_close(auto.phi, dfw_step(phi, x, y, lr=1 / steep, whiten=whiten).phi)


def test_blocks_leave_a_gap_and_change_places():
    x, y, _ = problem(noise=0.3, n=41)
    phi = basis(2, 6, 77)
    found = dfw(x, y, 2, init=phi, partition="blocks", gap=5, lr=0.07, max_iter=3, tol=0, split=0.4)
    # 14 rows for heads and 22 for the step, of 36
    ahead = torch.cat([torch.arange(14), torch.arange(19, 41)])
    behind = torch.cat([torch.arange(27, 41), torch.arange(22)])
    for rows in (ahead, behind, ahead):
        phi = dfw_step(phi, x[:, rows], y[:, rows], lr=0.07, split=0.4).phi
    torch.testing.assert_close(found.phi, phi)


def test_shuffled_rounds_split_every_row_anew():
    x, y, _ = problem(noise=0.3)
    phi = basis(2, 6, 77)
    found = dfw(x, y, 2, init=phi, lr=0.07, max_iter=2, tol=0, random_state=5, split=0.3)
    draws = np.random.RandomState(5)
    again = phi
    for _ in range(2):
        rows = torch.from_numpy(draws.random_sample((4, 40)).argsort(1))
        mixed = [v.gather(1, rows[..., None].expand(-1, -1, v.shape[2])) for v in (x, y)]
        again = dfw_step(again, *mixed, lr=0.07, split=0.3).phi
    torch.testing.assert_close(found.phi, again)


def test_tasks_of_unequal_length_count_alike():
    x, y, _ = problem(noise=0.3, n=60)
    sizes = (60, 35, 44, 51)
    parts = [[v[k, :n] for k, n in enumerate(sizes)] for v in (x, y)]
    phi = basis(2, 6, 77)
    found = dfw(*parts, 2, init=phi, partition="fixed", lr=0.07, max_iter=1)
    total = torch.zeros_like(phi)
    for a, b in zip(*parts, strict=True):
        k = len(a) // 2
        head = torch.linalg.lstsq(a[:k] @ phi.T, b[:k]).solution.T
        operator = torch.linalg.lstsq(a[k:], b[k:]).solution.T
        total += (phi - 0.07 * head.T @ (head @ phi - operator)) / 4
    assert float(subspace_distance(found.phi, total)) < 1e-10
    order = [2, 0, 3, 1]
    turned = [[v[k] for k in order] for v in parts]
    torch.testing.assert_close(dfw(*turned, 2, init=phi, partition="fixed", lr=0.07, max_iter=5).phi,
                               dfw(*parts, 2, init=phi, partition="fixed", lr=0.07, max_iter=5).phi)  # fmt: skip


def test_shuffled_tasks_of_unequal_length_keep_their_own_rows():
    x, y, _ = problem(noise=0.3)
    sizes, phi = (40, 22, 31, 36), basis(2, 6, 77)
    parts = [[v[k, :n] for k, n in enumerate(sizes)] for v in (x, y)]
    found = dfw(*parts, 2, init=phi, lr=0.07, max_iter=1, random_state=5).phi
    keys, total = np.random.RandomState(5).random_sample((4, 40)), torch.zeros_like(phi)
    for a, b, key in zip(*parts, keys, strict=True):
        rows = torch.from_numpy(key[: len(a)].argsort())
        one, two = rows[: len(a) // 2], rows[len(a) // 2 :]
        head = torch.linalg.lstsq(a[one] @ phi.T, b[one]).solution.T
        total += phi - 0.07 * head.T @ (head @ phi - torch.linalg.lstsq(a[two], b[two]).solution.T)
    assert float(subspace_distance(found, total)) < 1e-10


def test_the_span_does_not_depend_on_the_basis_of_the_start_nor_the_error_on_coordinates():
    x, y, phi = problem()
    start, mix = basis(2, 6, 77), randn(2, 2, seed=8)
    one, two = (
        dfw(x, y, 2, init=init, partition="fixed", max_iter=20, tol=0).phi for init in (start, mix @ start)
    )
    assert float(subspace_distance(one, two)) < 1e-10
    turn = torch.linalg.qr(randn(6, 6, seed=9)).Q
    moved = dfw(
        x @ turn.T, y, 2, init=start @ turn.T, partition="fixed", max_iter=20, tol=0, phi_true=phi @ turn.T
    )
    plain = dfw(x, y, 2, init=start, partition="fixed", max_iter=20, tol=0, phi_true=phi)
    torch.testing.assert_close(moved.distances, plain.distances, rtol=1e-8, atol=1e-10)
    # of one direction the rate is that of its length, so that any coordinates give the same path
    x, y, phi = problem(r=1, noise=0.3)
    start, A = basis(1, 6, 77), randn(6, 6, seed=5)
    options = {"partition": "fixed", "max_iter": 8, "tol": 0}
    plain = dfw(x, y, 1, init=start, **options).phi
    moved = dfw(x @ A.T, y, 1, init=start @ torch.linalg.inv(A), **options).phi
    assert float(subspace_distance(plain, phi)) > 1e-4 and float(subspace_distance(moved @ A, plain)) < 1e-8


def test_whitening_finds_the_subspace_of_unlike_tasks_where_descent_stalls():
    x, y, phi = problem(tasks=12, n=60, dx=10, dy=5, r=3, noise=1.0, skew=0.8)
    errors = {
        name: float(
            dfw(x, y, 3, max_iter=100, random_state=0, phi_true=phi, **options).distances[-10:].mean()
        )
        for name, options in (("amd", {"debias": False, "whiten": False}), ("dfw", {}))
    }
    assert errors["dfw"] < 0.5 * errors["amd"]


def test_one_output_is_enough_with_many_tasks():
    x, y, phi = problem(tasks=8, dy=1, r=3)
    assert float(dfw(x, y, 3, phi_true=phi, random_state=0, max_iter=2000).distances[-1]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_computed_in_float64_and_answers_in_the_dtype_of_x(dtype):
    x, y, _ = (v.to(dtype) for v in problem(noise=0.1))
    found, exact = (
        dfw(a, b, 2, partition="fixed", random_state=0) for a, b in ((x, y), (x.double(), y.double()))
    )
    assert found.phi.dtype == dtype and found.n_iter == exact.n_iter
    torch.testing.assert_close(found.phi, exact.phi.to(dtype))


# The estimator.


def test_the_estimator_is_one_of_scikit_learns(as_a_user):
    check_estimator(DFWRegressor(2, max_iter=20, random_state=0), invariant=("scale X", "scale y"))


def test_the_estimator_is_the_solver_and_a_task_may_have_its_own_unit():
    x, y, phi = problem(n=80, noise=0.1)
    Y, task = y.flatten(0, 1).numpy(), np.repeat([3, 1, 2, 0], 80)
    for options in ({}, {"whiten": False}, {"partition": "blocks", "gap": 4}, {"debias": False}):
        model = DFWRegressor(2, max_iter=15, random_state=0, **options)
        order = [3, 1, 2, 0]  # tasks by label
        found = dfw(x[order], y[order], 2, max_iter=15, random_state=0, **options)
        model.fit(x.flatten(0, 1).numpy(), Y, task)
        np.testing.assert_allclose(model.components_, found.phi, atol=1e-5)
        np.testing.assert_allclose(np.stack([model.heads_[k] for k in range(4)]), found.weights, atol=1e-4)
    unit = torch.tensor([1e-6, 1.0, 1e5, 30.0], dtype=torch.float64)[:, None, None]
    one, two = (
        DFWRegressor(2, random_state=0).fit(
            (x * u).flatten(0, 1).numpy(), (y * u).flatten(0, 1).numpy(), task
        )
        for u in (1.0, unit)
    )
    np.testing.assert_allclose(two.components_, one.components_, atol=1e-7)
    assert not DFWRegressor(2).fit(0 * X.flatten(0, 1).numpy(), Y[:160]).heads_[None].any()


def test_tasks_are_labels_and_new_ones_get_a_head(as_a_user):
    x, y, phi = problem(n=80, noise=0.01)
    X, Y, task = x.flatten(0, 1).numpy(), y.flatten(0, 1).numpy(), np.repeat(["d", "a", "c", "b"], 80)
    mixed = np.random.default_rng(0).permutation(len(X))
    model = DFWRegressor(2, random_state=0).fit(X[mixed], Y[mixed], task[mixed])
    assert model.tasks_ == ["a", "b", "c", "d"] and set(model.heads_) == set(model.tasks_)
    assert float(subspace_distance(torch.from_numpy(model.components_), phi)) < 0.02
    np.testing.assert_allclose(model.predict(X, task), Y, atol=0.1)
    np.testing.assert_allclose(model.predict(X[80:90], "a"), Y[80:90], atol=0.1)
    np.testing.assert_allclose(model.transform(X), X @ model.components_.T)
    head = model.fit_head(X[80:120], Y[80:120])
    np.testing.assert_allclose(head, model.heads_["a"], atol=0.05)
    for bad, said in (
        (lambda: model.predict(X), "task must say which of the 4"),
        (lambda: model.predict(X[:2], ["a", "z"]), "task 'z' was not fitted: fit_head"),
        (lambda: model.predict(X[:2], ["a"]), "task must have a label for each of the 2"),
        (lambda: DFWRegressor().fit(X, Y, task[:5]), "task must have a label"),
        (lambda: model.fit_head(X[:5], Y[:4]), "y must have a row for each"),
        (lambda: model.fit_head(X[:5], Y[:5] * np.nan), "y must be finite"),
        (lambda: DFWRegressor(0).fit(X, Y, task), "n_components"),
    ):
        with pytest.raises(ValueError, match=said):
            bad()


X, Y, _ = problem()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: dfw(X, Y, 7), r"r must be in 1\.\.6"),
        (lambda: dfw(X[:1], Y[:1], 4), r"r must be in 1\.\.3: .* 3 outputs of all tasks"),
        (lambda: dfw(X, Y, 0), "r must be"),
        (lambda: dfw(X, Y, 2, split=0.0), "split"),
        (lambda: dfw(X, Y, 2, split=1.0), "split"),
        (lambda: dfw(X[:, :10], Y[:, :10], 2), "at least 6 rows in the second part .* task 0 has 5"),
        (lambda: dfw(X, Y, 2, split=0.03), "at least 2 rows in the first part .* task 0 has 1"),
        (lambda: dfw([X[0], X[1][:10]], [Y[0], Y[1][:10]], 2), "at least 6 rows in the second part .* task 1 has 5"),
        (lambda: dfw([X[0], X[1][:3]], [Y[0], Y[1][:3]], 2), "at least 2 rows in the first part .* task 1 has 1"),
        (lambda: dfw([X[0], X[1] * torch.nan], [Y[0], Y[1]], 2), r"x\[1\] must be finite"),
        (lambda: dfw_step(torch.eye(6)[:2], X, Y, lr=0.1, split=1.0), "split"),
        (lambda: dfw_step(torch.eye(6)[:2], X[:, :10], Y[:, :10], lr=0.1), "at least 6 rows in the second part"),
        (lambda: dfw([X[0], X[1][:, :5]], [Y[0], Y[1]], 2), r"x\[1\] must have shape"),
        (lambda: dfw([X[0], X[1]], [Y[0], Y[1][:, :2]], 2), r"y\[1\] must have shape"),
        (lambda: dfw([X[0]], [Y[0], Y[1]], 2), "as many tasks"),
        (lambda: dfw(X / 0, Y, 2), r"x\[0\] must be finite"),
        (lambda: dfw(X, Y, 2, init=torch.eye(6)), "init must have shape"),
        (lambda: dfw(X, Y, 2, init="zero"), "init must be one of"),
        (lambda: dfw(X, Y, 2, gap=20, partition="blocks"), "gap must be less than half"),
        (lambda: dfw(X, Y, 2, gap=2), 'gap=2 needs partition="blocks"'),
        (lambda: dfw(X, Y, 2, partition="random"), "partition"),
        (lambda: dfw(X, Y, 2, lr=0.0), "lr"),
        (lambda: dfw(X * torch.tensor([1.0, 1, 1, 1, 1, 0]), Y, 2), "is singular: set ridge"),
        (lambda: dfw(torch.cat([X[..., :5], X[..., :1] + X[..., 1:2]], 2), Y, 2), "task 0 is singular: set ridge"),
        (lambda: dfw(X, Y, 2, init="spectral", split=0.9), "at least 6 rows in the second part .* task 0 has 4"),
        (lambda: dfw(X, Y, 2, phi_true=torch.ones(2, 6)), "phi_true must have independent rows"),
        (lambda: dfw(X, Y, 2, init=torch.zeros(2, 6)), "init must have independent rows"),
        (lambda: dfw(X, Y, 2, ridge=-1.0), "ridge"),
        (lambda: dfw(X, Y, 2, tol=-1.0), "tol"),
        (lambda: dfw(X, Y, 2, max_iter=0), "max_iter"),
        (lambda: dfw(X, Y / 0, 2), r"y\[0\] must be finite"),
        (lambda: dfw(X, list(Y), 2), "both be tensors"),
        (lambda: dfw_step(torch.eye(6)[:2] / 0, X, Y, lr=0.1), "phi must be finite"),
        (lambda: dfw_step(torch.eye(6)[:0], X, Y, lr=0.1), "phi must have 1..6 rows"),
        (lambda: dfw_step(torch.eye(6)[:2], X, Y[:3], lr=0.1), "y must have shape"),
        (lambda: dfw_step(torch.eye(5)[:2], X, Y, lr=0.1), "phi must have shape"),
        (lambda: subspace_distance(torch.eye(3), torch.eye(4)), "b must have shape"),
        (lambda: subspace_distance(torch.ones(2, 3), torch.eye(3)), "a must have independent rows"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(as_a_user, make, said):
    with pytest.raises(ValueError, match=said):
        make()
