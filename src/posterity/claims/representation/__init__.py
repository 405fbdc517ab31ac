"""Claims of the papers on representation."""
