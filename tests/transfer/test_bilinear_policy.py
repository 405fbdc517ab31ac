"""Policies from demonstrations: linear laws, the demonstration that goes along, and time."""

import pickle

import numpy as np
import pytest
import torch

from posterity.transfer import BilinearTransductionPolicy


def walk(goals, steps=8, rate=0.3, extra=True):
    """Return demonstrations of a = g - s from the origin, of which a share of the way is walked."""
    demos = []
    for goal in goals:
        s = (1 - (1 - rate) ** np.arange(steps + 1.0))[:, None] * goal
        obs = np.concatenate([s, np.tile(goal, (steps + 1, 1))], 1)
        demos.append({"obs": obs if extra else obs[:steps], "action": (goal - s)[:steps]})
    return demos


GOALS = np.random.default_rng(0).uniform(0, 1, (40, 2))
QUICK = {"goal_indices": (2, 3), "n_steps": 30, "random_state": 0}


def test_a_linear_law_is_followed_half_a_range_outside():
    policy = BilinearTransductionPolicy(
        (), 2, goal_indices=[2, 3], n_steps=400, batch_size=64, lr=1e-2, random_state=0
    ).fit(walk(GOALS))
    worst = 0.0
    for goal in ([1.5, 0.5], [-0.5, 0.5], [0.5, 1.5], [1.3, 1.3]):
        s = np.zeros(2)
        policy.reset([*s, *goal])
        for _ in range(8):
            action = policy.act([*s, *goal])
            worst = max(worst, float(np.abs(action - (goal - s)).max()))
            s = s + 0.3 * action
    assert worst < 0.05


def test_the_demonstration_is_chosen_by_its_goal_alone():
    policy = BilinearTransductionPolicy(**QUICK).fit(walk(GOALS))
    unit = GOALS.std(0)
    differences = ((GOALS[:, None] - GOALS[None]) / unit).reshape(-1, 2)
    for goal in np.random.default_rng(1).uniform(-1, 2, (10, 2)):
        steps = (goal - GOALS) / unit
        distance = np.linalg.norm(steps[:, None] - differences, axis=2).min(1)
        chosen = policy.reset([7.0, -3.0, *goal])
        assert chosen == policy.anchor_ == policy.reset([0.0, 0.0, *goal])
        np.testing.assert_allclose([distance[chosen], policy.distance_], distance.min(), atol=1e-12)
    assert policy.reset([0, 0, *GOALS[5]]) == 0  # every difference from a demonstration's goal was seen
    assert policy.distance_ < 1e-12
    policy.reset([0, 0, 50.0, 0.5])
    np.testing.assert_allclose(policy.distance_ * unit[0], 48.0, atol=0.2)


def test_the_goal_of_a_demonstration_is_in_its_last_observation():
    demos = walk(GOALS)
    for demo in demos:
        demo["obs"][:-1, 2:] = 9.0
    assert np.array_equal(BilinearTransductionPolicy(**QUICK).fit(demos).goals_, GOALS)


@pytest.mark.parametrize("extra", [True, False])
def test_an_action_is_predicted_from_the_anchor_at_the_same_time_and_its_last_step_afterwards(extra):
    demos = walk(GOALS, extra=extra)
    policy = BilinearTransductionPolicy(**QUICK).fit(demos)
    obs, action = np.stack([demo["obs"] for demo in demos]), np.stack([demo["action"] for demo in demos])
    mean, scale = obs.mean((0, 1)), obs.std((0, 1))
    seen = np.random.default_rng(2).uniform(-1, 1, (11, 4))
    anchor = policy.reset(seen[0])
    for t, row in enumerate(seen):
        x = torch.from_numpy((obs[anchor, min(t, 7)] - mean) / scale)[None]
        delta = torch.from_numpy((row - mean) / scale)[None] - x
        expected = policy.predictor_(x, delta)[0].detach().numpy() * action.std((0, 1)) + action.mean((0, 1))
        np.testing.assert_allclose(policy.act(row), expected)
        np.testing.assert_allclose(policy.act_batch(seen[:2], t, [anchor, anchor])[1:], policy.act_batch(seen[1:2], t, np.array([anchor])))  # fmt: skip
        np.testing.assert_allclose(policy.act_batch(row[None], t, [anchor])[0], expected)
    policy.reset(seen[0])
    first = policy.act(seen[0])
    policy.act(seen[1])
    policy.reset(seen[0])
    assert np.array_equal(policy.act(seen[0]), first)  # time begins anew


def test_training_pairs_are_at_equal_times():
    """Actions depend on time alone, and differences of equal times are 0: the anchor says it all."""
    demos = [{"obs": np.stack([np.arange(6.0), np.full(6, 1.0 + k)], 1), "action": np.sin(np.arange(6.0))[:, None]}
             for k in range(2)]  # fmt: skip
    policy = BilinearTransductionPolicy((16,), 4, goal_indices=[1], n_steps=250, lr=1e-2, random_state=0).fit(
        demos
    )
    policy.reset([0.0, 1.0])
    for t in range(6):
        assert abs(policy.act([float(t), 1.0])[0] - np.sin(t)) < 0.3


def test_the_same_random_state_gives_the_same_bytes_pickling_keeps_an_episode_and_no_gpu_is_reseeded(
    monkeypatch,
):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs were reseeded"))
    before, demos = torch.get_rng_state(), walk(GOALS)
    policy, twin = (BilinearTransductionPolicy(**QUICK).fit(demos) for _ in range(2))
    obs = np.array([0.1, 0.2, 1.3, 0.4])
    for each in (policy, twin):
        each.reset(obs)
        each.act(obs)
    kept = pickle.loads(pickle.dumps(policy))
    assert policy.act(obs).tobytes() == twin.act(obs).tobytes() == kept.act(obs).tobytes()
    assert torch.equal(before, torch.get_rng_state())
    with torch.inference_mode():
        inside = BilinearTransductionPolicy(**QUICK).fit(demos)
    assert np.array_equal(inside.loss_curve_, policy.loss_curve_)


def test_single_precision_stays_so_and_constant_features_are_no_harm():
    demos = [{name: np.asarray(v, np.float32) for name, v in demo.items()} for demo in walk(GOALS)]
    policy = BilinearTransductionPolicy(**QUICK).fit(demos)
    policy.reset(demos[0]["obs"][0])
    assert policy.act(demos[0]["obs"][0]).dtype == np.float32
    assert next(policy.predictor_.parameters()).dtype == torch.float32
    still = [{"obs": np.full((4, 2), 7.0), "action": np.full((4, 1), 2.0)}] * 3
    policy = BilinearTransductionPolicy(goal_indices=[1], n_steps=2, random_state=0).fit(still)
    assert policy.reset([7.0, 7.0]) == 0
    assert np.isfinite(policy.act([7.0, 7.0])).all()


def test_a_policy_reads_many_demonstrations_in_samples_of_differences(monkeypatch):
    monkeypatch.setattr("posterity.transfer.bilinear_policy.MOST", 100)
    policy = BilinearTransductionPolicy(**QUICK).fit(walk(GOALS))
    assert len(policy._search.deltas) == 100


DEMOS = walk(GOALS[:4])


def changed(**parts):
    return [DEMOS[0], {**DEMOS[1], **parts}, DEMOS[2]]


@pytest.mark.parametrize(
    ("demos", "message"),
    [
        (DEMOS[:1], "demos must be a sequence of at least 2 demonstrations, got"),
        (None, "demos must be a sequence of at least 2 demonstrations, got None"),
        ([DEMOS[0], 3], r'demos\[1\] must be a mapping with "obs" and "action", got 3'),
        ([DEMOS[0], {"obs": DEMOS[0]["obs"]}], r'demos\[1\] must be a mapping with "obs" and "action"'),
        (walk(GOALS[:2]) + walk(GOALS[2:4], steps=5), r'demos\[2\]\["obs"\] must have the shape of the first demonstration, \(9, 4\), got \(6, 4\)'),
        (changed(obs=np.ones((9, 3))), r'demos\[1\]\["obs"\] must have the shape of the first demonstration, \(9, 4\), got \(9, 3\)'),
        (changed(action=np.ones((8, 5))), r'demos\[1\]\["action"\] must have the shape'),
        (changed(action=np.ones(8)), r'demos\[1\]\["action"\] must be \(time, features\), none 0, got \(8,\)'),
        (changed(obs=np.full((9, 4), np.nan)), r'demos\[1\]\["obs"\] must be finite'),
        (changed(obs="far"), r'demos\[1\]\["obs"\] must be an array of numbers, got str'),
        ([{"obs": np.ones((9, 4)), "action": np.ones((6, 2))}] * 2, r'demos\[0\]\["obs"\] must have as many rows as "action", or one more, got 9 and 6'),
    ],
)  # fmt: skip
def test_refuses_demonstrations_that_do_not_fit_and_names_them(as_a_user, demos, message):
    with pytest.raises(ValueError, match=message):
        BilinearTransductionPolicy(**QUICK).fit(demos)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goal_indices": [2, 4]}, r"goal_indices must be in 0..3, got 4"),
        ({"goal_indices": [-1]}, "goal_indices must be an integer of at least 0, got -1"),
        ({"goal_indices": []}, r"goal_indices must be a sequence of at least one index, got \[\]"),
        ({"goal_indices": 2}, "goal_indices must be a sequence of at least one index, got 2"),
        ({"hidden": 32}, "hidden must be a sequence of widths, got 32"),
        ({"n_embed": 0}, "n_embed must be an integer of at least 1, got 0"),
        ({"n_steps": 0}, "n_steps must be"), ({"batch_size": 0}, "batch_size must be"), ({"lr": 0}, "lr must be"),
        ({"device": "nowhere"}, "device must be one that torch has here, got 'nowhere'"),
        ({"lr": 1e200}, "lower lr"),
    ],
)  # fmt: skip
def test_refuses_bad_parameters_by_name(as_a_user, options, message):
    with pytest.raises(ValueError, match=message):
        BilinearTransductionPolicy(**{**QUICK, **options}).fit(DEMOS)


def test_refuses_to_act_out_of_turn_or_on_other_observations(as_a_user):
    policy = BilinearTransductionPolicy(**QUICK)
    for call in (lambda: policy.act(np.zeros(4)), lambda: policy.reset(np.zeros(4))):
        with pytest.raises(ValueError, match=r"fit\(demos\) must come before"):
            call()
    policy.fit(DEMOS)
    with pytest.raises(ValueError, match=r"reset\(obs\) must come before act\(obs\)"):
        policy.act(np.zeros(4))
    policy.reset(np.zeros(4))
    for call, message in (
        (lambda: policy.act(np.zeros(3)), r"obs must have shape \(4,\) as those of the demonstrations, got \(3,\)"),
        (lambda: policy.reset(np.zeros((1, 4))), r"obs must have shape \(4,\)"),
        (lambda: policy.act(np.full(4, np.inf)), "obs must be finite"),
        (lambda: policy.act(None), "obs must be"),
        (lambda: policy.act_batch(np.zeros(4), 0, [0]), r"obs must have shape \(b, 4\)"),
        (lambda: policy.act_batch(np.zeros((2, 4)), -1, [0, 0]), "t must be an integer of at least 0, got -1"),
        (lambda: policy.act_batch(np.zeros((2, 4)), 0, [0]), "anchors must be 2 integers"),
        (lambda: policy.act_batch(np.zeros((2, 4)), 0, [0.0, 1.0]), "anchors must be 2 integers"),
        (lambda: policy.act_batch(np.zeros((2, 4)), 0, [0, 4]), "anchors must be in 0..3, got 0 to 4"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    policy.fit(DEMOS)
    with pytest.raises(ValueError, match=r"reset\(obs\) must come before"):
        policy.act(np.zeros(4))
