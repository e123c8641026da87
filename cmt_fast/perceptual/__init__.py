"""Distances in features of images, the networks behind them and how those are trained."""
