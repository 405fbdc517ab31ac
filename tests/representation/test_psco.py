import copy
import io
import math
import zipfile

import numpy as np
import ot
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.claims.representation.psco import read_characters
from posterity.representation import PsCo, PsCoLoss, adapt_few_shot, sinkhorn_assign
from posterity.testing import check_loss


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=rng(seed))


def made(dim=5, **options):
    torch.manual_seed(0)
    return PsCoLoss(dim, **{"queue_size": 16, "n_shots": 3} | options).double()


# Assignments.


def test_assignments_are_sinkhorns_at_convergence_and_rows_sum_to_one():
    s = randn(6, 9)
    for n_iter in (1, 3):
        found = sinkhorn_assign(s, n_iter=n_iter, epsilon=0.5)
        torch.testing.assert_close(found.sum(1), torch.ones(6, dtype=torch.float64))
    even = sinkhorn_assign(s, epsilon=0.5, n_iter=200)
    torch.testing.assert_close(even.sum(0), torch.full((9,), 6 / 9, dtype=torch.float64), rtol=1e-9, atol=0)
    plan = ot.sinkhorn(np.full(6, 1 / 6), np.full(9, 1 / 9), -s.numpy(), 0.5, numItermax=5000, stopThr=1e-14)
    torch.testing.assert_close(even, torch.from_numpy(6 * plan), rtol=1e-6, atol=1e-9)
    moved = sinkhorn_assign(s + randn(6, 1, seed=1) + randn(1, 9, seed=2), epsilon=0.5, n_iter=200)
    torch.testing.assert_close(moved, even)


def test_assignments_of_cosines_at_the_default_sharpness_are_pots():
    s = F.normalize(randn(6, 5), dim=1) @ F.normalize(randn(9, 5, seed=1), dim=1).T
    found = sinkhorn_assign(s, n_iter=5000)
    torch.testing.assert_close(found.sum(0), torch.full((9,), 6 / 9, dtype=torch.float64), rtol=1e-6, atol=0)
    plan = ot.sinkhorn(
        np.full(6, 1 / 6), np.full(9, 1 / 9), -s.numpy(), 0.05, numItermax=50_000, stopThr=1e-14
    )
    torch.testing.assert_close(found, torch.from_numpy(6 * plan), rtol=0, atol=1e-6)


def test_a_step_goes_over_columns_first():
    s = randn(3, 4)
    a = (s / 0.2).exp()
    for _ in range(2):
        a = a / a.sum(0) / 4
        a = a / a.sum(1, keepdim=True) / 3
    torch.testing.assert_close(sinkhorn_assign(s, epsilon=0.2, n_iter=2), 3 * a)
    far = sinkhorn_assign(torch.tensor([[1.0, -1.0], [1.0, -1.0]]).half(), epsilon=1e-3)
    assert far.isfinite().all() and far.dtype == torch.float16
    assert not sinkhorn_assign(s.requires_grad_()).requires_grad


# The loss.


def by_loops(loss, query, key, shots):
    """Both parts, image by image."""
    p, z = F.normalize(query, dim=1), F.normalize(key, dim=1)
    moco = meta = 0.0
    chosen = [loss.queue[shots[i]] for i in range(len(p))]
    everything = torch.cat(chosen)
    for i in range(len(p)):
        logits = torch.stack([p[i] @ z[i], *(p[i] @ q for q in loss.queue)]) / loss.temperature
        moco = moco + logits.logsumexp(0) - logits[0]
        similar = torch.stack([p[i] @ s for s in everything]) / loss.meta_temperature
        meta = meta + similar.logsumexp(0) - p[i] @ chosen[i].mean(0) / loss.meta_temperature
    return moco / len(p), meta / len(p)


def test_the_loss_is_contrast_plus_the_pseudo_task():
    loss = made(temperature=0.3, meta_temperature=0.7, meta_weight=2.0)
    query, key = randn(6, 5), randn(6, 5, seed=1)
    assigned = sinkhorn_assign(F.normalize(key, dim=1) @ loss.queue.T)
    shots = assigned.argsort(1, descending=True)[:, :3]
    assert torch.equal(loss.shots(key).sort(1).values, shots.sort(1).values)
    moco, meta = by_loops(loss, query, key, shots)
    terms = loss.terms(query, key)
    torch.testing.assert_close(terms.moco, moco)
    torch.testing.assert_close(terms.meta, meta)
    torch.testing.assert_close(loss(query, key, update=False), moco + 2 * meta)
    plain = made(temperature=0.3, meta_temperature=0.7, meta_weight=0)
    torch.testing.assert_close(plain(query, key, update=False), moco)
    torch.testing.assert_close(plain.terms(query.requires_grad_(), key).meta, meta)
    start = loss.queue.clone()
    loss.terms(query, key)
    assert torch.equal(loss.queue, start) and int(loss.pointer) == 0


@pytest.mark.parametrize("epsilon", [0.01, 0.04, 0.05, 0.5])
def test_shots_are_the_largest_assignments_at_any_sharpness(epsilon):
    loss = made(queue_size=300, n_shots=4, epsilon=epsilon, n_iter=5).float()
    key = torch.eye(5)[0] + randn(20, 5, dtype=torch.float32) / 5  # all far from some of the queue
    loss.queue = torch.cat([loss.queue[:298], F.normalize(key[:1], dim=1), -F.normalize(key[:1], dim=1)])
    exact = sinkhorn_assign((F.normalize(key, dim=1) @ loss.queue.T).double(), epsilon=epsilon, n_iter=5)
    found = exact.gather(1, loss.shots(key))
    torch.testing.assert_close(found, exact.topk(4, dim=1).values, rtol=1e-4, atol=0)


def test_copies_in_the_queue_are_found_and_make_the_supervised_contrastive_loss():
    key, query = randn(4, 5), randn(4, 5, seed=1).requires_grad_()
    loss = made(queue_size=12)
    loss.queue = F.normalize(key, dim=1).repeat(3, 1)[torch.randperm(12, generator=rng())]
    z = F.normalize(key, dim=1)
    for i, places in enumerate(loss.shots(key)):
        torch.testing.assert_close(loss.queue[places], z[i].expand(3, 5))
    p = F.normalize(query, dim=1)
    similar = p @ z.repeat_interleave(3, 0).T
    own = similar.view(4, 4, 3).diagonal().T  # each image's three shots
    supervised = -(own - similar.logsumexp(1, keepdim=True)).mean()
    torch.testing.assert_close(loss.terms(query, key).meta, supervised)


def test_shots_may_be_drawn_by_the_assignments():
    loss, key = made(sampling="multinomial", n_shots=1, epsilon=0.5), randn(1, 5)
    assigned = sinkhorn_assign(F.normalize(key, dim=1) @ loss.queue.T, epsilon=0.5)[0]
    generator = rng(3)
    state = torch.get_rng_state()
    drawn = torch.cat([loss.shots(key, generator=generator)[0] for _ in range(600)])
    assert torch.equal(torch.get_rng_state(), state)
    share = drawn.bincount(minlength=16) / 600
    assert ((share - assigned).abs() < 5 * (assigned * (1 - assigned) / 600).sqrt() + 1e-3).all()
    several = made(sampling="multinomial")
    assert all(len(row.unique()) == 3 for row in several.shots(randn(6, 5), generator=rng()))


def test_no_gradient_enters_keys_and_the_queue_is_first_in_first_out():
    loss, query, key = made(queue_size=7), randn(3, 5).requires_grad_(), randn(3, 5, seed=1).requires_grad_()
    start = loss.queue.clone()
    loss(query, key, update=False).backward()
    assert key.grad is None and query.grad.norm() > 0
    assert torch.equal(loss.queue, start) and int(loss.pointer) == 0
    entered = []
    for seed in range(4):
        batch = randn(3, 5, seed=seed)
        loss(query, batch)
        entered += list(F.normalize(batch, dim=1))
    assert int(loss.pointer) == 12 % 7
    for k in range(5, 12):  # the last seven
        torch.testing.assert_close(loss.queue[k % 7], entered[k])
    again = made(queue_size=7)
    again.load_state_dict(loss.state_dict())
    assert int(again.pointer) == int(loss.pointer) != 0
    assert torch.equal(again(query, key), loss(query, key))
    assert torch.equal(again.queue, loss.queue)
    for size in (1, 7, 5, 7, 2):  # a whole queue too, from anywhere
        batch = randn(size, 5, seed=size)
        start, place = loss.queue.clone(), int(loss.pointer)
        loss(batch, batch)
        start[[(place + k) % 7 for k in range(size)]] = F.normalize(batch, dim=1)
        torch.testing.assert_close(loss.queue, start)
        assert int(loss.pointer) == (place + size) % 7


def test_a_loss_taken_in_inference_mode_leaves_a_queue_to_train_with():
    loss = made()
    with torch.inference_mode():
        loss(randn(3, 5), randn(3, 5, seed=1))
    torch.testing.assert_close(loss.queue[:3], F.normalize(randn(3, 5, seed=1), dim=1))
    loss(randn(3, 5).requires_grad_(), randn(3, 5)).backward()
    assert int(loss.pointer) == 6


class Still(nn.Module):
    """The loss without its queue moving, as a function that may be called again."""

    def __init__(self):
        super().__init__()
        self.loss = made()

    def forward(self, query, key):
        return self.loss(query, key, update=False)


def test_it_is_a_loss(as_a_user):
    check_loss(Still(), randn(6, 5).requires_grad_(), randn(6, 5, seed=1), symmetric=True, compiles=False)


# The model.


def model(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU())
    return PsCo(net, 8, **{"hidden_dim": 12, "dim": 6, "queue_size": 32, "momentum": 0.8} | options)


def images(n=10, seed=0):
    return torch.rand(n, 1, 4, 4, generator=rng(seed))


def test_the_loss_moves_branch_and_queue_in_training_mode_only_unless_asked():
    net, x1, x2 = model(), images(), images(seed=1)
    with torch.no_grad():
        for p in net.trainable_parameters():
            p.add_(0.1)

    def moved(**options):
        before = [value.clone() for value in (*net.target_projector.parameters(), net.criterion.queue)]
        net.loss(x1, x2, **options)
        after = (*net.target_projector.parameters(), net.criterion.queue)
        return [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]

    assert not any(moved(update=False)) and all(moved())
    net.eval()
    assert not any(moved()) and all(moved(update=True))


def test_keys_and_queries_may_be_of_a_length_whose_square_overflows():
    query, key = (randn(6, 5, seed=k).float() for k in (1, 2))
    plain, long = (made().float() for _ in range(2))
    torch.testing.assert_close(long(1e25 * query, 1e25 * key), plain(query, key))
    torch.testing.assert_close(long.queue, plain.queue)


def test_a_step_moves_the_momentum_branch_first():
    net, x1, x2 = model(), images(), images(seed=1)
    with torch.no_grad():
        for p in net.trainable_parameters():
            p.add_(0.1)
    before = [p.clone() for p in net.target_projector.parameters()]
    twin = model()
    twin.load_state_dict(net.state_dict())
    value = net.loss(x1, x2)
    for start, now, source in zip(
        before, net.target_projector.parameters(), net.projector.parameters(), strict=True
    ):
        torch.testing.assert_close(now, 0.8 * start + 0.2 * source)
    for name in ("backbone", "projector"):
        source = dict(getattr(net, name).named_parameters())
        for key, p in getattr(twin, f"target_{name}").named_parameters():
            p.data = 0.8 * p + 0.2 * source[key].detach()
    query = twin.predictor(twin.projector(twin.backbone(x1)))
    key = twin.target_projector(twin.target_backbone(x2))
    torch.testing.assert_close(value, twin.criterion(query, key))
    value.backward()
    assert all(p.grad is not None for p in net.trainable_parameters())
    assert not any(
        p.requires_grad for p in (*net.target_backbone.parameters(), *net.target_projector.parameters())
    )
    assert [type(part).__name__ for part in net.projector] == [
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
        "BatchNorm1d",
    ]
    assert not list(net.projector[-1].parameters())


def test_views_that_do_not_fit_leave_the_momentum_branch():
    net = model()
    with torch.no_grad():
        net.backbone[1].weight.add_(1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for n1, n2 in ((4, 5), (33, 33)):
        with pytest.raises(ValueError, match="x2 must have as many images as x1, and queue_size=32 at most"):
            net.loss(images(n1), images(n2))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_embeddings_are_of_the_online_branch_at_rest():
    net, x = model(), images()
    net.loss(x, images(seed=1))
    net.train()
    support, query = net.embed(x), net.embed(x, role="query")
    assert net.training and not support.requires_grad
    net.eval()
    z = net.projector(net.backbone(x))
    torch.testing.assert_close(support, F.normalize(z, dim=1))
    torch.testing.assert_close(query, F.normalize(net.predictor(z), dim=1))
    labels = torch.arange(10) % 2
    means = torch.stack([support[labels == k].mean(0) for k in (0, 1)])
    torch.testing.assert_close(net.predict(x, labels, x), query @ F.normalize(means, dim=1).T)
    assert type(model(predictor=False).predictor).__name__ == "Identity"


def test_adapting_moves_the_heads_of_a_copy_towards_the_task():
    net, x, labels = model(), images(12), torch.arange(12) % 3
    before = {name: value.clone() for name, value in net.state_dict().items()}
    adapted = adapt_few_shot(net, x, labels, n_steps=30)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    moved = {
        name.split(".")[0]
        for name, value in adapted.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert moved == {"projector", "predictor"}

    def accuracy(net):
        return float((net.predict(x, labels, x).argmax(1) == labels).float().mean())

    assert accuracy(adapted) > accuracy(net)
    with torch.inference_mode():
        torch.testing.assert_close(adapt_few_shot(net, x, labels, n_steps=30).embed(x), adapted.embed(x))


def test_adapting_is_sgd_with_momentum_on_the_supervised_contrast():
    net, x, labels = model(meta_temperature=0.7).eval(), images(6), torch.arange(6) % 2
    adapted = adapt_few_shot(net, x, labels, n_steps=3, lr=0.5, momentum=0.8, weight_decay=0.1)
    twin = model(meta_temperature=0.7)
    with torch.no_grad():
        features = twin.eval().backbone(x)
    twin.train()
    heads = [*twin.projector.parameters(), *twin.predictor.parameters()]
    speed = [torch.zeros_like(p) for p in heads]
    for _ in range(3):
        raw = twin.projector(features)
        z, p = F.normalize(raw, dim=1), F.normalize(twin.predictor(raw), dim=1)
        similar, total = p @ z.T / 0.7, 0.0
        for i in range(6):
            same = [j for j in range(6) if labels[j] == labels[i]]
            total = total + similar[i].logsumexp(0) - similar[i, same].mean()
        for weight, v, slope in zip(heads, speed, torch.autograd.grad(total / 6, heads), strict=True):
            v.mul_(0.8).add_(slope + 0.1 * weight.detach())
            weight.data -= 0.5 * v
    ours = [*adapted.projector.parameters(), *adapted.predictor.parameters()]
    torch.testing.assert_close(ours, heads, rtol=1e-3, atol=1e-5)
    assert not adapted.training


def test_training_pulls_views_of_an_image_together():
    net, x = model(dim=6, queue_size=64), images(64)
    opt = torch.optim.Adam(net.trainable_parameters(), lr=1e-2)

    def views(seed):
        return x + 0.1 * torch.randn(x.shape, generator=rng(seed))

    losses = []
    for step in range(60):
        opt.zero_grad()
        value = net.loss(views(2 * step)[:32], views(2 * step + 1)[:32])
        value.backward()
        opt.step()
        losses.append(float(value.detach()))
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.3
    assert math.isfinite(losses[-1])


def test_drawings_of_a_zip_are_read_by_character_with_ink_one(tmp_path):
    from PIL import Image

    names = [
        f"set/{alphabet}/character{k:02d}/{i}.png" for alphabet in "BA" for k in (1, 2) for i in range(3)
    ]
    for part in ("a.zip", "b.zip"):
        with zipfile.ZipFile(tmp_path / part, "w") as file:
            for k, name in enumerate(names):
                array = np.full((105, 105), 255, np.uint8)
                array[: 15 * (k % 7 + 1)] = 0
                out = io.BytesIO()
                Image.fromarray(array).convert("1").save(out, "png")
                file.writestr(name.replace("set", part[0]), out.getvalue())
            file.writestr(f"{part[0]}/readme.txt", "no drawing")
    data = read_characters([tmp_path / "a.zip", tmp_path / "b.zip"])
    assert data.x.shape == (24, 1, 28, 28) and data.classes[0] == "a/A/character01" and len(data.classes) == 8
    assert data.y.tolist() == np.repeat(np.arange(8), 3).tolist()
    drawn = names.index(data.ids[0].replace("a/", "set/", 1))
    assert data.x[0].mean() == pytest.approx((drawn % 7 + 1) / 7, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapts_as_float32_does(dtype):
    torch.manual_seed(0)
    model = PsCo(nn.Linear(6, 6), 6, hidden_dim=8, dim=4, queue_size=16).to(dtype)
    support, labels = (
        torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(dtype),
        torch.arange(8) % 2,
    )
    ours = adapt_few_shot(model, support, labels, n_steps=30, lr=1e-3)
    wider = copy.deepcopy(model)
    wider.projector, wider.predictor = wider.projector.float(), wider.predictor.float()
    wider.backbone.register_forward_hook(lambda module, args, out: out.float())
    plain = adapt_few_shot(wider, support, labels, n_steps=30, lr=1e-3)
    for a, b in zip(ours.projector.parameters(), plain.projector.parameters(), strict=True):
        torch.testing.assert_close(a, b.to(dtype), rtol=0, atol=0)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(ours.projector.parameters(), model.projector.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PsCoLoss(4, queue_size=3), "n_shots must be at most"),
        (lambda: PsCoLoss(4, temperature=0), "temperature"),
        (lambda: PsCoLoss(4, meta_temperature=-1), "meta_temperature"),
        (lambda: PsCoLoss(4, epsilon=0), "epsilon"),
        (lambda: PsCoLoss(4, meta_weight=-1), "meta_weight"),
        (lambda: PsCoLoss(4, sampling="best"), "sampling"),
        (lambda: PsCoLoss(4, queue_size=5)(torch.ones(6, 4), torch.ones(6, 4)), "at most queue_size=5 rows"),
        (lambda: PsCoLoss(4)(torch.ones(6, 4), torch.ones(5, 4)), "key must have shape"),
        (lambda: PsCoLoss(4)(torch.ones(6, 3), torch.ones(6, 3)), "query must have shape"),
        (lambda: PsCoLoss(4)(torch.ones(6, 4).long(), torch.ones(6, 4)), "query must be a floating"),
        (lambda: PsCoLoss(4)(torch.ones(4), torch.ones(4)), "query must have shape"),
        (lambda: PsCoLoss(4)(torch.ones(0, 4), torch.ones(0, 4)), "query must have at least 1 rows"),
        (lambda: PsCoLoss(4)(torch.ones(6, 4), torch.ones(6, 4).long()), "key must be a floating"),
        (lambda: PsCoLoss(4).terms(torch.ones(6, 4), torch.ones(5, 4)), "key must have shape"),
        (lambda: PsCoLoss(4).shots(torch.ones(6, 3)), "key must have shape"),
        (lambda: PsCoLoss(4, n_iter=0), "n_iter"),
        (lambda: PsCoLoss(4, temperature=-0.1), "temperature"),
        (lambda: PsCoLoss(4, meta_temperature=0), "meta_temperature"),
        (lambda: PsCoLoss(4, epsilon=-0.1), "epsilon"),
        (lambda: sinkhorn_assign(torch.ones(2, 2), epsilon=0), "epsilon"),
        (lambda: sinkhorn_assign(torch.ones(2, 2), n_iter=0), "n_iter"),
        (lambda: sinkhorn_assign(torch.ones(0, 2)), "similarity must have a row"),
        (lambda: model(momentum=1.1), "momentum"),
        (lambda: model(momentum=-0.1), "momentum"),
        (lambda: model(n_shots=40), "n_shots"),
        (lambda: adapt_few_shot(model(), images(4), torch.arange(3)), "labels must have shape"),
        (lambda: adapt_few_shot(model(), images(4), torch.arange(4), n_steps=0), "n_steps"),
        (lambda: adapt_few_shot(model(), images(4), torch.arange(4), lr=0), "lr"),
        (lambda: adapt_few_shot(model(), images(4), torch.arange(4), momentum=1), "momentum"),
        (lambda: adapt_few_shot(model(), images(4), torch.arange(4), weight_decay=-1), "weight_decay"),
        (lambda: model().embed(images(), role="key"), "role"),
        (lambda: PsCo(nn.Flatten(), 8).embed(images()), r"backbone must return \(10, backbone_dim=8\), got \(10, 16\)"),
        (lambda: adapt_few_shot(model(), images(4), torch.zeros(4, dtype=torch.int64)), "at least two classes"),
        (lambda: adapt_few_shot(nn.Linear(2, 2), images(4), torch.arange(4)), "model must be a PsCo"),
        (lambda: model().predict(images(4), torch.arange(3), images(2)), "labels must have shape"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(as_a_user, make, said):
    with pytest.raises(ValueError, match=said):
        make()
