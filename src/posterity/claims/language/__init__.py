"""Claims of the papers on language."""
