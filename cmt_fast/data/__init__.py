"""Rows to train on: digits, mixtures, arrays, stores of latents and of trajectories, and their loaders."""
