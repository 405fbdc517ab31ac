"""Claims of the papers on timeseries."""
