"""What a subgoal search needs, learned: a distribution over states, and a puzzle that is solved with it."""

import itertools

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from posterity.combinatorial import TokenSubgoals, adaptive_subgoal_search, fit_subgoal_models
from posterity.lab.environments import SlidingPuzzle, world_env


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def net(length=4, n_tokens=3, width=16):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = TokenSubgoals(length, n_tokens, width=width)
        for weight in made.parameters():
            torch.nn.init.normal_(weight, std=0.5)
    return made.eval()


EVERY = torch.tensor(list(itertools.product(range(3), repeat=4)))


def test_the_probabilities_of_all_strings_add_up_to_one():
    for start in EVERY[[0, 17, 80]]:
        total = net().log_prob(start.expand_as(EVERY), EVERY).exp().sum()
        torch.testing.assert_close(total, torch.tensor(1.0))


@pytest.mark.parametrize("n", [1, 5, 81])
def test_a_beam_that_holds_all_finds_the_likeliest(n):
    for start in EVERY[[3, 44]]:
        chances = net().log_prob(start.expand_as(EVERY), EVERY)
        want = EVERY[chances.argsort(descending=True)[:n]]
        assert torch.equal(net().propose(start, n, beam=81), want)


def test_a_token_sees_those_before_it_alone():
    model, target = net(), EVERY[[5, 60]]
    state = EVERY[[1, 2]]
    for changed in range(4):
        other = target.clone()
        other[:, changed] = (other[:, changed] + 1) % 3
        before = model._next(model._known(state)[:, None] + model._prefixes(target), torch.arange(4))
        after = model._next(model._known(state)[:, None] + model._prefixes(other), torch.arange(4))
        same = (before == after).all(2).all(0)
        assert same.tolist() == [at <= changed for at in range(4)]


def test_the_loss_of_a_random_position_is_that_of_all_on_average():
    model, start, target = net(), EVERY[:6], EVERY[20:26]
    whole = model.loss(start, target)
    torch.testing.assert_close(whole, -model.log_prob(start, target).mean() / 4)
    model.train()
    draws = torch.stack([model.loss(start, target, generator=rng(k)).detach() for k in range(400)])
    assert abs(float(draws.mean() - whole.detach())) < 5 * float(draws.std()) / 20
    assert float(draws.std()) > 0


def test_it_learns_a_map_of_states_in_any_dtype():
    model = net(3, 3).train()
    x = torch.tensor(list(itertools.product(range(3), repeat=3)))
    y = (x + 1) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    for step in range(120):
        optimizer.zero_grad()
        model.loss(x, y, generator=rng(step)).backward()
        optimizer.step()
    model.eval()
    assert all(torch.equal(model.propose(row, 1)[0], (row + 1) % 3) for row in x)
    low = TokenSubgoals(3, 3, width=16).bfloat16()
    low.load_state_dict(model.state_dict())
    torch.testing.assert_close(low.eval().loss(x, y), model.loss(x, y), rtol=0.1, atol=0.02)


def test_proposals_do_not_depend_on_who_asks_with_them(fitted):
    puzzle, models, states = fitted
    one = models.value(states)
    torch.testing.assert_close(one, torch.cat([models.value([s]) for s in states]))
    assert [models.generators[2](s, 2) for s in states] == [models.generators[2](s, 2) for s in states]


@pytest.fixture(scope="module")
def fitted():
    puzzle, draws = SlidingPuzzle(2), np.random.default_rng(0)
    walks = [puzzle.trajectory(7, draws) for _ in range(60)]
    models = fit_subgoal_models(
        puzzle, walks, distances=(3, 2), n_steps=60, n_verifier_states=20, generator=rng()
    )
    return puzzle, models, [puzzle.trajectory(9, draws)[0][0] for _ in range(6)]


def test_a_small_puzzle_is_learned_and_solved(fitted):
    puzzle, models, states = fitted
    for start in states:
        found = adaptive_subgoal_search(puzzle, start, **models._asdict(), n_subgoals=2, slack=1, budget=200)
        state = start
        for action in found.actions:
            state = puzzle.step(state, action)
        assert found.solved and puzzle.is_solved(state)


def test_the_same_generator_gives_the_same_networks_and_global_draws_stay(fitted):
    puzzle, models, states = fitted
    draws = np.random.default_rng(0)
    walks = [puzzle.trajectory(7, draws) for _ in range(60)]
    before = torch.random.get_rng_state()
    again = fit_subgoal_models(
        puzzle, walks, distances=(3, 2), n_steps=60, n_verifier_states=20, generator=rng()
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    for ours, theirs in ((again.value, models.value), (again.policy, models.policy)):
        for name, weight in ours.state_dict().items():
            assert torch.equal(weight, theirs.state_dict()[name])


def test_where_the_policy_always_arrives_the_verifier_says_so():
    class Trivial:
        n_actions = 1

        def step(self, state, action):
            return max(0, state - 1)

        def is_solved(self, state):
            return state == 0

        def tokens(self, states):
            return torch.tensor(states)[:, None]

        def from_tokens(self, tokens):
            return int(tokens[0])

        def encode(self, states):
            return torch.tensor(states, dtype=torch.float32)[:, None]

    walks = [([1, 0], [0])] * 3
    with pytest.warns(UserWarning, match=r"the policy reaches (all|none) of"):
        models = fit_subgoal_models(
            Trivial(), walks, distances=(1,), n_steps=2, n_verifier_states=3, generator=rng()
        )
    assert models.verifier([1], [0]).tolist() in ([1.0], [0.0])


def test_the_batched_puzzle_moves_as_the_single_one_and_gymnasium_takes_it():
    puzzle, draws = SlidingPuzzle(3), np.random.default_rng(0)
    states = puzzle.start(40, draws)
    actions = draws.integers(4, size=40)
    new, reward, solved = puzzle.move(states, actions)
    for before, action, after, won in zip(
        states.tolist(), actions.tolist(), new.tolist(), solved, strict=True
    ):
        assert tuple(after) == puzzle.step(tuple(before), action) and won == puzzle.is_solved(tuple(after))
    assert (reward == solved).all()
    check_env(world_env(puzzle), skip_render_check=True)


def test_half_of_all_orders_are_states_of_the_puzzle():
    puzzle = SlidingPuzzle(2)
    reached, front = {puzzle.goal}, [puzzle.goal]
    while front:
        front = [t for s in front for a in range(4) if (t := puzzle.step(s, a)) not in reached]
        reached |= set(front)
    every = {order for order in itertools.permutations(range(4)) if puzzle.from_tokens(order) is not None}
    assert every == reached and len(reached) == 12
    assert puzzle.from_tokens((1, 1, 2, 0)) is None
    states, actions = SlidingPuzzle(4).trajectory(50, np.random.default_rng(1))
    assert SlidingPuzzle(4).from_tokens(states[0]) == states[0] and len(actions) == 50


PUZZLE = SlidingPuzzle(2)
STATES, ACTIONS = PUZZLE.trajectory(5, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fit_subgoal_models(PUZZLE, []), "trajectories must be one or more"),
        (lambda: fit_subgoal_models(PUZZLE, [(STATES, ACTIONS[1:])]), "one state more than actions, has 6 and 4"),
        (lambda: fit_subgoal_models(PUZZLE, [(STATES, ACTIONS), (STATES, ACTIONS[::-1])]), "trajectory 1: action"),
        (lambda: fit_subgoal_models(PUZZLE, [(STATES[:-1], ACTIONS[:-1])]), "trajectory 0 does not end in a solved state"),
        (lambda: fit_subgoal_models(PUZZLE, [(STATES, ACTIONS)], distances=(6,)), "6 actions or more"),
        (lambda: fit_subgoal_models(PUZZLE, [(STATES, ACTIONS)], distances=()), "distances must"),
        (lambda: fit_subgoal_models(PUZZLE, [(STATES, ACTIONS)], lr=0.0), "lr must"),
        (lambda: TokenSubgoals(0, 3), "length must"),
        (lambda: net().propose(torch.zeros(5, dtype=torch.long), 1), r"tokens must be \(batch, 4\)"),
        (lambda: net().propose(torch.zeros(1, 4, dtype=torch.long), 1), r"tokens must be \(4,\)"),
        (lambda: net().log_prob(torch.zeros(1, 4, dtype=torch.long), torch.full((1, 4), 3)), r"tokens must be in 0..2"),
        (lambda: net().log_prob(torch.zeros(1, 4), torch.zeros(1, 4)), "tokens must be integers"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(as_a_user, call, said):
    with pytest.raises(ValueError, match=said):
        call()
