"""Claims of the papers on federated."""
