"""CCQD: what is asked and told, policies and losses against loops over modules, values that are known."""

import copy
import math

import numpy as np
import pytest
import torch
from ribs.archives import CVTArchive, GridArchive
from torch import nn
from torch.nn.utils import vector_to_parameters

from posterity.combinatorial import CCQD, PolicyCritic, iso_line

SMALL = {
    "n_representations": 2, "batch_size": 12, "critic_steps": 3, "decision_steps": 2, "n_sampled": 5,
    "train_batch": 8, "hidden": (6,), "encoder": (5, 4), "seed": 0,
}  # fmt: skip


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def parts():
    representation = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    return representation, nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2), nn.Tanh())


class Wrapped(nn.Module):
    """The same function, which is no plain stack of layers."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("one", torch.ones(()))

    def forward(self, x):
        return self.inner(x) * self.one


def weights(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def grid(*modules, **options):
    options = {"dims": [6, 6], "ranges": [(0, 1)] * 2, "dtype": np.float32, "seed": 0, **options}
    return GridArchive(
        solution_dim=weights(*modules), extra_fields={"representation": ((), np.int32)}, **options
    )


def emitter(modules=None, archive=None, **options):
    modules = modules or parts()
    archive = grid(*modules) if archive is None else archive
    return CCQD(archive, *modules, **{"obs_dim": 3, "action_dim": 2, **SMALL, **options})


def steps(n=20, seed=0, obs=3, action=2):
    draw = np.random.default_rng(seed)
    return {
        "observation": draw.normal(size=(n, obs)),
        "action": draw.uniform(-1, 1, (n, action)),
        "next": {
            "observation": draw.normal(size=(n, obs)),
            "reward": draw.normal(size=n),
            "terminated": draw.random(n) < 0.2,
            "truncated": draw.random((n, 1)) < 0.2,
        },
    }


def scored(solutions):
    """Return objective and measures: smooth functions of the weights."""
    projected = solutions @ np.random.default_rng(1).normal(size=(solutions.shape[1], 3))
    return -(projected[:, 0] ** 2), 1 / (1 + np.exp(-projected[:, 1:]))


def rounds(made, n):
    """Run so many rounds; return the solutions of each."""
    every = []
    for k in range(n):
        every.append(made.ask())
        made.tell(*scored(every[-1]), steps(seed=k))
    return every


# --- asking and telling ---


def loaded(modules, solution):
    """Return copies of the modules with these weights."""
    both = nn.Sequential(*copy.deepcopy(modules))
    vector_to_parameters(torch.as_tensor(solution), both.parameters())
    return both


@pytest.mark.parametrize("middle", [(), (3, 2), (0,)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_policies_act_as_the_modules_with_their_weights(wrapped, middle):
    modules = tuple(map(Wrapped, parts())) if wrapped else parts()
    made = emitter(modules)
    solutions, obs = made.ask(), torch.randn(12, *middle, 3, generator=rng())
    action = made.act(solutions, obs)
    assert action.shape == (12, *middle, 2) and not action.requires_grad
    for solution, mine, seen in zip(solutions, action, obs, strict=True):
        torch.testing.assert_close(loaded(modules, solution)(seen), mine, atol=1e-6, rtol=1e-5)
    changed = solutions.copy()
    changed[1:] += 1
    torch.testing.assert_close(made.act(changed, obs)[0], action[0], atol=1e-6, rtol=1e-5)


def test_any_network_learns_as_a_plain_stack_does():
    plain = parts()
    torch.manual_seed(1)
    ways = [rounds(emitter(modules), 3) for modules in (plain, tuple(map(Wrapped, plain)))]
    for stacked, mapped in zip(*ways, strict=True):
        np.testing.assert_allclose(stacked, mapped, atol=2e-4)


def test_the_first_policies_are_random_decisions_in_blocks_of_representations():
    made = emitter()
    first, d_r = made.ask(), weights(parts()[0])
    assert first.dtype == np.float32 and first.shape == (12, made.solution_dim)
    assert (first[:6, :d_r] == first[0, :d_r]).all() and (first[6:, :d_r] == first[6, :d_r]).all()
    assert len(np.unique(first[:, d_r:], axis=0)) == 12 and len(np.unique(first[:, :d_r], axis=0)) == 2
    np.testing.assert_array_equal(made.representations, first[[0, 6], :d_r])
    np.testing.assert_array_equal(made.greedy_decisions, first[[0, 6], d_r:])


def test_offspring_by_gradient_carry_the_representations_bit_for_bit():
    made = emitter()
    rounds(made, 3)
    solutions, d_r = made.ask(), weights(parts()[0])
    now = {tuple(row) for row in made.representations.tolist()}
    assert all(tuple(row) in now for row in solutions[:6, :d_r].tolist())
    np.testing.assert_array_equal(solutions[4:6, :d_r], made.representations)
    np.testing.assert_array_equal(solutions[4:6, d_r:], made.greedy_decisions)
    assert not any(tuple(row) in now for row in solutions[6:, :d_r].tolist())
    made.tell(*scored(solutions), steps())
    old = {row.tobytes() for row in solutions[:4, d_r:]}
    assert not old & {row.tobytes() for row in made.archive.data("solution")[:, d_r:]} - old


def test_without_gradients_it_is_map_elites_with_iso_line():
    made = emitter(gradient_share=0.0)
    before, found = made.representations, rounds(made, 5)
    assert torch.equal(made.representations, before)
    archive, generator = grid(*parts()), rng(SMALL["seed"])
    for solutions in found:
        archive.add(solutions, *scored(solutions), representation=np.zeros(12))
        elites = torch.from_numpy(archive.data("solution"))
        x, y = (elites[torch.randint(len(elites), (12,), generator=generator)] for _ in range(2))
        want = iso_line(x, y, generator=generator)
    np.testing.assert_array_equal(made.ask(), want)


def test_offspring_belong_to_the_representation_of_their_first_parent():
    made = emitter(gradient_share=0.0, iso_sigma=0.0, line_sigma=0.0, n_representations=3)
    first, d_r = made.representations.numpy(), weights(parts()[0])
    for k in range(4):  # copies of first parents, each better than all before
        measures = np.random.default_rng(k).random((12, 2))
        made.ask()
        made.tell(np.arange(12.0) + 12 * k, measures, steps())
    kept = made.archive.data(["solution", "representation"])
    np.testing.assert_array_equal(kept["solution"][:, :d_r], first[kept["representation"]])


def test_the_archive_never_gets_worse_and_owners_are_known():
    modules = parts()
    archive = CVTArchive(
        solution_dim=weights(*modules), centroids=20, ranges=[(0, 1)] * 2, dtype=np.float32, seed=0,
        extra_fields={"representation": ((), np.int32)}, qd_score_offset=-50,
    )  # fmt: skip
    made, scores = emitter(modules, archive, n_representations=4), []
    for k in range(6):
        solutions = made.ask()
        told = made.tell(*scored(solutions), steps(seed=k))
        scores.append(archive.stats.qd_score)
        assert set(archive.data("representation").tolist()) <= set(range(4))
        assert set(told) == {"added", "replaced", "critic_loss", "policy_critic_loss"}
        assert all(math.isfinite(value) for value in told.values())
    assert scores == sorted(scores)


def test_a_representation_whose_elites_are_gone_becomes_a_copy():
    made = emitter(critic_steps=0)
    solutions = made.ask()
    measures = np.tile([[0.5, 0.5]], (12, 1))
    told = made.tell(np.arange(12.0), measures, steps())  # the last, of representation 1, is best
    assert told["replaced"] == 1.0
    np.testing.assert_array_equal(made.representations[0], made.representations[1])
    np.testing.assert_array_equal(made.greedy_decisions[0], solutions[6, weights(parts()[0]) :])


def test_the_same_seed_gives_the_same_and_nothing_of_the_users_is_touched():
    modules = parts()
    modules[0].train()
    before, state = copy.deepcopy(nn.ModuleList(modules).state_dict()), torch.random.get_rng_state()
    one, two = (rounds(emitter(modules), 3)[-1] for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, rounds(emitter(modules, seed=1), 3)[-1])
    assert torch.equal(state, torch.random.get_rng_state())
    for name, value in nn.ModuleList(modules).state_dict().items():
        assert torch.equal(value, before[name])
    assert modules[0].training and all(p.requires_grad for p in modules[0].parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_modules_of_any_precision_and_modes_around_it_change_nothing(as_a_user, dtype):
    want = rounds(emitter(parts()), 2)[-1]
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        modules = tuple(part.to(dtype) for part in parts())
        found = rounds(emitter(modules), 2)[-1]
    np.testing.assert_array_equal(found, want)


def test_an_archive_that_takes_nothing_is_offered_new_policies():
    modules = parts()
    made = emitter(modules, grid(*modules, threshold_min=1e9, learning_rate=1.0))
    one, two, three = rounds(made, 3)
    assert len(made.archive) == 0 and not np.array_equal(one, two) and not np.array_equal(two, three)


# --- what is learned ---


def by_modules(made, batch, decisions, index):
    """Return both critic losses and the actors' without noise, policy by policy with modules."""
    learner, how = made._learner, made._learner.how
    policy = learner.policy
    obs, action, after, reward, terminated, truncated = (np.asarray(column) for column in batch)
    obs, action, after = map(torch.from_numpy, (obs, action, after))
    reward, terminated, kept = (torch.from_numpy(x[:, 0]) for x in (reward, terminated, 1 - truncated))

    def act(r, d, x):
        return loaded((policy.representation.model, policy.decision.model), torch.cat([r, d]))(x)

    def twin(row):
        critic = PolicyCritic(3, 2, 4, hidden=(6,), encoder=(5, 4))
        vector_to_parameters(row, critic.parameters())
        return critic

    def greedy(row, s, a):
        pair = []
        for half in row.chunk(2):
            net = nn.Sequential(nn.Linear(5, 6), nn.LeakyReLU(0.01), nn.Linear(6, 1))
            vector_to_parameters(half, net.parameters())
            pair.append(net(torch.cat([s, a], 1))[:, 0])
        return torch.stack(pair, 1)

    slow, now = learner.slow, learner.weights
    critic_loss = policy_loss = actors = 0.0
    for i in range(learner.n):
        then = greedy(slow["Q"][i], after, act(slow["R"][i], slow["G"][i], after)).min(1).values
        target = reward + how.discount * (1 - terminated) * then
        critic_loss += (
            ((greedy(now["Q"][i], obs, action) - target[:, None]) * kept[:, None]).square().mean(0).sum()
        )
        actors -= greedy(now["Q"][i], obs, act(now["R"][i], now["G"][i], obs))[:, 0].mean()
    for d, i in zip(decisions, index.tolist(), strict=True):
        last = loaded((policy.decision.model,), d)[0][2]
        head = torch.cat([last.weight, last.bias[:, None]], 1)
        then = twin(slow["P"][i])(after, act(slow["R"][i], d, after), head).min(1).values
        target = reward + how.discount * (1 - terminated) * then
        error = (twin(now["P"][i])(obs, action, head) - target[:, None]) * kept[:, None]
        policy_loss += error.square().mean(0).sum()
        actors -= twin(now["P"][i])(obs, act(now["R"][i], d, obs), head)[:, 0].mean()
    return critic_loss, policy_loss, actors


def test_losses_are_those_of_modules_one_by_one():
    made = emitter(noise=0.0)
    rounds(made, 4)
    learner = made._learner
    batch, decisions = learner.replay.sample(9, rng()), made._elites()[0][:5, weights(parts()[0]) :]
    index = torch.tensor([1, 0, 0, 1, 1])
    with torch.no_grad():
        want = by_modules(made, batch, decisions, index)
    found = *learner._critic_losses(batch, decisions, index), learner._actor_loss(batch[0], decisions, index)
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), atol=1e-5, rtol=1e-4)


def test_actors_move_in_one_of_so_many_steps_and_slow_copies_follow():
    made = emitter(policy_delay=3, tau=0.25)
    rounds(made, 1)  # three steps: the first moves actors
    learner = made._learner
    decisions = made._elites()[0][:, weights(parts()[0]) :]
    for moves in (True, False, False, True):
        before = {name: rows.detach().clone() for name, rows in learner.weights.items()}
        slow = {name: rows.clone() for name, rows in learner.slow.items()}
        learner.step(decisions)
        for name, rows in learner.weights.items():
            moved = moves or name in "QP"
            assert torch.equal(rows, before[name]) != moved
            want = slow[name] + 0.25 * (rows.detach() - slow[name]) if moved else slow[name]
            torch.testing.assert_close(learner.slow[name], want)


def test_critics_converge_to_the_values_of_a_chain():
    """Two states in turn, the first with a reward of 1, and a third that ends with a reward of 2."""
    modules = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Sequential(nn.Linear(3, 1), nn.Tanh())
    how = {
        **SMALL,
        "critic_steps": 250,
        "hidden": (32,),
        "train_batch": 48,
        "n_sampled": 3,
        "policy_delay": 1000,
    }
    made = CCQD(
        grid(*modules),
        *modules,
        obs_dim=3,
        action_dim=1,
        discount=0.5,
        tau=0.1,
        critic_lr=2e-2,
        noise=0.0,
        **how,
    )
    at = np.arange(48) % 3
    obs, action = np.eye(3), np.random.default_rng(0).uniform(-1, 1, (48, 1))
    then = {"observation": obs[[1, 0, 2]][at], "reward": np.array([1.0, 0.0, 2.0])[at]}
    then |= {"terminated": at == 2, "truncated": np.zeros(48)}
    made.tell(*scored(made.ask()), {"observation": obs[at], "action": action, "next": then})
    want = torch.tensor([4 / 3, 2 / 3, 2.0])
    learner, seen = made._learner, torch.from_numpy(np.hstack([obs[at], action])[:3]).float()
    found = learner._values(learner._twins(learner.slow["Q"]), seen.expand(2, -1, -1))
    torch.testing.assert_close(found, want.expand_as(found), atol=1e-2, rtol=0)
    decisions, each = made._elites()[0][:3, weights(modules[0]) :], seen.expand(3, -1, -1)
    critics = learner._twins(learner.slow["P"])[[0, 1, 0]]
    found = learner._policy_values(critics, each[..., :3], each[..., 3:], learner.policy.heads(decisions))
    torch.testing.assert_close(found, want.expand_as(found), atol=1e-2, rtol=0)


def test_steps_cut_off_by_time_teach_nothing_unless_they_also_ended():
    for terminated, learns in ((False, False), (True, True)):
        made, seen = emitter(), steps()
        seen["next"] |= {"truncated": np.ones(20), "terminated": np.full(20, terminated)}
        told = made.tell(*scored(made.ask()), seen)
        assert (told["critic_loss"] > 0) == learns and (told["policy_critic_loss"] > 0) == learns


def test_improving_follows_the_critic_uphill_in_the_decision_alone():
    for shared in (True, False):
        made = emitter(decision_steps=30, train_batch=64, decision_lr=1e-2, shared=shared)
        rounds(made, 2)
        learner, d_r = made._learner, weights(parts()[0])
        index, start = torch.zeros(4, dtype=torch.long), made._elites()[0][:4]
        start[:, :d_r] = made.representations[index]
        better, obs = learner.improved(start, index), learner.replay.rows[:, :3].expand(4, -1, -1)
        assert torch.equal(better[:, :d_r], start[:, :d_r]) == shared

        def value(rows, learner=learner, obs=obs, shared=shared, index=index, d_r=d_r):
            critics = learner._twins(learner.weights["P" if shared else "Q"].detach())[index, :1]
            action = learner.policy(rows, obs)
            if shared:
                return learner._policy_values(critics, obs, action, learner.policy.heads(rows[:, d_r:])).mean(
                    -1
                )
            return learner._values(critics, torch.cat([obs, action], -1)).mean(-1)

        assert (value(better) > value(start)).all()


def test_without_sharing_there_is_one_greedy_actor():
    made = emitter(shared=False, n_representations=9)
    rounds(made, 3)
    solutions = made.ask()
    assert made.representations.shape[0] == made.greedy_decisions.shape[0] == 1
    actor = torch.cat([made.representations, made.greedy_decisions], 1)
    np.testing.assert_array_equal(solutions[5:6], actor)
    assert set(made.archive.data("representation").tolist()) == {0}


def test_the_buffer_keeps_the_latest_transitions():
    made = emitter(buffer_size=50, critic_steps=0)
    told = [steps(n, seed=n) for n in (20, 25, 17, 70, 3)]
    kept = []
    for each in told:
        made.tell(*scored(made.ask()), each)
        kept = [*kept, *each["observation"].tolist()][-50:]
        replay = made._learner.replay
        stored = sorted(replay.rows[: replay.filled, :3].tolist())
        np.testing.assert_allclose(stored, sorted(np.float32(kept).tolist()))


def test_transitions_may_be_a_tensordict():
    tensordict = pytest.importorskip("tensordict")
    one, two = emitter(), emitter()
    asked = one.ask(), two.ask()
    one.tell(*scored(asked[0]), steps())
    two.tell(*scored(asked[1]), tensordict.TensorDict(steps(), batch_size=[20]))
    np.testing.assert_array_equal(one.ask(), two.ask())


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "batch_size must be at least n_representations, 2, got 1"),
        ({"gradient_share": 0.05}, "gradient_share times batch_size must be at least n_representations, 2"),
        ({"gradient_share": 1.5}, "gradient_share must be in"),
        ({"tau": 0.0}, "tau must be in"),
        ({"discount": math.nan}, "discount must be in"),
        ({"critic_lr": 0.0}, "critic_lr must be greater than 0"),
        ({"hidden": (4, 0)}, "each size of hidden must be an integer of at least 1, got 0"),
        ({"hidden": 4}, "hidden must be a sequence"),
        ({"encoder": ()}, "encoder must have at least one layer"),
        ({"action_dim": 3}, "decision must have an nn.Linear with action_dim = 3 outputs"),
        ({"obs_dim": 4}, "representation must take rows of obs_dim = 4"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"device": "nowhere"}, "device must name a device"),
        ({"shared": 1}, "shared must be True or False"),
        ({"modules": (nn.Tanh(), nn.Linear(3, 2))}, "representation must be a module with weights"),
        ({"modules": (nn.Linear(3, 5), nn.Linear(4, 2))}, "decision must take what representation gives"),
        ({"modules": (nn.Linear(3, 5), nn.Sequential(nn.Linear(5, 2), nn.Flatten(0)))}, "decision must give one"),
        ({"modules": (None, nn.Linear(3, 2))}, "representation must be a module with weights, got None"),
        ({"archive": "grid"}, "archive must be an archive of ribs, got str"),
        ({"archive": grid(nn.Linear(3, 5))}, "archive must have solution_dim 54, of which representation has 20"),
        (
            {"archive": GridArchive(solution_dim=54, dims=[2], ranges=[(0, 1)])},
            "archive must have extra_fields={'representation'",
        ),
    ],
)  # fmt: skip
def test_refuses_bad_settings_by_name(as_a_user, options, message):
    options = {"modules": parts(), **options}
    modules = options.pop("modules")
    archive = options.pop("archive", None)
    if archive is None:
        archive = grid(*(part for part in modules if part is not None))
    with pytest.raises(ValueError, match=message):
        emitter(modules, archive, **options)


def changed(at, value):
    told = steps()
    (told if at in told else told["next"])[at] = value
    return told


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"objective": np.zeros(5)}, r"objective must have shape \(12\)"),
        ({"objective": np.full(12, np.nan)}, "objective must be finite"),
        ({"objective": None}, "objective must be numbers, got NoneType"),
        ({"measures": np.zeros((12, 3))}, r"measures must have shape \(12, 2\)"),
        ({"measures": np.full((12, 2), np.inf)}, "measures must be finite"),
        ({"transitions": {"observation": np.zeros((4, 3))}}, "must have the key 'action'"),
        ({"transitions": {**steps(), "next": {}}}, "must have the key 'next.observation'"),
        ({"transitions": None}, "must have the key 'observation'"),
        ({"transitions": steps(0)}, "transitions must have at least one step"),
        (
            {"transitions": steps(obs=4)},
            r"transitions 'observation' must have shape \(any, 3\), got \(20, 4\)",
        ),
        ({"transitions": steps(action=1)}, r"transitions 'action' must have shape \(20, 2\)"),
        ({"transitions": changed("reward", np.zeros(19))}, r"'next.reward' must have shape \(20, 1\)"),
        ({"transitions": changed("reward", np.full(20, np.nan))}, "'next.reward' must be finite"),
    ],
)
def test_refuses_bad_results_by_name_and_takes_good_ones_after(as_a_user, told, message):
    made = emitter(critic_steps=0)
    objective, measures = scored(made.ask())
    good = {"objective": objective, "measures": measures, "transitions": steps()}
    with pytest.raises(ValueError, match=message):
        made.tell(**{**good, **told})
    assert len(made.archive) == 0
    made.tell(**good)
    with pytest.raises(ValueError, match="got tell without a new ask"):
        made.tell(**good)


def test_refuses_to_be_told_unasked_and_to_act_on_what_does_not_fit(as_a_user):
    with pytest.raises(ValueError, match="got tell without a new ask"):
        emitter().tell(np.zeros(12), np.zeros((12, 2)), steps())
    made = emitter()
    with pytest.raises(ValueError, match=r"solutions must have shape \(any, 54\)"):
        made.act(np.zeros((2, 53)), np.zeros((2, 3)))
    for obs in (np.zeros((3, 3)), np.zeros((2, 4)), np.zeros(3)):
        with pytest.raises(ValueError, match=r"obs must have shape \(2, ..., 3\)"):
            made.act(np.zeros((2, 54)), obs)
