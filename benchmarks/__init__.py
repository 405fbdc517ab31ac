"""Side-by-side speed runs: ``python -m benchmarks.<domain>.<paper>`` prints ratios."""
