"""Claims about textual inversion: a learned word says what no known one does, and one vector leaves the prompt its say."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from posterity._checks import needs
from posterity.claims import Count, Positive, Several, Trial, comparison
from posterity.generative import DiffusionLoss, TextualInversion, TinyTextToImage, shapes
from posterity.lab import metrics, pretrained
from posterity.lab.contact_sheet import contact_sheet
from posterity.lab.data import SampleData, Samples, dataset, load_samples
from posterity.lab.data.needs import require_rest

KNOWN = ("circle", "square", "triangle", "cross", "ring", "bar")
PLAIN = ("a photo of a {}", "a photo of the {}", "a rendition of a {}", "a photo of my {}")
SIDES = {"on the left": (0, -1), "on the right": (0, 1), "at the top": (1, -1), "at the bottom": (1, 1)}
LEAST = 16  # images to compare with
FINAL = 10  # words of which all pairs are tried, and texts that are looked at closely


@dataset(Samples, "new-colour")
def new_colour(seed: int) -> SampleData:
    """Return 300 pictures of a shape that the small model knows in a colour that it does not, by the seed."""
    rng = np.random.default_rng(seed)
    colour, kind = rng.choice(["orange", "cyan", "violet"]), rng.choice(KNOWN)
    return _pictures(seed, colour, kind)


@dataset(Samples, "new-shape")
def new_shape(seed: int) -> SampleData:
    """Return 300 pictures of a shape that the small model does not know, in a colour that it knows, by the seed."""
    rng = np.random.default_rng(seed)
    colour = rng.choice(["red", "yellow", "green", "azure", "blue", "magenta"])
    return _pictures(seed, colour, rng.choice(["diamond", "frame"]))


def _pictures(seed: int, colour: str, kind: str) -> SampleData:
    generator = torch.Generator().manual_seed(seed)
    images, _ = shapes(300, colors=[str(colour)], kinds=[str(kind)], generator=generator)
    return SampleData(2 * images.numpy() - 1, f"300 pictures of a {colour} {kind}")


class Model(NamedTuple):
    """A frozen text-to-image model, its loss, and images of its size."""

    pipe: Any
    denoise: DiffusionLoss
    shown: Tensor
    held_out: Tensor


def _loaded(model: str) -> Any:
    if model == "tiny":
        return TinyTextToImage.pretrained()
    pipeline = needs("diffusers", "generative").DiffusionPipeline
    return pretrained.load(
        pipeline, model, "model must be tiny, or a folder or name of a pipeline of diffusers"
    )


def _fits(data: SampleData, images: int, **_: object) -> None:
    if data.x.ndim != 4 or data.x.shape[1] != 3:
        raise ValueError(f"images of three colours are needed, data are of shape {data.x.shape[1:]}")
    require_rest(len(data.x), "images", images, LEAST, "images")


def _model(trial: Trial, data: str, model: str, images: int) -> Model:
    """Return the model, so many images of the concept, and the others."""
    pipe = _loaded(model).to(trial.device)
    # any text does: here the loss is asked for, and the word itself is chosen later
    _, denoise = TextualInversion.from_pipeline(pipe, initializer=None)
    x = torch.from_numpy(load_samples(data, seed=trial.seed).x).float() / 2 + 0.5
    side = pipe.unet.config.sample_size * (
        2 ** (len(pipe.vae.config.block_out_channels) - 1) if denoise.vae else 1
    )
    if x.shape[-2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True).clamp(0, 1)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(trial.seed))].to(trial.device)
    return Model(pipe, denoise, x[:images], x[images:])


def _learned(
    trial: Trial, at: Model, start: str, n_vectors: int, steps: int, lr: float, batch_size: int
) -> TextualInversion:
    learner, _ = TextualInversion.from_pipeline(at.pipe, initializer=start, n_vectors=n_vectors)
    learner.fit(
        at.denoise, at.shown, n_steps=steps, lr=lr, batch_size=batch_size, kind=PLAIN,
        generator=torch.Generator().manual_seed(trial.seed),
        callback=lambda k, loss: trial.track(f"loss, {n_vectors} vectors", k, float(loss)) if k % 10 == 0 else None,
    )  # fmt: skip
    return learner


@torch.no_grad()
def _best_texts(trial: Trial, at: Model, most: int, draws: int) -> tuple[str, str]:
    """Return the word, and the word or pair of words, under which the images are denoised best.

    All words (at most so many) are tried, all pairs of the best of them, and the best of both once more on six times
    as much noise, which is the same for all.
    """
    learner, _ = TextualInversion.from_pipeline(at.pipe, initializer=None)
    tokens = sorted(at.pipe.tokenizer.get_vocab())
    words = sorted({word for token in tokens if (word := token.removesuffix("</w>")).isalpha()})
    if len(words) > most:
        words = [str(word) for word in np.random.default_rng(trial.seed).permutation(words)[:most]]

    def ranked(texts: list[str], draws: int) -> list[str]:
        x = at.shown.repeat(draws, 1, 1, 1)
        errors = {}
        for text in texts:
            told = learner.encode([PLAIN[0].format(text)]).expand(len(x), -1, -1)
            errors[text] = float(at.denoise(x, told, generator=torch.Generator().manual_seed(trial.seed)))
        return sorted(texts, key=lambda text: errors[text])

    words = ranked(words, draws)
    first = words[:FINAL]
    pairs = ranked([f"{a} {b}" for a in first for b in first if a != b], draws)
    word = ranked(first[:4], 6 * draws)[0]
    return word, ranked([word, *pairs[:FINAL]], 6 * draws)[0]


def _samples(
    trial: Trial, at: Model, learner: TextualInversion, texts: list[str], n_steps: int, guidance: float
) -> Tensor:
    generator = torch.Generator().manual_seed(trial.seed + 1)
    with torch.no_grad():
        told, nothing = learner.encode(texts), learner.encode([""])
    return at.denoise.sample(told, nothing, n_steps=n_steps, guidance_scale=guidance, generator=generator)


@comparison(
    paper="textual-inversion",
    says="One learned word reproduces a concept that no word of the model describes.",
    where="Gal et al., Sections 4.1 and 5.1",
    arms=("best word", "learned word"),
    metric="sliced W2 between samples and held-out images",
    better="lower",
    seeds=10,
    smallest={"steps": 1, "samples": 2, "sampling_steps": 1, "images": 1, "words": 2, "draws": 1},
    check=_fits,
)
def learned_word(
    trial: Trial,
    data: Samples = "new-colour",
    model: str = "tiny",
    images: Count = 5,
    steps: Count = 300,
    lr: Positive = 2e-2,
    batch_size: Count = 8,
    samples: Several = 128,
    sampling_steps: Count = 15,
    guidance: Positive = 1.5,
    words: Count = 500,
    draws: Count = 4,
) -> dict[str, float]:
    """Draw "a photo of a ..." with the words that fit a few images best, and with a word learned from the same images.

    The baseline is the word, or the pair of words, of lowest denoising loss on the images, of all in the vocabulary (of a
    large one ``words``, drawn by the seed), each on ``draws`` noises an image; the learned word starts from the best
    single one. Both are drawn from the same noise. The record has the distance of the images themselves, which are few,
    and of other images of the concept.
    ``data="new-shape"`` is harder: a network that has drawn six shapes has no other between them.
    Your own images: a folder or an ``.npz`` of one size, ``model="<folder or name of a pipeline of diffusers>"``, at
    its scale ``steps=3_000, lr=5e-3, batch_size=4, guidance=7.5, sampling_steps=50``.
    """
    at = _model(trial, data, model, images)
    word, text = _best_texts(trial, at, words, draws)
    learner = _learned(trial, at, word, 1, steps, lr, batch_size)
    real = at.held_out[:samples].cpu()
    trial.record(
        "distance of the training images", metrics.sliced_wasserstein(at.shown.cpu(), real, seed=trial.seed)
    )
    others = at.held_out[samples : 2 * samples].cpu()
    if len(others) >= LEAST:
        trial.record("distance of other images", metrics.sliced_wasserstein(others, real, seed=trial.seed))
    distance = {}
    for arm, what in {"best word": text, "learned word": learner.token}.items():
        made = _samples(trial, at, learner, [PLAIN[0].format(what)] * samples, sampling_steps, guidance).cpu()
        distance[arm] = metrics.sliced_wasserstein(made, real, seed=trial.seed)
        sheet = contact_sheet(torch.cat([at.shown.cpu()[:8], made[: 16 - min(images, 8)]]))
        trial.picture(
            arm, sheet._replace(says=f"the first {min(images, 8)} are given, the others drawn as {what!r}")
        )
    return distance


def _towards(images: Tensor, sides: list[tuple[int, int]]) -> float:
    """Return how often what is drawn on a plain ground stands farthest towards the side that was asked for."""
    border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], 2)
    ground = border.median(2).values[:, :, None, None]
    weight = (images - ground).abs().sum(1)
    weight = torch.where(weight > 0.3, weight, 0)  # without what is left of the noise
    total = weight.sum((1, 2)).clamp_min(1e-6)
    n = images.shape[-1]
    axis = (torch.arange(n) + 0.5) / n - 0.5
    centre = torch.stack([(weight.sum(1) * axis).sum(1), (weight.sum(2) * axis).sum(1)], 1) / total[:, None]
    farthest = centre.abs().argmax(1)
    hits = [
        int(farthest[k]) == axis_asked and float(centre[k, axis_asked]) * sign > 0
        for k, (axis_asked, sign) in enumerate(sides)
    ]
    return float(np.mean(hits))


@comparison(
    paper="textual-inversion",
    says="A word of one vector leaves the rest of the prompt its say; a word of many takes it away.",
    where="Gal et al., Section 5.2 (distortion and editability)",
    arms=("16 vectors", "1 vector"),
    metric="share of samples that stand on the side that the prompt asks for",
    better="higher",
    smallest={"steps": 1, "samples": 1, "sampling_steps": 1, "images": 2, "batch_size": 2},
    check=_fits,
)
def editable(
    trial: Trial,
    data: Samples = "new-colour",
    model: str = "tiny",
    images: Count = 5,
    steps: Count = 300,
    lr: Positive = 2e-2,
    batch_size: Count = 8,
    samples: Count = 16,
    sampling_steps: Count = 15,
    guidance: Positive = 1.5,
    initializer: str = "circle",
) -> dict[str, float]:
    """Ask for a learned concept on each of four sides, ``samples`` times each.

    Both arms learn from the same images with the same budget and start from the same word; their drawings start from
    the same noise. A drawing counts if its centre of mass lies farther towards the asked side than towards any other:
    a quarter of them by chance. The record has the share for the word that both start from, which the model must heed
    for the claim to mean anything, and how far the samples without a place are from held-out images.
    Images of one's own need a plain ground.
    """
    at = _model(trial, data, model, images)
    asked = {"16 vectors": 16, "1 vector": 1}
    real = at.held_out[: 4 * samples].cpu()
    places = [place for place in SIDES for _ in range(samples)]
    share = {}
    for arm, n_vectors in asked.items():
        learner = _learned(trial, at, initializer, n_vectors, steps, lr, batch_size)
        if not share:
            texts = [f"{PLAIN[0].format(initializer)} {place}" for place in places]
            known = _samples(trial, at, learner, texts, sampling_steps, guidance).cpu()
            trial.record("share for the known word", _towards(known, [SIDES[place] for place in places]))
        texts = [f"{PLAIN[0].format(learner.token)} {place}" for place in places]
        made = _samples(trial, at, learner, texts, sampling_steps, guidance).cpu()
        share[arm] = _towards(made, [SIDES[place] for place in places])
        free = _samples(
            trial, at, learner, [PLAIN[0].format(learner.token)] * len(real), sampling_steps, guidance
        ).cpu()
        trial.record(
            f"sliced W2 to held-out images, {arm}", metrics.sliced_wasserstein(free, real, seed=trial.seed)
        )
        shown = torch.cat([made[k * samples : k * samples + 4] for k in range(4)])
        trial.picture(arm, contact_sheet(shown)._replace(says="four each of left, right, top and bottom"))
    return share
