"""Claims of the papers on privacy."""
