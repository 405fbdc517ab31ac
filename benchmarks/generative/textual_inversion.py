"""Race a step of textual inversion with training the whole embedding matrix, and with the models' own two passes.

Run from the repository root: ``python -m benchmarks.generative.textual_inversion``.
"""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.timing import race
from posterity.generative import TextualInversion, TinyTextToImage, shapes
from posterity.lab.memory import peak_bytes

VOCABULARY, WIDTH, BATCH = 49_408, 768, 4
TEXTS = ["a photo of a {}", "a rendition of the {}", "a good photo of a {}", "the photo of a {}"]


class Wide(TinyTextToImage):
    """The small model with a vocabulary as large and as wide as CLIP's."""

    def __init__(self) -> None:
        small = TinyTextToImage.pretrained()
        torch.manual_seed(0)
        encoder = CLIPTextModel(CLIPTextConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
            num_attention_heads=12, max_position_embeddings=32,
        ))  # fmt: skip
        unet = UNet2DConditionModel.from_config({**small.unet.config, "cross_attention_dim": WIDTH})
        for module in (encoder, unet):
            module.eval().requires_grad_(False)
        super().__init__(unet, encoder, small.tokenizer, DDPMScheduler(1000))


def steps() -> None:
    """Time and weigh one step each, on the same images, texts and noise."""
    model = Wide()
    images, _ = shapes(BATCH, colors=["orange"], kinds=["ring"], generator=torch.Generator().manual_seed(0))
    learner, denoise = TextualInversion.from_pipeline(model, initializer="ring")
    options = {"n_steps": 1, "batch_size": BATCH, "kind": TEXTS, "flip": 0.0}

    def ours() -> Tensor:
        return learner.fit(denoise, images, generator=torch.Generator().manual_seed(0), **options).vectors

    layer = model.text_encoder.get_input_embeddings()
    tokens = model.tokenizer(
        [text.format("ring") for text in TEXTS], padding="max_length", return_tensors="pt"
    ).input_ids
    ids = model.tokenizer.convert_tokens_to_ids(["ring"])
    others = torch.ones(VOCABULARY, dtype=torch.bool)
    others[ids] = False

    def forward() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        t, noise = (
            torch.randint(1000, (BATCH,), generator=generator),
            torch.randn(images.shape, generator=generator),
        )
        noisy = model.scheduler.add_noise(2 * images - 1, noise, t)
        said = model.unet(noisy, t, encoder_hidden_states=model.text_encoder(tokens)[0]).sample
        return (said - noise).square().mean()

    def whole(kept: Tensor, adam: torch.optim.Optimizer) -> None:
        """Step the whole matrix and put the other rows back, as the example of diffusers does."""
        forward().backward()
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            layer.weight[others] = kept[others]

    found = torch.zeros(1, WIDTH, requires_grad=True)
    hook = layer.register_forward_hook(lambda module, args, output: output + 0 * found)

    def passes() -> None:
        """Run both networks forward and back to a vector, and nothing else."""
        torch.autograd.grad(forward(), found)

    train_one = learner.embedding.vectors
    adam_one = torch.optim.AdamW([train_one], lr=5e-3)

    def step() -> None:
        (train_one.grad,) = torch.autograd.grad(
            learner.loss(denoise, images, kind=TEXTS, generator=torch.Generator().manual_seed(0)), train_one
        )
        adam_one.step()

    race("a step, against the two networks' passes alone", step, passes, target=0.97, rounds=15)
    least = peak_bytes(passes)
    hook.remove()
    extra = {"ours": max(peak_bytes(ours) - least, 0)}
    layer.weight.requires_grad_(True)
    kept = layer.weight.detach().clone()
    adam = torch.optim.AdamW([layer.weight], lr=5e-3)

    def theirs() -> None:
        layer.weight.requires_grad_(True)
        whole(kept, adam)
        layer.weight.requires_grad_(False)

    extra["whole matrix"] = peak_bytes(theirs) - least + kept.nbytes
    race(
        f"a step at a vocabulary of {VOCABULARY} x {WIDTH}, against the whole matrix",
        step,
        theirs,
        target=1.5,
        rounds=5,
    )
    for name, count in extra.items():
        print(f"  {name}: {count / 2**20:.1f} MiB beyond the two passes")


def main() -> None:
    torch.set_num_threads(1)
    steps()


if __name__ == "__main__":
    main()
