"""Programs of the repository: evidence, benchmarks, docstring checks."""
