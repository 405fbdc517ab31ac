"""Claims of the papers on scenes."""
