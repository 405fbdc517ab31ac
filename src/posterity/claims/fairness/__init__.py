"""Claims of the papers on fairness."""
