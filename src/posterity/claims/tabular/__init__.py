"""Claims of the papers on tabular."""
