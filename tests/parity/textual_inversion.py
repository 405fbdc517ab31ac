"""Error of a linear denoiser told a learned word, and its gradient in the word's vectors, for noise and velocity."""

from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler
from torch import nn

from posterity.generative import DiffusionLoss, TextualInversion, TinyTextToImage

AGAINST = "equation 2 and its derivative written out in numpy, for a model that is linear in what it is told, in float64"


class Encoder(nn.Module):
    """Adds up to each position the embeddings of all before it."""

    def __init__(self, weight):
        super().__init__()
        self.words = nn.Embedding.from_pretrained(weight)

    def get_input_embeddings(self):
        return self.words

    def set_input_embeddings(self, words):
        self.words = words

    def forward(self, ids):
        return (self.words(ids).cumsum(1),)


class Denoiser(nn.Module):
    """``share * x`` and a linear map of the mean of what it is told."""

    def __init__(self, weight, share):
        super().__init__()
        self.weight, self.share = nn.Parameter(weight), share

    def forward(self, x, t, encoder_hidden_states):
        told = encoder_hidden_states.mean(1) @ self.weight
        return SimpleNamespace(sample=self.share * x + told.view(x.shape))


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    given = {name: torch.tensor(stored[name]) for name in ("words", "map", "images", "noise", "t", "start")}
    tokenizer = TinyTextToImage.pretrained().tokenizer
    for prediction in ("epsilon", "v_prediction"):
        learner = TextualInversion(
            tokenizer, Encoder(given["words"]), initializer=given["start"], n_vectors=2
        )
        context = learner.encode(["a photo of a red <concept>", "the <concept> on the left"])
        scheduler = DDIMScheduler(beta_schedule="linear", prediction_type=prediction)
        denoise = DiffusionLoss(Denoiser(given["map"], 0.3), scheduler)
        loss = denoise(given["images"], context, t=given["t"], noise=given["noise"])
        (gradient,) = torch.autograd.grad(loss, learner.embedding.vectors)
        yield f"error, {prediction}", loss.detach(), stored[f"{prediction}_loss"], 1e-5
        yield f"gradient, {prediction}", gradient, stored[f"{prediction}_gradient"], 1e-5
