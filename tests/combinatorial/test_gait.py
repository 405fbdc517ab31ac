"""The gait: its equations by a plain loop, a rollout against one environment, and what Gymnasium asks of one."""

import math
import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from posterity.lab.environments import Gait, world_env


def by_loops(actions, n_joints):
    """Return observations after each step, and rewards, of one body, joint by joint."""
    q, v, c = [0.0] * n_joints, [0.0] * n_joints, 0.0
    seen, rewards = [], []
    for action in actions:
        for j in range(n_joints):
            v[j] += 0.1 * (4 * action[j] - 2 * q[j] - 0.8 * v[j])
            q[j] = min(max(q[j] + 0.1 * v[j], -2.0), 2.0)
        c += 0.15
        wave = sum(q[j] * v[j + 1] - q[j + 1] * v[j] for j in range(n_joints - 1))
        rewards.append(0.1 * wave - 0.002 * sum(a * a for a in action))
        seen.append([*q, *v, math.sin(c), math.cos(c)])
    return np.array(seen), np.array(rewards)


@pytest.mark.parametrize("n_joints", [3, 4])
def test_a_rollout_is_the_equations_step_by_step(n_joints):
    world, rng = Gait(n_joints), np.random.default_rng(0)
    actions = rng.choice([-1.0, 1.0], (60, 5, n_joints)) * np.sqrt(rng.random((60, 5, n_joints)))
    actions[:, 0] = 1.0  # against the stops
    played = iter(actions)
    found = world.rollout(lambda obs: next(played), 5)
    t = found.transitions
    for k in range(5):
        seen, rewards = by_loops(actions[:, k], n_joints)
        mine = slice(60 * k, 60 * (k + 1))
        np.testing.assert_allclose(t["next"]["observation"][mine], seen, atol=1e-5)
        np.testing.assert_allclose(t["next"]["reward"][mine], rewards, atol=1e-5)
        np.testing.assert_allclose(t["observation"][mine][1:], seen[:-1], atol=1e-5)
        np.testing.assert_allclose(t["action"][mine], actions[:, k], atol=1e-6)
        assert found.objective[k] == pytest.approx(rewards.sum(), abs=1e-4)
        assert found.measures[k].tolist() == pytest.approx([(seen[:, 0] > 0).mean(), (seen[:, 2] > 0).mean()])
    assert np.flatnonzero(t["next"]["truncated"]).tolist() == [59, 119, 179, 239, 299]
    assert not t["next"]["terminated"].any()


def test_it_is_an_environment_of_gymnasium():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a speed has no bounds
        check_env(world_env(Gait()), skip_render_check=True)


def test_one_episode_of_the_environment_is_the_rollout():
    env = world_env(Gait())
    obs, _ = env.reset(seed=0)
    assert obs.tolist() == [0.0] * 9 + [1.0]
    total, ended = 0.0, False
    while not ended:
        obs, reward, terminated, ended, _ = env.step(np.tanh(obs[:4] + obs[8:9]))
        total += reward
        assert not terminated
    found = Gait().rollout(lambda obs: np.tanh(obs[:, :4] + obs[:, 8:9]), 2)
    assert found.objective.tolist() == pytest.approx([total, total], abs=1e-4)
    np.testing.assert_array_equal(found.transitions["next"]["observation"][59], obs)


def test_a_wave_moves_the_body_and_its_mirror_image_moves_it_back():
    def wave(direction):
        phase = direction * np.arange(4) * 1.2
        return lambda obs: np.sin(np.arctan2(obs[:, 8:9], obs[:, 9:10]) + phase)

    there, back = (float(Gait().rollout(wave(sign), 1).objective[0]) for sign in (-1, 1))
    assert max(there, back) > 5 and min(there, back) < -5


def test_refuses_too_few_joints():
    with pytest.raises(ValueError, match="n_joints must be at least 3"):
        Gait(2)
