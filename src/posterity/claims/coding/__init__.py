"""Claims of the papers on coding."""
