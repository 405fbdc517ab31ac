"""A step of tuning against padded prompts and against images seen anew; the metrics against an argmax a bias.

Run from the repository root: ``python -m benchmarks.transfer.csp``.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from benchmarks.timing import race
from posterity.transfer import CompositionalPrompts, composition_metrics, feasibility

ATTRIBUTES, OBJECTS = [f"a{k}" for k in range(8)], [f"o{k}" for k in range(8)]
POSITIONS = 77  # of CLIP
BEGIN, END = 98, 99


def small_clip(n_layers: int, image_size: int) -> CLIPModel:
    """Return an untrained CLIP of 77 positions and patches of 8 pixels, the image tower half as wide again, as in ViT-B."""
    tower = {"num_hidden_layers": n_layers, "num_attention_heads": 4}
    torch.manual_seed(0)
    text = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 100, "max_position_embeddings": POSITIONS,
            "eos_token_id": END, "bos_token_id": BEGIN}  # fmt: skip
    vision = {"hidden_size": 192, "intermediate_size": 768, "image_size": image_size, "patch_size": 8}
    config = CLIPConfig(text_config={**tower, **text}, vision_config={**tower, **vision}, projection_dim=64)
    return CLIPModel(config).eval().requires_grad_(False)


def tokenize(texts: list[str]) -> Tensor:
    """Return rows of 77 tokens, a word each."""
    words = ["", "a", "photo", "of", "X", *ATTRIBUTES, *OBJECTS]
    rows = [[BEGIN, *(words.index(word) for word in text.split()), END] for text in texts]
    return torch.tensor([row + [0] * (POSITIONS - len(row)) for row in rows])


def padded(model: CLIPModel, vocabulary: Tensor, pairs: Tensor) -> Tensor:
    """Return text features of whole rows of 77 positions."""
    ids = tokenize(["a photo of X X"]).expand(len(pairs), -1)
    embeds = model.text_model.get_input_embeddings().weight[ids].clone()
    embeds[:, 4], embeds[:, 5] = vocabulary[pairs[:, 0]], vocabulary[pairs[:, 1] + len(ATTRIBUTES)]
    layer = model.text_model.get_input_embeddings()
    hook = layer.register_forward_hook(lambda module, args, output: embeds)
    try:
        return F.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=1)
    finally:
        hook.remove()


def evaluator(scores: Tensor, target: Tensor, pairs: Tensor, seen: Tensor, n_biases: int = 20) -> float:
    """Return the AUC by copies of all scores and one answer of all samples a bias, as evaluators have it."""
    truth = pairs[target]
    of_seen = seen[target].nonzero()[:, 0]
    of_unseen = (~seen[target]).nonzero()[:, 0]

    def right(bias: float) -> tuple[Tensor, Tensor]:
        biased = scores.clone()
        biased[~seen.repeat(len(scores), 1)] += bias
        answer = pairs[biased.topk(1, dim=1)[1][:, 0]]
        match = ((answer[:, 0] == truth[:, 0]) & (answer[:, 1] == truth[:, 1])).float()
        return match[of_seen], match[of_unseen]

    last = right(1e3)
    own = scores[torch.arange(len(scores)), target][of_unseen]
    margin = scores[of_unseen][:, seen].topk(1, dim=1)[0][:, 0] - own
    biases = torch.sort(margin[last[1].bool()] - 1e-4)[0]
    points = [right(float(bias)) for bias in biases[:: max(len(biases) // n_biases, 1)]] + [last]
    return float(np.trapezoid([float(s.mean()) for s, _ in points], [float(u.mean()) for _, u in points]))


def word_by_word(seen: Tensor, attributes: Tensor, objects: Tensor) -> Tensor:
    """Return feasibility by a loop over pairs and words."""
    a_cos, o_cos = (F.normalize(x, dim=1) @ F.normalize(x, dim=1).T for x in (attributes, objects))
    had = set(map(tuple, seen.tolist()))
    out = torch.ones(len(attributes), len(objects))
    a_cos, o_cos = a_cos.tolist(), o_cos.tolist()
    for a in range(len(attributes)):
        for o in range(len(objects)):
            if (a, o) not in had:
                by_o = max((o_cos[o][p] for p in range(len(objects)) if (a, p) in had), default=-1.0)
                by_a = max((a_cos[a][b] for b in range(len(attributes)) if (b, o) in had), default=-1.0)
                out[a, o] = (by_o + by_a) / 2
    return out


def main() -> None:
    torch.set_num_threads(1)
    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))[::2]
    y = torch.arange(64) % len(pairs)
    model = small_clip(4, 64)
    prompts = CompositionalPrompts(model, tokenize, ATTRIBUTES, OBJECTS)
    features = torch.randn(64, 64)
    unit, scale = F.normalize(features, dim=1), model.logit_scale.exp()

    def step(prompts: CompositionalPrompts, **seen: Tensor) -> Tensor:
        loss = F.cross_entropy(prompts(pairs=pairs, **seen), y)
        return torch.autograd.grad(loss, prompts.vocabulary)[0]

    def step_padded() -> Tensor:
        loss = F.cross_entropy(scale * unit @ padded(model, prompts.vocabulary, pairs).T, y)
        return torch.autograd.grad(loss, prompts.vocabulary)[0]

    torch.testing.assert_close(
        prompts.encode(pairs), padded(model, prompts.vocabulary, pairs), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(step(prompts, image_features=features), step_padded(), rtol=1e-3, atol=1e-5)
    race(f"step on {len(pairs)} pairs, text of 4 layers cut to 7 positions, against 77",
         lambda: step(prompts, image_features=features), step_padded, target=4, rounds=7)  # fmt: skip

    sees = small_clip(2, 112)
    tuned = CompositionalPrompts(sees, tokenize, ATTRIBUTES, OBJECTS)
    images = torch.randn(64, 3, 112, 112)

    def once() -> None:
        with torch.no_grad():
            cached = sees.get_image_features(images).pooler_output
        for _ in range(20):
            step(tuned, image_features=cached)

    def anew() -> None:
        for _ in range(20):
            step(tuned, images=images)

    race("20 epochs of 64 images of 196 patches on 32 pairs, features computed once, against in each epoch",
         once, anew, target=10, rounds=1)  # fmt: skip

    generator = torch.Generator().manual_seed(0)
    n, m = 10_000, 1_000
    every = torch.cartesian_prod(torch.arange(40), torch.arange(25))
    seen = torch.rand(m, generator=generator) < 0.5
    target = torch.randint(m, (n,), generator=generator)
    scores = torch.randn(n, m, generator=generator)
    scores[torch.arange(n), target] += 3
    ours = composition_metrics(scores, target, every, seen).auc
    assert abs(ours - evaluator(scores, target, every, seen)) < 1e-4, ours
    race(f"metrics of {n:,} samples and {m:,} candidates, against an answer a bias",
         lambda: composition_metrics(scores, target, every, seen),
         lambda: evaluator(scores, target, every, seen), target=5, rounds=3)  # fmt: skip

    attributes, objects = (
        torch.randn(115, 300, generator=generator),
        torch.randn(245, 300, generator=generator),
    )
    every = torch.cartesian_prod(torch.arange(115), torch.arange(245))
    had = every[torch.randperm(len(every), generator=generator)[:1_262]]
    torch.testing.assert_close(feasibility(had, attributes, objects), word_by_word(had, attributes, objects))
    race("feasibility of 115 attributes and 245 objects, 1,262 pairs seen, against a loop over words",
         lambda: feasibility(had, attributes, objects), lambda: word_by_word(had, attributes, objects),
         target=10, rounds=3)  # fmt: skip


if __name__ == "__main__":
    main()
