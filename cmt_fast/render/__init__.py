"""Arrays in, pictures out: grids of samples, plots, page templates."""
