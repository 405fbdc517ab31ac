"""Claims about CSP: words tuned on some pairs of attribute and object carry over to pairs never seen, and to triples."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional as F

from posterity.claims import Count, Trial, comparison
from posterity.lab import training
from posterity.lab.data import ImageData, Images, dataset, load_images
from posterity.lab.nets import seeded
from posterity.lab.two_towers import ATTRIBUTES, OBJECTS, attribute_object_images, captions, two_towers
from posterity.transfer import CompositionalPrompts, CompositionMetrics, composition_metrics
from posterity.transfer._towers import Towers

LEAST = 4  # images of a composition: half to learn from, two to test on
N_CONTEXT = 16  # CoOp's free vectors
RATES = (1e-3, 5e-3)  # of both, the better on validation data
KINDS = ("colour", "colour", "colour", "pattern", "pattern", "size", "size", "light")  # of drawn attributes
BATCH = 500  # images that go through a tower together


def _drawn(each: Mapping[int, int], seed: int, style: str = "inverted") -> ImageData:
    """Return images of all compositions of so many attributes that do not exclude each other, ``each`` so many."""
    chosen = [
        (has, k)
        for n in each
        for has in itertools.combinations(range(len(ATTRIBUTES)), n)
        if len({KINDS[a] for a in has}) == n
        for k in range(len(OBJECTS))
    ]
    attributes = torch.zeros(len(chosen), len(ATTRIBUTES), dtype=torch.bool)
    for row, (has, _) in zip(attributes, chosen, strict=True):
        row[list(has)] = True
    objects = torch.tensor([k for _, k in chosen])
    names = tuple(caption.replace(" ", "_") for caption in captions(attributes, objects))
    y = torch.arange(len(chosen)).repeat_interleave(torch.tensor([each[len(has)] for has, _ in chosen]))
    generator = torch.Generator().manual_seed(seed)
    x = attribute_object_images(attributes[y], objects[y], style=style, generator=generator)
    return ImageData(x.numpy(), y.numpy(), names)


@dataset(Images, "shapes")
def shapes(seed: int) -> ImageData:
    """Return 60 drawings each of six objects with eight attributes; a colour is the complement of what its name says."""
    return _drawn({1: 60}, seed)


@dataset(Images, "plain-shapes")
def plain_shapes(seed: int) -> ImageData:
    """Return the same in the colours of their names, as the tiny model has learned them."""
    return _drawn({1: 60}, seed, "plain")


@dataset(Images, "shapes-of-two")
def shapes_of_two(seed: int) -> ImageData:
    """Return 40 drawings each of the objects of ``shapes``, and 10 each of the objects with two attributes that do not exclude each other."""
    return _drawn({1: 40, 2: 10}, seed)


class Words:
    """Compositions as classes are named, "attribute_object" or "attribute_attribute_object", in words and indices."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.parts = [name.split("_") for name in classes]
        for name, parts in zip(classes, self.parts, strict=True):
            if not 2 <= len(parts) <= 3 or not all(parts):
                raise ValueError(
                    f'classes must be named attribute_object, as red_disc, "." for a space in a word, got {name!r}'
                )
        self.attributes = sorted({a for parts in self.parts for a in parts[:-1]})
        self.objects = sorted({parts[-1] for parts in self.parts})
        self.texts = [" ".join(parts).replace(".", " ").lower() for parts in self.parts]
        self.indices = [
            [*map(self.attributes.index, parts[:-1]), self.objects.index(parts[-1])] for parts in self.parts
        ]
        self.sizes = np.array([len(parts) for parts in self.parts])


def roles(words: Words, seed: int) -> ndarray:
    """Return which compositions are seen, half of them, and which of the others validate, a third, and which test.

    These are 0, 1 and 2. Each word is in one that is seen.
    """
    order = np.random.default_rng(seed).permutation(len(words.parts)).tolist()
    seen, known = [], set()
    for k in order:
        both = {("attribute", words.parts[k][0]), ("object", words.parts[k][-1])}
        if not both <= known:
            seen.append(k)
            known |= both
    rest = [k for k in order if k not in set(seen)]
    more = max(len(order) // 2 - len(seen), 0)
    left = rest[more:]
    role = np.zeros(len(order), dtype=int)
    role[left] = 2
    role[left[: len(left) // 3]] = 1
    return role


def _enough(data: ImageData) -> Words:
    words, counts = Words(data.classes), np.bincount(data.y, minlength=len(data.classes))
    if counts.min() < LEAST:
        few = data.classes[counts.argmin()]
        raise ValueError(f"{LEAST} images of each class are needed, {few!r} has {counts.min()}")
    if data.x.shape[1] not in (1, 3):
        raise ValueError(f"images must be grey or have three colours, got {data.x.shape[1]} channels")
    return words


def _pairs(data: ImageData, **_: Any) -> None:
    words = _enough(data)
    if (words.sizes > 2).any():
        name = data.classes[int(np.argmax(words.sizes > 2))]
        raise ValueError(f"classes must be named attribute_object, as red_disc, got {name!r}")
    # how many are left depends on the seed: as many as words are seen, at the most
    left = len(words.parts) - max(len(words.parts) // 2, len(words.attributes) + len(words.objects) - 1)
    if left < 3:
        raise ValueError(
            f"three pairs must be left that are not seen, where half are and each word is in one of these; there are "
            f"{len(words.parts)} pairs of {len(words.attributes)} attributes and {len(words.objects)} objects"
        )


def _triples(data: ImageData, **_: Any) -> None:
    words = _enough(data)
    of = {size: [parts for parts in words.parts if len(parts) == size] for size in (2, 3)}
    for size, what in ((2, "attribute_object"), (3, "attribute_attribute_object")):
        if len(of[size]) < 2:
            raise ValueError(f"at least two classes named {what} are needed, has {len(of[size])}")
    known = {a for a, _ in of[2]}, {o for _, o in of[2]}
    for first, second, o in of[3]:
        for word, where in ((first, known[0]), (second, known[0]), (o, known[1])):
            if word not in where:
                raise ValueError(f"{word!r} of {first}_{second}_{o} must be in a class of one attribute too")


class Coop(nn.Module):
    """A prompt of free vectors before the words of a class, the same for all."""

    def __init__(self, towers: Towers, texts: Sequence[str], n_context: int, seed: int) -> None:
        super().__init__()
        self.towers = towers
        self.found = towers.tokens([" ".join(["x"] * n_context + [text]) for text in texts])
        with seeded(seed):
            self.context = nn.Parameter(0.02 * torch.randn(n_context, towers.words.shape[1]))

    def forward(self, image_features: Tensor, rows: Tensor) -> Tensor:
        ids = self.found.ids[rows]
        embeds = self.towers.words[ids]
        at, end = self.towers.n_before, self.towers.n_before + len(self.context)
        context = self.context.to(embeds).expand(len(rows), -1, -1)
        embeds = torch.cat([embeds[:, :at], context, embeds[:, end:]], dim=1)
        mask = None if self.found.mask is None else self.found.mask[rows]
        texts = self.found._replace(ids=ids, ends=self.found.ends[rows], mask=mask)
        return self.towers.logits(self.towers.text(texts, embeds), None, image_features)


class Csp(nn.Module):
    """CSP's prompts of the compositions, called as `Coop`."""

    def __init__(self, towers: Towers, words: Words) -> None:
        super().__init__()
        self.indices = words.indices
        self.prompts = CompositionalPrompts(
            towers.model, towers.tokenizer, words.attributes, words.objects, placeholder="x"
        )

    def forward(self, image_features: Tensor, rows: Tensor) -> Tensor:
        pairs = torch.tensor([self.indices[k] for k in rows.tolist()])
        return self.prompts(pairs=pairs, image_features=image_features)


class Study:
    """Image features of a frozen model, computed once, and the prompts that are tuned on them."""

    def __init__(
        self, trial: Trial, data: str, model: str, pretraining: int, n_train: int, steps: int
    ) -> None:
        images = load_images(data)
        self.trial, self.n_train, self.steps = trial, n_train, steps
        self.words = Words(images.classes)
        made = two_towers(model, trial.seed, steps=pretraining)
        self.towers = Towers(made.model.to(trial.device), made.tokenizer)
        x = torch.from_numpy(images.x)
        with torch.no_grad():
            parts = [self.towers.image(made.prepare(part).to(trial.device)) for part in x.split(BATCH)]
        self.features, self.y = torch.cat(parts), torch.from_numpy(images.y).to(trial.device)

    def of(self, compositions: ndarray, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return images of compositions: to learn from, and of the rest a third and two thirds."""
        rng, parts = np.random.default_rng(seed), ([], [], [])
        for k in compositions:
            own = rng.permutation(np.flatnonzero(self.y.cpu().numpy() == k))
            n = min(self.n_train, len(own) // 2)
            cut = n + max((len(own) - n) // 3, 1)
            for part, some in zip(parts, (own[:n], own[n:cut], own[cut:]), strict=True):
                part.extend(some.tolist())
        train, first, second = (torch.tensor(part, device=self.y.device) for part in parts)
        return train, first, second

    def clip(self) -> Callable[..., Tensor]:
        """Return the model's own prompts."""
        found = self.towers.tokens([f"a photo of {text}" for text in self.words.texts])
        with torch.no_grad():
            text = self.towers.text(found, self.towers.words[found.ids])
        return lambda features, rows: self.towers.logits(text[rows], None, features)

    def tuned(
        self, make: Callable[[], nn.Module], rows: Tensor, candidates: Tensor,
        value: Callable[[nn.Module], float], name: str,
    ) -> nn.Module:  # fmt: skip
        """Return prompts tuned on images of compositions, at the rate that has the larger value."""
        nets = []
        for lr in RATES:
            net = make()
            training.fit(
                net, lambda net, x, y: F.cross_entropy(net(x, candidates), y),
                (self.features[rows], self.place(rows, candidates)), steps=self.steps, batch_size=64, lr=lr,
                seed=self.trial.seed, device=self.trial.device,
            )  # fmt: skip
            nets.append((value(net), lr, net))
        best = max(nets, key=lambda each: each[0])
        self.trial.record(f"learning rate chosen, {name}", best[1])
        return best[2]

    def place(self, rows: Tensor, candidates: Tensor) -> Tensor:
        """Return the place of each image's composition among candidates."""
        place = torch.full((len(self.words.parts),), -1, device=self.y.device)
        place[candidates] = torch.arange(len(candidates), device=self.y.device)
        return place[self.y[rows]]

    @torch.no_grad()
    def metrics(
        self, net: Callable[..., Tensor], rows: Tensor, candidates: Tensor, seen: Tensor
    ) -> CompositionMetrics:
        """Return accuracies on images, ``seen`` being a mask of compositions."""
        pairs = torch.tensor([self.words.indices[k] for k in candidates.tolist()])
        scores = net(self.features[rows], candidates)
        return composition_metrics(scores, self.place(rows, candidates), pairs, seen[candidates])

    @torch.no_grad()
    def accuracy(self, net: Callable[..., Tensor], rows: Tensor, candidates: Tensor) -> float:
        """Return the share of images whose composition has the largest score."""
        answers = net(self.features[rows], candidates).argmax(1)
        return float((answers == self.place(rows, candidates)).float().mean())


@comparison(
    paper="csp",
    says="Words tuned on some pairs recombine: pairs never seen are recognised better than by CLIP's prompts and by CoOp.",
    where="Nayak et al., abstract and Section 5",
    arms=("better of clip and coop", "clip", "coop", "csp"),
    metric="area under the curve of accuracy on seen over unseen pairs, closed world",
    better="higher",
    smallest={"pretraining": 3, "steps": 2},
    check=_pairs,
)
def recombines(
    trial: Trial, data: Images = "shapes", model: str = "tiny", pretraining: Count = 600, n_train: Count = 20,
    steps: Count = 200,
) -> dict[str, float]:  # fmt: skip
    """Tune prompts on images of half the pairs, and recognise images of these and of pairs that had none.

    The tiny CLIP is trained anew for each seed on drawings whose colours are what they are called; the task has inverted
    colours, thicker strokes and more noise, so that words have another look, the same in all pairs. CoOp tunes 16 vectors
    before the words of all classes. Both have the same images, steps, optimiser (Adam), batches and two learning rates,
    of which each takes the better by AUC on images of a third of the unseen pairs, which are not tested on. The verdict
    is on the better of CLIP and CoOp on the test images of each seed, which is more than either. Where the model's
    words already fit the images tuning loses: with ``data="plain-shapes"``, in the colours of their names, CLIP has an
    area of about 0.7 and both kinds of tuned prompts less than 0.6, since 20 images of some pairs are less than what the
    model has seen of all.

    Of each seen pair at most ``n_train`` images, and at most half, are learned from. Your own: a folder with a subfolder
    a pair, named ``red_disc`` ("." for a space in a word), and a CLIP by folder or name:
    ``--data photos --set model=path/to/clip``. Images are of one size; those of another than the model's are resized.
    """
    study = Study(trial, data, model, pretraining, n_train, steps)
    role = roles(study.words, trial.seed)
    train, first, second = study.of(np.flatnonzero(role == 0), trial.seed)
    seen = torch.from_numpy(role == 0)
    y, of = study.y.cpu(), torch.from_numpy(role)

    def part(k: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        unseen = (of[y] == k).nonzero()[:, 0].to(rows.device)
        return torch.cat([rows, unseen]), torch.from_numpy(np.flatnonzero((role == 0) | (role == k))), seen

    validation, test = part(1, first), part(2, second)
    candidates = seen.nonzero()[:, 0]
    nets = {"clip": study.clip()}
    for arm, make in (
        ("coop", lambda: Coop(study.towers, study.words.texts, N_CONTEXT, trial.seed)),
        ("csp", lambda: Csp(study.towers, study.words)),
    ):
        nets[arm] = study.tuned(make, train, candidates, lambda net: study.metrics(net, *validation).auc, arm)
    found = {arm: study.metrics(net, *test) for arm, net in nets.items()}
    for arm, metrics in found.items():
        trial.record(f"best accuracy on seen pairs, {arm}", metrics.best_seen)
        trial.record(f"best accuracy on unseen pairs, {arm}", metrics.best_unseen)
        trial.record(f"best harmonic mean, {arm}", metrics.best_harmonic)
    auc = {arm: metrics.auc for arm, metrics in found.items()}
    return {"better of clip and coop": max(auc["clip"], auc["coop"]), **auc}


@comparison(
    paper="csp",
    says="Words tuned on pairs compose to three: two attributes of an object are recognised better than by CLIP's prompts.",
    where="Nayak et al., Section 6",
    arms=("clip", "csp"),
    metric="accuracy on images of compositions of two attributes and an object",
    better="higher",
    smallest={"pretraining": 3, "steps": 2},
    check=_triples,
)
def higher_order(
    trial: Trial, data: Images = "shapes-of-two", model: str = "tiny", pretraining: Count = 600,
    n_train: Count = 20, steps: Count = 200,
) -> dict[str, float]:  # fmt: skip
    """Tune words on images of one attribute and an object each, and recognise two attributes of an object.

    The setting is that of `recombines`, with all pairs seen; candidates are the 138 compositions of two attributes that
    do not exclude each other. The learning rate is that with the larger accuracy on other images of pairs: no image of
    two attributes is learned from or chosen by. The tiny CLIP was trained on captions of one and of two attributes, as
    a CLIP would have been. Your own: a folder with subfolders named ``red_disc`` and ``red_striped_disc``.
    """
    study = Study(trial, data, model, pretraining, n_train, steps)
    two, three = (np.flatnonzero(study.words.sizes == size) for size in (2, 3))
    train, first, second = study.of(two, trial.seed)
    rows = torch.from_numpy(np.flatnonzero(np.isin(study.y.cpu().numpy(), three))).to(train.device)
    one, more, others = torch.from_numpy(two), torch.from_numpy(three), torch.cat([first, second])
    net = study.tuned(
        lambda: Csp(study.towers, study.words),
        train,
        one,
        lambda net: study.accuracy(net, others, one),
        "csp",
    )
    found = {"clip": study.clip(), "csp": net}
    for arm, each in found.items():
        trial.record(f"accuracy on images of one attribute, {arm}", study.accuracy(each, others, one))
    return {arm: study.accuracy(each, rows, more) for arm, each in found.items()}
