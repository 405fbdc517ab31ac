"""Claims of the papers on combinatorial."""
