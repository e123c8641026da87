"""Checkpoints of other projects: their parameter names and layouts, and ours."""
