"""Vision: detection, saliency, spheres, events, points."""

from posterity.papers import serve

__getattr__, __dir__ = serve(__name__)
