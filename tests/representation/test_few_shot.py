import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posterity.representation import PsCo, evaluate_few_shot, prototype_scores, sample_episode


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LABELS = torch.arange(90) % 6


def test_an_episode_has_different_samples_of_different_classes():
    seen = torch.zeros(6)
    for seed in range(60):
        e = sample_episode(LABELS, n_way=3, k_shot=2, n_query=4, generator=rng(seed))
        assert len(e.classes.unique()) == 3
        assert torch.equal(LABELS[e.support], e.classes.repeat_interleave(2))
        assert torch.equal(LABELS[e.query], e.classes.repeat_interleave(4))
        assert len(torch.cat([e.support, e.query]).unique()) == 18
        seen[e.classes] += 1
    assert seen.min() > 15
    a, b = (sample_episode(LABELS, generator=rng(5), n_query=3) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_prototypes_are_mean_directions_and_one_shot_is_the_cosine():
    query, support = (torch.randn(n, 4, dtype=torch.float64, generator=rng(n)) for n in (7, 6))
    labels = torch.tensor([5, 2, 5, 9, 2, 5])
    u = F.normalize(support, dim=1)
    means = torch.stack([u[labels == c].mean(0) for c in (2, 5, 9)])
    expected = F.normalize(query, dim=1) @ F.normalize(means, dim=1).T
    torch.testing.assert_close(prototype_scores(query, support, labels), expected)
    order = torch.randperm(6, generator=rng())
    lengths = torch.rand(6, 1, generator=rng()).double() + 0.1
    torch.testing.assert_close(
        prototype_scores(3 * query, (lengths * support)[order], labels[order]), expected
    )
    renamed = torch.tensor([1, 8, 1, 3, 8, 1])  # 5, 2, 9 become 1, 8, 3
    torch.testing.assert_close(prototype_scores(query, support, renamed), expected[:, [1, 2, 0]])
    cosines = F.cosine_similarity(query[:, None], support[None], dim=2)
    torch.testing.assert_close(prototype_scores(query, support, torch.arange(6)), cosines)
    assert torch.autograd.gradcheck(lambda q, s: prototype_scores(q, s, labels), (query.requires_grad_(), support.requires_grad_()))  # fmt: skip


def test_separated_embeddings_are_all_right_and_random_ones_a_guess():
    apart = F.one_hot(LABELS, 6).float()
    assert evaluate_few_shot(nn.Identity(), apart, LABELS, n_query=5, n_tasks=30).accuracy == 1
    noise, names = torch.randn(6000, 20, generator=rng()), torch.arange(6000) % 60
    options = {"n_way": 4, "n_query": 8, "n_tasks": 200}
    found = evaluate_few_shot(lambda x: x, noise, names, generator=rng(), **options)
    assert abs(found.accuracy - 1 / 4) < found.interval < 0.02 and found.per_task.shape == (200,)
    assert found.interval == pytest.approx(1.96 * float(found.per_task.std()) / math.sqrt(200))
    again = evaluate_few_shot(lambda x: x, noise, names, generator=rng(), **options)
    assert torch.equal(again.per_task, found.per_task)


def test_each_sample_is_embedded_once():
    seen = []

    def model(x):
        seen.extend(x[:, 0].tolist())
        return x

    x = torch.arange(90.0)[:, None] + torch.rand(90, 4, generator=rng())
    evaluate_few_shot(model, x, LABELS, n_query=5, n_tasks=7, generator=rng())
    assert seen == x[:, 0].tolist()


def test_lengths_of_embeddings_do_not_count():
    x, lengths = torch.randn(90, 5, generator=rng()), 10 ** torch.randn(90, 1, generator=rng(1))
    few = {"k_shot": 3, "n_query": 5, "n_tasks": 20}
    plain, long = (
        evaluate_few_shot(lambda x: x, z, LABELS, generator=rng(2), **few) for z in (x, lengths * x)
    )
    torch.testing.assert_close(plain.per_task, long.per_task)


def test_all_tasks_at_once_are_each_of_them_alone():
    torch.manual_seed(0)
    x = torch.rand(90, 6, generator=rng())
    model = PsCo(nn.Linear(6, 8), 8, hidden_dim=8, dim=5, queue_size=16)
    found = evaluate_few_shot(model, x, LABELS, k_shot=2, n_query=5, n_tasks=20, generator=rng(1))
    generator, alone = rng(1), []
    for _ in range(20):
        e = sample_episode(LABELS, k_shot=2, n_query=5, generator=generator)
        scores = model.predict(x[e.support], torch.arange(5).repeat_interleave(2), x[e.query])
        alone.append((scores.argmax(1) == torch.arange(5).repeat_interleave(5)).double().mean())
    torch.testing.assert_close(found.per_task, torch.stack(alone))
    assert model.training
    calls = []

    def adapt(model, support, labels):
        calls.append((support.shape, labels.tolist()))
        return model

    same = evaluate_few_shot(model, x, LABELS, k_shot=2, n_query=5, n_tasks=20, adapt=adapt, generator=rng(1))
    torch.testing.assert_close(same.per_task, found.per_task)
    assert calls[0] == ((10, 6), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]) and len(calls) == 20
    tuned = evaluate_few_shot(model, x, LABELS, n_way=2, k_shot=3, n_query=5, n_tasks=2, adapt=True)
    assert 0 <= tuned.accuracy <= 1


def test_prototype_scores_do_not_depend_on_lengths_whose_squares_overflow():
    query, support = (torch.randn(n, 4, generator=rng(n)) for n in (7, 6))
    labels = torch.arange(6) % 3
    plain = prototype_scores(query, support, labels)
    torch.testing.assert_close(prototype_scores(1e25 * query, 1e25 * support, labels), plain)


def test_a_submodule_called_embed_is_not_taken_for_embeddings_by_role():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(5, 3)

        def forward(self, x):
            return x

    x, options = torch.randn(90, 5, generator=rng()), {"n_query": 5, "n_tasks": 20}
    plain, own = (evaluate_few_shot(m, x, LABELS, generator=rng(1), **options) for m in (lambda x: x, Net()))
    assert torch.equal(own.per_task, plain.per_task)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: sample_episode(LABELS, n_way=7), "at least n_way=7 classes, got 6"),
        (lambda: sample_episode(torch.tensor([0] * 9 + [1] * 4), n_way=2, n_query=4), "class 1 has 4"),
        (lambda: sample_episode(LABELS.float()), "labels must hold class indices"),
        (lambda: sample_episode(LABELS, k_shot=0), "k_shot"),
        (lambda: sample_episode(LABELS, n_way=0), "n_way"),
        (lambda: sample_episode(LABELS, n_query=0), "n_query"),
        (lambda: evaluate_few_shot(nn.Identity(), torch.ones(90, 2), LABELS, n_way=7), "at least n_way=7 classes, got 6"),
        (lambda: evaluate_few_shot(nn.Identity(), torch.ones(90, 2), LABELS, n_query=15), "class 0 has 15"),
        (lambda: prototype_scores(torch.ones(2, 3), torch.ones(2, 4), torch.arange(2)), "support must have shape"),
        (lambda: prototype_scores(torch.ones(2, 3), torch.ones(0, 3), torch.arange(0)), "at least one row"),
        (lambda: prototype_scores(torch.ones(2, 3), torch.ones(2, 3), torch.arange(3)), "labels must have shape"),
        (lambda: evaluate_few_shot(nn.Identity(), torch.ones(90), LABELS), "x must be a tensor of samples"),
        (lambda: evaluate_few_shot(nn.Identity(), torch.ones(89, 2), LABELS), "labels must have shape"),
        (lambda: evaluate_few_shot(nn.Identity(), torch.ones(90, 2), LABELS, n_tasks=0), "n_tasks"),
        (lambda: evaluate_few_shot(lambda x: x[:1], torch.ones(90, 2), LABELS, n_query=5, n_tasks=5), "model must return embeddings"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(as_a_user, make, said):
    with pytest.raises(ValueError, match=said):
        make()
