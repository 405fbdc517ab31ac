"""Claims of the papers on robustness."""
