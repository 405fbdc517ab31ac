"""Curves and summary of the official evaluator on drawn scores, feasibility and its threshold, and prompts as put together."""

import torch
from torch import nn
from torch.nn import functional as F

from posterity.transfer import CompositionalPrompts, composition_metrics, feasibility, feasible_logits

AGAINST = "the authors' code (github.com/BatsResearch/csp): its evaluator, feasibility, threshold and prompts, in float32"


class Recording(nn.Module):
    """A two-tower module that keeps the word vectors it is given."""

    def __init__(self, words):
        super().__init__()
        self.token_embedding = nn.Embedding.from_pretrained(words)
        self.logit_scale = nn.Parameter(torch.tensor(0.0))
        self.seen = []

    def encode_text(self, input_ids, inputs_embeds=None):
        self.seen.append(inputs_embeds)
        return inputs_embeds.cumsum(1)[torch.arange(len(input_ids)), input_ids.argmax(1)]

    def encode_image(self, images):
        return images


def tokenize(texts):
    ids = {"a": 3, "photo": 4, "of": 5, "X": 1}
    rows = [[18, *(ids.get(word, 6) for word in text.split()), 19] for text in texts]
    return torch.tensor([row + [0] * (8 - len(row)) for row in rows])


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    t = {name: torch.tensor(value) for name, value in stored.items()}
    for case in ("small", "logits", "many", "cosines"):
        found = composition_metrics(*(t[f"{case}_{name}"] for name in ("scores", "target", "pairs", "seen")))
        yield (
            f"accuracy on seen pairs over biases, {case}",
            found.seen_curve,
            stored[f"{case}_seen_curve"],
            1e-6,
        )
        yield (
            f"accuracy on unseen pairs over biases, {case}",
            found.unseen_curve,
            stored[f"{case}_unseen_curve"],
            1e-6,
        )
        yield f"summary, {case}", torch.tensor(found[:6]), stored[f"{case}_summary"], 1e-6
    ours = feasibility(t["seen_pairs"], t["attribute_embeddings"], t["object_embeddings"])
    seen = torch.zeros_like(ours, dtype=torch.bool)
    seen[tuple(t["seen_pairs"].long().T)] = True
    yield "feasibility, 0 for seen pairs", ours.masked_fill(seen, 0.0), stored["feasibility"], 1e-6
    every = torch.cartesian_prod(*map(torch.arange, ours.shape))
    kept = feasible_logits(t["logits"], every, seen.flatten(), ours, threshold=0.1).isfinite()
    yield "pairs that are kept", kept.float(), stored["kept"], 0.0
    model = Recording(t["words"])
    prompts = CompositionalPrompts(model, tokenize, ["wet", "old"], ["dog", "cat", "car"])
    prompts.load_state_dict({"vocabulary": t["vocabulary"]})
    text = prompts.encode(t["prompt_pairs"])
    yield "vectors of prompts", model.seen[-1], stored["prompts"], 0.0
    yield (
        "features of prompts",
        text,
        F.normalize(torch.tensor(stored["prompts"]).sum(1), dim=1),
        1e-6,
    )
