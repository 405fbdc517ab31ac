import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.lab.memory import peak_bytes
from posterity.optimization import (
    DictionaryContrastiveLoss,
    ForwardTrainer,
    LabelDictionary,
    SupervisedContrastiveLoss,
    dictionary_logits,
    pool_labels,
)
from posterity.testing import check_layer, check_loss

G = partial(torch.Generator().manual_seed, 0)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("shape", "n_patches"), [((3, 4, 2, 5), 1), ((3, 4, 6), 1), ((3, 12), 3), ((3, 12), 1)]
)
def test_logits_are_the_mean_over_local_features_of_their_products_with_each_embedding(
    shape, n_patches, normalize
):
    features, words = randn(*shape), randn(5, 8, seed=1)
    logits = dictionary_logits(features, words, n_patches=n_patches, temperature=0.7, normalize=normalize)
    for b in range(3):
        one = features[b].numpy().reshape(shape[1], -1)  # channels, positions
        if normalize:
            one = one / np.linalg.norm(one, axis=0)
        local = one.T if len(shape) > 2 else one.reshape(n_patches, -1)
        for z in range(5):
            word = F.adaptive_avg_pool1d(words[z][None, None], local.shape[1])[0, 0].numpy()
            word = word / np.linalg.norm(word) if normalize else word
            hand = sum(float(h @ word) for h in local) / len(local) / 0.7
            assert float(logits[b, z]) == pytest.approx(hand, rel=1e-12, abs=1e-12)


def test_positions_do_not_matter_and_logits_are_linear_in_features_and_embedding():
    maps, words = randn(2, 4, 3, 3), randn(6, 4, seed=1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = maps.flatten(2)[:, :, order].unflatten(2, (3, 3))
    logits = dictionary_logits(maps, words)
    torch.testing.assert_close(dictionary_logits(shuffled, words), logits)
    torch.testing.assert_close(dictionary_logits(maps.mean((2, 3)), words), logits)
    torch.testing.assert_close(
        dictionary_logits(2 * maps + shuffled.roll(1, 1), words),
        2 * logits + dictionary_logits(shuffled.roll(1, 1), words),
    )
    torch.testing.assert_close(
        dictionary_logits(maps, 3 * words + words.flip(0)), 3 * logits + logits.flip(1)
    )


@pytest.mark.parametrize(("dim", "new"), [(12, 12), (12, 4), (12, 5), (4, 6), (7, 1)])
def test_pooling_averages_the_bins_of_torchs_rule(dim, new):
    words = randn(3, dim)
    pooled = pool_labels(words, new)
    for i in range(new):
        low, high = i * dim // new, -(-(i + 1) * dim // new)
        torch.testing.assert_close(pooled[:, i], words[:, low:high].mean(1))
    torch.testing.assert_close(pool_labels(torch.full((2, dim), 3.0), new), torch.full((2, new), 3.0))


def test_the_loss_of_one_piece_is_that_of_a_linear_classifier_whose_rows_are_the_embeddings():
    x, w, y = randn(7, 4), randn(3, 4, seed=1), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    for reduction in ("mean", "sum", "none"):
        loss = DictionaryContrastiveLoss(reduction=reduction)(x, y, w)
        torch.testing.assert_close(loss, F.cross_entropy(x @ w.T, y, reduction=reduction), rtol=1e-12, atol=0)
    w.requires_grad_()
    DictionaryContrastiveLoss()(x, y, w).backward()
    hand = (torch.softmax(x @ w.detach().T, 1) - F.one_hot(y, 3)).T @ x / 7
    torch.testing.assert_close(w.grad, hand, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{"n_patches": 2, "temperature": 0.5}, {"normalize": True}])
def test_the_loss_keeps_every_promise_of_a_loss(options, as_a_user):
    x, w = randn(6, 8).requires_grad_(), randn(3, 8, seed=1).requires_grad_()
    y = torch.tensor([0, 1, 2, 2, 1, 0])
    check_loss(DictionaryContrastiveLoss(**options), x, y, w)
    assert torch.autograd.gradcheck(lambda x, w: DictionaryContrastiveLoss(**options)(x, y, w), (x, w))


def test_the_rival_is_the_loop_over_anchors_and_keeps_every_promise_of_a_loss(as_a_user):
    h, y = randn(6, 5), torch.tensor([0, 1, 0, 2, 1, 0])
    unit, total = h / h.norm(dim=1, keepdim=True), 0.0
    for i in range(6):
        others = [a for a in range(6) if a != i]
        same = [p for p in others if y[p] == y[i]]
        norm = sum(torch.exp(unit[i] @ unit[a] / 0.2) for a in others)
        if same:
            total -= sum(torch.log(torch.exp(unit[i] @ unit[p] / 0.2) / norm) for p in same) / len(same)
    torch.testing.assert_close(SupervisedContrastiveLoss(0.2)(h, y), total / 6, rtol=1e-12, atol=0)
    maps = h[:, :, None, None] + torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(SupervisedContrastiveLoss(0.2)(maps, y), total / 6, rtol=1e-12, atol=0)
    check_loss(SupervisedContrastiveLoss(), h.requires_grad_(), y, batch_of_one=False)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sizes_whose_squares_leave_float32_do_not_count(size):
    h, words, y = randn(6, 4).float(), randn(3, 4, seed=1).float(), torch.tensor([0, 1, 0, 2, 1, 0])
    for loss in (
        SupervisedContrastiveLoss(),
        lambda h, y: DictionaryContrastiveLoss(normalize=True)(h, y, words),
    ):
        torch.testing.assert_close(loss(size * h, y), loss(h, y))
    plain = dictionary_logits(h, words, normalize=True)
    torch.testing.assert_close(dictionary_logits(h, size * words, normalize=True), plain)


def test_the_dictionary_is_drawn_as_said_and_learns_only_if_adaptive():
    wide = LabelDictionary(400, 300, generator=G())
    assert abs(wide.weight.mean().item()) < 0.02 and abs(wide.weight.std().item() - 1) < 0.02
    rows = LabelDictionary(5, 9, init="orthogonal", generator=G())().detach()
    torch.testing.assert_close(rows @ rows.T, 9 * torch.eye(5), rtol=1e-5, atol=1e-5)
    assert isinstance(wide.weight, nn.Parameter)
    still = LabelDictionary(5, 9, adaptive=False, generator=G())
    assert list(still.state_dict()) == ["weight"] and not list(still.parameters())
    assert torch.equal(still.weight, LabelDictionary(5, 9, generator=G()).weight)


# --- the trainer ---


def layers(depth=3, width=16, seed=0):
    torch.manual_seed(seed)
    made = [nn.Sequential(nn.Linear(6, width), nn.ReLU())]
    made += [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU()) for _ in range(depth - 1)]
    return made


def problem(n=40):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long()


def make(parts=None, **options):
    return ForwardTrainer(parts or layers(), 3, **{"n_patches": 4, "generator": G(), **options})


def train(trainer, steps=5):
    x, y = problem()
    return [trainer.learn(x[k : k + 8], y[k : k + 8]) for k in range(0, 8 * steps, 8)]


def test_a_static_dictionary_makes_the_first_layer_independent_of_all_that_follow():
    def first(depth, **options):
        trainer = make(layers(depth), **options)
        train(trainer)
        return trainer.layers[0][0].weight

    assert torch.equal(first(1, adaptive=False), first(4, adaptive=False))
    assert not torch.equal(first(1, update="synchronous"), first(4, update="synchronous"))
    assert not torch.equal(first(1), first(4))  # the dictionary takes more steps


def test_one_synchronous_step_is_the_gradient_of_the_sum_of_local_losses():
    x, y = problem(8)
    trainer = make(update="synchronous", optimizer=torch.optim.SGD, lr=0.1)
    twin, words = copy.deepcopy(trainer.layers), trainer.dictionary.weight.detach().clone().requires_grad_()
    h, total, by_hand = x, 0.0, {}
    for k, layer in enumerate(twin):
        h = layer(h.detach())
        loss = F.cross_entropy(h.unflatten(1, (4, 4)).mean(1) @ words.T, y)
        by_hand[str(k)] = loss.item()
        total = total + loss
    total.backward()
    losses = trainer.learn(x, y)
    assert losses == pytest.approx({**by_hand, "readout": losses["readout"]}, rel=1e-6)
    for before, after in zip(twin.parameters(), trainer.layers.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.1 * before.grad)
    torch.testing.assert_close(trainer.dictionary.weight, words - 0.1 * words.grad)


def test_asynchronous_layers_step_at_once_each_with_moments_of_its_own():
    x, y = problem(8)
    trainer = make(optimizer=torch.optim.Adam, lr=0.01, readout="dictionary")
    twin, words = copy.deepcopy(trainer.layers), trainer.dictionary.weight.detach().clone().requires_grad_()
    rules = [torch.optim.Adam([*layer.parameters(), words], lr=0.01) for layer in twin]
    for _ in range(3):
        h = x
        for layer, rule in zip(twin, rules, strict=True):
            h = layer(h.detach())  # before the layer's own step
            rule.zero_grad()
            F.cross_entropy(h.unflatten(1, (4, 4)).mean(1) @ words.T, y).backward()
            rule.step()
        trainer.learn(x, y)
    torch.testing.assert_close(trainer.dictionary.weight, words)
    for ours, theirs in zip(trainer.layers.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_readout_sees_detached_features_and_a_rate_of_zero_moves_nothing():
    trainer = make(lr=0.0)
    before = copy.deepcopy(trainer.state_dict())
    train(trainer, 2)
    assert all(
        torch.equal(before[name], value)
        for name, value in trainer.state_dict().items()
        if name != "_extra_state"
    )
    static = make(adaptive=False)
    words = static.dictionary.weight.clone()
    train(static)
    assert torch.equal(static.dictionary.weight, words)
    with_readout, without = make(adaptive=False), make(adaptive=False, readout="dictionary")
    train(with_readout)
    train(without)
    for ours, theirs in zip(with_readout.layers.parameters(), without.layers.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("update", ["asynchronous", "synchronous"])
def test_memory_does_not_grow_with_depth(update):
    x, y = torch.randn(512, 6), torch.zeros(512, dtype=torch.long)

    def peak(depth, run):
        trainer = make(layers(depth), update=update, optimizer=torch.optim.SGD)
        return peak_bytes(lambda: run(trainer))

    def end_to_end(trainer):
        F.cross_entropy(nn.Sequential(*trainer.layers)(x)[:, :3], y).backward()

    grown = peak(12, lambda trainer: trainer.learn(x, y)) / peak(3, lambda trainer: trainer.learn(x, y))
    assert grown < 1.2 and peak(12, end_to_end) / peak(3, end_to_end) > 3


def test_every_layer_answers_and_training_helps_it():
    x, y = problem(200)
    trainer = make(lr=1e-2, readout="dictionary")
    before = [float((trainer.layer_logits(x, k).argmax(1) == y).float().mean()) for k in range(3)]
    for _ in range(60):
        trainer.learn(x, y)
    after = [float((trainer.layer_logits(x, k).argmax(1) == y).float().mean()) for k in range(3)]
    assert all(b < 0.75 and a > 0.85 for b, a in zip(before, after, strict=True))
    torch.testing.assert_close(trainer(x), trainer.layer_logits(x, -1))
    torch.testing.assert_close(trainer.features(x, 0), trainer.layers[0](x))
    assert torch.equal(trainer.predict(x), trainer(x).argmax(1))


def test_maps_passed_through_and_mixed_layers_are_read_as_they_come():
    torch.manual_seed(0)
    parts = [
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()), nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()), nn.Flatten(), nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 24), nn.ReLU()),
    ]  # fmt: skip
    trainer = ForwardTrainer(parts, 3, n_patches=[1, 1, 2], generator=G())
    assert trainer.dictionary.weight.shape == (3, 12)  # the largest of 8, 4 and 24 / 2
    x, y = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    assert list(trainer.learn(x, y)) == ["0", "2", "4", "readout"]
    assert int(trainer.layers[0][1].num_batches_tracked) == 1
    assert trainer.layer_logits(x, 2).shape == (6, 3) and trainer(x).shape == (6, 3)
    with pytest.raises(ValueError, match="layer must be one that learns"):
        trainer.layer_logits(x, 1)


def test_the_rival_objective_contrasts_features():
    x, y = problem(8)
    trainer = make(objective="feature")
    features = trainer.layers[0](x)
    losses = trainer.learn(x, y)
    assert losses["0"] == pytest.approx(float(SupervisedContrastiveLoss()(features, y).detach()), rel=1e-6)
    assert trainer.dictionary is None
    with pytest.raises(ValueError, match="from the dictionary"):
        trainer.layer_logits(x, 0)


@pytest.mark.parametrize("update", ["asynchronous", "synchronous"])
def test_a_state_dict_has_the_optimisers_and_training_goes_on_the_same(update, tmp_path):
    trainer = make(update=update)
    train(trainer, 3)
    torch.save(trainer.state_dict(), tmp_path / "state")
    twin = make(layers(seed=5), update=update, generator=None)
    twin.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    train(trainer, 3)
    train(twin, 3)
    for ours, theirs in zip(twin.parameters(), trainer.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    copied = copy.deepcopy(trainer)
    train(copied, 1)
    assert not torch.equal(copied.dictionary.weight, trainer.dictionary.weight)
    train(trainer, 1)
    assert torch.equal(copied.dictionary.weight, trainer.dictionary.weight)


def test_it_learns_inside_no_grad_and_inference_mode_in_low_precision_and_under_autocast():
    x, y = problem(8)
    alone = make()
    alone.learn(x, y)
    for context in (torch.no_grad, torch.inference_mode):
        trainer = make()
        with context():
            trainer.learn(x.clone(), y)
        assert torch.equal(trainer.layers[0][0].weight, alone.layers[0][0].weight)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        low = make(optimizer=torch.optim.SGD).to(dtype)
        assert low.learn(x.to(dtype), y)["0"] == pytest.approx(make().learn(x, y)["0"], rel=0.03)
        assert low(x.to(dtype)).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make().learn(x, y)["0"] == pytest.approx(make().learn(x, y)["0"], rel=0.02)
    check_layer(make(readout="dictionary"), x, shape=(8, 3))


@pytest.mark.parametrize(("call", "words"), [
    (lambda: pool_labels(torch.ones(2, 2), 0), "dim must be an integer of at least 1"), (lambda: pool_labels(torch.ones(2, 0), 2), "embedding must have a column"),
    (lambda: dictionary_logits(torch.ones(2), torch.ones(2, 2)), "features must be vectors"), (lambda: dictionary_logits(torch.ones(1, 2, 1, 1, 1), torch.ones(2, 2)), "features must be vectors"),
    (lambda: dictionary_logits(torch.ones(2, 5), torch.ones(2, 2), n_patches=2), "divisible by n_patches=2"), (lambda: dictionary_logits(torch.ones(2, 4), torch.ones(4)), "embedding must have shape"),
    (lambda: dictionary_logits(torch.ones(2, 4), torch.ones(1, 4)), "at least two classes"), (lambda: dictionary_logits(torch.ones(2, 4), torch.ones(2, 4), temperature=0.0), "temperature must be greater than 0"),
    (lambda: dictionary_logits(torch.ones(2, 3, 0), torch.ones(2, 4)), "features must not be empty"), (lambda: dictionary_logits(torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4)), "features must be a floating"),
    (lambda: DictionaryContrastiveLoss()(torch.ones(2, 4), torch.tensor([0.0, 1.0]), torch.ones(2, 4)), "target must hold class indices, got torch.float32"),
    (lambda: DictionaryContrastiveLoss()(torch.ones(2, 4), torch.tensor([0, 2]), torch.ones(2, 4)), r"target must be in 0\.\.1, got values from 0 to 2"),
    (lambda: DictionaryContrastiveLoss()(torch.ones(2, 4), torch.tensor([0, -1]), torch.ones(2, 4)), r"target must be in 0\.\.1, got values from -1 to 0"),
    (lambda: DictionaryContrastiveLoss()(torch.ones(2, 4), torch.tensor([0]), torch.ones(2, 4)), "target must have shape"),
    (lambda: DictionaryContrastiveLoss()(torch.ones(0, 4), torch.zeros(0, dtype=torch.long), torch.ones(2, 4)), "at least one class"),
    (lambda: DictionaryContrastiveLoss(reduction="max"), "reduction must be one of"), (lambda: DictionaryContrastiveLoss(n_patches=0), "n_patches"),
    (lambda: SupervisedContrastiveLoss()(torch.ones(1, 4), torch.tensor([0])), "at least two samples"), (lambda: SupervisedContrastiveLoss(-1.0), "temperature"),
    (lambda: LabelDictionary(1, 4), "n_classes"), (lambda: LabelDictionary(2, 0), "dim"), (lambda: LabelDictionary(2, 2, init="zeros"), "init must be one of"),
    (lambda: ForwardTrainer([], 3), "layers must hold one that learns"), (lambda: ForwardTrainer([nn.ReLU()], 3), "without trainable parameters"),
    (lambda: make(n_patches=[1, 2]), "n_patches must be one number, or one for each of 3"), (lambda: make(readout="none"), "readout must be one of"),
    (lambda: make(objective="pixels"), "objective must be one of"), (lambda: make(update="never"), "update must be one of"), (lambda: make(temperature=0.0), "temperature"),
    (lambda: make(objective="feature", readout="dictionary"), "readout must be 'linear'"), (lambda: make([nn.PReLU()]), "dim must be given: layer 0"),
    (lambda: make([nn.PReLU()], dim=4), "readout must be 'dictionary': layer 0"), (lambda: make(n_patches=3).learn(*problem(4)), "divisible by n_patches=3"),
    (lambda: make().learn(problem(4)[0], torch.tensor([0, 1, 2, 3])), r"target must be in 0\.\.2, got values from 0 to 3"), (lambda: make().learn(problem(4)[0], torch.tensor([0])), "target must have shape"),
    (lambda: make(objective="feature").learn(*problem(1)), "at least two samples"), (lambda: make().features(problem(4)[0], 3), "layer must be in -3 .. 2"),
    (lambda: make(lr=-1.0), "lr must be at least 0"),
])  # fmt: skip
def test_bad_input(call, words, as_a_user):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("update", ["asynchronous", "synchronous"])
def test_a_loss_that_is_not_finite_names_its_layer_which_did_not_step(update, as_a_user):
    x, y = problem(8)
    trainer = make(update=update)
    with torch.no_grad():
        trainer.layers[1][1].bias.fill_(float("nan"))
    weights = [layer[-2].weight.detach().clone() for layer in trainer.layers]
    with pytest.raises(ValueError, match="finite loss, got nan in layer 1"):
        trainer.learn(x, y)
    moved = [not torch.equal(layer[-2].weight, w) for layer, w in zip(trainer.layers, weights, strict=True)]
    assert moved == [update == "asynchronous", False, False]
