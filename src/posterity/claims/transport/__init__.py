"""Claims of the papers on transport."""
