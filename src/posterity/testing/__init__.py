"""Conformance checks by kind, for Posterity's methods and for anyone's.

Each check takes an object (or what makes one) and inputs, and raises ``AssertionError``
with the property that does not hold. They test what users of the kind rely on; what a
paper's mathematics promises is tested beside the paper. Where torch sees a CUDA device,
losses, layers, metrics, solvers, neural and generative processes must agree on it with
the CPU. A kind has a file here.
"""

from posterity._names import serve_files

__getattr__, __dir__ = serve_files(__name__)
