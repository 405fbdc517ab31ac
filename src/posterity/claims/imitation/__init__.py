"""Claims of the papers on imitation."""
