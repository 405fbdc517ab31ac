"""Soft prompts with a penalty beside plain ones: what it adds to a step, and what cutting and batching save."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from benchmarks.timing import race
from posterity.transfer import NemesisLoss, PromptLearner, low_norm_positions

NAMES = ["cat", "dog", "bird", "car", "boat", "plane", "deer", "frog", "horse", "truck"]


def tokenize(texts: list[str]) -> torch.Tensor:
    """Return a token a word, padded to 77."""
    rows = [
        [98, *(1 + sum(map(ord, word)) % 90 for word in text.replace(".", " .").split()), 99]
        for text in texts
    ]
    return torch.tensor([row + [0] * (77 - len(row)) for row in rows])


def learner(cut: bool = True, layers: int = 2, width: int = 64) -> PromptLearner:
    """Return prompts of ten classes for a text tower of so many layers, the texts cut or padded to 77."""
    torch.manual_seed(0)
    text = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": 2,
            "vocab_size": 100, "max_position_embeddings": 77, "bos_token_id": 98, "eos_token_id": 99}  # fmt: skip
    image = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
             "image_size": 16, "patch_size": 8}  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=64)).eval()
    prompts = PromptLearner(model, tokenize, NAMES)
    if not cut:
        prompts._towers.may_cut = False
        prompts._texts, slots = prompts._placed(16, "end", "X", prompts._towers.word_ids("X"))
        prompts._slots = slots[:, :, None].expand(-1, -1, width)
    return prompts


def step(prompts: PromptLearner, loss: nn.Module | None, features: torch.Tensor, y: torch.Tensor) -> None:
    """Take the gradient of a loss, of cross-entropy where there is none."""
    prompts.context.grad = None
    if loss is None:
        F.cross_entropy(prompts(image_features=features), y).backward()
    else:
        loss(prompts, features, y).backward()


def main() -> None:
    """Race steps and passes."""
    prompts, padded = learner(), learner(cut=False)
    features, y = torch.randn(32, 64), torch.arange(32) % 10
    uniform, aware = NemesisLoss(beta=1.0), NemesisLoss(beta=0.0, n_positions=1)
    for layers, width in ((2, 64), (4, 256)):
        size, each = f"text of {layers} layers of {width}", learner(layers=layers, width=width)
        race(f"step with the uniform penalty, {size}, against plain prompts",
             lambda each=each: step(each, uniform, features, y),
             lambda each=each: step(each, None, features, y), target=1 / 1.02, rounds=50,
             why="Norms are some small operations, which only a tower of a real size hides.")  # fmt: skip
        race(f"step with the position-aware penalty, one position, {size}, against plain prompts",
             lambda each=each: step(each, aware, features, y),
             lambda each=each: step(each, None, features, y), target=1 / 1.6, rounds=50,
             why="It asks for one more pass of the tower, of which little is hidden at this size.")  # fmt: skip
    race("step with prompts cut behind the end, against 77 tokens", lambda: step(prompts, None, features, y),
         lambda: step(padded, None, features, y), target=2.0, rounds=20)  # fmt: skip

    @torch.no_grad()
    def loop() -> list[bool]:
        right = (prompts(image_features=features).argmax(1) == y).sum()
        found = []
        for i in range(8):
            context = prompts.context.detach().clone()
            context[i] *= 0.5
            found.append(
                bool((prompts(image_features=features, context=context).argmax(1) == y).sum() > right)
            )
        return found

    race("eight positions of ten classes in one pass, against a loop", lambda: low_norm_positions(
        prompts, features, y, n_positions=8), loop, target=3.0, rounds=20)  # fmt: skip


if __name__ == "__main__":
    main()
