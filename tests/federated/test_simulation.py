"""Federated training: what the server computes, and that it is the same wherever clients run."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.federated.simulation import aggregate, federate, local_sgd, update_vectors


def rows(seed, n=12, d=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=g), torch.randint(2, (n,), generator=g)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.ReLU(), nn.Linear(4, 2))


def equal(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_the_mean_is_weighted_and_counts_are_the_largest():
    sent = [{"w": torch.full((2,), float(k)), "n": torch.tensor(k)} for k in (1, 2, 6)]
    assert aggregate(sent)["w"].tolist() == pytest.approx([3, 3])
    mean = aggregate(sent, [1, 1, 2])
    assert mean["w"].tolist() == pytest.approx([15 / 4] * 2) and mean["n"] == 6
    assert aggregate(sent[::-1], [2, 1, 1])["w"].tolist() == pytest.approx([15 / 4] * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_narrow_states_are_added_in_float32(dtype):
    sent = [{"w": torch.full((3,), 1.5, dtype=dtype)} for _ in range(1000)]
    mean = aggregate(sent)["w"]
    assert mean.dtype == dtype and mean.tolist() == [1.5] * 3
    big = [{"w": torch.full((1,), 60000.0, dtype=torch.float16)} for _ in range(4)]
    assert aggregate(big)["w"].item() == 60000


def test_one_client_and_one_epoch_is_plain_sgd():
    net, client = network(), rows(0)
    seed = torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(5)).item()
    ours = federate(net, [client], rounds=1, generator=torch.Generator().manual_seed(5))
    plain, g = network(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # for dropout
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    batch = torch.randperm(12, generator=g)
    F.cross_entropy(plain.train()(client[0][batch]), client[1][batch]).backward()
    optimizer.step()
    assert equal(ours, plain)
    assert equal(net, network()), "the model that was given is left as it was"


def test_full_batches_of_one_step_are_the_gradient_of_all_rows():
    """FedAvg with one full-batch step and weights by rows is gradient descent on all rows."""
    torch.manual_seed(0)
    net, clients = nn.Linear(3, 2).double(), [rows(k, n) for k, n in enumerate((4, 9, 20))]
    clients = [[x.double(), y] for x, y in clients]
    ours = federate(net, clients, rounds=1, train=functools.partial(local_sgd, batch_size=100))
    x, y = (torch.cat(parts) for parts in zip(*clients, strict=True))
    F.cross_entropy(net(x), y).backward()
    assert torch.allclose(ours.weight, net.weight - 0.1 * net.weight.grad, atol=1e-12)


def test_a_lone_last_row_is_left_out_and_single_rows_are_trained_on_where_they_are_asked_for():
    def steps(n, batch_size):
        net, seen = nn.Linear(3, 2), []
        local_sgd(
            net, rows(0, n), torch.Generator().manual_seed(0), batch_size=batch_size,
            loss_fn=lambda out, y: (seen.append(len(y)), F.cross_entropy(out, y))[1],
        )  # fmt: skip
        return seen

    assert steps(9, 4) == [4, 4]
    assert steps(10, 4) == [4, 4, 2]
    assert steps(3, 1) == [1, 1, 1]
    assert steps(1, 4) == [1]


def test_a_seed_is_a_run_and_rounds_draw_who_takes_part():
    clients = [rows(k) for k in range(6)]
    seen = []

    def train(model, client, generator):
        seen.append(next(k for k, each in enumerate(clients) if each is client))
        local_sgd(model, client, generator)

    runs = [
        federate(
            network(), clients, rounds=3, per_round=2, train=train, generator=torch.Generator().manual_seed(s)
        )
        for s in (1, 1, 2)
    ]
    assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])
    assert seen[:6] == seen[6:12]
    assert all(len(set(seen[k : k + 2])) == 2 for k in range(0, 18, 2))
    assert len(set(seen)) > 2


def test_layers_that_draw_by_themselves_leave_the_generators_of_all_devices_as_they_were(monkeypatch):
    net, before = network(), torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs were reseeded"))
    federate(net, [rows(0)], rounds=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_are_ordered_on_the_device_of_the_generator(monkeypatch):
    places, draw = [], torch.randperm
    monkeypatch.setattr(
        torch, "randperm", lambda *n, **how: places.append(how.get("device")) or draw(*n, **how)
    )
    local_sgd(nn.Linear(3, 2), rows(0), torch.Generator())
    assert places == [torch.device("cpu")]


def test_what_is_trained_under_no_grad_or_inference_mode_is_the_same():
    clients = [rows(k) for k in range(2)]
    run = functools.partial(federate, network(), clients, rounds=2)
    plain = run(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert equal(plain, run(generator=torch.Generator().manual_seed(0)))
    with torch.inference_mode():
        assert equal(plain, run(generator=torch.Generator().manual_seed(0)))


def test_workers_of_ray_give_the_numbers_of_one_process():
    ray = pytest.importorskip("ray")
    torch.set_num_threads(1)
    clients = [rows(k) for k in range(3)]
    run = functools.partial(federate, network(), clients, rounds=2, per_round=2)
    here = run(generator=torch.Generator().manual_seed(0))
    try:
        assert equal(here, run(generator=torch.Generator().manual_seed(0), ray=True))
    finally:
        ray.shutdown()


def test_vectors_hold_every_floating_point_entry_less_the_base():
    net = network()
    states = [net.state_dict(), {k: v + 1 for k, v in net.state_dict().items()}]
    vectors = update_vectors(states, net.state_dict())
    assert vectors.shape == (2, sum(v.numel() for v in net.state_dict().values() if v.is_floating_point()))
    assert torch.allclose(vectors, torch.tensor([[0.0], [1.0]]).expand_as(vectors), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: aggregate([]), "updates must hold at least one"),
        (lambda: aggregate([{"a": torch.ones(1)}, {"b": torch.ones(1)}]), "same keys"),
        (
            lambda: aggregate([{"a": torch.ones(1)}, {"a": torch.ones(2)}]),
            r"'a' has \(2,\) in 1 and \(1,\) in 0",
        ),
        (lambda: aggregate([{"a": torch.ones(1)}], [0.0]), "not all be 0"),
        (lambda: aggregate([{"a": torch.ones(1)}], [-1.0]), "weights must be at least 0"),
        (lambda: aggregate([{"a": torch.ones(1)}], [float("nan")]), "weights"),
        (lambda: aggregate([{"a": torch.ones(1)}], [1.0, 1.0]), "one for each of 1 updates"),
        (lambda: federate(network(), [], rounds=1), "clients must hold at least one"),
        (lambda: federate(network(), [rows(0)], rounds=-1), "rounds"),
        (lambda: federate(network(), [rows(0)], rounds=1, per_round=2), "per_round must be at most"),
        (
            lambda: federate(network(), [rows(0)], rounds=1, weights=[1.0, 2.0]),
            "weights must be one for each",
        ),
        (lambda: federate(network(), [[torch.ones(2, 3), torch.ones(3)]], rounds=1), "got 2 and 3"),
        (lambda: local_sgd(network(), rows(0), lr=0.0), "lr must be greater than 0"),
    ],
)
def test_bad_input_is_refused(as_a_user, call, said):
    with pytest.raises(ValueError, match=said):
        call()
